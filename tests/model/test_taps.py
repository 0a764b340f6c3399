"""Points of the network: what is read there equals what hooks in transformers see, and a change made there equals the
same change made by a hook."""

import re
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from transformers.models.llama import modeling_llama

from llama.api.errors import ParameterError
from llama.model.interventions import Add, Apply, Project, Replace, Scale
from llama.model.taps import LAYER_POINTS, all_points, resolve_points
from tests.model.models import tiny_model
from tests.model.pairs import float64_throughout, make_pair

LAYERS, HEADS, KV_HEADS, HEAD_DIM, HIDDEN = 3, 4, 2, 16, 48
BOUNDS = {torch.float64: 1e-10, torch.float32: 1e-5}


@pytest.fixture(scope="module", params=[torch.float64, torch.float32], ids=["float64", "float32"])
def pair(request, tmp_path_factory):
    """The same random weights in transformers and here."""
    with float64_throughout() if request.param == torch.float64 else nullcontext():
        yield make_pair(tmp_path_factory.mktemp("pair"), seed=3, dtype=request.param)


@pytest.fixture(scope="module")
def ids():
    return torch.randint(0, 97, (3, 21), generator=torch.Generator().manual_seed(0))


def places(theirs, point):
    """(module, whether its input is the point) in transformers."""
    if "." not in point:
        return {"embed": (theirs.model.embed_tokens, False), "norm": (theirs.model.norm, False)}.get(
            point, (theirs.lm_head, False)
        )
    _, i, name = point.split(".")
    layer = theirs.model.layers[int(i)]
    return {
        "resid_pre": (layer, True),
        "attn_in": (layer.input_layernorm, False),
        "q_pre": (layer.self_attn.q_proj, False),
        "k_pre": (layer.self_attn.k_proj, False),
        "v": (layer.self_attn.v_proj, False),
        "z": (layer.self_attn.o_proj, True),
        "attn_out": (layer.self_attn.o_proj, False),
        "resid_mid": (layer.post_attention_layernorm, True),
        "mlp_in": (layer.post_attention_layernorm, False),
        "mlp_act": (layer.mlp.down_proj, True),
        "mlp_out": (layer.mlp.down_proj, False),
        "resid_post": (layer, False),
    }[name]


def hook(theirs, point, change):
    """Call `change` on the point's value in transformers; what it returns takes its place."""
    module, is_input = places(theirs, point)
    if is_input:
        return module.register_forward_pre_hook(lambda _, args: (change(args[0]), *args[1:]))
    return module.register_forward_hook(lambda _, args, out: change(out))


@torch.no_grad()
def their_values(theirs, ids, monkeypatch):
    seen, rotated = {}, []
    original = modeling_llama.apply_rotary_pos_emb

    def spy(q, k, *args, **kwargs):
        rotated.append(original(q, k, *args, **kwargs))
        return rotated[-1]

    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", spy)
    hooked = [p for p in all_points(LAYERS) if p.rpartition(".")[2] not in ("q", "k")]
    handles = [hook(theirs, point, lambda x, point=point: seen.setdefault(point, x)) for point in hooked]
    theirs(ids)
    for handle in handles:
        handle.remove()
    for i, (q, k) in enumerate(rotated):
        seen[f"layers.{i}.q"], seen[f"layers.{i}.k"] = q.transpose(1, 2), k.transpose(1, 2)
    return seen


def test_every_point_equals_the_hook_of_transformers(pair, ids, monkeypatch):
    theirs, ours = pair
    seen = their_values(theirs, ids, monkeypatch)
    logits, cache = ours.run_with_cache(ids, all_points(LAYERS), logits=True)
    assert list(cache) == all_points(LAYERS) and len(cache) == 3 + LAYERS * len(LAYER_POINTS)
    for point, value in cache.items():
        expected = seen[point].reshape(value.shape)
        torch.testing.assert_close(value, expected, rtol=0, atol=BOUNDS[ours.dtype] * max(1.0, expected.abs().max()))
    assert torch.equal(logits, cache["logits"])


