"""A SQLite file for many threads: one that writes, in groups, and any that read.

Whatever was asked to be written while a group was being committed is the next group, so that many small
writes cost few commits. What was committed survives the end of the process, and of the machine (WAL,
synchronous=FULL).
"""

import logging
import os
import queue
import sqlite3
import threading
from collections import deque
from concurrent.futures import Future
from contextlib import ExitStack, closing, contextmanager, suppress
from tempfile import TemporaryDirectory
from typing import Any, Callable, Deque, Iterator, List, NamedTuple, Optional, Union

from ..exceptions import ConfigurationError

logger: logging.Logger = logging.getLogger(__name__)

_MAX_GROUP = 1000
#: While a reader keeps deleted data from being wiped off the disk, seconds until the next try.
_WIPE_RETRY = 0.1
#: The longest that an answer is held back for that.
_WIPE_WAIT = 5.0

#: What is to be written: runs in the writing thread, in a transaction, perhaps more than once.
Operation = Callable[[sqlite3.Connection], Any]


class _Write(NamedTuple):
    operation: Operation
    done: "Future[Any]"


class Database:
    """The file, open until `close`: made if it is not there; ``:memory:`` is a temporary one, gone when closed.

    Only its owner can read it, and only one `Database` at a time can have it open. The schema makes the tables of a
    new file, the addition what those of earlier releases lack. A file that can't be used, that of another
    application or version of the schema among them, is a ConfigurationError that says why.
    """

    def __init__(
        self, path: Union[str, "os.PathLike[str]"], schema: str, addition: str, *, application_id: int, version: int
    ) -> None:
        self._readers: Deque[sqlite3.Connection] = deque()
        self._writes: queue.SimpleQueue[Optional[_Write]] = queue.SimpleQueue()
        self._wiped = threading.Event()
        self._wiped.set()
        with ExitStack() as opened:
            is_temporary = path == ":memory:"  # a real one can't be shared by threads
            if is_temporary:
                path = os.path.join(opened.enter_context(TemporaryDirectory(prefix="synthgen-")), "tasks.db")
            self._path = os.path.realpath(path)
            try:
                self._lock(opened)
                _create(self._path)
                self._connection = opened.enter_context(closing(_connect(self._path, timeout=0.2)))
                self._prepare(schema, addition, application_id, version, "OFF" if is_temporary else "FULL")
            except (OSError, sqlite3.Error) as exc:
                reason = exc.strerror if isinstance(exc, OSError) else exc
                raise ConfigurationError(f"can't use the database {self._path}: {reason}") from exc
            self._opened = opened.pop_all()
        self._thread = threading.Thread(target=self._write_groups, name="synthgen-database", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Write what there is to write, and let go of the file."""
        self._writes.put(None)
        self._thread.join()
        while self._readers:
            self._readers.pop().close()
        self._opened.close()

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """A connection to read with, for this thread until the end of the block."""
        try:
            connection = self._readers.pop()
        except IndexError:
            connection = _connect(self._path, timeout=5.0)
        try:
            yield connection
        finally:
            self._readers.append(connection)

    def write(self, operation: Operation) -> "Future[Any]":
        """Have something written; the future has what the operation returns, once it is committed."""
        done: Future[Any] = Future()
        self._writes.put(_Write(operation, done))
        return done

    def wipe(self) -> None:
        """Within an operation: once it is committed, what it deleted must go from the disk as well."""
        self._wiped.clear()

    def wait_until_wiped(self) -> None:
        """Wait until nothing deleted is left on the disk; for `_WIPE_WAIT` at most, if a reader stands in the way."""
        self._wiped.wait(_WIPE_WAIT)

    # Opening.

    def _lock(self, opened: ExitStack) -> None:
        """Keep the file from other servers, until closed or killed: each would run the tasks of the other."""
        path = self._path + "-lock"
        _create(path)
        before = os.stat(path).st_ino
        lock = opened.enter_context(closing(_connect(path, timeout=0)))
        try:
            lock.execute("PRAGMA journal_mode = OFF")
            lock.execute("BEGIN EXCLUSIVE")
            if not os.path.exists(path) or os.stat(path).st_ino != before:  # another one has just let go of it
                raise sqlite3.OperationalError
        except sqlite3.OperationalError:
            raise sqlite3.OperationalError("another server has it open") from None
        opened.callback(_remove, path)  # before it is unlocked

    def _prepare(self, schema: str, addition: str, application_id: int, version: int, synchronous: str) -> None:
        is_new = self._connection.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()[0] == 0
        found_version = self._pragma("user_version")
        if not is_new and self._pragma("application_id") != application_id:
            raise sqlite3.DatabaseError("it belongs to another program")
        if not is_new and found_version != version:
            raise sqlite3.DatabaseError(f"its format is {found_version}, this version reads {version}")
        self._pragma("journal_mode = WAL")
        for suffix in ("", "-wal", "-shm"):  # of a file that others could read; not before it is known to be ours
            with suppress(FileNotFoundError):
                os.chmod(self._path + suffix, 0o600)
        self._pragma("wal_checkpoint(TRUNCATE)")  # what a process that was killed left
        script = f"PRAGMA secure_delete = ON; PRAGMA synchronous = {synchronous}; BEGIN; {addition};"
        if is_new:
            script += f"PRAGMA application_id = {application_id}; PRAGMA user_version = {version}; {schema}"
        self._connection.executescript(script + "COMMIT")

    def _pragma(self, text: str) -> Any:
        return self._connection.execute(f"PRAGMA {text}").fetchone()[0]

    # The writing thread.

    def _write_groups(self) -> None:
        is_open = True
        while is_open:
            group: List[Optional[_Write]] = []
            with suppress(queue.Empty):
                group.append(self._writes.get(timeout=None if self._wiped.is_set() else _WIPE_RETRY))
                while len(group) < _MAX_GROUP:
                    group.append(self._writes.get_nowait())
            is_open = None not in group  # which is the last that comes
            self._write_group([write for write in group if write is not None])

    def _write_group(self, group: List[_Write]) -> None:
        try:
            with self._connection:  # commits, or rolls back
                self._connection.execute("BEGIN IMMEDIATE")
                values = [write.operation(self._connection) for write in group]
        except Exception as exc:  # to whoever asked for it
            if len(group) == 1:
                group[0].done.set_exception(exc)
            else:  # one's failure is not the others'
                for write in group:
                    self._write_group([write])
            return
        self._wipe_if_wanted()
        for write, value in zip(group, values):
            write.done.set_result(value)

    def _wipe_if_wanted(self) -> None:
        """Empty the -wal file, where deleted data stays although secure_delete has cleared it in the database."""
        try:
            if not self._wiped.is_set() and not self._pragma("wal_checkpoint(TRUNCATE)"):  # which gives 1 if busy
                self._wiped.set()
        except sqlite3.Error as exc:
            logger.warning("can't empty %s-wal, trying again: %s", self._path, exc)


def _connect(path: str, timeout: float) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=timeout, isolation_level=None, check_same_thread=False)
    connection.row_factory = sqlite3.Row
    return connection


def _create(path: str) -> None:
    """Make a file that only its owner reads, if there is none; SQLite's own files take after it."""
    with suppress(FileExistsError):  # opening that one, and closing it, would undo this process's locks on it
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))


def _remove(path: str) -> None:
    with suppress(OSError):  # where a file in use can't be removed, it stays, empty
        os.remove(path)
