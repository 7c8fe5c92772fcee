"""What the embedded server knows: batches, tasks and their results.

A task's row id is its batch's number and its number in the batch, put together: a batch is a range of
row ids in the order of submission, so that nothing needs an index but the cache. The counters of a
batch are kept in its row, so that asking for them costs the same for any size.

Times are microseconds since 1970, durations milliseconds.
"""

import os
import sqlite3
import time
from collections import Counter
from concurrent.futures import Future
from contextlib import closing
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple, Union
from uuid import UUID, uuid4

from .database import Database

_APPLICATION_ID = 0x53796E67  # "Syng"
_VERSION = 2
_TASK_BITS = 32
_PAGE = 100
_PAGE_CHARACTERS = 1 << 20

#: What a batch counts of its tasks that have ended, and how much each of them adds.
_COUNTERS = {
    "completed": "{task}.status = 'COMPLETED' AND NOT {task}.cached",
    "failed": "{task}.status = 'FAILED'",
    "cached": "{task}.cached",
    "prompt_tokens": "{task}.prompt_tokens * (NOT {task}.cached)",
    "completion_tokens": "{task}.completion_tokens * (NOT {task}.cached)",
    "total_tokens": "{task}.total_tokens * (NOT {task}.cached)",
    "cached_prompt_tokens": "{task}.prompt_tokens * {task}.cached",
    "cached_completion_tokens": "{task}.completion_tokens * {task}.cached",
    "cached_total_tokens": "{task}.total_tokens * {task}.cached",
}


def _count(sign: str, task: str) -> str:
    """What an UPDATE sets, to add a task to the counters or to take it off."""
    return ", ".join(f"{name} = {name} {sign} ({adds.format(task=task)})" for name, adds in _COUNTERS.items())


_SCHEMA = f"""
CREATE TABLE batches (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    batch_id TEXT NOT NULL UNIQUE,
    last_task INTEGER NOT NULL DEFAULT 0,
    total INTEGER NOT NULL DEFAULT 0,
    {" ".join(f"{name} INTEGER NOT NULL DEFAULT 0," for name in _COUNTERS)}
    created_at INTEGER NOT NULL,
    started_at INTEGER,
    completed_at INTEGER
);
CREATE TABLE tasks (  -- what is small first: a scan does not read the pages of long bodies
    id INTEGER PRIMARY KEY,
    status TEXT NOT NULL DEFAULT 'PENDING',
    cached INTEGER NOT NULL DEFAULT 0,
    created_at INTEGER NOT NULL,
    started_at INTEGER,
    completed_at INTEGER,
    duration INTEGER,
    prompt_tokens INTEGER NOT NULL DEFAULT 0,
    completion_tokens INTEGER NOT NULL DEFAULT 0,
    total_tokens INTEGER NOT NULL DEFAULT 0,
    use_cache INTEGER NOT NULL,
    track_progress INTEGER NOT NULL,
    cache_key BLOB,  -- set once the provider has answered
    custom_id TEXT,
    method TEXT NOT NULL,
    url TEXT NOT NULL,
    key INTEGER,  -- in provider_keys
    dataset TEXT,
    source TEXT NOT NULL,
    body TEXT NOT NULL,
    completions TEXT NOT NULL DEFAULT 'null'
);
CREATE INDEX cache ON tasks (cache_key) WHERE cache_key IS NOT NULL;
CREATE TRIGGER task_ended AFTER UPDATE OF status ON tasks BEGIN
    UPDATE batches SET
        {_count("+", "NEW")},
        started_at = MIN(COALESCE(started_at, NEW.started_at), NEW.started_at),
        completed_at = MAX(COALESCE(completed_at, NEW.completed_at), NEW.completed_at)
    WHERE number = NEW.id >> 32;
    UPDATE provider_key_uses SET unfinished = unfinished - 1 WHERE key = NEW.key;
END;
CREATE TRIGGER task_deleted AFTER DELETE ON tasks BEGIN
    UPDATE batches SET total = total - 1, {_count("-", "OLD")} WHERE number = OLD.id >> 32;
    DELETE FROM batches WHERE number = OLD.id >> 32 AND total = 0;
    UPDATE provider_key_uses SET unfinished = unfinished - (OLD.status = 'PENDING') WHERE key = OLD.key;
END;
-- Keys are never moved, since SQLite may leave bytes where a row was, and overwritten after use.
CREATE TABLE provider_keys (number INTEGER PRIMARY KEY, api_key BLOB NOT NULL);
CREATE TABLE provider_key_uses (key INTEGER PRIMARY KEY, unfinished INTEGER NOT NULL);
CREATE TRIGGER key_used AFTER UPDATE OF unfinished ON provider_key_uses WHEN NEW.unfinished = 0 BEGIN
    UPDATE provider_keys SET api_key = zeroblob(length(api_key)) WHERE number = NEW.key;
END;
CREATE TABLE uploads (
    idempotency_key TEXT PRIMARY KEY,
    digest BLOB NOT NULL,
    batch_id TEXT NOT NULL,
    tasks INTEGER NOT NULL
);
CREATE TRIGGER batch_deleted AFTER DELETE ON batches BEGIN  -- its uploads may be sent again
    DELETE FROM uploads WHERE batch_id = OLD.batch_id;
END;
CREATE TABLE settings (id_prefix TEXT NOT NULL);
INSERT INTO settings VALUES (LOWER(HEX(RANDOMBLOB(8))));
"""
#: What was paid for and is in no task (any more); files of version 1.0.0 have no such table.
_DELETED = "CREATE TABLE IF NOT EXISTS deleted (prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL)"


