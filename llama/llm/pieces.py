"""What LLM.stream gives: one request's pieces, each when it is asked for."""

from collections.abc import Callable, Iterator

from llama.api.outputs import Piece
from llama.llm.replies import Replies, Reply


class Pieces(Iterator[Piece]):
    """The engine has the request already; `step` advances all that it has. Closing this aborts the request, and so does
    dropping it."""

    def __init__(self, replies: Replies, reply: Reply, step: Callable[[Reply], object]) -> None:
        reply.streams = True
        self._replies = replies
        self._reply = reply
        self._step = step

    def __next__(self) -> Piece:
        reply = self._reply
        try:
            while not (reply.pending or reply.finished):
                self._step(reply)
        except BaseException:
            self.close()
            raise
        if not reply.pending:
            raise StopIteration
        return reply.pending.popleft()

    def close(self) -> None:
        """Legal at any time and any number of times; nothing comes afterwards."""
        self._replies.abort(self._reply)
        self._reply.pending.clear()

    def __del__(self) -> None:
        self.close()
