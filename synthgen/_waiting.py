"""When is a batch done, and when will it never be?

By our own count: the server says COMPLETED between two chunks, drops malformed tasks without a trace, and
may have nobody to run the rest.
"""

import math
import time
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Iterator, Optional, Protocol

from ._options import RunOptions
from ._progress import health_rows
from ._retry import LONGEST_RETRY_AFTER
from .exceptions import (
    APIError,
    BatchStalledError,
    BatchTimeoutError,
    BudgetExceededError,
    ConnectionFailedError,
    InvalidResponseError,
    NotFoundError,
    RateLimitError,
    ServerError,
)
from .models import Batch, HealthResponse, HealthStatus, TaskResponse
from .monitor import Monitor

_FIRST_PAUSE = 0.1
#: How long nothing may move before the server is asked whether it knows of trouble.
_ASK_AFTER = 10.0
_PAUSE_GROWTH = 1.5
#: Counts lag behind by the framework's index refresh, 5 s: a total that was the same for longer is final.
SETTLED_AFTER = 6.0
#: How long one poll waits for bytes; less before a deadline, but the last one, too, needs time for an answer.
LONGEST_POLL = 30.0
_SHORTEST_POLL = 1.0
_NOT_SEEN = Batch(batch_id="", batch_status="")
#: After these the server is away, and may be back at the next poll.
AWAY_ERRORS = (ConnectionFailedError, InvalidResponseError, RateLimitError, ServerError)
#: While all of these stay the same, nothing moves.
_counters = attrgetter(
    "total_tasks", "pending_tasks", "processing_tasks", "completed_tasks", "cached_tasks", "failed_tasks"
)


class Connection(Protocol):
    """What waiting for a batch, uploading it and reading it back ask of the client."""

    _retries: int
    _idempotent_uploads: bool
    _given_session: Any

    def check_health(self) -> HealthResponse: ...
    def iter_batch_tasks(self, batch_id: str) -> Iterator[TaskResponse]: ...
    def _get_batch(self, batch_id: str, **options: Any) -> Batch: ...
    def _upload(self, batch_id: str, lines: bytes, key: str) -> str: ...
    def _was_refused(self, exc: Exception) -> bool: ...
    def _pause(self, repeats: int, error: APIError) -> None: ...
    def _sleep(self, seconds: float) -> None: ...


