"""Prometheus metrics under vLLM's names with `llama_` in front, so that its dashboards work after one replacement.

Each server has a registry of its own. What the engine counts is read when somebody asks; what requests see (times,
ends) is observed here.
"""

from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST as CONTENT_TYPE

from llama.api.outputs import RequestMetrics
from llama.engine.metrics import EngineMetrics

_TIMES = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
_SIZES = tuple(float(digit * 10**power) for power in range(6) for digit in (1, 2, 5))

Counts = Mapping[str, tuple[str, Callable[[], int]]]  # name -> documentation, and what gives the present count


class Metrics:
    """`engine` returns the engine's present counts, `gauges` and `counters` other ones."""

    def __init__(
        self, engine: Callable[[], EngineMetrics], model_name: str, *, gauges: Counts, counters: Counts
    ) -> None:
        self._registry = CollectorRegistry()
        self._model_name = model_name
        self._registry.register(_Collector(engine, model_name, gauges, counters))
        self._ends = Counter(
            "llama_request_success",
            "Completions that ended, by the reason.",
            ["model_name", "finished_reason"],
            registry=self._registry,
        )
        self._errors = Counter(
            "llama_http_errors",
            "Requests that were answered with an error, by status and code.",
            ["model_name", "status", "code"],
            registry=self._registry,
        )
        self.time_to_first_token = self._histogram(
            "llama_time_to_first_token_seconds", "From the request to its first token.", _TIMES
        )
        self.inter_token_latency = self._histogram(
            "llama_inter_token_latency_seconds", "Between two tokens of one completion.", _TIMES
        )
        self.e2e_latency = self._histogram(
            "llama_e2e_request_latency_seconds", "From the request to the end of its answer.", _TIMES
        )
        self._queue_time = self._histogram(
            "llama_request_queue_time_seconds", "From the request to the first step that computes some of it.", _TIMES
        )
        self._prefill_time = self._histogram(
            "llama_request_prefill_time_seconds", "From that step to the first token.", _TIMES
        )
        self._decode_time = self._histogram(
            "llama_request_decode_time_seconds", "From the first token to the last.", _TIMES
        )
        self._inference_time = self._histogram(
            "llama_request_inference_time_seconds", "From that step to the last token.", _TIMES
        )
        self._time_per_output_token = self._histogram(
            "llama_request_time_per_output_token_seconds", "Mean time of the tokens behind the first.", _TIMES
        )
        self.prompt_tokens = self._histogram("llama_request_prompt_tokens", "Tokens of a prompt.", _SIZES)
        self.generation_tokens = self._histogram("llama_request_generation_tokens", "Tokens of an answer.", _SIZES)
        self._longest = self._histogram(
            "llama_request_max_num_generation_tokens", "Tokens of the longest completion of a request.", _SIZES
        )
        self.max_tokens = self._histogram(
            "llama_request_params_max_tokens", "The most tokens of an answer, where a request says so.", _SIZES
        )
        self.completions = self._histogram("llama_request_params_n", "Completions asked for.", (1, 2, 5, 10, 20, 50))

    def ended(self, reason: str) -> None:
        self._ends.labels(self._model_name, reason).inc()

    def timed(self, times: RequestMetrics, num_tokens: int) -> None:
        """Of a request that has ended, whose longest completion has `num_tokens`."""
        self._longest.observe(num_tokens)
        queue, prefill, decode = times.queue_time, times.prefill_time, times.decode_time
        if queue is not None:
            self._queue_time.observe(queue)
        if prefill is not None and decode is not None:
            self._prefill_time.observe(prefill)
            self._decode_time.observe(decode)
            self._inference_time.observe(prefill + decode)
        if decode is not None and num_tokens > 1:
            self._time_per_output_token.observe(decode / (num_tokens - 1))

    def refused(self, status: int, code: int) -> None:
        self._errors.labels(self._model_name, str(status), str(code)).inc()

    def exposition(self) -> bytes:
        return generate_latest(self._registry)

    def samples(self) -> Iterator[tuple[str, str, dict[str, str], float]]:
        """(name, documentation, labels, value) of all that exposition() shows."""
        for family in self._registry.collect():
            for sample in family.samples:
                if not sample.name.endswith("_created"):
                    yield sample.name, family.documentation, sample.labels, sample.value

    def _histogram(self, name: str, documentation: str, buckets: tuple[float, ...]) -> Histogram:
        family = Histogram(name, documentation, ["model_name"], buckets=buckets, registry=self._registry)
        return family.labels(self._model_name)


class _Collector:
    """Counts that others keep, read at each scrape."""

    def __init__(self, engine: Callable[[], EngineMetrics], model_name: str, gauges: Counts, counters: Counts) -> None:
        self._gauges = gauges
        self._counters = counters
        self._engine = engine
        self._model_name = model_name

    def collect(self) -> Iterator[Metric]:
        now = self._engine()
        gauges = {
            "num_requests_running": ("Completions that run.", now.num_running),
            "num_requests_waiting": ("Completions that wait.", now.num_waiting),
            "kv_cache_usage_perc": ("Share of the KV cache in use, 1 = all.", now.num_used_blocks / now.num_blocks),
            "kv_cache_blocks": ("Blocks of the KV cache.", now.num_blocks),
            **{name: (documentation, count()) for name, (documentation, count) in self._gauges.items()},
        }
        counters = {
            "num_preemptions": ("Completions sent back to wait.", now.num_preemptions),
            "prompt_tokens": ("Tokens of prompts.", now.num_prompt_tokens),
            "generation_tokens": ("Tokens generated.", now.num_generated_tokens),
            "prefix_cache_queries": ("Tokens looked up in the prefix cache.", now.num_prefix_queries),
            "prefix_cache_hits": ("Tokens found in the prefix cache.", now.num_prefix_hits),
            "engine_steps": ("Steps of the engine.", now.num_steps),
            **_of_drafts(now),
            **{name: (documentation, count()) for name, (documentation, count) in self._counters.items()},
        }
        for kind, table in ((GaugeMetricFamily, gauges), (CounterMetricFamily, counters)):
            for name, (documentation, value) in table.items():
                family = kind(f"llama_{name}", documentation, labels=["model_name"])
                family.add_metric([self._model_name], value)
                yield family
        if now.num_accepted_tokens_per_pos:
            text = "Drafts that were right, by their place behind the last token."
            name, labels = "llama_spec_decode_num_accepted_tokens_per_pos", ["model_name", "position"]
            family = CounterMetricFamily(name, text, labels=labels)
            for position, count in enumerate(now.num_accepted_tokens_per_pos):
                family.add_metric([self._model_name, str(position)], count)
            yield family


def _of_drafts(now: EngineMetrics) -> dict[str, tuple[str, int]]:
    """Nothing where the engine makes none."""
    if not now.num_accepted_tokens_per_pos:
        return {}
    return {
        "spec_decode_num_drafts": ("Times that drafts of a completion were verified.", now.num_drafts),
        "spec_decode_num_draft_tokens": ("Tokens of drafts.", now.num_draft_tokens),
        "spec_decode_num_accepted_tokens": ("Tokens of drafts that were right.", now.num_accepted_tokens),
    }


__all__ = ["CONTENT_TYPE", "Metrics"]
