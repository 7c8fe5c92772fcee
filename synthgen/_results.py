"""Results that wait on the disk until their turn: sorted to their tasks in little memory, however many they are."""

import errno
import json
import os
import sqlite3
import sys
import tempfile
from contextlib import contextmanager, suppress
from itertools import islice
from typing import Any, BinaryIO, Iterable, Iterator, List, Optional, Tuple, TypeVar

from ._matching import UNFINISHED, LookUp, Name, result_digest, result_name, task_digest, task_name
from ._stream import decoded
from .models import Task, TaskResponse

_Item = TypeVar("_Item")

_SETUP = (
    "PRAGMA journal_mode = OFF",
    "PRAGMA synchronous = OFF",
    "CREATE TABLE tasks (position INTEGER PRIMARY KEY, digest BLOB, custom_id TEXT, name TEXT, short_name TEXT)",
    "CREATE TABLE results (id INTEGER PRIMARY KEY, digest BLOB, message_id TEXT, ok INTEGER, name TEXT, source BLOB)",
    "CREATE TABLE matched (position INTEGER PRIMARY KEY, result_id INTEGER UNIQUE)",
    "BEGIN",  # and no end: nothing is ever read back from what a process left
)
_DERIVED = (
    "CREATE INDEX IF NOT EXISTS tasks_by_digest ON tasks (digest, name, position)",
    "CREATE INDEX IF NOT EXISTS results_by_digest ON results (digest, name, ok DESC)",
    """
    CREATE TABLE IF NOT EXISTS alike AS
    SELECT digest FROM tasks GROUP BY digest HAVING COUNT(DISTINCT name) > 1
    """,
)
#: The results that only a custom_id tells from others, and that came without.
_UNNAMED = """
    SELECT id, message_id FROM results WHERE id > ? AND name IS NULL AND digest IN (SELECT digest FROM alike)
    ORDER BY id LIMIT 1000
"""
#: What tasks and results that are left are matched by, besides their digests: as in `_match_any`.
_NAMES = (("name", "name"), ("short_name", "name"), ("''", "COALESCE(name, '')"))
_TASKS_LEFT = """
    SELECT digest, {0}, position FROM tasks WHERE position NOT IN (SELECT position FROM matched)
    ORDER BY digest, {0}, position
"""
_RESULTS_LEFT = """
    SELECT digest, {0}, id FROM results WHERE {0} IS NOT NULL AND id NOT IN (SELECT result_id FROM matched)
    ORDER BY digest, {0}, ok DESC
"""


def in_pieces(items: Iterable[_Item], size: int = 1000) -> Iterator[List[_Item]]:
    """The items, so many at a time."""
    iterator = iter(items)
    for first in iterator:
        yield [first, *islice(iterator, size - 1)]


class ResultFile:
    """Tasks, by their digests, and their results, in a file that is gone at the end, however that comes.

    Args:
        beside: The file is in the folder of this one; where that has none, in the system's for such files.

    Attributes:
        tasks: How many tasks were noted.

    Raises:
        OSError: From any method: the disk is full, say.
    """

    needs_source = True

    def __init__(self, beside: BinaryIO) -> None:
        self.tasks = 0
        name = getattr(beside, "name", None)
        folder = os.path.dirname(name) if isinstance(name, str) and os.path.isfile(name) else None
        handle, self._path = tempfile.mkstemp(".part", "results.", folder)
        os.close(handle)
        # An asyncio client closes it in another thread than it made it in.
        self._db = sqlite3.connect(self._path, isolation_level=None, check_same_thread=False)
        if sys.platform != "win32":
            os.unlink(self._path)  # what is open lives on, and a killed process leaves nothing
        try:
            for statement in _SETUP:
                self._write(statement)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let go of the file."""
        self._db.close()
        with suppress(FileNotFoundError):
            os.unlink(self._path)

    def note(self, tasks: Iterable[Task]) -> None:
        """Note the next tasks."""
        for task in tasks:
            names = json.dumps(task_name(task)), json.dumps((task.custom_id, None, None))
            row = (self.tasks, task_digest(task), task.custom_id, *names)
            self._write("INSERT INTO tasks VALUES (?, ?, ?, ?, ?)", row)
            self.tasks += 1

    def match(self, results: Iterable[Tuple[TaskResponse, bytes]], look_up: LookUp) -> Tuple[int, int]:
        """Sort results to the tasks, in place of those of an earlier call.

        Args:
            results: What came back, each with its JSON; unfinished tasks among them are passed over.
            look_up: Told of those that only their custom_id tells apart, where the server left that out.

        Returns:
            How many tasks have a result, and how many results belong to no task.
        """
        self._write("DELETE FROM results")
        self._write("DELETE FROM matched")
        received = matched = 0
        for result, source in results:
            if result.status not in UNFINISHED:
                row = (result_digest(result), result.message_id, result.ok, _json_or_none(result_name(result)), source)
                self._write("INSERT INTO results VALUES (NULL, ?, ?, ?, ?, ?)", row)
                received += 1
        for statement in _DERIVED:
            self._write(statement)
        self._name_results(look_up)
        for of_task, of_result in _NAMES:
            tasks, results = self._read(_TASKS_LEFT.format(of_task)), self._read(_RESULTS_LEFT.format(of_result))
            for pair in _merged(tasks, results):
                self._write("INSERT INTO matched VALUES (?, ?)", pair)
                matched += 1
        return matched, received - matched

    def __iter__(self) -> Iterator[TaskResponse]:
        """Each result, in the order of the tasks, with its task's custom_id."""
        joined = "matched JOIN tasks USING (position) JOIN results ON results.id = result_id"
        for source, custom_id in self._read(f"SELECT source, tasks.custom_id FROM {joined} ORDER BY position"):
            result = TaskResponse.model_validate(decoded(source))
            result.custom_id = custom_id
            yield result

    def missing(self) -> Iterator[int]:
        """The position of each task without a result."""
        for (position,) in self._read("SELECT position FROM tasks EXCEPT SELECT position FROM matched ORDER BY 1"):
            yield position

    def _name_results(self, look_up: LookUp) -> None:
        last = 0
        while True:
            rows = list(self._read(_UNNAMED, last))
            if not rows:
                return
            for (last, _), result in zip(rows, look_up([message_id for _, message_id in rows])):
                name = _json_or_none(result_name(result) if result else None)
                self._write("UPDATE results SET name = ? WHERE id = ?", (name, last))

    def _read(self, query: str, *values: Any) -> Iterator[Any]:
        with _as_os_errors(self._path):
            yield from self._db.execute(query, values)

    def _write(self, statement: str, values: Tuple[Any, ...] = ()) -> None:
        with _as_os_errors(self._path):
            self._db.execute(statement, values)


def _json_or_none(name: Optional[Name]) -> Optional[str]:
    return None if name is None else json.dumps(name)


def _merged(tasks: Iterator[Any], results: Iterator[Any]) -> Iterator[Tuple[int, int]]:
    """Pairs of what is at the end of each, where what is before it is the same; both are in order."""
    task = next(tasks, None)
    for digest, name, result_id in results:
        while task is not None and task[:2] < (digest, name):
            task = next(tasks, None)
        if task is None:
            return
        if task[:2] == (digest, name):
            yield task[2], result_id
            task = next(tasks, None)


@contextmanager
def _as_os_errors(path: str) -> Iterator[None]:
    try:
        yield
    except sqlite3.OperationalError as exc:
        number = errno.ENOSPC if "full" in str(exc) else errno.EIO
        raise OSError(number, f"results wait in this file, and {exc}", path) from exc
