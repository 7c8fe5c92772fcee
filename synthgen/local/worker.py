"""The threads that run tasks: which one is next, what waits, and what became of each.

Of a batch, only a few tasks are out of the database at a time: waiting for their account, being called, waiting
to be tried again, waiting for an identical task's answer, or waiting for their result to be stored.
Batches take turns, a few tasks each, so that a small one does not wait for a large one.
"""

import hashlib
import heapq
import json
import logging
import math
import sqlite3
import threading
import time
from collections import Counter, defaultdict, deque
from typing import Any, Callable, DefaultDict, Deque, Dict, List, Optional, Tuple
from urllib.parse import urlsplit

from ..exceptions import ConfigurationError
from .pace import Account, Budget, Call, Limits, clock
from .provider import CallPolicy, Kind, Outcome, Provider
from .store import Result, Store, batch_number, now

logger: logging.Logger = logging.getLogger(__name__)

#: Seconds until a store that failed (a full disk) is tried again.
_AGAIN = 1.0
#: Seconds that `close` waits for the threads. Only one that is just connecting can take longer, and it does no more.
_JOIN_SECONDS = 2.0
#: How many tasks of a batch may be out of the database; this many only while they wait for an account.
_MAX_OUT = 4096


class _Task:
    """A task that is out of the database."""

    def __init__(self, row: sqlite3.Row, account: Account) -> None:
        self.id, self.method, self.url, self.api_key, self.body, self.use_cache, self.track_progress = row
        body = json.loads(self.body)
        name = self.url if self.method == "POST" else f"{self.method} {self.url}"
        self.key = hashlib.sha256(f"{name}\n{json.dumps(body, sort_keys=True)}".encode()).digest()
        self.account = account
        self.group = self.key, account
        self.estimate = account.estimate(body)
        self.started_at: Optional[int] = None
        self.call: Call  # the last one, once there is one
        #: How many of its calls failed, and the first of them when; how many it has used up.
        self.failures, self.failed_at = 0, math.inf
        self.tries = 0
        #: The tokens, of the prompt and the output, that its call counts for although the answer tells none.
        self.untold = 0, 0
        self.result: Optional[Result] = None
        #: Whether its call failed and will be made again.
        self.is_repeating = False
        #: Whether identical tasks may have the result.
        self.is_usable = False
        #: Identical tasks that wait for the result. If they can't have it, two of them are called, for the others.
        self.followers: List[_Task] = []