def test_reading_changes_no_bit(pair, ids):
    _, ours = pair
    assert torch.equal(ours.run_with_cache(ids, all_points(LAYERS), logits=True)[0], ours.logits(ids))


def test_names_of_transformer_lens_mean_the_same_points(pair, ids):
    _, ours = pair
    _, cache = ours.run_with_cache(
        ids, ["blocks.1.hook_resid_post", "blocks.*.attn.hook_rot_k", "blocks.0.attn.hook_q"]
    )
    assert list(cache) == ["layers.0.q_pre", *(f"layers.{i}.k" for i in (0, 1)), "layers.1.resid_post", "layers.2.k"]
    assert cache["blocks.1.hook_resid_post"] is cache["layers.1.resid_post"]
    assert "ActivationCache of 5 points" in repr(cache) and "layers.1.resid_post: [3, 21, 48]" in repr(cache)


def test_a_pattern_of_several_points_has_no_one_value(ids):
    _, cache = tiny_model().run_with_cache(ids, ["layers.*.z"])
    assert cache["layers.-1.z"] is cache["layers.1.z"]
    with pytest.raises(ParameterError, match=r"'layers.\*.z' names 2 points"):
        cache["layers.*.z"]


def test_patterns():
    assert resolve_points("layers.1:.z", 3) == ("layers.1.z", "layers.2.z")
    assert resolve_points(["layers.-1.q", "embed", "layers.-1.q"], 3) == ("embed", "layers.2.q")
    assert resolve_points("layers.*.*", 2) == tuple(all_points(2)[1:-2])


@pytest.mark.parametrize(
    "wrong", ["layers.3.z", "layers.0.hook_q", "resid_post", "layers.2:1.z", "", 7, "blocks.0.z.x"]
)
def test_a_point_that_does_not_exist_is_refused_with_the_list(wrong):
    with pytest.raises(ParameterError, match=r"resid_mid|must be a string"):
        resolve_points([wrong], 3)


def edits(dtype):
    """Each kind of change: (ours, the same as a function of the whole [batch, seq, ...] value in transformers)."""
    g = torch.Generator().manual_seed(5)
    vector = torch.randn(HIDDEN, generator=g, dtype=torch.float64).to(dtype)
    values = torch.randn(2, HIDDEN, generator=g, dtype=torch.float64).to(dtype)
    directions = torch.randn(2, HIDDEN, generator=g, dtype=torch.float64).to(dtype)

    def add(x):
        return x + 3.0 * vector

    def matched(x):
        y = x + 3.0 * vector
        return y * (x.norm(dim=-1, keepdim=True) / y.norm(dim=-1, keepdim=True))

    def put(x):
        x = x.clone()
        x[:, [7, 2]] = values
        return x

    def heads(x):
        x = x.clone().view(*x.shape[:2], HEADS, HEAD_DIM)
        x[:, 4:, 3] = 0
        return x.flatten(2)

    def removed(x):
        return x - x @ torch.linalg.pinv(directions) @ directions

    return {
        "Add": (Add("layers.1.resid_post", vector, scale=3.0), add),
        "Add, norm kept": (Add("layers.1.attn_out", vector, scale=3.0, norm_match=True), matched),
        "Replace": (Replace("layers.0.resid_post", values, positions=[7, 2]), put),
        "Scale": (Scale("layers.2.z", 0.0, heads=[3], positions=range(4, 21)), heads),
        "Project": (Project("layers.1.mlp_out", directions), removed),
        "Project, kept": (Project("norm", directions, mode="keep"), lambda x: x - removed(x)),
        "Apply": (Apply("embed", lambda x: x.square()), torch.square),
    }


