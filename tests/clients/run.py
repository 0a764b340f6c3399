"""Client packages run against this server, unchanged, with a scripted model: `make clients`.

With --vllm DIRECTORY also `vllm bench serve`, from the virtual environment there.

Prints the table of docs/clients.md; with --output FILE it writes it there. Exit status 1 if anything went wrong.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from llama.async_llm.async_llm import AsyncLLM
from tests.server import helpers

HERE = Path(__file__).parent
DEMO_MODEL = "checkpoints/smollm2-135m-instruct"
TASKS = ("chat", "stream", "tools", "structured", "responses", "completions")
PYTHON = ("openai", "cloudflare", "langchain_openai", "openai_agents", "litellm", "pydantic_ai_slim", "instructor")
PYTHON = (*PYTHON, "lm_eval")
PATIENCE = 900  # seconds
NODE = ("openai", "cloudflare", "@ai-sdk/openai", "workers-ai-provider")
HEAD = """# Clients that run unchanged

`make clients` installs these packages in an environment of its own (versions: `constraints-clients.txt` and
`tests/clients/package.json`; it needs Node.js 20 or newer) and runs them, unchanged, against our server. With the
scripted model every answer is known and compared; with another model the form of the answers is checked. This table
is for the models: {models}. "Tools" is a call that the client forces, and the answer to its result where the client
sends that by itself. A dash: the client has no such feature, or it is not tried. To include the demo model:
`MODELS="scripted demo"`. To include `vllm bench serve`: `VLLM=DIRECTORY`, a virtual environment with vLLM (3 GB).

"""
NO_VLLM = "vllm (bench serve): not tried, for VLLM=DIRECTORY names no virtual environment that holds it"


@contextmanager
def servers(names: Sequence[str]) -> Iterator[list[tuple[str, str]]]:
    """(URL, model) of each: scripted or demo."""
    with ExitStack() as stack:
        listed = []
        for name in names:
            if name == "scripted":
                llm, engine = helpers.scripted_llm()
                engine.script, engine.longest_prompt = say, 4000
            else:
                folder = greedy(Path(DEMO_MODEL), Path(stack.enter_context(TemporaryDirectory())))
                llm = AsyncLLM(folder, dtype="float32", max_model_len=2048)
            server = stack.enter_context(helpers.running(llm, model_names=(name,)))
            listed.append((server.url, name))
        yield listed


def greedy(model: Path, folder: Path) -> Path:
    """The model in another folder, where it answers without chance: what passes once passes again."""
    for file in model.iterdir():
        (folder / file.name).symlink_to(file.absolute())
    defaults = json.loads((model / "generation_config.json").read_text())
    (folder / "generation_config.json").unlink()
    (folder / "generation_config.json").write_text(json.dumps({**defaults, "do_sample": False}))
    return folder


def say(prompt, index):
    """The user's last message, and behind a tool's result "The tool said " and that."""
    result = helpers.TOKENIZER.encode("<|start_header_id|>ipython<|end_header_id|>\n\n")
    said = list(prompt)
    starts = [i for i in range(len(said)) if said[i : i + len(result)] == result]
    if not starts or said.count(helpers.EOT) == 0:
        return helpers.say_what_the_user_says(prompt, index)
    told = said[starts[-1] + len(result) :]
    return [*b"The tool said ", *(token for token in told[: told.index(helpers.EOT)] if token < 256), helpers.EOT]


def run(client: str, command: list[str], served: Sequence[tuple[str, str]]) -> dict:
    # Else the one asks the network, three times, and the other tells it of its use.
    environment = {**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True", "VLLM_NO_USAGE_STATS": "1"}
    words = [*command, client, *(word for pair in served for word in pair)]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=PATIENCE, env=environment)
        return json.loads(done.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        what = f"not done after {PATIENCE} s"
    except (IndexError, ValueError):
        what = f"no answer: {done.stderr.strip()[-300:]}"
    return {"version": "?", "models": {model: {"chat": what} for _, model in served}}


def cells_of(models: dict[str, dict[str, str]]) -> list[str]:
    cells = []
    for task in TASKS:
        told = [tasks[task] for tasks in models.values() if task in tasks]
        cells.append("ok" if told and set(told) == {"ok"} else "**no**" if told else "-")
    return cells


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--environment", default=".venv-clients", help="the packages' (%(default)s)")
    parser.add_argument("--vllm", type=Path, help="a virtual environment that holds vLLM")
    parser.add_argument("--models", nargs="+", default=["scripted"], choices=["scripted", "demo"])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--only", help="one client")
    options = parser.parse_args()
    environment = Path(options.environment).absolute()
    script = environment / "npm" / "javascript_clients.mjs"  # node looks for packages beside the script
    script.write_text((HERE / "javascript_clients.mjs").read_text())
    asked = [(name, "Python", [str(environment / "bin/python"), str(HERE / "python_clients.py")]) for name in PYTHON]
    asked += [(name, "npm", ["node", str(script)]) for name in NODE]
    if options.vllm is None:
        print(NO_VLLM, flush=True)
    else:
        python = options.vllm.absolute() / "bin/python"
        asked.append(("vllm", "bench serve", [str(python), str(HERE / "python_clients.py")]))
    rows, is_failed = [], False
    with servers(options.models) as served:
        for name, language, command in asked:
            if options.only not in (None, name):
                continue
            answer = run(name, command, served)
            told = [(model, *task) for model, tasks in answer["models"].items() for task in tasks.items()]
            failures = [f"{name} ({language}), {task}, {model}: {what}" for model, task, what in told if what != "ok"]
            is_failed |= bool(failures)
            cells = " | ".join(cells_of(answer["models"]))
            rows.append(f"| {name.replace('_', '-')} ({language}) | {answer['version']} | {cells} |")
            print("\n".join([rows[-1], *failures]), flush=True)
    table = "\n".join([f"| client | version | {' | '.join(TASKS)} |", "|---" * (2 + len(TASKS)) + "|", *rows, ""])
    print(f"\n{table}")
    if options.output:
        options.output.write_text(HEAD.format(models=", ".join(options.models)) + table, encoding="utf-8")
    return is_failed


if __name__ == "__main__":
    sys.exit(main())
