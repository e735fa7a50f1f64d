"""Answer requests that arrive together in one batch."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

Answer = Callable[[list[str], Any], Sequence[Any]]


class Overloaded(RuntimeError):
    """More requests wait for the model than the queue holds."""


class _Waiting(NamedTuple):
    texts: list[str]
    options: Hashable
    answer: asyncio.Future[list[Any]]


class Batcher:
    """A queue of requests in front of a function that runs in a single thread.

    Requests that wait at the same time share a call of the function if their options are equal. If a call fails, its
    requests are answered one at a time, so that only the one at fault fails.

    Args:
        answer: Function ``(texts, options) -> answers`` with an answer for each text.
        batch_size: Number of texts from which on a batch takes no further requests.
        wait_seconds: Time to wait for further requests if a batch is not full.
        max_waiting: Maximum number of requests in the queue.
    """

    def __init__(self, answer: Answer, batch_size: int, wait_seconds: float, max_waiting: int) -> None:
        self._answer, self._batch_size, self._wait_seconds = answer, batch_size, wait_seconds
        self._queue: asyncio.Queue[_Waiting] = asyncio.Queue(max_waiting)

    async def submit(self, texts: list[str], options: Hashable) -> list[Any]:
        """Return the answer of each text, once the batch with this request is done.

        Raises:
            Overloaded: if the queue is full.
            Exception: if the function raises it for these texts and options.
        """
        answer: asyncio.Future[list[Any]] = asyncio.get_running_loop().create_future()
        try:
            self._queue.put_nowait(_Waiting(texts, options, answer))
        except asyncio.QueueFull:
            raise Overloaded(f"{self._queue.maxsize} requests wait for the model: try again later.") from None
        return await answer

    async def run(self) -> None:
        """Answer requests until cancelled."""
        loop = asyncio.get_running_loop()
        with ThreadPoolExecutor(1, thread_name_prefix="hf_xmc-model") as thread:
            while True:
                for group in _by_options(await self._batch()):
                    outcomes = await loop.run_in_executor(thread, self._outcomes, group)
                    for waiting, outcome in zip(group, outcomes, strict=True):
                        if waiting.answer.done():  # the client has gone
                            continue
                        if isinstance(outcome, Exception):
                            waiting.answer.set_exception(outcome)
                        else:
                            waiting.answer.set_result(outcome)

    async def _batch(self) -> list[_Waiting]:
        batch = [await self._queue.get()]
        self._take_waiting(batch)
        if self._wait_seconds and _num_texts(batch) < self._batch_size:
            await asyncio.sleep(self._wait_seconds)
            self._take_waiting(batch)
        return [waiting for waiting in batch if not waiting.answer.done()]

    def _take_waiting(self, batch: list[_Waiting]) -> None:
        while _num_texts(batch) < self._batch_size and not self._queue.empty():
            batch.append(self._queue.get_nowait())

    def _outcomes(self, group: list[_Waiting]) -> list[list[Any] | Exception]:
        """Return the answers of each request, or its error."""
        texts = [text for waiting in group for text in waiting.texts]
        try:
            answers = iter(self._answer(texts, group[0].options))
            return [[next(answers) for _ in waiting.texts] for waiting in group]
        except Exception as error:
            if len(group) == 1:
                return [error]
        return [outcome for waiting in group for outcome in self._outcomes([waiting])]


def _num_texts(batch: list[_Waiting]) -> int:
    return sum(len(waiting.texts) for waiting in batch)


def _by_options(batch: list[_Waiting]) -> list[list[_Waiting]]:
    groups: dict[Hashable, list[_Waiting]] = {}
    for waiting in batch:
        groups.setdefault(waiting.options, []).append(waiting)
    return list(groups.values())