@pytest.mark.parametrize("kind", edits(torch.float64))
def test_a_change_equals_the_same_change_by_a_hook_in_transformers(pair, ids, kind):
    theirs, ours = pair
    edit, change = edits(ours.dtype)[kind]
    handle = hook(theirs, edit.point, change)
    with torch.no_grad():
        expected = theirs(ids).logits
    handle.remove()
    changed = ours.logits(ids, interventions=[edit])
    torch.testing.assert_close(changed, expected, rtol=0, atol=2 * BOUNDS[ours.dtype] * max(1.0, expected.abs().max()))
    assert not torch.allclose(changed, ours.logits(ids), atol=1e-2)


def test_changed_keys_are_those_that_attention_reads(ids):
    ours = tiny_model()
    halved = ours.logits(ids, interventions=[Scale("layers.1.q", 0.5)])
    assert torch.equal(ours.logits(ids, interventions=[Scale("layers.1.k", 0.5)]), halved)  # powers of two are exact
    both = ours.logits(ids, interventions=[Scale("layers.1.k", 0.25), Scale("layers.1.q", 4.0)])
    assert torch.equal(both, ours.logits(ids)) and not torch.allclose(both, halved, atol=1e-3)


def test_each_sequence_has_its_own_changes_in_the_order_given(ids):
    ours = tiny_model(num_hidden_layers=LAYERS)
    add, _ = edits(torch.float64)["Add"]
    scale = Scale("layers.1.resid_post", 2.0)
    lists = [[add, scale, add], None, [scale, add]]
    together = ours.logits(ids, interventions=lists)
    for i, own in enumerate(lists):
        torch.testing.assert_close(together[i], ours.logits(ids[i : i + 1], interventions=own)[0], rtol=0, atol=1e-12)
    assert torch.equal(together[1], ours.logits(ids)[1])
    other = ours.logits(ids, interventions=[[scale, add, add], None, [add, scale]])
    assert not torch.allclose(together[0], other[0], atol=1e-3) and not torch.allclose(together[2], other[2], atol=1e-3)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (Add("layers.0.z", torch.zeros(HIDDEN)), r"Add does not fit layers.0.z, .* is \[4, 16\]"),
        (Add("embed", torch.full((HIDDEN,), float("nan"))), "NaN"),
        (Add("embed", [0.0]), "vector must be a tensor of real numbers, got list"),
        (Add("embed", torch.zeros(HIDDEN), positions=[21]), "positions has 21, and the prompt has 21 tokens"),
        (Add("embed", torch.zeros(HIDDEN), positions="some"), "positions must be all, prompt"),
        (Replace("embed", torch.zeros(3, HIDDEN), positions=[1, 2]), "Replace does not fit embed"),
        (Scale("embed", 0.0, heads=[0]), "Scale does not fit embed"),
        (Scale("layers.0.q", 0.0, heads=[4]), "Scale does not fit"),
        (Project("embed", torch.zeros(2, HIDDEN), mode="rotate"), "mode must be 'remove' or 'keep', got 'rotate'"),
        (Apply("embed", lambda x: x[:, :1]), "Apply at embed must give"),
        (Scale("layers.9.q", 0.0), "names no layer"),
        ("layers.0.q", "interventions must be one list"),
        (Add("embed", torch.zeros(HIDDEN), scale="2"), "Add: scale must be a number, got '2'"),
        (Add("embed", torch.zeros(HIDDEN), scale=float("inf")), "Add: scale must be finite in torch.float64, got inf"),
        (Add("embed", torch.zeros(HIDDEN), scale=10**400), "Add: scale must be finite"),
        (Add("embed", torch.full((HIDDEN,), 1e10), scale=1e300), "1e[+]300 times the vector is too large"),
        (Add("embed", torch.zeros(HIDDEN), norm_match="no"), "norm_match must be True or False, got 'no'"),
        (Add("embed", torch.zeros(HIDDEN, device="meta")), "a tensor of real numbers, got torch.float32 .* on meta"),
        (Add("embed", torch.zeros(HIDDEN).to_sparse()), "a tensor of real numbers, got torch.float32 torch.sparse"),
        (Add("embed", torch.zeros(HIDDEN), positions=(p for p in [3])), "positions must be .* got <generator"),
        (Add("embed", torch.zeros(HIDDEN), positions=torch.tensor([3])), r"positions must be .* got tensor\(\[3\]\)"),
        (Add("embed", torch.zeros(HIDDEN), positions=[3, -18]), r"positions has one twice, .* 21 tokens: \[3, -18\]"),
        (Scale("layers.0.q", 0.0, heads=(h for h in [1])), r"Scale does not fit layers.0.q"),
        (Scale("layers." + "9" * 5000 + ".q", 0.0), "no point is called"),
        (Apply("embed", lambda x: x.to("meta")), "must give torch.float64 .* on cpu, got .* on meta"),
        (Add("embed", torch.zeros(HIDDEN, dtype=torch.complex64)), "a tensor of real numbers, got torch.c"),
        (Add("embed", torch.zeros(HIDDEN), positions=3), "positions must be all, prompt, .* got 3"),
        (Add(3, torch.zeros(HIDDEN)), "a point must be a string, got 3"),
        (Scale("embed", None), "Scale: factor must be a number, got None"),
        (Scale("embed", torch.ones(HIDDEN)), "Scale: factor must be a number, got tensor"),
        (Scale("layers.0.q", float("nan")), "Scale: factor must be finite in torch.float64, got nan"),
        (Scale("layers.0.q", 0.0, heads=[1.5]), r"Scale does not fit layers.0.q"),
        (Scale("layers.0.q", 0.0, heads=1), r"Scale does not fit layers.0.q"),
    ],
)
def test_what_does_not_fit_is_one_clear_error(ids, wrong, message):
    with pytest.raises(ParameterError, match=message):
        tiny_model(num_hidden_layers=LAYERS).logits(ids, interventions=[wrong])