class Stored(NamedTuple):
    """What became of an upload."""

    batch_id: str
    tasks: int
    #: The row id of the first of the tasks; None for an upload that had been stored before.
    first_task: Optional[int]


class Result(NamedTuple):
    """How a task ended."""

    completed: bool
    #: JSON: the provider's answer, or an object with an ``error``.
    completions: str
    duration: int
    prompt_tokens: int = 0
    completion_tokens: int = 0
    total_tokens: int = 0
    cached: bool = False


def now() -> int:
    """The time, in microseconds since 1970."""
    return time.time_ns() // 1000


def batch_number(task_id: int) -> int:
    """The number of the batch that a row id belongs to."""
    return task_id >> _TASK_BITS


def task_ids(batch: int) -> Tuple[int, int]:
    """The row ids that tasks of a batch can have: the lowest, and one past the highest."""
    return batch << _TASK_BITS, (batch + 1) << _TASK_BITS


class Store:
    """The database, open until `close`."""

    def __init__(self, path: Union[str, "os.PathLike[str]"]) -> None:
        self._database = Database(path, _SCHEMA, _DELETED, application_id=_APPLICATION_ID, version=_VERSION)
        self._id_prefix: str = self._read("SELECT id_prefix FROM settings")[0]["id_prefix"]

    def close(self) -> None:
        self._database.close()

    # What changes the database: each gives a future that is done when the change is committed.

    def add(
        self, batch_id: str, rows: Sequence[Tuple[Any, ...]], key: Optional[str], digest: bytes
    ) -> "Future[Optional[Stored]]":
        """Store an upload, whole or not at all; one that comes again, with the same key and digest, only once.

        Rows are custom_id, method, url, api_key, body, dataset, source, use_cache, track_progress; body and source as
        JSON. An empty batch id has one made up. None comes of it if the idempotency key belongs to another upload.
        """

        def operation(connection: sqlite3.Connection) -> Optional[Stored]:
            query = "SELECT digest, batch_id, tasks FROM uploads WHERE idempotency_key = ?"
            earlier = connection.execute(query, (key,)).fetchone()
            if earlier:
                is_same = earlier["digest"] == digest
                return Stored(earlier["batch_id"], earlier["tasks"], None) if is_same else None
            batch, size = batch_id or str(uuid4()), len(rows)
            if key is not None:
                connection.execute("INSERT INTO uploads VALUES (?, ?, ?, ?)", (key, digest, batch, size))
            return Stored(batch, size, _insert_tasks(connection, batch, rows))

        return self._database.write(operation)

    def finish(
        self,
        task_id: int,
        result: Result,
        started_at: int,
        completed_at: int,
        cache_key: Optional[bytes],
        untold: Tuple[int, int] = (0, 0),
    ) -> "Future[None]":
        """Store how a task ended, and forget its provider key; of one deleted meanwhile, only what it cost.

        That is `untold`, in tokens of the prompt and the output, for an answer that does not tell its own.
        """

        def operation(connection: sqlite3.Connection) -> None:
            status = "COMPLETED" if result.completed else "FAILED"
            query = """
                UPDATE tasks SET status = ?, started_at = ?, completed_at = ?, cache_key = ?, completions = ?,
                    duration = ?, prompt_tokens = ?, completion_tokens = ?, total_tokens = ?, cached = ?
                WHERE id = ? AND status = 'PENDING'
            """
            values = (status, started_at, completed_at, cache_key, *result[1:], task_id)
            is_there = connection.execute(query, values).rowcount
            told = (0, 0) if is_there or result.cached else (result.prompt_tokens, result.completion_tokens)
            cost = max(told, untold)
            if any(cost):
                connection.execute("INSERT INTO deleted VALUES (?, ?)", cost)
            query = "SELECT 1 FROM batches WHERE number = ? AND total > completed + failed + cached"
            if not connection.execute(query, (batch_number(task_id),)).fetchone():
                self._database.wipe()  # the batch has ended: its provider keys

        return self._database.write(operation)

    def delete(self, first: int, end: int) -> "Future[int]":
        """Delete the tasks with row ids from `first` to before `end`, and a batch with its last; gives how many."""

        def operation(connection: sqlite3.Connection) -> int:
            query = """
                INSERT INTO deleted SELECT SUM(prompt_tokens), SUM(completion_tokens)
                FROM tasks WHERE id >= ? AND id < ? AND NOT cached GROUP BY id >> 32
            """
            connection.execute(query, (first, end))
            self._database.wipe()
            return connection.execute("DELETE FROM tasks WHERE id >= ? AND id < ?", (first, end)).rowcount

        return self._database.write(operation)

    # What reads it.

    def batch(self, batch_id: str) -> Optional[sqlite3.Row]:
        """The row of a batch, at the same cost for any size. An ended one has no provider key left on the disk."""
        self._database.wait_until_wiped()
        return self._read_one("SELECT * FROM batches WHERE batch_id = ?", batch_id)

    def batches(self) -> List[sqlite3.Row]:
        """The rows of all batches, newest first."""
        self._database.wait_until_wiped()
        return self._read("SELECT * FROM batches ORDER BY number DESC")

    def totals(self) -> sqlite3.Row:
        """The counters of all batches, added up; each 0 where there is none."""
        sums = ", ".join(f"COALESCE(SUM({name}), 0) AS {name}" for name in ["total", *_COUNTERS])
        return self._read(f"SELECT {sums} FROM batches")[0]

    def spent(self) -> sqlite3.Row:
        """The prompt and the completion tokens of all calls, those of deleted tasks included."""
        tokens = "SELECT prompt_tokens AS prompt, completion_tokens AS completion FROM"
        query = f"SELECT TOTAL(prompt), TOTAL(completion) FROM ({tokens} batches UNION ALL {tokens} deleted)"
        return self._read(query)[0]

    def task(self, message_id: str) -> Optional[sqlite3.Row]:
        """The row of a task, with its ``batch_id``."""
        query = "SELECT tasks.*, batch_id FROM tasks, batches WHERE id = ? AND number = id >> 32"
        return self._read_one(query, self.task_id(message_id))

    def pages(self, batch: int, status: Optional[str] = None) -> Iterator[List[sqlite3.Row]]:
        """The rows of a batch's tasks, each with its ``batch_id``, newest first, a few at a time.

        A page has 100 rows, or fewer long ones; no transaction is open in between.
        """
        first, end = task_ids(batch)
        query = """
            SELECT tasks.*, batch_id FROM tasks, batches WHERE number = ? AND id >= ? AND id < ?
            AND status = COALESCE(?, status) ORDER BY id DESC LIMIT ?
        """
        while True:
            page, size = [], 0
            with self._database.reading() as connection:
                with closing(connection.execute(query, (batch, first, end, status, _PAGE))) as rows:
                    for row in rows:
                        page.append(row)
                        size += len(row["body"]) + len(row["completions"])
                        if size >= _PAGE_CHARACTERS:
                            break
            if not page:
                return
            yield page
            end = page[-1]["id"]

    def usage_by_minute(self, batch: int, since: int) -> List[sqlite3.Row]:
        """Sums over the tasks that ended from `since` on, for each minute in which any did."""
        first, end = task_ids(batch)
        query = """
            SELECT completed_at / 60000000 AS minute, COUNT(*) AS total_tasks,
                   SUM(status = 'COMPLETED' AND NOT cached) AS completed_tasks, SUM(status = 'FAILED') AS failed_tasks,
                   SUM(cached) AS cached_tasks, SUM(prompt_tokens) AS prompt_tokens,
                   SUM(completion_tokens) AS completion_tokens, SUM(total_tokens) AS total_tokens,
                   SUM(duration) AS duration, SUM(duration * (status = 'COMPLETED')) AS completed_duration
            FROM tasks WHERE id >= ? AND id < ? AND completed_at >= ? GROUP BY minute ORDER BY minute
        """
        return self._read(query, first, end, since)

    def unfinished_batches(self) -> List[int]:
        """The numbers of the batches that have tasks to run, oldest first."""
        query = "SELECT number FROM batches WHERE total > completed + failed + cached ORDER BY number"
        return [row["number"] for row in self._read(query)]

    def unfinished_tasks(self, batch: int, after: int, limit: int) -> List[sqlite3.Row]:
        """What is needed to run a batch's next tasks; `after` is a row id."""
        first, end = task_ids(batch)
        query = """
            SELECT id, method, url, CAST(api_key AS TEXT) AS api_key, body, use_cache, track_progress
            FROM tasks LEFT JOIN provider_keys ON number = key
            WHERE id > ? AND id < ? AND status = 'PENDING' ORDER BY id LIMIT ?
        """
        return self._read(query, max(after, first), end, limit)

    def cached(self, cache_key: bytes) -> Optional[Result]:
        """The newest result of an identical task that completed."""
        query = """
            SELECT completions, duration, prompt_tokens, completion_tokens, total_tokens
            FROM tasks WHERE cache_key = ? ORDER BY id DESC LIMIT 1
        """
        row = self._read_one(query, cache_key)
        return Result(True, *row)._replace(cached=True) if row else None

    def _read(self, query: str, *values: Any) -> List[sqlite3.Row]:
        with self._database.reading() as connection:
            return connection.execute(query, values).fetchall()

    def _read_one(self, query: str, *values: Any) -> Optional[sqlite3.Row]:
        return next(iter(self._read(query, *values)), None)

    def message_id(self, task_id: int) -> str:
        """The public id of a task: the database's own prefix and the row id, in the form of a UUID."""
        return str(UUID(f"{self._id_prefix}{task_id:016x}"))

    def task_id(self, message_id: str) -> Optional[int]:
        """The row id of a task, which need not be there; None if the database gave no such public id."""
        try:
            task_id = UUID(message_id).int & ((1 << 63) - 1)
        except ValueError:
            return None
        return task_id if self.message_id(task_id) == message_id else None


