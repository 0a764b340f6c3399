"""Whatever changed activations before, beside or between, by interventions or by raw hooks, in any order: a request
without changes finds clean blocks alone, and gets the tokens and log-probabilities of an engine of its own."""

import itertools
from functools import cache
from warnings import catch_warnings, simplefilter

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from torch.nn.modules.module import register_module_forward_hook

from llama import LLM, Add, Apply, Capture, Project, Replace, SamplingParams, Scale
from llama.llm.taps import tapped
from tests import drafters
from tests.llm.test_capture import close, prompt, vector
from tests.model.models import tiny_model

MODEL = tiny_model()
PROMPTS = [prompt(40, 3, 1), prompt(40, 9, 2), prompt(21, 4, 3), prompt(40, 0, 4)]
PARAMS = [
    SamplingParams(max_tokens=8, temperature=0, ignore_eos=True, logprobs=2),
    SamplingParams(max_tokens=11, temperature=0.8, seed=5, ignore_eos=True, logprobs=1),
    SamplingParams(max_tokens=5, temperature=1.0, seed=6, ignore_eos=True, n=2, logprobs=0),
]
LAST = SamplingParams(max_tokens=1, speculative=False, temperature=0, logprobs=2)
READ = Capture(["layers.*.resid_post", "layers.1.k"], positions="all")
CHANGES = [
    [Add("layers.0.resid_post", vector(1), scale=2)],
    [Add("layers.0.resid_post", vector(1), scale=3)],
    [Add("layers.0.k", vector(2, 16))],
    [Add("embed", vector(3), positions="generated")],
    [Replace("layers.0.resid_post", vector(4), positions=[20])],
    [Scale("layers.1.z", 0.0, heads=[3], positions="prompt"), Project("layers.0.mlp_out", vector(5))],
    [Apply("layers.0.mlp_act", torch.neg)],
]
EVERYWHERE = "every module there is"
HOOKED = ["embed_tokens", "layers.0", "layers.1.self_attn.qkv_proj", "layers.1", "lm_head", EVERYWHERE]


def halved(module, args, output):
    parts = output if isinstance(output, tuple) else (output,)
    changed = tuple(part if part is None else part * 0.5 for part in parts)
    return changed if isinstance(output, tuple) else changed[0]


def doubled(module, args):
    return tuple(arg * 2 if isinstance(arg, torch.Tensor) and arg.is_floating_point() else arg for arg in args)


def ask(llm, name, number, params, changes, capture):
    request = llm.engine.request(name, PROMPTS[number], PARAMS[params])
    return tapped(llm.engine, [request], capture, None if changes is None else CHANGES[changes])[0]


def run(llm, name, *asked):
    request = ask(llm, name, *asked)
    llm.engine.add(request)
    outputs = []
    while llm.engine.has_unfinished:
        outputs += llm.engine.step()
    return request, outputs


def drawn(outputs, index):
    own = [output for output in outputs if output.index == index]
    return [t for o in own for t in o.token_ids], [entry for o in own for entry in o.logprobs]


@cache
def alone(*asked):
    """In an engine that nothing else has used: (tokens, log-probabilities) of each completion, and what was captured.
    Known before there are hooks."""
    llm = LLM(MODEL, block_size=4, num_blocks=60)
    request, outputs = run(llm, "alone", *asked, READ)
    completions = [drawn(outputs, i) for i in range(request.params.n)]
    return completions, request.taps.finish("alone", [len(tokens) for tokens, _ in completions])


@cache
def last(number, params, index):
    """The most likely token behind all but the last one."""
    tokens = alone(number, params, None)[0][index][0]
    llm = LLM(MODEL, block_size=4, num_blocks=60)
    [output] = llm.generate([*PROMPTS[number], *tokens[:-1]], LAST, use_tqdm=False)
    return output.outputs[0].logprobs[0]


def assert_close(ours, theirs, told):
    assert ours.keys() == theirs.keys(), told
    for token, entry in theirs.items():
        assert ours[token].logprob == pytest.approx(entry.logprob, abs=1e-9), told


@cache
def know_all():
    for number in range(len(PROMPTS)):
        for params in range(len(PARAMS)):
            for i in range(PARAMS[params].n):
                last(number, params, i)
        for changes in range(len(CHANGES)):
            alone(number, changes % len(PARAMS), changes)


