"""One model and many who ask: each waits for its turn, and nobody can take two in a row from who waits."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from train_llava.acting.arrays import RequestError

if TYPE_CHECKING:
    from train_llava.acting.observation import Observation
    from train_llava.acting.policy import Answer, Policy, Question
    from train_llava.acting.tally import Tally

_logger = logging.getLogger(__name__)
_HANGS_S = 60.0  # longer than any model needs for a chunk


@dataclass(frozen=True, slots=True)
class _Waiting:
    question: Question
    answered: asyncio.Future[_Answered]


@dataclass(frozen=True, slots=True)
class _Answered:
    """An answer; begun: when the model took up its batch, perf_counter."""

    answer: Answer
    begun: float


class Turns:
    """Questions in the order in which they were ready. Who asks has one at a time, so that order is a round
    through all who ask.
    """

    def __init__(self, policy: Policy, max_batch: int, tally: Tally) -> None:
        """`max_batch`: of those that wait when the model is free, so many are answered together."""
        self._policy, self._max_batch, self._tally = policy, max_batch, tally
        self._waiting: deque[_Waiting] = deque()
        self._arrived = asyncio.Event()
        self._cpu = ThreadPoolExecutor(min(4, os.cpu_count() or 1), "preprocess")
        self._model = ThreadPoolExecutor(1, "model")
        self._has_failed = False
        self._begun: float | None = None  # of what the model has in hand, perf_counter
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def ask(self, observation: Observation) -> tuple[Answer, float]:
        """The answer, and the milliseconds that the observation waited: for a thread that scales its images,
        and for the model.

        Raises: ObservationError for what will not do; RequestError when the model fails, which is logged.
        """
        loop, start = asyncio.get_running_loop(), time.perf_counter()
        question = await loop.run_in_executor(self._cpu, self._policy.question, observation)
        waiting = _Waiting(question, loop.create_future())
        self._waiting.append(waiting)
        self._arrived.set()
        self._tally.in_flight += 1
        try:
            answered = await waiting.answered
        finally:
            self._tally.in_flight -= 1
        return answered.answer, (answered.begun - start) * 1000 - question.preprocess_ms

    def problem(self) -> str | None:
        """Why the model does not answer; None while it does."""
        seconds = 0.0 if self._begun is None else time.perf_counter() - self._begun
        if seconds > _HANGS_S:
            return f"the model is at one request for {seconds:.0f} s"
        return "the model failed at the last request" if self._has_failed else None

    @property
    def is_busy(self) -> bool:
        """Whether the model has something in hand."""
        return self._begun is not None

    async def close(self) -> None:
        """Stop; who still waits is cancelled. What the model has begun it ends."""
        self._task.cancel()
        for waiting in self._waiting:
            waiting.answered.cancel()
        for pool in (self._cpu, self._model):
            pool.shutdown(wait=False, cancel_futures=True)

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._arrived.wait()
            batch = self._next()
            if not batch:
                self._arrived.clear()
                continue
            self._tally.batches.add(len(batch))
            self._begun = time.perf_counter()
            answers = await loop.run_in_executor(self._model, self._answers, batch)
            self._begun, self._has_failed = None, not any(answers)
            for waiting, answered in zip(batch, answers, strict=True):
                if waiting.answered.done():  # who asked is gone
                    continue
                if answered is None:
                    problem = RequestError("server", "could not answer; its log says why", "internal")
                    waiting.answered.set_exception(problem)
                else:
                    waiting.answered.set_result(answered)

    def _next(self) -> list[_Waiting]:
        batch: list[_Waiting] = []
        while self._waiting and len(batch) < self._max_batch:
            waiting = self._waiting.popleft()
            if not waiting.answered.done():
                batch.append(waiting)
        return batch

    def _answers(self, batch: list[_Waiting]) -> list[_Answered | None]:
        """In the model's thread. A question that the model fails at must not take its neighbours with it."""
        begun = time.perf_counter()
        try:
            answers = self._policy.answer([waiting.question for waiting in batch])
            return [_Answered(answer, begun) for answer in answers]
        except Exception:
            _logger.exception("the model failed at %r", [one.question.text[:200] for one in batch])
        # Not above: while it is handled, an exception holds all that the model had in memory.
        if len(batch) == 1:
            return [None]
        return [one for waiting in batch for one in self._answers([waiting])]