def _insert_tasks(connection: sqlite3.Connection, batch_id: str, rows: Sequence[Tuple[Any, ...]]) -> int:
    """Add tasks to a batch, made if it is not there; gives the row id of the first."""
    created = now()
    connection.execute("INSERT OR IGNORE INTO batches (batch_id, created_at) VALUES (?, ?)", (batch_id, created))
    query = "SELECT number, last_task FROM batches WHERE batch_id = ?"
    batch, last = connection.execute(query, (batch_id,)).fetchone()
    first: int = task_ids(batch)[0] + last + 1
    keys: Dict[Optional[str], Optional[int]] = {None: None}
    for api_key, count in Counter(row[3] for row in rows if row[3] is not None).items():
        insert = "INSERT INTO provider_keys (api_key) VALUES (?)"
        keys[api_key] = key = connection.execute(insert, (api_key.encode("utf-8"),)).lastrowid
        connection.execute("INSERT INTO provider_key_uses VALUES (?, ?)", (key, count))
    columns = "id, created_at, custom_id, method, url, key, body, dataset, source, use_cache, track_progress"
    query = f"INSERT INTO tasks ({columns}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
    tasks = ((task_id, created, *row[:3], keys[row[3]], *row[4:]) for task_id, row in enumerate(rows, first))
    connection.executemany(query, tasks)
    query = "UPDATE batches SET last_task = last_task + ?, total = total + ? WHERE number = ?"
    connection.execute(query, (len(rows), len(rows), batch))
    return first