@pytest.mark.parametrize("wrong", [Add("embed", torch.zeros(HIDDEN)), 5, torch.zeros(3), "layers.0.q"], ids=str)
def test_what_is_no_list_is_one_clear_error(ids, wrong):
    with pytest.raises(ParameterError, match="interventions must be one list, or 3 lists or None"):
        tiny_model(num_hidden_layers=LAYERS).logits(ids, interventions=wrong)


@pytest.mark.parametrize(
    ("dtype", "wrong", "message"),
    [
        (
            torch.float32,
            Add("embed", torch.full((HIDDEN,), 1e300, dtype=torch.float64)),
            "vector holds numbers that are",
        ),
        (
            torch.float32,
            Add("embed", torch.full((HIDDEN,), 1e38), scale=10),
            "10 times the vector is too large for torch",
        ),
        (torch.float16, Add("embed", torch.full((HIDDEN,), 6e4), scale=2), "2 times the vector is too large for torch"),
        (torch.float16, Replace("embed", torch.full((HIDDEN,), 7e4)), "values holds numbers that are too large"),
        (torch.float32, Scale("embed", 1e39), r"factor must be finite in torch\.float32, got 1e\+39"),
    ],
)
def test_numbers_that_the_model_cannot_hold_are_refused(ids, dtype, wrong, message):
    with pytest.raises(ParameterError, match=message):
        tiny_model(dtype=dtype).logits(ids, interventions=[wrong])


def test_positions_and_heads_may_be_numpys(ids):
    ours, vector = tiny_model(num_hidden_layers=LAYERS), torch.ones(HIDDEN)
    found = ours.logits(ids, interventions=[Add("embed", vector, positions=list(np.array([3, -1])))])
    assert torch.equal(found, ours.logits(ids, interventions=[Add("embed", vector, positions=[3, -1])]))
    found = ours.logits(ids, interventions=[Scale("layers.0.z", 0.0, heads=list(np.array([1])))])
    assert torch.equal(found, ours.logits(ids, interventions=[Scale("layers.0.z", 0.0, heads=[1])]))