class CleanBlocks(RuleBasedStateMachine):
    @initialize(
        num_blocks=st.sampled_from([26, 40, 300]),
        budget=st.sampled_from([5, 19, 256]),
        max_num_seqs=st.sampled_from([2, 5, 16]),
        lag=st.integers(0, 1),
        drafts=st.sampled_from(["none", "none", "right", "mixed"]),
    )
    def start(self, num_blocks, budget, max_num_seqs, lag, drafts):
        know_all()
        speculation = None if drafts == "none" else {"method": "ngram", "num_speculative_tokens": 4}
        options = {"block_size": 4, "num_blocks": num_blocks, "max_num_seqs": max_num_seqs, "max_model_len": 64}
        self.llm = LLM(MODEL, **options, max_num_batched_tokens=budget, speculative_config=speculation)
        self.engine = self.llm.engine
        self.engine.runner.lag = lag
        if drafts != "none":
            drafters.use(self.engine, lambda name, i: drafters.KINDS[drafts](alone(*self.asked[name][1:4])[0][i][0]))
        self.asked, self.outputs, self.touched, self.handles = {}, {}, set(), []

    @rule(
        number=st.integers(0, len(PROMPTS) - 1),
        params=st.integers(0, len(PARAMS) - 1),
        changes=st.one_of(st.none(), st.integers(0, len(CHANGES) - 1)),
        reads=st.booleans(),
        count=st.integers(1, 3),
    )
    def add(self, number, params, changes, reads, count):
        params = params if changes is None else changes % len(PARAMS)
        for _ in range(count):
            name = str(len(self.asked))
            request = ask(self.llm, name, number, params, changes, READ if reads else None)
            self.asked[name] = request, number, params, changes
            self.outputs[name] = []
            self.engine.add(request)

    @rule(count=st.integers(1, 6), hooked=st.sampled_from([None, None, *HOOKED]), before=st.booleans())
    def step(self, count, hooked, before):
        """Perhaps with a hook that is there for these steps alone."""
        if hooked is not None:
            self.hook(hooked, before)
        for _ in range(count):
            self.one_step(is_hooked=bool(self.handles))
        if hooked is not None:
            self.handles.pop().remove()

    @precondition(lambda self: not self.handles and self.engine.has_unfinished)
    @rule(where=st.sampled_from(HOOKED), stays=st.booleans())
    def step_into_which_a_hook_comes(self, where, stays):
        """From another thread, or from a function of a request: behind the first layer, and perhaps not for long."""
        first, last = MODEL.layers[0].post_attention_layernorm, MODEL.norm

        def hook(*args):
            self.hook(where, before=False)
            return type(first).forward(first, *args)

        def unhook(*args):
            if not stays:
                self.unhook()
            return type(last).forward(last, *args)

        first.forward, last.forward = hook, unhook
        try:
            self.one_step(is_hooked=True)
        finally:
            del first.forward, last.forward
            if not stays:
                self.unhook()

    @precondition(lambda self: len(self.handles) < 2 and self.engine.has_unfinished)
    @rule(where=st.sampled_from(HOOKED), before=st.booleans())
    def hook(self, where, before):
        if where == EVERYWHERE:
            self.handles.append(register_module_forward_hook(halved))
            return
        module = MODEL.get_submodule(where)
        kind = module.register_forward_pre_hook if before else module.register_forward_hook
        self.handles.append(kind(doubled if before else halved))

    @precondition(lambda self: self.handles)
    @rule()
    def unhook(self):
        while self.handles:
            self.handles.pop().remove()

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def preempt(self, data):
        running = sorted(self.running, key=lambda sequence: sequence.order)
        self.engine.scheduler.preempt(data.draw(st.sampled_from(running)))

    @precondition(lambda self: self.asked)
    @rule(data=st.data())
    def abort(self, data):
        name = data.draw(st.sampled_from(sorted(self.asked)))
        self.engine.abort(name)
        self.touched.add(name)

    @property
    def running(self):
        scheduler = self.engine.scheduler
        return [*scheduler.running.prefilling, *scheduler.running.decoding]

    def one_step(self, *, is_hooked):
        seen = {sequence.request_id for sequence in self.running}
        with catch_warnings():
            simplefilter("ignore", UserWarning)
            outputs = self.engine.step()
        for output in outputs:
            self.outputs[output.request_id].append(output)
        if is_hooked:
            self.touched |= seen | {s.request_id for s in self.running} | {o.request_id for o in outputs}
        self.engine.check()

    def teardown(self):
        if not hasattr(self, "engine"):
            return
        self.unhook()
        while self.engine.has_unfinished:
            self.one_step(is_hooked=False)
        for name, (request, *asked) in self.asked.items():
            if name not in self.touched:
                self.is_as_alone(request, self.outputs[name], asked)
        self.what_is_cached_is_clean()

    def what_is_cached_is_clean(self):
        """Behind each prompt, and behind what was written there."""
        requests, found = {}, {}
        for number, params in itertools.product(range(len(PROMPTS)), range(len(PARAMS))):
            for i in range(PARAMS[params].n):
                name = f"behind {number} {params} {i}"
                requests[name] = number, params, i
                tokens = alone(number, params, None)[0][i][0]
                self.engine.add(self.engine.request(name, [*PROMPTS[number], *tokens[:-1]], LAST))
        while self.engine.has_unfinished:
            for output in self.engine.step():
                [found[output.request_id]] = output.logprobs
        for name, asked in requests.items():
            assert_close(found[name], last(*asked), name)

    def is_as_alone(self, request, outputs, asked):
        completions, captured = alone(*asked)
        for i, (tokens, logprobs) in enumerate(completions):
            found, entries = drawn(outputs, i)
            assert found == tokens, (request.request_id, asked)
            for ours, theirs in zip(entries, logprobs, strict=True):
                assert_close(ours, theirs, (request.request_id, asked))
        if request.taps is not None and request.taps.sequence.captures:
            num_tokens = [len(tokens) for tokens, _ in completions]
            of_prompt, each = request.taps.finish(request.request_id, num_tokens)
            close(of_prompt, captured[0])
            for ours, theirs in zip(each, captured[1], strict=True):
                close(ours, theirs)


class TestCleanBlocks(CleanBlocks.TestCase):
    settings = settings(max_examples=8, stateful_step_count=14, deadline=None)


@pytest.mark.slow
class TestCleanBlocksAtLength(CleanBlocks.TestCase):
    settings = settings(max_examples=300, stateful_step_count=40, deadline=None)