@dataclass
class BatchWait:
    """Polls one batch, until a deadline by ``time.monotonic()``. `wait` may be called again when it proved to be early.

    Attributes:
        submitted: How many tasks it will have; None takes the server's word, once that has settled.
        batch: The batch when last seen.
    """

    client: Connection
    options: RunOptions
    monitor: Monitor
    batch_id: str
    submitted: Optional[int]
    deadline: float
    batch: Optional[Batch] = None

    def __post_init__(self) -> None:
        stall_timeout = math.inf if self.options.stall_timeout is None else self.options.stall_timeout
        # Until a total has settled, a batch that is done stands still, too, and one that is none may be on its way.
        self._stall_timeout = max(stall_timeout, SETTLED_AFTER if self.options.batch_id is not None else 0.0)
        #: When a counter last changed; where the silence begins that may be a stall; when to look for results again.
        self._moved_at = self._quiet_since = self._not_before = time.monotonic()
        self._away_since: Optional[float] = None
        self._retry_after = 0.0
        self._early = 0
        self._trouble: Optional[str] = None
        self._asked_at = self._moved_at

    @property
    def expected(self) -> int:
        """How many tasks have to have an outcome."""
        return self._seen.total_tasks if self.submitted is None else self.submitted

    @property
    def waiting(self) -> int:
        """How many tasks have no outcome yet, by the server's count when the batch was last seen."""
        return self._seen.pending_tasks + self._seen.processing_tasks

    @property
    def _is_unknown(self) -> bool:
        """Whether nothing was seen of a batch that somebody named; `_is_done` tells when there is none."""
        return self.batch is None and self.options.batch_id is not None

    @property
    def _seen(self) -> Batch:
        return self.batch or _NOT_SEEN

    def wait(self) -> Optional[HealthResponse]:
        """Block until every task has an outcome, or until none of those without one will get it.

        Returns:
            None in the first case; in the second, what the server says of its queues.

        Raises:
            BatchTimeoutError: The deadline passed. The batch goes on.
            BatchStalledError: Tasks wait in a queue that nobody consumes.
            BudgetExceededError: Tasks wait for money.
            NotFoundError: There is no such batch, or it was deleted meanwhile.
        """
        pause = _FIRST_PAUSE
        while True:
            if self.poll():
                if self._is_done():
                    return None
                self._look_for_trouble()
                stuck = self._look_for_stall()
                if stuck is not None:
                    return stuck
            self._pause(max(min(pause, self.options.poll_interval), self._retry_after))
            pause *= _PAUSE_GROWTH

    def came_early(self) -> None:
        """Results were missing although the counts add up: let the counts move, or some time pass, first."""
        self._early += 1
        self._not_before = time.monotonic() + min(2.0**self._early, LONGEST_POLL)

    def poll(self) -> bool:
        """Look at the batch, and give whether the server answered; if it did not, `wait` waits for it."""
        self._retry_after = 0.0
        before = self.batch
        read_timeout = min(LONGEST_POLL, max(self._time_left(), _SHORTEST_POLL))
        try:
            self.batch = self.client._get_batch(self.batch_id, retries=0, read_timeout=read_timeout)
        except (NotFoundError, *AWAY_ERRORS) as exc:
            is_none = is_not_ingested(exc)
            if is_none and self.batch is not None and isinstance(exc, NotFoundError):
                raise  # it was deleted
            if not is_none or self.batch is not None:
                self._went_away(exc)
                return False
        now = time.monotonic()
        if self._away_since is not None:
            self.monitor.note(f"the server is back after {now - self._away_since:.0f} s")
            self._quiet_since += now - self._away_since
            self._away_since = None
        if self.batch and (before is None or _counters(self.batch) != _counters(before)):
            self._moved_at = self._quiet_since = self._not_before = now
        self.monitor.batch(self.batch, self.expected, self._seen.cost(*self.options.prices))
        return True

    def _went_away(self, exc: APIError) -> None:
        if isinstance(exc, RateLimitError):
            self._retry_after = min(exc.retry_after or 0.0, LONGEST_RETRY_AFTER)
        if self._away_since is None:
            self._away_since = time.monotonic()
            self.monitor.note(f"server away since {time.strftime('%H:%M:%S')}, still trying: {exc}")

    def _is_done(self) -> bool:
        batch, now = self.batch, time.monotonic()
        if self.submitted is not None and not self._is_unknown:
            return not self.waiting and self._seen.finished_tasks >= self.submitted and now >= self._not_before
        rested = now - max(self._moved_at, self._not_before)
        if (batch is not None and not batch.done) or rested < SETTLED_AFTER:
            return False
        health = ask_health(self.client)
        if health is None or not knows_queues(health):  # nobody tells whether more is on its way
            return batch is not None and now - max(self._quiet_since, self._not_before) >= self._stall_timeout
        if health.services.batch_queue_messages:
            return False
        if batch is None:
            raise NotFoundError(f"batch {self.batch_id!r}: no such batch (was it deleted?)", status_code=404)
        return True

    def _look_for_trouble(self) -> None:
        """Pass on what the server says of itself while nothing moves, such as a provider that is not there."""
        now = time.monotonic()
        if now - max(self._moved_at, self._asked_at) < _ASK_AFTER:
            return
        self._asked_at = now
        health = ask_health(self.client)
        if health is None:
            return
        if health.budget is not None and health.budget.waiting and self.waiting:
            spent, cap = health.budget.spent, health.budget.cap
            raise BudgetExceededError(
                f"batch {self.batch_id!r}: {spent:.6g} of {cap:.6g} are spent, and {self.waiting:,} tasks wait that "
                "may cost more than is left: start the server on the same database with a higher max_cost to go on",
                batch_id=self.batch_id,
                spent=spent,
                cap=cap,
                waiting=self.waiting,
            )
        if health.error and health.error != self._trouble:
            self._trouble = health.error
            self.monitor.note(health.error)

    def _look_for_stall(self) -> Optional[HealthResponse]:
        now = time.monotonic()
        if now - self._quiet_since < self._stall_timeout:
            return None
        health = ask_health(self.client)
        if health is not None and knows_queues(health):
            services = health.services
            if not self._is_unknown and not self.waiting and not services.batch_queue_messages:
                return health
            no_consumer = self.waiting and services.task_queue_consumers == 0
            if no_consumer or (services.batch_queue_messages and services.batch_queue_consumers == 0):
                raise BatchStalledError(
                    f"batch {self.batch_id!r} stands still: {self.waiting:,} tasks wait; {describe_queues(health)}",
                    batch_id=self.batch_id,
                    batch=self.batch,
                    health=health,
                )
        self._quiet_since = now
        has_all = self.submitted is not None and self._seen.finished_tasks >= self.submitted
        if health is not None and self.waiting and has_all:
            return health  # what waits may have been ingested twice, and run once: the results tell
        self.monitor.note(
            f"nothing has moved for {now - self._moved_at:.0f} s; {describe_queues(health)}. "
            "A provider may be slow, or waited for between retries"
        )
        return None

    def _time_left(self) -> float:
        return max(self.deadline - time.monotonic(), 0.0)

    def _pause(self, seconds: float) -> None:
        if not self._time_left():
            of = f" of {self.submitted:,}" if self.submitted is not None else ""
            finished = f"{self._seen.finished_tasks:,}{of}"
            raise BatchTimeoutError(
                f"batch {self.batch_id!r}: {finished} tasks finished when the time ran out; "
                f"come back to it with {self.options.way_back(self.batch_id)}",
                batch_id=self.batch_id,
                batch=self.batch,
            )
        self.client._sleep(min(seconds, self._time_left()))


def ask_health(client: Connection) -> Optional[HealthResponse]:
    """What the server says of itself; None if it does not answer: the next look at the batch tells more."""
    try:
        return client.check_health()
    except APIError:  # a proxy's 404, too
        return None


def is_not_ingested(error: APIError) -> bool:
    """Whether the server has nothing of a batch, yet or any more: it says null; a 404 with an answer is a proxy's, say.

    Any read of a new framework fails until it has ingested its first task.
    """
    if isinstance(error, NotFoundError):
        return error.response is None
    return "index_not_found_exception" in error.message


def knows_queues(health: HealthResponse) -> bool:
    """Whether what it says of the queues is so: with RabbitMQ down the framework calls them empty."""
    return health.services.rabbitmq != HealthStatus.UNHEALTHY


def describe_queues(health: Optional[HealthResponse]) -> str:
    """The two queues in words, as far as the server tells."""
    if health is None:
        return "the server does not tell its health"
    if not knows_queues(health):
        return "RabbitMQ is down, and nothing known of its queues"
    rows = [f"{name}: {state}" for name, state in health_rows(health) if name.endswith("queue")]
    return "; ".join(rows) or "the server tells nothing of its queues"
