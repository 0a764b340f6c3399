"""A template cannot hang, fill the memory, reach files or change what it is given; the next rendering works."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from llama.api.errors import ChatTemplateError
from llama.text.chat.renderer import TemplateRenderer

HOSTILE = {
    "endless": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "doubling": "{% set n = namespace(s='x') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}{{ n.s }}",
    "laughs": "{% set n = namespace(x=[]) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}{% endfor %}"
    "{{ n.x | tojson }}",
    "power": "{% set a = 10 %}{{ a ** (a ** 9) }}",
    "multiply": "{{ 'x' * 10 ** 11 }}",
    "centre": "{{ 'x' | center(10 ** 11) }}",
    "output": "{% for a in range(99999) %}{{ 'x' * 1000 }}{% endfor %}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "range": "{% for a in range(10 ** 9) %}{% endfor %}",
}


@contextmanager
def closing_renderer(templates, **options):
    renderer = TemplateRenderer(templates, **options)
    yield renderer
    renderer.worker.close()


@pytest.fixture(scope="module")
def hostile():
    with closing_renderer({**HOSTILE, "fine": "{{ text }}"}, deadline_seconds=0.5) as renderer:
        yield renderer


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_templates_end_with_an_error(hostile, name):
    with pytest.raises(ChatTemplateError) as raised:
        hostile.render(name, {})
    assert len(str(raised.value)) < 300
    assert hostile.render("fine", {"text": "still here"}) == "still here"


def test_compilation_has_a_deadline_too():
    """jinja2 computes constant expressions when it compiles."""
    source = "{{ 10 ** (10 ** 9) }}"
    with closing_renderer({"default": source}, deadline_seconds=0.5) as renderer, pytest.raises(ChatTemplateError):
        renderer.render("default", {})


REFUSED = {
    "class": "{{ ''.__class__.__mro__ }}",
    "append": "{{ messages.append(1) }}",
    "clear": "{{ messages.clear() }}",
    "globals": "{{ raise_exception.__globals__.sys }}",
    "include": "{% include 'x' %}",
    "undefined": "{{ undefined_function() }}",
}


@pytest.fixture(scope="module")
def refusing():
    with closing_renderer(REFUSED) as renderer:
        yield renderer


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_sandbox_refuses(refusing, name):
    with pytest.raises(ChatTemplateError, match="chat template"):
        refusing.render(name, {"messages": [1]})


def test_a_filter_that_does_not_exist():
    with (
        closing_renderer({"default": "{{ 1 | no_such_filter }}"}) as renderer,
        pytest.raises(ChatTemplateError, match="no_such"),
    ):
        renderer.render("default", {})


FEATURES = [
    ("{{ x | tojson }}", {"b": "<é>&'", "a": [1]}, '{"b": "<é>&\'", "a": [1]}'),
    ("{{ x | tojson(indent=2) }}", [1], "[\n  1\n]"),
    ("{% for i in x %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", [1, 2, 3], "1"),
    ("{% generation %}{{ x }}{% endgeneration %}!", "a", "a!"),
    ("  {% if true %}\n  a\n  {% endif %}\nb", None, "  a\nb"),
    ("{{ strftime_now('%Y') | length }}", None, "4"),
    ("{{ x is none }}{{ y is defined }}{{ x.a }}", None, "TrueFalse"),
    ("{{ x }}", "\U0001f469\u200d\u0000 你", "\U0001f469\u200d\u0000 你"),
    ("{{ x | wordwrap(3) }}{{ x | pprint }}{{ lipsum(n=1, html=false) | length > 9 }}", "a b c", "a b\nc'a b c'True"),
]


def test_what_templates_rely_on():
    with closing_renderer({str(i): source for i, (source, _, _) in enumerate(FEATURES)}) as renderer:
        for i, (_, x, expected) in enumerate(FEATURES):
            assert renderer.render(str(i), {"x": x}) == expected


def test_raise_exception_gives_its_own_message():
    source = "{{ raise_exception('roles must alternate') }}"
    message = r"^chat template: roles must alternate$"
    with closing_renderer({"x": source}) as renderer, pytest.raises(ChatTemplateError, match=message):
        renderer.render("x", {})


def test_many_threads_share_one_process():
    with closing_renderer({"default": "{{ x }}"}) as renderer, ThreadPoolExecutor(8) as pool:
        texts = [str(i) * 50 for i in range(200)]
        assert list(pool.map(lambda x: renderer.render("default", {"x": x}), texts)) == texts


def test_a_large_text_passes():
    text = "é" * 2_000_000
    with closing_renderer({"default": "{{ x }}"}) as renderer:
        assert renderer.render("default", {"x": text}) == text


def test_values_that_are_not_json():
    with closing_renderer({"default": ""}) as renderer, pytest.raises(ValueError, match="must be JSON values"):
        renderer.render("default", {"x": {1, 2}})


def worker_of(renderer):
    return renderer.worker._process.pid


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_close_and_collection_end_the_process():
    renderer = TemplateRenderer({"default": "a"})
    renderer.worker.close()
    assert renderer.render("default", {}) == "a"
    pid = worker_of(renderer)
    assert is_alive(pid)
    renderer.worker.close()
    assert not is_alive(pid)
    assert renderer.render("default", {}) == "a"
    pid = worker_of(renderer)
    del renderer
    assert not is_alive(pid)


def test_a_worker_that_dies_is_replaced():
    with closing_renderer({"default": "a"}) as renderer:
        renderer.render("default", {})
        os.kill(worker_of(renderer), 9)
        renderer.worker._process.wait()
        assert renderer.render("default", {}) == "a"


def test_the_worker_can_open_no_file_even_outside_the_sandbox():
    """The limits hold for all code of the process, so a template that escaped jinja2's sandbox would gain nothing."""
    script = (
        "import sys, json; from llama.text.sandbox import child; child.limit_files()\n"
        "try: open('/dev/null')\nexcept OSError as error: print('refused')\n"
        "try: import socket; socket.socket()\nexcept (OSError, ImportError): print('refused')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "refused\nrefused\n"


def test_the_worker_imports_little():
    script = (
        "import json, sys; import llama.text.sandbox.chat_templates as c; c.make_environment()\n"
        "print(json.dumps(sorted({m.split('.')[0] for m in sys.modules} & {'torch', 'numpy', 'tokenizers'})))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []
