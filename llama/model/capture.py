"""Capture: which activations of a request are kept. RequestTaps: what one request reads and changes on its way through
an engine, whatever becomes of it there: each row is kept once, at its position, also where it is computed twice."""

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from llama.api.errors import ParameterError, is_one_of
from llama.model.config import ModelConfig
from llama.model.interventions import ENDLESS, Intervention, Positions, Rows, rows_of
from llama.model.kept import write
from llama.model.taps import SequenceTaps, bind, point_shape, resolve_points


@dataclass(frozen=True)
class Capture:
    """Keep the values of `points` (names and patterns of `taps.resolve_points`) at `positions`, in `dtype` (None = the
    model's): "last" is the prompt's last token, "generated" the generated ones but the last, which is never computed.

    reduce="mean" keeps their mean over the positions, in float64 until the end: one for the prompt and one for each
    completion, but for `save_to` one for the prompt and completion 0 together. `save_to` takes what one request has
    captured when it ends, and nothing stays in memory: a folder, for a safetensors file with the request's id as its
    name (LLM.generate and chat do not compute what is there already), or a function of (request_id, {point: tensor}).
    Values of completion i > 0 are named "i.point" there.
    """

    points: str | Sequence[str]
    positions: Positions = "last"
    dtype: torch.dtype | None = None
    reduce: Literal["mean"] | None = None
    save_to: str | Path | Callable[[str, dict[str, Tensor]], object] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.points, Iterator):  # each request of a call reads them
            object.__setattr__(self, "points", tuple(self.points))


