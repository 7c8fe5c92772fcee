"""Which tasks of an upload does a batch have, after the answer to that upload was lost?

Ingestion is the server's, in its own order and time: this is as sure as reading can make it.
"""

import time
from collections import Counter
from dataclasses import dataclass
from typing import Iterable, List, Optional

from ._matching import result_digest, task_digest
from ._waiting import AWAY_ERRORS, LONGEST_POLL, SETTLED_AFTER, Connection, ask_health, is_not_ingested, knows_queues
from .exceptions import BatchTimeoutError, ConnectionFailedError, InvalidResponseError, NotFoundError, ServerError
from .models import Task

#: How long nothing of an upload may be seen, while the server answers, before it was not taken. The framework handles
#: one in less than a second, and shows it after its index refresh of 5 s; the rest is for a worker that is busy.
_UNSEEN_AFTER = 30.0
#: How long the queue of uploads, which is everybody's, may keep us from knowing.
_LONGEST_LOOK = 3600.0
_FIRST_PAUSE, _PAUSE_GROWTH, _LONGEST_PAUSE = 0.1, 1.5, 2.0


@dataclass(frozen=True)
class ReadBack:
    """Looks into one batch for tasks whose upload got no answer, until a deadline by ``time.monotonic()``."""

    client: Connection
    batch_id: str
    deadline: float

    def check_deadline(self) -> None:
        """Raise BatchTimeoutError if there is no time left."""
        if time.monotonic() >= self.deadline:
            raise BatchTimeoutError(f"batch {self.batch_id!r}: the time ran out", batch_id=self.batch_id)

    def total(self, **options: int) -> int:
        """How many tasks the batch has just now; 0 where the server says that there is none, which a 404 does not."""
        try:
            return self.client._get_batch(self.batch_id, read_timeout=LONGEST_POLL, **options).total_tasks
        except (NotFoundError, ServerError) as exc:
            if is_not_ingested(exc):
                return 0
            raise

    def find_missing(
        self, chunk: List[Task], before: int, before_tasks: Optional[Iterable[Task]], is_own: bool
    ) -> List[Task]:
        """Those of a chunk that the batch does not have; blocks until that is known.

        By the tasks themselves: of the total alone, tasks that the server lost earlier could be missing.

        Args:
            chunk: What was sent.
            before: How many tasks were sent to the batch, or were in it, before.
            before_tasks: Those sent before, where they can be read once more.
            is_own: Nobody else adds to the batch.

        Raises:
            APIError: The server was away for too long, or which tasks are there can't be told.
            BatchTimeoutError: There was no time left.
        """
        total = self.settled_total(before)
        wanted = Counter(map(task_digest, chunk))
        there = self._count(wanted, total) if total else Counter()
        if not there and not (is_own and total - before >= len(chunk)):  # else it has grown, by what looks otherwise
            return chunk
        alike = None if before_tasks is None else Counter(d for d in map(task_digest, before_tasks) if d in wanted)
        there.subtract(alike or ())
        is_known = is_own and alike is not None and not alike  # nothing else in the batch is like this chunk
        others_may_be_alike = not is_own and max(wanted.values()) > 1
        if not there or (not is_known and (others_may_be_alike or sum(there.values()) != total - before)):
            if is_own and alike is None and any(there[digest] > count for digest, count in wanted.items()):
                # Earlier ones are alike, and can't be counted: the total has to tell.
                if total in (before, before + len(chunk)):
                    return chunk if total == before else []
            raise InvalidResponseError(
                f"batch {self.batch_id!r} has {total:,} tasks, and had {before:,} before an upload of {len(chunk):,} "
                "whose answer was lost; others in it are alike, or something else adds to it: which of them "
                f"are there can't be told{'; a list, which can be read once more, tells more' * (alike is None)}"
            )
        missing = []
        for task in chunk:
            digest = task_digest(task)
            there[digest] -= 1
            if there[digest] < 0:
                missing.append(task)
        return missing

    def settled_total(self, before: int) -> int:
        """The batch's total, once it will not change any more."""
        away, pause = 0, _FIRST_PAUSE
        total: Optional[int] = None
        started = quiet_since = unqueued_since = time.monotonic()
        while True:
            self.check_deadline()
            try:
                last, total = total, self.total(retries=0)
            except (NotFoundError, *AWAY_ERRORS) as exc:
                away, total = away + 1, None
                if away > self.client._retries:
                    raise
                self.client._pause(away, exc)
                continue
            health = ask_health(self.client)
            is_queued = (
                None if health is None else not knows_queues(health) or bool(health.services.batch_queue_messages)
            )
            away, now = 0, time.monotonic()
            if total != last:
                quiet_since = now
            if is_queued or last is None:
                unqueued_since = now
            needed = SETTLED_AFTER if total > before else _UNSEEN_AFTER
            if is_queued is False and now - quiet_since >= needed and now - unqueued_since >= SETTLED_AFTER:
                return total
            if now - started > _LONGEST_LOOK:
                raise ServerError(f"batch {self.batch_id!r} does not come to rest: uploads are queued, or it grows")
            self.client._sleep(pause)
            pause = min(pause * _PAUSE_GROWTH, _LONGEST_PAUSE)

    def _count(self, wanted: "Counter[bytes]", total: int) -> "Counter[bytes]":
        """How often each of these is in the batch; all of its ``total`` tasks are looked at."""
        there: Counter[bytes] = Counter()
        seen = 0
        for seen, task in enumerate(self.client.iter_batch_tasks(self.batch_id), 1):
            digest = result_digest(task)
            if digest in wanted:
                there[digest] += 1
        if seen < total:
            raise ConnectionFailedError(f"batch {self.batch_id!r}: an export ended after {seen:,} of {total:,} tasks")
        return there
