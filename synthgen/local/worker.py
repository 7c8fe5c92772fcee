"""The threads that run tasks: which one is next, what waits, and what became of each.

Of a batch, only a few tasks are out of the database at a time: ready to be called, being called, waiting
to be tried again, waiting for an identical task's answer, or waiting for their result to be stored.
Batches take turns, a few tasks each, so that a small one does not wait for a large one.
"""

import hashlib
import heapq
import itertools
import json
import logging
import sqlite3
import threading
import time
from collections import Counter, OrderedDict, deque
from concurrent.futures import Future
from functools import partial
from typing import Counter as CounterType
from typing import Deque, Dict, List, Optional, Set, Tuple
from urllib.parse import urlsplit

from .provider import CallPolicy, Provider
from .store import Result, Store, batch_number, now

__all__ = ["Workers"]

logger = logging.getLogger(__name__)

#: Seconds until a store that failed (a full disk) is tried again.
_AGAIN = 1.0
#: Seconds that `close` waits for the threads. Only one that is just connecting can take longer, and it does no more.
_JOIN_SECONDS = 2.0


class _Task:
    """A task that is out of the database."""

    def __init__(self, row: sqlite3.Row) -> None:
        self.id, self.url, self.api_key, self.body, self.use_cache, self.track_progress = row
        self.key = _cache_key(self.url, self.body)
        self.started_at: Optional[int] = None
        self.tries = 0
        self.result: Optional[Result] = None