class _Rows:
    """What is captured of the prompt, or of one completion."""

    def __init__(self, mean: bool) -> None:
        self.mean = mean
        self.have: set[int] = set()
        self.parts: dict[str, list[tuple[list[int], Tensor]]] = {}
        self.sums: dict[str, Tensor] = {}

    def take(self, values: Mapping[str, tuple[list[int], Tensor]], dtype: torch.dtype | None) -> None:
        fresh: set[int] = set()
        for point, (positions, rows) in values.items():
            new = [i for i, position in enumerate(positions) if position not in self.have]
            if not new:
                continue
            rows = rows if len(new) == len(rows) else rows[new]
            positions = [positions[i] for i in new]
            fresh.update(positions)
            if self.mean:
                self.sums[point] = self.sums.get(point, 0) + rows.double().sum(0)
            else:
                self.parts.setdefault(point, []).append((positions, rows if dtype is None else rows.to(dtype)))
        self.have |= fresh

    def and_then(self, later: "_Rows") -> "_Rows":
        """Both, as of one sequence."""
        both = _Rows(self.mean)
        both.have = self.have | later.have
        for rows in (self, later):
            for point, parts in rows.parts.items():
                both.parts.setdefault(point, []).extend(parts)
            for point, total in rows.sums.items():
                both.sums[point] = both.sums.get(point, 0) + total
        return both

    def values(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """[positions, ...] in rising order of their positions, or the mean."""
        if self.mean:
            return {point: (total / len(self.have)).to(dtype) for point, total in self.sums.items()}
        found = {}
        for point, parts in self.parts.items():
            positions = torch.tensor([p for places, _ in parts for p in places], device="cpu")
            rows = torch.cat([rows for _, rows in parts])
            found[point] = rows if bool((positions.diff() > 0).all()) else rows[positions.argsort()]
        return found


class RequestTaps:
    """`sequence` says what its tokens' forwards read and change. `salt` stands for the changes in the keys of the
    prefix cache, from the block of `first_change` on; empty where there is none."""

    def __init__(
        self,
        capture: Capture | None,
        interventions: Sequence[Intervention],
        config: ModelConfig,
        prompt_len: int,
        *,
        num_completions: int,
        like: Tensor,
    ) -> None:
        self.capture = capture
        self.prompt_len = prompt_len
        self._dtype = like.dtype if capture is None or capture.dtype is None else capture.dtype
        self._wanted: Rows = range(0)
        captures: dict[str, Rows] = {}
        if capture is not None:
            captures = self._captures(capture, config)
        self.sequence: SequenceTaps = bind(interventions, captures, config, prompt_len, like=like)
        self.first_change = self.sequence.first_change
        self.salt = self._salt(interventions) if self.first_change < math.inf else b""
        mean = capture is not None and capture.reduce == "mean"
        self._prompt = _Rows(mean)
        self._completions = [_Rows(mean) for _ in range(num_completions)]
        # By completion, what its last step computed: a stop string may yet end it before the last of these tokens.
        self._held: dict[int, dict[str, tuple[list[int], Tensor]]] = {}
        self._config = config
        self.identity = ""  # of the request, in the file that `save_to` gets
        self.is_kept = False  # by an earlier run: it need not be computed

    def _captures(self, capture: Capture, config: ModelConfig) -> dict[str, Rows]:
        if not is_one_of(capture.reduce, (None, "mean")):
            raise ParameterError(f'capture: reduce must be None or "mean", got {capture.reduce!r}', "capture")
        if capture.dtype is not None and not getattr(capture.dtype, "is_floating_point", False):
            raise ParameterError(f"capture: dtype must be a float dtype of torch, got {capture.dtype!r}", "capture")
        is_place = isinstance(capture.save_to, str | Path | None) and capture.save_to != ""
        if not is_place and not callable(capture.save_to):
            raise ParameterError(f"capture: save_to must be a folder or a function, got {capture.save_to!r}", "capture")
        points = resolve_points(capture.points, config.num_hidden_layers)
        self._wanted = rows_of(capture.positions, self.prompt_len)
        if isinstance(self._wanted, tuple):
            self._wanted = tuple(sorted(set(self._wanted)))
        if "logits" in points and self._wanted and min(self._wanted[:1]) < self.prompt_len - 1:
            raise ParameterError(
                'capture: logits are computed from the prompt\'s last token on: positions must be "last" or '
                '"generated" (see prompt_logprobs, and Transformer.run_with_cache)',
                "capture",
            )
        return dict.fromkeys(points, self._wanted)

    def _salt(self, interventions: Iterable[Intervention]) -> bytes:
        told = blake2b(digest_size=32)
        for given in interventions:
            told.update(given.digest + repr(rows_of(given.positions, self.prompt_len)).encode())
        return told.digest()

    def num_bytes(self, limit: int) -> int:
        """What is captured needs at most, of a request that may have `limit` tokens."""
        if self.capture is None:
            return 0
        per_row = sum(math.prod(point_shape(point, self._config)) for point in self.sequence.captures)
        if self.capture.reduce == "mean":
            return per_row * 8 * (1 + len(self._completions))
        wanted = self._wanted
        stop = wanted.stop if isinstance(wanted, range) else ENDLESS
        prompt = len([p for p in wanted if p < self.prompt_len]) if isinstance(wanted, tuple) else 0
        if isinstance(wanted, range):
            prompt = max(0, min(stop, self.prompt_len) - wanted.start)
        generated = max(0, min(stop, limit) - max(wanted.start, self.prompt_len)) if isinstance(wanted, range) else 0
        return per_row * self._dtype.itemsize * (prompt + generated * len(self._completions))

    def first_missing(self, index: int) -> int:
        """The first position that is to be captured for completion `index` and is not yet; those before it may be found
        in the prefix cache."""
        self._settle(index)
        have = self._prompt.have | self._completions[index].have
        return next((p for p in self._wanted if p not in have), ENDLESS)

    def take(self, index: int, values: Mapping[str, tuple[list[int], Tensor]], stop: int | None = None) -> None:
        """See `llama.engine.request.Taps`."""
        of_prompt, of_completion = {}, {}
        for point, (positions, rows) in values.items():
            end = len(positions) if stop is None else bisect_left(positions, stop)
            split = min(end, bisect_left(positions, self.prompt_len))
            of_prompt[point] = positions[:split], rows[:split]
            of_completion[point] = positions[split:end], rows[split:end]
        self._settle(index)
        self._prompt.take(of_prompt, self._asked_dtype)
        self._held[index] = of_completion

    def _settle(self, index: int, stop: int = ENDLESS) -> None:
        """Keep what is held of a completion, as far as the position `stop`."""
        kept = {}
        for point, (positions, rows) in self._held.pop(index, {}).items():
            end = bisect_left(positions, stop)
            kept[point] = positions[:end], rows[:end]
        self._completions[index].take(kept, self._asked_dtype)

    @property
    def _asked_dtype(self) -> torch.dtype | None:
        return None if self.capture is None else self.capture.dtype

    def finish(
        self, request_id: str, num_tokens: Sequence[int], is_whole: bool = True
    ) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
        """`num_tokens`: of each completion. -> the prompt's values and each completion's; both empty where `save_to` is
        to take them. It gets what is whole alone: nothing of a request that failed or was aborted."""
        for index, count in enumerate(num_tokens):
            self._settle(index, self.prompt_len + count - 1)  # the last one is never computed
        target = None if self.capture is None else self.capture.save_to
        if target is None:
            return self._prompt.values(self._dtype), [each.values(self._dtype) for each in self._completions]
        nothing: tuple[dict[str, Tensor], list[dict[str, Tensor]]] = {}, [{} for _ in self._completions]
        if not is_whole:
            return nothing
        whole = self._prompt.and_then(self._completions[0]).values(self._dtype)
        for i, completion in enumerate(self._completions[1:], 1):
            whole |= {f"{i}.{point}": rows for point, rows in completion.values(self._dtype).items()}
        if callable(target):
            target(request_id, whole)
        else:
            save(Path(target), request_id, whole, self.identity)
        return nothing


def save(folder: Path, name: str, values: Mapping[str, Tensor], identity: str) -> None:
    """Whole or not at all, under `name`.safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / f"{name}.safetensors", values, {"request": identity})


def is_kept(folder: Path, name: str, identity: str) -> bool:
    """Whether `save` has written this file, whole, for a request of this identity."""
    from safetensors import SafetensorError, safe_open  # machines that only run kernels have no safetensors

    try:
        with safe_open(folder / f"{name}.safetensors", "pt") as file:
            return (file.metadata() or {}).get("request") == identity
    except (OSError, SafetensorError):
        return False


def attention_pattern(q: Tensor, k: Tensor, scale: float | None = None) -> Tensor:
    """The probabilities softmax(q k^T * scale) of causal attention from captured points "q" [queries, heads, head_dim]
    and "k" [keys, kv_heads, head_dim], the last query seeing all keys -> [heads, queries, keys], in at least float32.
    scale is head_dim ** -0.5 where it is None. ParameterError for tensors that are not such."""
    shapes = [tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__ for x in (q, k)]
    if not isinstance(q, Tensor) or not isinstance(k, Tensor) or not q.dim() == k.dim() == 3 or not k.numel():
        raise ParameterError(f"attention_pattern takes q and k of three dimensions, got {shapes[0]}, {shapes[1]}", "q")
    if len(q) > len(k) or q.shape[1] % k.shape[1] or q.shape[2] != k.shape[2]:
        what = "at most as many queries as keys, and heads that share the heads of k"
        raise ParameterError(f"attention_pattern takes {what}, got q {shapes[0]}, k {shapes[1]}", "q")
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    queries, keys, group = len(q), len(k), q.shape[1] // k.shape[1]
    scores = torch.einsum("qhd,khd->hqk", q.to(wide), k.to(wide).repeat_interleave(group, 1))
    later = torch.ones(queries, keys, dtype=torch.bool, device=q.device).triu(keys - queries + 1)
    return (scores * (q.shape[-1] ** -0.5 if scale is None else scale)).masked_fill(later, -math.inf).softmax(-1)
