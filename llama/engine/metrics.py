"""What an engine counts. Runs without torch."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class EngineMetrics:
    """Counts of now (waiting, running, blocks) and totals since the start (all others)."""

    num_waiting: int
    num_running: int
    num_blocks: int
    num_used_blocks: int
    num_cached_blocks: int  # without an owner, but their content can be used again
    num_steps: int
    num_preemptions: int
    num_prompt_tokens: int
    num_generated_tokens: int
    num_prefix_queries: int  # tokens looked up in the prefix cache
    num_prefix_hits: int  # tokens found there
    num_drafts: int = 0  # times that drafts of a sequence were verified
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0  # of these, those that were right
    num_accepted_tokens_per_pos: tuple[int, ...] = ()  # the same by place behind the last token; () = no drafts at all

    @property
    def kv_usage(self) -> float:
        """Fraction of the blocks that running requests own."""
        return self.num_used_blocks / self.num_blocks
