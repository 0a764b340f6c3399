"""A batch file's way from its input to its output; a function given answers the lines.

Reads as far as it answers: memory does not grow with the files. Each output line is written as soon as it is known, so
a run can be killed at any time and started again: it goes on with what has no answer yet.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from tqdm.auto import tqdm

from llama.batch import parquet
from llama.batch.lines import Line, Settings, count_lines, read_lines
from llama.batch.output import OutputFile

Answer = Callable[[Line], Awaitable[dict[str, Any]]]


@dataclass(slots=True)
class Counts:
    """Lines: answered by an earlier run, answered by this one, rejected with a 4xx, failed."""

    kept: int = 0
    answered: int = 0
    rejected: int = 0
    failed: int = 0

    def __str__(self) -> str:
        total = self.kept + self.answered + self.rejected + self.failed
        kept = f" ({self.kept:,} of them by an earlier run)" if self.kept else ""
        answered = self.kept + self.answered
        return f"{total:,} lines: {answered:,} answered{kept}, {self.rejected:,} rejected, {self.failed:,} failed"


class Job:
    """Opens both files, before any model is loaded. `settings`: what else the answers depend on, for example the model
    and its dtype; an output that was begun with others is refused with a ValueError. `captures`: the folder of what
    lines read of the network; one whose file there is missing or torn is asked again."""

    def __init__(self, source: Path, output: Path, settings: Settings, captures: Path | None = None) -> None:
        _check_paths(source, output)
        if output.exists() and source.samefile(output):
            raise ValueError(f"the output is the input: {output}")
        self._source = source
        self._target = output
        self._settings = settings
        self.num_lines = count_lines(source)
        journal = parquet.open_journal(output) if parquet.is_parquet(output) else output
        self.output = OutputFile(journal, lambda line_id: captures is None or _has_files(captures, line_id))
        try:
            self.counts = Counts(kept=self._num_answered(output))
        except BaseException:
            self.output.close()
            raise

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.output.close()
        if kind is None and parquet.is_parquet(self._target):
            parquet.close_journal(self._target)

    def pending(self) -> Iterator[Line]:
        """The lines that have no answer yet, in order."""
        answered = self.output.answered
        return (line for line in read_lines(self._source, self._settings) if line.id not in answered)

    def write(self, line: dict[str, Any]) -> None:
        if line["error"] is not None:
            self.counts.failed += 1
        elif line["response"]["status_code"] >= 400:
            self.counts.rejected += 1
        else:
            self.counts.answered += 1
        self.output.write(line)

    async def run(self, answer: Answer, max_in_flight: int, show_progress: bool = True) -> None:
        """Have every pending line answered, at most `max_in_flight` at a time. What `answer` raises ends the run."""
        pending = self.pending()
        # disable=None lets tqdm itself be silent where stderr is no terminal
        silent = None if show_progress else True
        with tqdm(total=self.num_lines, initial=self.counts.kept, desc="Lines", unit="line", disable=silent) as bar:

            async def work() -> None:
                for line in pending:
                    if line.refusal is None:
                        self.write(await answer(line))
                    else:
                        self.write(line.failed(line.refusal.code, line.refusal.message))
                        await asyncio.sleep(0)
                    bar.update()

            workers = [asyncio.ensure_future(work()) for _ in range(max_in_flight)]
            try:
                await asyncio.gather(*workers)
            finally:
                for worker in workers:
                    worker.cancel()
                await asyncio.gather(*workers, return_exceptions=True)

    def _num_answered(self, output: Path) -> int:
        answered = self.output.answered
        if not answered:
            return 0
        num_asked = sum(line.id in answered for line in read_lines(self._source, self._settings))
        if num_asked < len(answered):
            raise ValueError(
                f"{output} answers {len(answered) - num_asked} lines that this run does not ask, or not with this "
                "model and these settings: name another output, or remove it"
            )
        return num_asked


def _check_paths(source: Path, output: Path) -> None:
    """ValueError that names what is missing and what is expected in its place."""
    told = "the input is a file of requests, one JSON object a line"
    if not source.exists():
        raise ValueError(f"{source}: there is no such file; {told}")
    if source.is_dir():
        raise ValueError(f"{source}: is a folder; {told}")
    if output.exists() and not output.is_file():  # a table would take a device's place
        found = "a folder" if output.is_dir() else "not a regular file"
        raise ValueError(f"{output}: is {found}; the output is a file, which is made where it does not exist")
    if not output.parent.is_dir():
        raise ValueError(f"{output}: there is no folder {output.parent} for this file of answers; make it first")


def _has_files(folder: Path, line_id: str) -> bool:
    """Of a line, and of those of its other prompts that have one: whole ones."""
    first = folder / f"{line_id}.safetensors"
    try:
        for path in (first, *folder.glob(f"{line_id}.*.safetensors")):
            with safe_open(path, "np"):
                pass
    except (OSError, SafetensorError):
        return False
    return True
