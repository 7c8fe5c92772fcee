"""What was uploaded of a batch, in a file: the same script, run again, goes on from it.

It is lines of JSON, each on the disk before what it announces is done, and has no task and no key in it:

    {"format": "synthgen checkpoint 1", "server": "http://...", "batch_id": "...", "chunk_size": 1000}
    {"tasks": 1000, "digest": "...", "key": "..."}    a chunk, before it is sent
    {"taken": 0}                                      and after it was taken
    {"refused": 1}                                    or was not
    {"again": 1}                                      before one that was not is sent again
    {"end": 1000}                                     all tasks were uploaded
"""

import json
import os
from contextlib import suppress
from hashlib import blake2b
from typing import Any, Callable, Dict, Iterable, List, Optional, Set, Tuple, Union

from ._chunks import Chunks
from ._files import hold
from .exceptions import CheckpointError
from .models import Task

_FORMAT = "synthgen checkpoint 1"


class Checkpoint:
    """The file, from its making to `close`; no other process has it meanwhile.

    It is made, for its owner alone, if it is not there; of one that is there, the batch id and the chunk size hold.
    A server that has the batch is the same one as before, by whatever name.

    Attributes:
        counts: How many tasks each chunk of an earlier run has.
        taken: Which of those chunks it got into the batch.

    Raises:
        CheckpointError: The file is something else, of another server, or in use.
    """

    def __init__(
        self,
        path: Union[str, "os.PathLike[str]"],
        server: str,
        batch_id: str,
        chunk_size: int,
        has_batch: Callable[[str], bool] = lambda batch_id: False,
    ) -> None:
        self._path = os.path.abspath(path)
        self._file = open(self._path, "a+b", buffering=0, opener=lambda path, flags: os.open(path, flags, 0o600))
        try:
            self._hold()
            try:
                lines = self._read()
                if not lines:
                    lines = [{"format": _FORMAT, "server": server, "batch_id": batch_id, "chunk_size": chunk_size}]
                    os.chmod(self._path, 0o600)  # an empty file may have been there
                    self._write(lines[0])
                    self._sync_folder()
                header, *rest = lines
                its_server: str = header["server"]
                self.batch_id: str = header["batch_id"]
                self.chunk_size: int = header["chunk_size"]
                self._chunks = [line for line in rest if "key" in line]
                self.counts: List[int] = [chunk["tasks"] for chunk in self._chunks]
                self.taken: Set[int] = {line["taken"] for line in rest if "taken" in line}
                last = {line.get("refused", line.get("again")): "refused" in line for line in rest}
                self._refused = {index for index, is_refused in last.items() if is_refused}
                self._end: Optional[int] = next((line["end"] for line in rest if "end" in line), None)
            except (AttributeError, KeyError, TypeError, ValueError):
                raise self.error("it is no checkpoint, or one of another version") from None
            if its_server != server and not has_batch(self.batch_id):
                raise self.error(f"it is of batch {self.batch_id!r} at {its_server}, which is not at {server}")
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let go of the file, which stays."""
        self._file.close()

    def check(self, tasks: Iterable[Task]) -> None:
        """Raise a CheckpointError if these are other tasks than an earlier run noted; nothing is noted."""
        index = -1
        for index, (chunk, lines) in enumerate(Chunks(tasks, self.chunk_size, self.counts)):
            if index == len(self._chunks) and self._end is None:
                return
            self._checked_digest(index, chunk, lines)
        self.end(index + 1, 0)

    def begin(self, index: int, tasks: List[Task], lines: bytes, key: str) -> Tuple[str, bool]:
        """Note that a chunk is about to be sent; give its key, perhaps of an earlier run, and whether that may have."""
        digest = self._checked_digest(index, tasks, lines)
        if index < len(self._chunks):
            is_refused = index in self._refused
            if is_refused:
                self._write({"again": index})
            return self._chunks[index]["key"], not is_refused
        self._write({"tasks": len(tasks), "digest": digest, "key": key})
        return key, False

    def take(self, index: int) -> None:
        """Note that a chunk was taken."""
        self._write({"taken": index})

    def refuse(self, index: int) -> None:
        """Note that nothing of a chunk was taken."""
        self._write({"refused": index})

    def end(self, chunks: int, tasks: int) -> None:
        """Note that these were all."""
        if chunks < len(self._chunks):
            raise self._other_tasks(chunks)
        if self._end is None and tasks:
            self._write({"end": tasks})

    def error(self, what: str) -> CheckpointError:
        """An error about the file, which says what to do."""
        return CheckpointError(f"{self._path}: {what}. Name another file, or remove this one to run all tasks anew")

    def _checked_digest(self, index: int, tasks: List[Task], lines: bytes) -> str:
        """The digest of a chunk; an error if an earlier run noted another one, or that there is none."""
        digest = _digest(tasks, lines)
        noted = [(chunk["tasks"], chunk["digest"]) for chunk in self._chunks[index : index + 1]]
        is_more = not noted and self._end is None
        if noted != [(len(tasks), digest)] and not is_more:
            raise self._other_tasks(index)
        return digest

    def _other_tasks(self, index: int) -> CheckpointError:
        first = sum(self.counts[:index]) + 1
        return self.error(f"these are other tasks than before, from chunk {index + 1} on (task {first:,} is its first)")

    def _hold(self) -> None:
        try:
            hold(self._file)
        except (BlockingIOError, PermissionError):
            raise CheckpointError(f"{self._path}: another run has it open; wait until that has ended") from None
        except OSError:
            pass  # the file system knows no locks

    def _read(self) -> List[Dict[str, Any]]:
        """The lines; a last one that was not written whole is cut off."""
        self._file.seek(0)
        data = self._file.read()
        start = json.dumps({"format": _FORMAT})[:-1].encode("ascii")
        whole = data[: data.rfind(b"\n") + 1]
        if not (data.startswith(start) or start.startswith(data)):
            raise ValueError("not what this writes")
        lines: List[Dict[str, Any]] = list(map(json.loads, whole.splitlines()))
        self._file.truncate(len(whole))
        return lines

    def _write(self, line: Dict[str, Any]) -> None:
        data = json.dumps(line).encode("ascii") + b"\n"
        while data:
            data = data[self._file.write(data) :]
        os.fsync(self._file.fileno())

    def _sync_folder(self) -> None:
        with suppress(OSError):  # not on Windows
            folder = os.open(os.path.dirname(self._path), os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)


def _digest(tasks: List[Task], lines: bytes) -> str:
    """The same for the same tasks, whatever their provider's key is."""
    if any(task.api_key is not None for task in tasks):
        lines = b"\n".join(task.model_copy(update={"api_key": None}).to_line() for task in tasks)
    return blake2b(lines, digest_size=16).hexdigest()
