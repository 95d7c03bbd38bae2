"""Requests that come while the model is busy are answered together, as one batch; repeated ones are answered alike."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable

import numpy as np

from fedprompt.blackbox.service import Ledger, Request, digest

AT_ONCE = 256  # images of one batch, where there are several requests in it
KEPT = 256 * 2**20  # bytes of answers that are kept for requests that are repeated


class Batcher:
    """Gathers concurrent requests, each float32 [n, 3, S, S], for a scorer that takes one batch at a time."""

    def __init__(self, scorer: Callable[[np.ndarray], np.ndarray]) -> None:
        self._scorer = scorer
        self._waiting: list[tuple[np.ndarray, asyncio.Future[np.ndarray]]] = []
        self._serving: asyncio.Task[None] | None = None

    async def scores(self, images: np.ndarray) -> np.ndarray:
        """Scores [n, K] of one request's images."""
        answer = asyncio.get_running_loop().create_future()
        self._waiting.append((images, answer))
        if self._serving is None:
            self._serving = asyncio.create_task(self._serve())
        return await answer

    async def _serve(self) -> None:
        """Answer until nobody waits any more."""
        while self._waiting:
            batch = self._next()
            images, answers = zip(*batch, strict=True)
            try:
                scores = await asyncio.to_thread(self._scorer, np.concatenate(images))
            except Exception as error:
                for answer in answers:
                    if not answer.done():
                        answer.set_exception(error)
                continue
            for answer, own in zip(answers, np.split(scores, np.cumsum([len(x) for x in images])[:-1]), strict=True):
                if not answer.done():  # its asker may have gone
                    answer.set_result(own)
        self._serving = None

    def _next(self) -> list[tuple[np.ndarray, asyncio.Future[np.ndarray]]]:
        """Take the requests that came first, as many as go into one batch, and at least one."""
        count, images = 1, len(self._waiting[0][0])
        while count < len(self._waiting) and images + len(self._waiting[count][0]) <= AT_ONCE:
            images += len(self._waiting[count][0])
            count += 1
        taken, self._waiting = self._waiting[:count], self._waiting[count:]
        return taken


class Answers:
    """The newest answers by the content of their requests.

    The last bits of an image's scores depend on the batch that it is in. A client that repeats its requests must get
    the same bits: else its next request has another content, and is counted anew.
    """

    def __init__(self, largest: int = KEPT) -> None:
        self._largest, self._bytes = largest, 0
        self._scores: OrderedDict[bytes, np.ndarray] = OrderedDict()

    def get(self, content: bytes) -> np.ndarray | None:
        """The answer to a request, if it is kept."""
        if content in self._scores:
            self._scores.move_to_end(content)
        return self._scores.get(content)

    def put(self, content: bytes, scores: np.ndarray) -> None:
        """Keep an answer, and drop the oldest ones where there are too many."""
        old = self._scores.pop(content, None)
        self._scores[content] = scores
        self._bytes += scores.nbytes - (0 if old is None else old.nbytes)
        while self._bytes > self._largest:
            self._bytes -= self._scores.popitem(last=False)[1].nbytes


class Desk:
    """Where requests come in: each is counted in its run's ledger, and answered as it was before if it is repeated."""

    def __init__(self, batcher: Batcher) -> None:
        self._batcher, self._answers = batcher, Answers()

    async def scores(self, ledger: Ledger, client: int, images: np.ndarray, request: Request) -> np.ndarray:
        """Scores [n, K] of one request's images; raises what ``Ledger.admit`` raises."""
        content = await asyncio.to_thread(digest, images)
        ledger.admit(client, len(images), request, content)
        scores = self._answers.get(content)
        if scores is None:
            # In pieces, so that a large request neither takes all memory nor holds up all others.
            pieces = np.split(images, range(AT_ONCE, len(images), AT_ONCE))
            scores = np.concatenate([await self._batcher.scores(piece) for piece in pieces])
            self._answers.put(content, scores)
        return scores