@pytest.mark.parametrize("mode", ["remove", "keep"])
@pytest.mark.parametrize("others", [[0.0], [1.0], [-3.0, 1e-30], [1e-30, 0.0, 2.0]])
def test_what_spans_nothing_more_is_projected_on_nothing_more(ids, mode, others):
    """A direction that is there twice, or 0, has no direction of its own."""
    ours = tiny_model(dtype=torch.float32)
    one = torch.randn(HIDDEN, generator=torch.Generator().manual_seed(0))
    expected = ours.logits(ids, interventions=[Project("embed", one, mode=mode)])
    several = torch.stack([one, *(factor * one for factor in others)])
    changed = ours.logits(ids, interventions=[Project("embed", several, mode=mode)])
    torch.testing.assert_close(changed, expected, rtol=0, atol=1e-4)
    nothing = ours.logits(ids, interventions=[Project("embed", 0 * several)])
    assert torch.equal(nothing, ours.logits(ids))


def test_a_projection_is_differentiated_in_directions_that_follow_from_one_another(ids):
    ours = tiny_model()
    one = torch.randn(HIDDEN, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    ways = [Project("embed", one), Project("embed", torch.stack([one, 2 * one]))]
    slopes = [torch.autograd.grad(ours.logits(ids, interventions=[way], grad=True).sum(), one)[0] for way in ways]
    torch.testing.assert_close(slopes[1], slopes[0], rtol=1e-9, atol=1e-9)
    assert slopes[0].abs().max() > 0.1


def test_equal_interventions_have_equal_digests():
    vector = torch.ones(HIDDEN)
    assert Add("embed", vector).digest == Add("embed", vector.clone()).digest
    different = [Add("embed", vector), Add("embed", 2 * vector), Add("embed", vector, scale=2.0), Scale("embed", 1.0)]
    different += [Add("norm", vector), Add("embed", vector, positions="prompt"), Add("embed", vector.double())]
    assert len({one.digest for one in different}) == len(different)
    function = torch.square
    assert Apply("embed", function).digest != Apply("embed", function).digest


def test_the_logit_lens(pair, ids):
    theirs, ours = pair
    _, cache = ours.run_with_cache(ids, "layers.*.resid_post")
    for _point, resid in cache.items():
        with torch.no_grad():
            expected = theirs.lm_head(theirs.model.norm(resid))
        bound = BOUNDS[ours.dtype] * max(1.0, expected.abs().max())
        torch.testing.assert_close(ours.unembed(resid), expected, rtol=0, atol=bound)
    torch.testing.assert_close(ours.unembed(cache["layers.-1.resid_post"]), ours.logits(ids))


def test_the_logit_lens_takes_residuals_alone():
    ours = tiny_model()
    none = torch.zeros(0, 3, HIDDEN, dtype=ours.dtype)
    assert ours.unembed(none).shape == (0, 3, ours.config.vocab_size)
    for wrong in (torch.zeros(2, HIDDEN - 1), torch.zeros(2, HIDDEN, dtype=torch.float16), torch.tensor(1.0), [1.0]):
        seen = list(wrong.shape) if isinstance(wrong, torch.Tensor) else wrong
        with pytest.raises(ParameterError, match=re.escape(f"[..., {HIDDEN}], got")) as caught:
            ours.unembed(wrong)
        assert str(seen) in str(caught.value)


def test_without_the_head_there_are_no_logits(ids, monkeypatch):
    ours = tiny_model()
    monkeypatch.setattr(type(ours), "head", lambda *_: pytest.fail("the head was computed"))
    assert ours.run_with_cache(ids, "layers.0.z")[0] is None


@pytest.mark.parametrize("shape", [(3, 0), (0, 5), (0, 0)])
def test_of_no_tokens_every_point_is_empty(shape):
    ours, none = tiny_model(), torch.empty(shape, dtype=torch.int64)
    logits, cache = ours.run_with_cache(none, all_points(2), logits=True)
    assert list(cache) == all_points(2) and logits.shape == (*shape, 97)
    for point, value in cache.items():
        one = ours.run_with_cache(torch.zeros(1, 1, dtype=torch.int64), point)[1][point]
        assert value.shape == (*shape, *one.shape[2:]) and value.dtype == one.dtype