class Workers:
    """Runs every unfinished task of a store, from `start` until `close`.

    Args:
        store: Where tasks come from, and results go.
        count: How many calls may run at a time.
        policy: How calls are made, and made again.
    """

    def __init__(self, store: Store, count: int, policy: CallPolicy) -> None:
        self.count = count
        self._store = store
        self._policy = policy
        self._max_out = max(16 * count, 256)
        self._changed = threading.Condition()
        self._closing = threading.Event()
        #: Batches with tasks still to be read, each with the row id that was read last; the next one to read first.
        self._unread: OrderedDict[int, int] = OrderedDict((batch, 0) for batch in store.unfinished_batches())
        #: The tasks that are out of the database, by row id, and how many of each batch are.
        self._out: Dict[int, _Task] = {}
        self._out_per_batch: CounterType[int] = Counter()
        self._ready: Deque[_Task] = deque()
        self._waiting: List[Tuple[float, int, _Task]] = []
        self._serial = itertools.count()
        #: Tasks whose call failed and will be made again, and why the last of them failed.
        self._repeating: Set[int] = set()
        self._last_error = ""
        self._unstored: Set[int] = set()
        #: By cache key: the task whose answer is waited for, and who waits.
        self._leaders: Dict[bytes, Tuple[_Task, List[_Task]]] = {}
        self._providers = [Provider(policy) for _ in range(count)]
        self._threads: List[threading.Thread] = []

    def start(self) -> None:
        """Begin to run tasks."""
        for provider in self._providers:
            thread = threading.Thread(target=self._work, args=(provider,), name="synthgen-worker", daemon=True)
            thread.start()
            self._threads.append(thread)

    def close(self) -> None:
        """Break off the calls that are running and end the threads; unfinished tasks stay PENDING in the store."""
        with self._changed:
            self._closing.set()
            self._changed.notify_all()
        for provider in self._providers:
            provider.interrupt()
        deadline = time.monotonic() + _JOIN_SECONDS
        for thread in self._threads:
            thread.join(max(deadline - time.monotonic(), 0))

    def added(self, first_task: int) -> None:
        """Tasks were added to a batch; the first of them is this row id."""
        with self._changed:
            batch, before = batch_number(first_task), first_task - 1
            self._unread[batch] = min(self._unread.get(batch, before), before)  # uploads may tell in any order
            self._changed.notify()

    def forget(self, first: int, end: int) -> None:
        """Tasks were deleted: those with row ids from `first` to before `end` are not called any more."""
        with self._changed:
            gone = [task for task_id, task in self._out.items() if first <= task_id < end]
            for task in gone:
                self._let_go(task)
            self._changed.notify()

    def processing(self) -> Dict[int, int]:
        """Since when (`store.now`) each task is being worked on, of those whose progress is tracked."""
        with self._changed:
            out = self._out.values()
            return {task.id: task.started_at for task in out if task.track_progress and task.started_at is not None}

    def trouble(self) -> Optional[str]:
        """How many calls wait to be made again, and why the last of them failed; None where all is well."""
        with self._changed:
            if not self._repeating:
                return None
            return f"calls that failed and will be made again: {len(self._repeating):,}; the last: {self._last_error}"

    def unstored(self) -> int:
        """How many results could not be stored yet."""
        with self._changed:
            return len(self._unstored)

    # The threads.

    def _work(self, provider: Provider) -> None:
        while not self._closing.is_set():
            try:
                task = self._take()
            except sqlite3.Error as exc:
                logger.error("can't read what to do next, trying again: %s", exc)
                self._closing.wait(_AGAIN)
                continue
            if task is None:
                break
            result = task.result or self._call(task, provider)
            if result is not None:  # else another thread may have the task already
                task.result = result
                self._store_result(task)
        provider.close()

    def _call(self, task: _Task, provider: Provider) -> Optional[Result]:
        """The result of a task, or None when there is none yet."""
        try:
            outcome = provider.call(task.url, task.api_key, task.body)
        except Exception as exc:  # what requests lets through for odd URLs; the text may hold the key
            logger.error("a provider can't be called: %s", type(exc).__name__)
            return _failure(f"Request error: {type(exc).__name__}")
        if self._closing.is_set():  # broken off by close()
            return None
        if isinstance(outcome, Result):
            return outcome
        if task.tries == self._policy.retries:
            return _failure(f"{outcome.error} (tried {task.tries + 1} times)", outcome.duration)
        task.tries += 1
        with self._changed:
            if task.id in self._out:  # not deleted
                self._repeating.add(task.id)
            host = urlsplit(task.url).netloc.rpartition("@")[2]  # the rest of a URL may hold a key
            status, is_answer, _ = outcome.error.partition("): ")  # what the provider said may hold the prompt
            self._last_error = f"{host}: {status}" + (")" if is_answer else "")
        self._postpone(task, self._policy.pause(task.tries, outcome.retry_after))
        return None

    def _store_result(self, task: _Task) -> None:
        assert task.result is not None
        key = task.key if task.result.completed and not task.result.cached else None
        moment = now()
        stored = self._store.finish(task.id, task.result, task.started_at or moment, moment, key)
        stored.add_done_callback(partial(self._stored, task))

    def _stored(self, task: _Task, stored: "Future[None]") -> None:
        """In the store's thread: the result is in the database, or could not be written."""
        error = stored.exception()
        with self._changed:
            if error is None:
                self._let_go(task)
            elif task.id in self._out:
                logger.error("can't store a result, trying again: %s", error)
                self._unstored.add(task.id)
                self._postpone(task, _AGAIN)
            self._changed.notify()

    def _postpone(self, task: _Task, seconds: float) -> None:
        with self._changed:
            heapq.heappush(self._waiting, (time.monotonic() + seconds, next(self._serial), task))
            self._changed.notify()

    def _take(self) -> Optional[_Task]:
        """The next task to call, or whose result to store again; None when closing."""
        with self._changed:
            while not self._closing.is_set():
                while self._waiting and self._waiting[0][0] <= time.monotonic():
                    self._ready.append(heapq.heappop(self._waiting)[2])
                while self._ready:
                    task = self._ready.popleft()
                    if task.id in self._out:  # not deleted
                        task.started_at = task.started_at or now()
                        self._changed.notify()  # one thread wakes the next, while there is something to do
                        return task
                if not self._read():
                    self._changed.wait(self._waiting[0][0] - time.monotonic() if self._waiting else None)
        return None

    # Under the lock.

    def _read(self) -> int:
        """Take a few tasks out of the store, of each batch in its turn; gives how many."""
        wanted, count = 2 * self.count, 0
        share = max(wanted // max(len(self._unread), 1), 1)
        for batch, after in list(self._unread.items()):
            limit = min(share, self._max_out - self._out_per_batch[batch])
            rows = self._store.unfinished_tasks(batch, after, limit) if limit > 0 else []
            for row in rows:
                if row["id"] not in self._out:  # read before it was known that the batch had grown
                    self._admit(_Task(row))
                    count += 1
            if rows:
                self._unread[batch] = rows[-1]["id"]
            self._unread.move_to_end(batch)
            if len(rows) < limit:
                del self._unread[batch]
            if count >= wanted:
                break
        return count

    def _admit(self, task: _Task) -> None:
        """Find the way to a task's answer: the cache, an identical task, or a call."""
        is_led = task.use_cache and task.key in self._leaders
        if task.use_cache and not is_led:
            task.result = self._store.cached(task.key)
        self._out[task.id] = task
        self._out_per_batch[batch_number(task.id)] += 1
        if task.result is not None:
            self._store_result(task)
        elif is_led:
            self._leaders[task.key][1].append(task)
        else:
            if task.use_cache:
                self._leaders[task.key] = (task, [])
            self._ready.append(task)

    def _let_go(self, task: _Task) -> None:
        """A task has ended, or was deleted: whoever waits for its answer goes on."""
        if self._out.pop(task.id, None) is None:
            return
        batch = batch_number(task.id)
        self._out_per_batch[batch] -= 1
        if not self._out_per_batch[batch]:
            del self._out_per_batch[batch]
        self._repeating.discard(task.id)
        self._unstored.discard(task.id)
        if self._leaders.get(task.key, (None,))[0] is task:
            for follower in self._leaders.pop(task.key)[1]:
                if follower.id in self._out:
                    self._go_on(follower, task.result)

    def _go_on(self, follower: _Task, result: Optional[Result]) -> None:
        if result is None:  # deleted: the first of its followers is the next leader
            leader, followers = self._leaders.setdefault(follower.key, (follower, []))
            (self._ready if leader is follower else followers).append(follower)
        elif result.completed:
            follower.result = result._replace(cached=True)
            self._store_result(follower)
        else:
            self._ready.append(follower)


def _failure(error: str, duration: int = 0) -> Result:
    return Result(False, json.dumps({"error": error}), duration)


def _cache_key(url: str, body: str) -> bytes:
    canonical = json.dumps(json.loads(body), sort_keys=True)
    return hashlib.sha256(f"{url}\n{canonical}".encode()).digest()
