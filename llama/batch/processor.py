"""build_processor: a function of Ray datasets that answers their rows, by the names of Ray's own LLM library.

    processor = build_processor(ProcessorConfig(model_source=path, concurrency=2), preprocess=..., postprocess=...)
    answered = processor(dataset)

Needs Ray (the extra `ray`). One Generator for each actor; an actor whose process ends is started again, and what it had
under way is computed again, `max_restarts` times at most, so that a row that ends the process cannot do so for ever.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from llama.batch.generator import ERROR_COLUMN, Generator

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class ProcessorConfig:
    """`engine_kwargs`: LLM's arguments. `concurrency`: how many engines, or (fewest, most). Each engine has
    max_concurrent_batches * batch_size rows under way: let that be more than its max_num_seqs. `num_gpus` and
    `num_cpus` are of each engine."""

    model_source: str
    engine_kwargs: Mapping[str, Any] = field(default_factory=dict)
    sampling_params: Mapping[str, Any] | None = None
    loras: Mapping[str, str] | None = None
    concurrency: int | tuple[int, int] = 1
    batch_size: int = 32
    max_concurrent_batches: int = 16
    num_gpus: float = 0
    num_cpus: float = 1
    max_restarts: int = 8

    def __post_init__(self) -> None:
        sizes = self.concurrency if isinstance(self.concurrency, tuple) else (self.concurrency, self.concurrency)
        if len(sizes) != 2 or not 0 < sizes[0] <= sizes[1]:
            raise ValueError(f"concurrency must be a number above 0 or (fewest, most), got {self.concurrency!r}")
        for name in ("batch_size", "max_concurrent_batches"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)!r}")


def build_processor(
    config: ProcessorConfig,
    preprocess: Callable[[Row], Row] | None = None,
    postprocess: Callable[[Row], Row] | None = None,
) -> Callable[[Any], Any]:
    """-> what makes, of a ray.data.Dataset, a lazy one of answered rows. `preprocess` gives the columns that Generator
    reads, which come beside those of the row; `postprocess` makes the row that comes out, but of rows with an error,
    which stay as they are."""
    import ray

    is_range = isinstance(config.concurrency, tuple)
    few, most = config.concurrency if isinstance(config.concurrency, tuple) else (config.concurrency, 0)
    in_flight = {"max_tasks_in_flight_per_actor": 2 * config.max_concurrent_batches}
    size = {"min_size": few, "max_size": most} if is_range else {"size": few}
    arguments = {"sampling_params": config.sampling_params, "loras": config.loras, **config.engine_kwargs}

    def processor(dataset: Any) -> Any:
        if preprocess is not None:
            dataset = dataset.map(lambda row: {**row, **preprocess(row)})
        dataset = dataset.map_batches(
            Generator,
            fn_constructor_args=(config.model_source,),
            fn_constructor_kwargs={"exit_on_death": True, **arguments},
            batch_size=config.batch_size,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(**size, **in_flight),
            num_gpus=config.num_gpus or None,
            num_cpus=config.num_cpus,
            max_concurrency=config.max_concurrent_batches,
            max_restarts=config.max_restarts,
        )
        return dataset if postprocess is None else dataset.map(_unless_failed(postprocess))

    return processor


def _unless_failed(postprocess: Callable[[Row], Row]) -> Callable[[Row], Row]:
    return lambda row: row if row[ERROR_COLUMN] else {**postprocess(row), ERROR_COLUMN: ""}
