"""A batch over an engine that answers at once: `python -m tests.batch.null_model INPUT OUTPUT` prints as JSON how much
memory the process took before it began and at most, in bytes."""

import asyncio
import json
import resource
import sys
from pathlib import Path

from llama import LLM, AsyncLLM
from llama.llm.replies import Replies
from tests.batch.helpers import completion, run_job, write_lines
from tests.fakes import ScriptedEngine, byte_tokenizer, script_of
from tests.model.models import tiny_model


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


async def main(source: Path, output: Path) -> None:
    llm = LLM(tiny_model(vocab_size=257, max_position_embeddings=4096), byte_tokenizer(), num_blocks=4)
    llm.engine = ScriptedEngine(lambda prompt, index: script_of("y"))
    llm.engine.config.max_num_seqs = 64
    llm.replies = Replies(llm.engine, llm.tokenizer)
    async with AsyncLLM(llm, max_waiting_requests=1 << 20, max_waiting_tokens=1 << 40) as served:
        warm = write_lines(source.with_suffix(".warm"), [completion(str(i), "hi") for i in range(2000)])
        await run_job(served, warm, output.with_suffix(".warm"), in_flight=128)
        before = peak()
        job = await run_job(served, source, output, in_flight=128)
    print(json.dumps({"before": before, "peak": peak(), "answered": job.counts.answered}))


if __name__ == "__main__":
    asyncio.run(main(*map(Path, sys.argv[1:])))
