"""Which tasks of an upload does a batch have, after the answer to that upload was lost?

Ingestion is the server's, in its own order and time: this is as sure as reading can make it. The network is
reached through the functions given.
"""

import time
from collections import Counter
from typing import Callable, Iterable, List, Optional

from ._matching import result_digest, task_digest
from ._waiting import AWAY_ERRORS, SETTLED_AFTER, has_no_index, knows_queues
from .exceptions import (
    APIError,
    BatchTimeoutError,
    ConnectionFailedError,
    InvalidResponseError,
    NotFoundError,
    ServerError,
)
from .models import Batch, HealthResponse, Task, TaskResponse

__all__ = ["ReadBack"]

#: How long nothing of an upload may be seen, while the server answers, before it was not taken. The framework handles
#: one in less than a second, and shows it after its index refresh of 5 s; the rest is for a worker that is busy.
_UNSEEN_AFTER = 30.0
_FIRST_PAUSE, _PAUSE_GROWTH, _LONGEST_PAUSE = 0.1, 1.5, 2.0


class ReadBack:
    """Looks into one batch for tasks whose upload got no answer.

    Args:
        get_batch: Asks for the batch, with as many ``retries`` as are given.
        check_health: Asks for the server's health once.
        iter_tasks: The tasks in the batch, as they are now.
        pause: Waits before a repeat, of this number in a row and after this error; raises that if it would be too long.
        sleep: Pauses for so many seconds.
        batch_id: The batch.
        retries: How often in a row the server may not answer.
        deadline: When to give up, by ``time.monotonic()``; None for never.
    """

    def __init__(
        self,
        get_batch: Callable[..., Batch],
        check_health: Callable[[], HealthResponse],
        iter_tasks: Callable[[], Iterable[TaskResponse]],
        pause: Callable[[int, APIError], None],
        sleep: Callable[[float], None],
        *,
        batch_id: str,
        retries: int,
        deadline: Optional[float],
    ) -> None:
        self._get_batch = get_batch
        self._check_health = check_health
        self._iter_tasks = iter_tasks
        self._pause = pause
        self._sleep = sleep
        self._batch_id = batch_id
        self._retries = retries
        self._deadline = deadline

    def check_deadline(self) -> None:
        """Raise BatchTimeoutError if there is no time left."""
        if self._deadline is not None and time.monotonic() >= self._deadline:
            raise BatchTimeoutError(f"batch {self._batch_id!r}: the time ran out", batch_id=self._batch_id)

    def total(self, **options: int) -> int:
        """How many tasks the batch has just now; 0 where there is no such batch, or none of it was ingested yet."""
        try:
            return self._get_batch(**options).total_tasks
        except NotFoundError:
            return 0
        except ServerError as exc:
            if has_no_index(exc):
                return 0
            raise

    def find_missing(
        self, chunk: List[Task], before: int, before_tasks: Optional[Iterable[Task]], is_own: bool
    ) -> List[Task]:
        """Those of a chunk that the batch does not have; blocks until that is known.

        Args:
            chunk: What was sent.
            before: How many tasks the batch had before.
            before_tasks: These tasks, where they can be read once more.
            is_own: Nobody else adds to the batch, so that its total tells.

        Raises:
            APIError: The server was away for too long, or has other tasks than it can have by this upload.
            BatchTimeoutError: There was no time left.
        """
        total = self.settled_total(before, before + len(chunk) if is_own else None)
        if total == before:
            return chunk
        if is_own and total == before + len(chunk):
            return []
        wanted = Counter(map(task_digest, chunk))
        there = self._count(wanted, total)
        for task in before_tasks or ():
            digest = task_digest(task)
            if digest in wanted:
                there[digest] -= 1
        if sum(there.values()) != total - before and not (is_own and before_tasks is not None):
            raise InvalidResponseError(
                f"batch {self._batch_id!r} has {total:,} tasks, and had {before:,} before an upload of {len(chunk):,} "
                f"whose answer was lost; {sum(there.values()):,} are alike to those: does something else add to it?"
            )
        missing = []
        for task in chunk:
            digest = task_digest(task)
            there[digest] -= 1
            if there[digest] < 0:
                missing.append(task)
        return missing

    def settled_total(self, before: int, whole: Optional[int] = None) -> int:
        """The batch's total, once it will not change any more: at once where it is ``whole``."""
        away, pause = 0, _FIRST_PAUSE
        total: Optional[int] = None
        quiet_since = unqueued_since = time.monotonic()
        while True:
            self.check_deadline()
            try:
                last, total = total, self.total(retries=0)
                is_queued = self._has_queued_uploads()
            except AWAY_ERRORS as exc:
                away, total = away + 1, None
                if away > self._retries:
                    raise
                self._pause(away, exc)
                continue
            away, now = 0, time.monotonic()
            if total == whole:
                return total
            if total != last:
                quiet_since = now
            if is_queued or last is None:
                unqueued_since = now
            needed = SETTLED_AFTER if total > before else _UNSEEN_AFTER
            if now - quiet_since >= needed and now - unqueued_since >= SETTLED_AFTER:
                return total
            self._sleep(pause)
            pause = min(pause * _PAUSE_GROWTH, _LONGEST_PAUSE)

    def _has_queued_uploads(self) -> bool:
        health = self._check_health()
        if not knows_queues(health):
            raise ServerError(f"the server does not know its queues ({health.error or 'RabbitMQ is down'})")
        return bool(health.services.batch_queue_messages)

    def _count(self, wanted: "Counter[bytes]", total: int) -> "Counter[bytes]":
        """How often each of these is in the batch; all of its ``total`` tasks are looked at."""
        there: Counter[bytes] = Counter()
        seen = 0
        for seen, task in enumerate(self._iter_tasks(), 1):
            digest = result_digest(task)
            if digest in wanted:
                there[digest] += 1
        if seen < total:
            raise ConnectionFailedError(f"batch {self._batch_id!r}: an export ended after {seen:,} of {total:,} tasks")
        return there
