"""Taps: points of the network where a sequence's activations are read (captured) and changed (interventions).

Points carry TransformerLens' words on Hugging Face's tree, such as `layers.14.resid_post`; TransformerLens' own hook
names are aliases by meaning. What a sequence wants is a `SequenceTaps`; one forward sees all sequences of its batch as
one `StepTaps`, in which equal kinds of change at a point are one op. A forward without taps runs none of this.
"""

import logging
import math
import re
import reprlib
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from llama.api.errors import ParameterError, is_failure
from llama.kernels.cpu.e4m3 import from_e4m3, to_e4m3
from llama.kernels.types import KVLayer
from llama.model.autocast import ordinary
from llama.model.communicator import Communicator
from llama.model.config import ModelConfig
from llama.model.interventions import Add, Apply, Intervention, Rows, checked, rows_of

logger = logging.getLogger(__name__)

# The points of a layer in the order in which a forward meets them. q_pre and k_pre are before the rotary embedding,
# z is the heads' output before o_proj, attn_in and mlp_in are the normed inputs; a residual is the whole sum.
LAYER_POINTS = (
    *("resid_pre", "attn_in", "q_pre", "k_pre", "v", "q", "k", "z", "attn_out"),
    *("resid_mid", "mlp_in", "mlp_act", "mlp_out", "resid_post"),
)
ALIASES = {
    "attn.hook_q": "q_pre",
    "attn.hook_k": "k_pre",
    "attn.hook_v": "v",
    "attn.hook_rot_q": "q",
    "attn.hook_rot_k": "k",
    "attn.hook_z": "z",
    "mlp.hook_post": "mlp_act",
    **{f"hook_{name}": name for name in ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")},
}
_LAYER = re.compile(r"(?:layers|blocks)\.(?P<layers>\*|-?[0-9]{1,9}|(-?[0-9]{1,9})?:(-?[0-9]{1,9})?)\.(?P<name>.+)")


def resolve_points(points: str | Iterable[str], num_layers: int) -> tuple[str, ...]:
    """The points that names and patterns mean, each once, in the network's order.

    A layer is a number (from the end where negative), `*`, or a range `4:8` as Python slices; `*` is every point of a
    layer too. ParameterError lists what there is for a name that is none.
    """
    found: set[str] = set()
    listed: list[Any] | None = [points] if isinstance(points, str) else _listed(points)
    if listed is None:
        listed = [points]
    for given in listed:
        found |= _resolve(given, num_layers)
    if not found:
        raise ParameterError("points must name at least one point", "points")
    return tuple(name for name in all_points(num_layers) if name in found)


def _listed(values: Any) -> list[Any] | None:
    """None where they cannot be: an array without dimensions, too, passes for an Iterable."""
    try:
        return list(values)
    except TypeError:
        return None


def all_points(num_layers: int) -> list[str]:
    layers = [f"layers.{i}.{name}" for i in range(num_layers) for name in LAYER_POINTS]
    return ["embed", *layers, "norm", "logits"]


def _resolve(given: str, num_layers: int) -> set[str]:
    legal = (
        f"embed, norm, logits, or layers.I.NAME with I in [0, {num_layers - 1}] and NAME of {', '.join(LAYER_POINTS)}"
    )
    if not isinstance(given, str):
        raise ParameterError(f"a point must be a string, got {reprlib.repr(given)}", "points")
    if given in ("embed", "norm", "logits"):
        return {given}
    if given == "hook_embed":
        return {"embed"}
    match = _LAYER.fullmatch(given)
    name = match and ALIASES.get(match["name"], match["name"])
    if match is None or name not in ("*", *LAYER_POINTS):
        raise ParameterError(f"no point is called {reprlib.repr(given)}: there are {legal}", "points")
    wanted, every = match["layers"], range(num_layers)
    if wanted == "*":
        layers = every
    elif ":" in wanted:
        start, stop = (int(end) if end else None for end in wanted.split(":"))
        layers = every[start:stop]
    else:
        layer = int(wanted)
        layers = every[layer:][:1] if -num_layers <= layer < num_layers else every[:0]
    if not layers:
        raise ParameterError(f"{given!r} names no layer of this model: there are {legal}", "points")
    return {f"layers.{i}.{one}" for i in layers for one in (LAYER_POINTS if name == "*" else (name,))}


def point_shape(point: str, config: ModelConfig) -> tuple[int, ...]:
    """The shape of one token's value."""
    name = point.rpartition(".")[2]
    if name in ("q_pre", "q", "z"):
        return (config.num_attention_heads, config.head_dim)
    if name in ("k_pre", "k", "v"):
        return (config.num_key_value_heads, config.head_dim)
    return ({"mlp_act": config.intermediate_size, "logits": config.vocab_size}.get(name, config.hidden_size),)


Interventions = Sequence[Intervention] | Sequence[Sequence[Intervention] | None] | None


class Edit(NamedTuple):
    """One intervention at one point of one sequence, its tensors on the model's device and in its dtype."""

    intervention: Intervention
    positions: Rows


@dataclass(eq=False)
class SequenceTaps:
    """What one sequence wants: which changes at which point, in order, and what is to be read where."""

    edits: Mapping[str, list[Edit]] = field(default_factory=dict)
    captures: Mapping[str, Rows] = field(default_factory=dict)
    interventions: Sequence[Intervention] = ()  # that `edits` were made of, for a prompt of this length
    prompt_len: int = 0
    has_failed: bool = False  # a function of the caller's; see `StepTaps.logits`

    @property
    def first_change(self) -> float:
        """The first position that an intervention changes; infinity where there is none."""
        return min(
            (
                min(e.positions[:1] if isinstance(e.positions, range) else e.positions)
                for edits in self.edits.values()
                for e in edits
                if e.positions
            ),
            default=math.inf,
        )


def bind(
    interventions: Iterable[Intervention],
    captures: Mapping[str, Rows],
    config: ModelConfig,
    prompt_len: int,
    *,
    like: Tensor,
) -> SequenceTaps:
    """Interventions checked against the model, for a sequence with a prompt of this length."""
    edits: dict[str, list[Edit]] = {}
    interventions = tuple(interventions)
    for given in interventions:
        if not isinstance(given, Intervention):
            told = f"an intervention must be Add, Replace, ..., got {reprlib.repr(given)}"
            raise ParameterError(told, "interventions")
        for point in resolve_points(given.point, config.num_hidden_layers):
            positions = rows_of(given.positions, prompt_len)
            if isinstance(positions, tuple) and len(set(positions)) < len(positions):
                what = f"{given.name} at {given.point}: positions has one twice"
                raise ParameterError(f"{what}, of a prompt of {prompt_len} tokens: {given.positions!r}", "positions")
            one = checked(given, point_shape(point, config), positions, like)
            edits.setdefault(point, []).append(Edit(one, positions))
    return SequenceTaps(edits, captures, interventions, prompt_len)


def each(interventions: Interventions, count: int) -> list[Sequence[Intervention]]:
    """One list for all, or one (or None) for each of `count` sequences, as one list for each."""
    what = f"one list, or {count} lists or None, one for each sequence"
    given = [] if interventions is None else _listed(interventions)
    if given is None or isinstance(interventions, Tensor | str):
        raise ParameterError(f"interventions must be {what}, got {reprlib.repr(interventions)}", "interventions")
    if all(isinstance(one, Intervention) for one in given):
        return [given] * count
    if len(given) != count or not all(one is None or isinstance(one, list | tuple) for one in given):
        raise ParameterError(f"interventions must be {what}, got {reprlib.repr(given)}", "interventions")
    return [one or () for one in given]


class Span(NamedTuple):
    """A run of one sequence's tokens in a batch."""

    taps: SequenceTaps
    row: int  # of the batch, of its first token
    start: int  # the first token's position
    length: int
    key: int = 0  # under which `StepTaps.captured` has what it captures

    def rows(self, positions: Rows) -> list[tuple[int, int]]:
        """(row of the batch, place in `positions`) of each of the positions that lie in the run."""
        stop, shift = self.start + self.length, self.row - self.start
        if isinstance(positions, range):
            first = max(self.start, positions.start)
            return [(p + shift, p - positions.start) for p in range(first, min(stop, positions.stop))]
        if len(positions) > 1 and list(positions) != sorted(positions):
            return [(p + shift, i) for i, p in enumerate(positions) if self.start <= p < stop]
        first = bisect_left(positions, self.start)
        return [(positions[i] + shift, i) for i in range(first, bisect_left(positions, stop))]


class StepTaps:
    """All that is read and changed in one forward. Made for it alone; afterwards `captured` has what sequences wanted
    to read, and `whole` the values of its points in the shape (rows, length) that was given for each."""

    def __init__(
        self,
        names: Mapping[nn.Module, str],
        spans: Sequence[Span],
        *,
        whole: Mapping[str, tuple[int, int]] | None = None,
        grad: bool = False,
        in_engine: bool = False,
        communicator: Communicator | None = None,
    ) -> None:
        """`names`: see `names_of`. With `grad` everything from the embedding on is part of autograd's graph.
        `in_engine`: a function that fails is the end of its own sequence. With a `communicator` the model is one rank's
        part; points that are cut are put together where they are wanted, so that all is as in one process."""
        self.whole: dict[str, Tensor] = {}
        self._shapes = whole or {}
        self._grad = grad
        self._in_engine = in_engine
        self._communicator = communicator
        self._names = names
        self._spans = [span for span in spans if span.taps.edits or span.taps.captures]
        self._wanted = {point for span in self._spans for point in (*span.taps.edits, *span.taps.captures)}
        self._wanted |= {*self._shapes, *(["embed"] if grad else [])}
        # Of each span that captures: point -> (positions, values), what its sequence wanted of the step.
        self.captured: dict[int, dict[str, tuple[list[int], Tensor]]] = {}

    def at(self, module: nn.Module, name: str, value: Tensor) -> Tensor:
        """`value` [tokens, ...] of the module's point `name`, changed and read as the sequences want."""
        point = self._names[module] + name
        if point not in self._wanted:
            return value
        if self._grad and not value.requires_grad:
            try:
                value = value.requires_grad_()
            except RuntimeError as error:  # inside torch.func's transforms
                what = "grad=True inside torch.func needs a transform of the embedding's weight too: use torch.autograd"
                raise ParameterError(what, "grad") from error
        part = None if self._communicator is None else self._communicator.shard.part_of(name)
        if part is not None:
            assert self._communicator is not None
            whole = self._communicator.whole(name, value)
            changed = self._changed(point, whole, self._spans)
            self._capture(point, changed, self._spans)
            return value if changed is whole else changed[:, part].contiguous()
        value = self._changed(point, value, self._spans)
        if point in self._shapes:  # what goes on is made of what is kept: gradients reach it
            self.whole[point] = value.view(*self._shapes[point], *value.shape[1:])
            value = self.whole[point].flatten(0, 1)
        self._capture(point, value, self._spans)
        return value

    def logits(self, module: nn.Module, logits: Tensor, sources: Sequence[int]) -> Tensor:
        """The same for logits that only some tokens of the batch have, row i those of the token `sources[i]`. Those of
        a sequence whose function has failed are NaN."""
        if "logits" not in self._wanted and not any(span.taps.has_failed for span in self._spans):
            return logits
        rows: dict[int, list[int]] = {}
        for row, source in enumerate(sources):
            rows.setdefault(source, []).append(row)
        spans = [
            Span(span.taps, row, span.start + source - span.row, 1, span.key)
            for span in self._spans
            for source in range(span.row, span.row + span.length)
            for row in rows.get(source, ())
        ]
        logits = self._changed("logits", logits, spans)
        self._capture("logits", logits, spans)
        failed = [span.row for span in spans if span.taps.has_failed]
        return logits.index_fill(0, torch.tensor(failed, device=logits.device), math.nan) if failed else logits

    def _capture(self, point: str, value: Tensor, spans: Sequence[Span]) -> None:
        rows_by_key: dict[int, dict[int, int]] = {}  # of each key: position -> row, the first of several
        for span in spans:
            for row, _ in span.rows(span.taps.captures.get(point, ())):
                rows_by_key.setdefault(span.key, {}).setdefault(row - span.row + span.start, row)
        for key, rows in rows_by_key.items():
            places = torch.tensor(list(rows.values()), device=value.device)
            self.captured.setdefault(key, {})[point] = list(rows), value.index_select(0, places)

    def wants(self, module: nn.Module, name: str) -> bool:
        return self._names[module] + name in self._wanted

    def residual(
        self, module: nn.Module, name: str, x: Tensor, residual: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The same for a residual stream that is still a pair, whose sum it makes only where it is wanted."""
        if not self.wants(module, name):
            return x, residual
        return self.at(module, name, x if residual is None else x + residual), None

    def stored(self, module: nn.Module, name: str, kv_layer: KVLayer, slots: Tensor, dtype: torch.dtype) -> None:
        """The same for the keys that the step's tokens have put into a cache at `slots`; in `dtype` where it holds
        codes."""
        if not self.wants(module, name):
            return
        places, scales = kv_layer.k.flatten(0, 1), kv_layer.scales
        value = places.index_select(0, slots)
        if scales is not None:
            value = (from_e4m3(value, dtype) * scales[0][:, None]).to(dtype)
        changed = self.at(module, name, value)
        if changed is not value:
            places.index_copy_(0, slots, changed if scales is None else to_e4m3(changed, scales[0]))

    def _changed(self, point: str, value: Tensor, spans: Sequence[Span]) -> Tensor:
        rounds: list[list[tuple[Span, Edit]]] = []
        for span in spans:
            for i, edit in enumerate(span.taps.edits.get(point, ())):
                if i == len(rounds):
                    rounds.append([])
                rounds[i].append((span, edit))
        for edits in rounds:  # the order of one sequence's changes is kept; those of different ones do not meet
            sums = [(s, e) for s, e in edits if isinstance(e.intervention, Add) and not e.intervention.norm_match]
            if sums:
                value = _add(value, sums)
            for span, edit in edits:
                if (span, edit) not in sums:
                    value = self._edit(value, span, edit)
        return value

    def _edit(self, value: Tensor, span: Span, edit: Edit) -> Tensor:
        found = span.rows(edit.positions)
        if not found:
            return value
        rows = torch.tensor([row for row, _ in found], device=value.device)
        old = value.index_select(0, rows)
        if isinstance(edit.intervention, Apply):
            return value.index_copy(0, rows, self._applied(edit.intervention, old, span.taps))
        return value.index_copy(0, rows, edit.intervention.of(old, [place for _, place in found]))

    def _applied(self, given: Apply, old: Tensor, taps: SequenceTaps) -> Tensor:
        """What the caller's function, which rank 0 has, makes of `old`."""
        if not self._in_engine:
            new = _checked(given, old, given.of(old, []))
            if new.requires_grad and not self._grad:
                what = f"what {given.name} at {given.point} gave requires grad, and this forward is not differentiable"
                raise ParameterError(f"{what}: pass grad=True, or use torch.no_grad()", "grad")
            return new
        new = torch.full_like(old, math.nan)
        if self._communicator is None or self._communicator.shard.rank == 0:
            try:
                with ordinary():
                    new = _checked(given, old, given.of(old.clone(), [])).detach().contiguous()
                if bool(new.isnan().all()):
                    raise ValueError(f"{given.function} gave nothing but NaN")
            except BaseException as error:  # the caller's function: whatever it raises is the end of its own request
                if not is_failure(error):
                    raise
                logger.exception("a function of Apply at %s failed; its request ends with an error", given.point)
        if self._communicator is not None:
            self._communicator.spread(new)
        taps.has_failed |= bool(new.isnan().all())
        return new


def _add(value: Tensor, sums: list[tuple[Span, Edit]]) -> Tensor:
    """All vectors that are added at a point, in one op."""
    rows, deltas = [], []
    for span, edit in sums:
        assert isinstance(edit.intervention, Add)
        found = [row for row, _ in span.rows(edit.positions)]
        if found:
            rows += found
            deltas.append(edit.intervention.delta().expand(len(found), *value.shape[1:]))
    if not rows:
        return value
    return value.index_add(0, torch.tensor(rows, device=value.device), torch.cat(deltas))


def _checked(given: Intervention, old: Tensor, new: Tensor) -> Tensor:
    if not isinstance(new, Tensor) or (new.shape, new.dtype, new.device) != (old.shape, old.dtype, old.device):
        found = f"{new.dtype} {list(new.shape)}" if isinstance(new, Tensor) else type(new).__name__
        is_elsewhere = isinstance(new, Tensor) and new.device != old.device
        wanted = f"{old.dtype} {list(old.shape)}{f' on {old.device}' if is_elsewhere else ''}"
        found += f" on {new.device}" if is_elsewhere else ""
        raise ParameterError(f"{given.name} at {given.point} must give {wanted}, got {found}", "interventions")
    return new


def names_of(model: nn.Module) -> dict[nn.Module, str]:
    """Each module that has points -> what comes before a point's own name. Layers and their parts may be wrapped, as
    for activation checkpointing: so every module of a layer is there."""
    names: dict[nn.Module, str] = {model: ""}
    for i, layer in enumerate(model.layers):  # type: ignore[arg-type]
        names |= dict.fromkeys(layer.modules(), f"layers.{i}.")
    return names