class Workers:
    """Runs every unfinished task of a store, from `start` until `close`; so many calls run at a time."""

    def __init__(self, store: Store, count: int, policy: CallPolicy, limits: Limits) -> None:
        self.count = count
        self._store = store
        self._policy = policy
        self._limits = limits
        self._budget = Budget(limits, *store.spent())
        self._changed = threading.Condition()
        self._is_closing = False
        #: Batches with tasks still to be read, each with the row id that was read last; the next one to read first.
        self._unread = dict.fromkeys(store.unfinished_batches(), 0)
        #: After so many calls tasks are read, whatever waits to be called: those of a new batch may go first.
        self._until_read = 0
        #: The tasks that are out of the database, by row id, and how many of each batch are.
        self._out: Dict[int, _Task] = {}
        self._out_per_batch: Counter[int] = Counter()
        #: By provider and a digest of the key; and those of them that have tasks to call, in the order of their turns.
        self._accounts: Dict[bytes, Account] = {}
        self._queued: Dict[Account, None] = {}
        #: The tasks that wait for money; and those that wait for a moment, each with what is done then.
        self._unaffordable: Deque[_Task] = deque()
        self._waiting: List[Tuple[float, int, Callable[[], None]]] = []
        #: Why the last of the calls failed that will be made again.
        self._last_error = ""
        #: The tasks whose results are not stored yet, though they may be paid for, and whether that has failed.
        self._unstored: Dict[int, bool] = {}
        #: By cache key and account: the task whose answer the next identical one waits for.
        self._leaders: Dict[Tuple[bytes, Account], _Task] = {}
        self._providers = [Provider(policy) for _ in range(count)]
        self._threads: List[threading.Thread] = []

    def start(self) -> None:
        """Begin to run tasks, once all threads are there."""
        with self._changed:
            for provider in self._providers:
                thread = threading.Thread(target=self._work, args=(provider,), name="synthgen-worker", daemon=True)
                try:
                    thread.start()
                except RuntimeError as exc:
                    self._is_closing = True
                    raise ConfigurationError(f"{exc} for {self.count} workers: give fewer") from exc
                self._threads.append(thread)

    def close(self) -> None:
        """Break off the calls that are running and end the threads; unfinished tasks stay PENDING in the store."""
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
        for provider in self._providers:
            provider.interrupt()
        deadline = time.monotonic() + _JOIN_SECONDS
        for thread in self._threads:
            thread.join(max(deadline - time.monotonic(), 0))
        with self._changed:
            for _, task_id, store_again in list(self._waiting):
                if self._unstored.get(task_id):
                    store_again()  # perhaps there is room by now

    def added(self, first_task: int) -> None:
        """Tasks were added to a batch; the first of them is this row id."""
        with self._changed:
            batch, before = batch_number(first_task), first_task - 1
            self._unread[batch] = min(self._unread.get(batch, before), before)  # uploads may tell in any order
            self._until_read = 0
            for account in self._accounts.values():
                account.reopen()
            self._changed.notify()

    def forget(self, first: int, end: int) -> None:
        """Tasks were deleted: those with row ids from `first` to before `end` are not called any more."""
        with self._changed:
            for task in [task for task_id, task in self._out.items() if first <= task_id < end]:
                self._let_go(task)
            self._changed.notify()

    def processing(self) -> DefaultDict[int, Dict[int, int]]:
        """By batch, since when (`store.now`) each task is being worked on, of those whose progress is tracked."""
        processing: DefaultDict[int, Dict[int, int]] = defaultdict(dict)
        with self._changed:
            for task in self._out.values():
                if task.track_progress and task.started_at is not None:
                    processing[batch_number(task.id)][task.id] = task.started_at
        return processing

    def health(self, unfinished: int) -> Tuple[int, Optional[str], Optional[Dict[str, Any]]]:
        """How many results could not be stored yet; what holds things up, and the budget, or None.

        A budget is what was spent, the cap, and how many of the unfinished tasks wait for a higher one.
        """
        with self._changed:
            moment = time.monotonic()
            troubles = [account.trouble(moment) for account in self._accounts.values()]
            repeating = sum(task.is_repeating for task in self._out.values())
            if repeating:
                count = f"calls that failed and will be made again: {repeating:,}"
                dues = [due for due, task_id, _ in self._waiting if task_id in self._out]
                is_long = len(dues) >= repeating and min(dues) - moment > self._policy.longest_pause  # all wait
                until = f"; no call before {clock(min(dues))}" if is_long else ""
                troubles.append(f"{count}; the last: {self._last_error}{until}")
            spent, cap = self._budget.spent, self._budget.cap
            is_idle = not (self._budget.running or self._queued or self._waiting)
            waiting = unfinished if is_idle and any(task.id in self._out for task in self._unaffordable) else 0
            if waiting:
                troubles.append(f"the budget of {cap:g} is used up, {spent:.6g} were spent")
            budget = None if cap is None else {"spent": spent, "cap": cap, "waiting": waiting}
            unstored = sum(self._unstored.values())
            return unstored, "; ".join(filter(None, troubles)) or None, budget

    # The threads.

    def _work(self, provider: Provider) -> None:
        task = self._take()
        while task is not None:
            outcome = provider.call(task.method, task.url, task.api_key, task.body)
            task = self._take((task, outcome))
        provider.close()

    def _end(self, task: _Task, result: Result) -> None:
        """Store how a task ended."""
        task.result = result
        key = task.key if task.is_usable or result.cached else None
        moment = now()
        stored = self._store.finish(task.id, result, task.started_at or moment, moment, key, task.untold)
        stored.add_done_callback(lambda stored: self._stored(task, result, stored.exception()))

    def _stored(self, task: _Task, result: Result, error: Optional[BaseException]) -> None:
        """In the store's thread: the result is in the database, or could not be written."""
        with self._changed:
            if error is None:
                self._let_go(task)
            else:
                logger.error("can't store a result, trying again: %s", error)
                self._unstored[task.id] = True
                self._postpone(task, _AGAIN, lambda: self._end(task, result))
            self._changed.notify()

    def _take(self, ended: Optional[Tuple[_Task, Outcome]] = None) -> Optional[_Task]:
        """The next task to call, after what has become of the last one; None when closing, which breaks calls off."""
        with self._changed:
            if ended is not None and (not self._is_closing or ended[1].result is not None):
                self._learn(*ended)
            while not self._is_closing:
                moment = time.monotonic()
                while self._waiting and self._waiting[0][0] <= moment:
                    heapq.heappop(self._waiting)[2]()
                task, delay = self._next(moment) if self._until_read > 0 else (None, 0.0)
                if task is not None:
                    self._changed.notify()  # one thread wakes the next, while there is something to do
                    return task
                try:
                    pause = 0.0 if self._read() else delay
                except sqlite3.Error as exc:
                    logger.error("can't read what to do next, trying again: %s", exc)
                    pause = _AGAIN
                self._changed.wait(pause)
        return None

    # Under the lock.

    def _next(self, moment: float) -> Tuple[Optional[_Task], float]:
        """A task that may be called now, or how long until there may be one."""
        delays = [threading.TIMEOUT_MAX, *(due - moment for due, _, _ in self._waiting[:1])]
        # Those would be paid for, and perhaps lost.
        is_behind = len(self._unstored) >= self.count or any(self._unstored.values())
        for account in [] if is_behind else list(self._queued):
            for task in iter(account.waiting.first, None):
                delay = account.delay(task.estimate, moment) if task.id in self._out else 0.0
                if delay > 0:
                    delays.append(delay)
                    break
                account.waiting.pop()
                if task.id in self._out and self._start(task, moment):
                    self._until_read -= 1
                    self._queued[account] = self._queued.pop(account)  # behind the others
                    return task, 0.0
            else:
                del self._queued[account]  # nothing waits for it any more
        return None, min(delays)

    def _start(self, task: _Task, moment: float) -> bool:
        """Take a task to be called, if its account is in order, and there is money for it."""
        if task.account.verdict is not None:
            self._end(task, _failure(f"not called: {task.account.verdict}"))
            return False
        cost = self._budget.reserve(task.estimate)
        if cost is None:
            self._unaffordable.append(task)
            return False
        task.call = task.account.start(task.estimate, cost, moment, task.failed_at)
        task.started_at, task.untold = task.started_at or now(), self._budget.tokens(task.estimate)
        return True

    def _queue(self, task: _Task) -> None:
        """Let a task wait until its account may be called."""
        task.account.waiting.append(task)
        self._queued[task.account] = None

    def _postpone(self, task: _Task, seconds: float, then: Callable[[], None]) -> None:
        heapq.heappush(self._waiting, (time.monotonic() + seconds, task.id, then))

    def _learn(self, task: _Task, outcome: Outcome) -> None:
        """What a call has come to: the task's result, or another try."""
        account = task.account
        account.ended(task.call, outcome, time.monotonic())
        self._budget.ended(task.call.cost, outcome)
        if self._budget.cap is None or outcome.result is None or outcome.result.total_tokens:
            task.untold = 0, 0
        while self._unaffordable:
            self._queue(self._unaffordable.popleft())
        error = outcome.error
        if outcome.kind is Kind.REFUSED:
            self._queue(task)
            return
        if outcome.kind is Kind.FAILED:
            task.failures += 1
            task.failed_at = min(task.failed_at, time.monotonic())
            if outcome.is_reached or not account.is_away:  # else it is not the task's fault
                task.tries += 1
            if task.tries <= self._policy.retries and account.verdict is None:
                self._repeat(task, outcome)
                return
            error = f"{error} (tried {task.failures} times)"
        task.is_usable = outcome.is_usable
        self._unstored[task.id] = False
        self._end(task, (outcome.result or _failure(error))._replace(duration=outcome.duration))

    def _repeat(self, task: _Task, outcome: Outcome) -> None:
        """Let a task wait for another try."""
        task.is_repeating = True
        # What the provider said may hold the prompt, and anybody may ask for /health.
        status = outcome.error.partition(": ")[0] if outcome.is_reached else outcome.error
        self._last_error = f"{task.account.name}: {status}"
        if task.account.is_away:
            self._queue(task)
        else:
            pause = self._policy.pause(task.tries, outcome.retry_after)
            self._postpone(task, pause, lambda: self._queue(task))

    def _account(self, url: str, api_key: Optional[str]) -> Account:
        """The account that a call belongs to."""
        try:
            parts = urlsplit(url.lower())
            provider = f"{parts.scheme}://{parts.hostname}:{parts.port or (443 if parts.scheme == 'https' else 80)}"
            name = parts.netloc.rpartition("@")[2]
        except ValueError:  # no URL
            provider = name = ""
        key = hashlib.sha256(f"{provider}\n{api_key or ''}".encode()).digest()
        if key not in self._accounts:
            self._accounts[key] = Account(name, self._policy, self._limits)
        return self._accounts[key]

    def _read(self) -> int:
        """Take a few tasks out of the store, of each batch in its turn; gives how many."""
        wanted, count = 2 * self.count, 0
        self._until_read = wanted
        share = max(wanted // max(len(self._unread), 1), 1)
        for batch, after in list(self._unread.items()):
            limit = min(share, max(16 * self.count, _MAX_OUT) - self._out_per_batch[batch])
            rows = self._store.unfinished_tasks(batch, after, limit) if limit > 0 else []
            for row in rows:
                if row["id"] not in self._out:  # read before it was known that the batch had grown
                    self._admit(_Task(row, self._account(row["url"], row["api_key"])))
                    count += 1
            del self._unread[batch]
            if len(rows) >= limit:  # there may be more: the others come first
                self._unread[batch] = rows[-1]["id"] if rows else after
            if count >= wanted:
                break
        return count

    def _admit(self, task: _Task) -> None:
        """Find the way to a task's answer: the cache, an identical task, or a call."""
        leader = self._leaders.get(task.group) if task.use_cache else None
        cached = self._store.cached(task.key) if task.use_cache and leader is None else None
        self._out[task.id] = task
        self._out_per_batch[batch_number(task.id)] += 1
        if cached is not None:
            self._end(task, cached)
        elif leader is not None:
            leader.followers.append(task)
        else:
            if task.use_cache:
                self._leaders[task.group] = task
            self._queue(task)

    def _let_go(self, task: _Task) -> None:
        """A task has ended, or was deleted: whoever waits for its answer goes on."""
        self._unstored.pop(task.id, None)
        if self._out.pop(task.id, None) is None:
            return
        self._out_per_batch[batch_number(task.id)] -= 1
        if self._leaders.get(task.group) is task:
            del self._leaders[task.group]
        followers = [follower for follower in task.followers if follower.id in self._out]
        if task.result is not None and task.is_usable:
            for follower in followers:
                self._end(follower, task.result._replace(cached=True))
            return
        parts = [followers] if task.result is None else [followers[::2], followers[1::2]]  # deleted: it was no failure
        for leader, *followers in filter(None, parts):
            leader.followers = followers
            self._leaders[task.group] = leader
            self._queue(leader)


def _failure(error: str) -> Result:
    return Result(False, json.dumps({"error": error}), 0)
