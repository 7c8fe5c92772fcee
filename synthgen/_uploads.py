"""Uploading: one chunk after the other, and what is known of each task whatever ends it."""

import math
import uuid
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import Callable, Iterable, List, Optional

from ._checkpoint import Checkpoint
from ._chunks import Chunks, TaskSource
from ._read_back import ReadBack
from ._waiting import Connection
from .exceptions import (
    APIError,
    BatchUploadError,
    CheckpointError,
    InvalidRequestError,
    InvalidResponseError,
    NotFoundError,
)
from .models import BulkTaskResponse, Task
from .monitor import Monitor


@dataclass
class Upload:
    """Sends tasks to a batch. What may have been taken is not sent again before the batch was looked at.

    Attributes:
        tasks: What to send; read once, but for a `TaskSource` that has to be looked at again.
        checkpoint: Where to note what was taken; its batch and its size of a chunk hold.
        note: Told of each chunk before it is sent, as the monitor is after it was taken.
        is_own: The batch is a new one, and nobody else adds to it.
        key: What names the first chunk, if that is not to be made up: an earlier call may have sent it.
        deadline: When to begin no more uploads, by ``time.monotonic()``.
    """

    client: Connection
    tasks: Iterable[Task]
    chunk_size: int
    batch_id: str
    monitor: Monitor
    checkpoint: Optional[Checkpoint]
    note: Callable[[List[Task]], None] = lambda chunk: None
    is_own: bool = True
    key: Optional[str] = None
    deadline: float = math.inf

    def __post_init__(self) -> None:
        if self.checkpoint:
            self.batch_id, self.chunk_size = self.checkpoint.batch_id, self.checkpoint.chunk_size
        self._deduplicates = self.client._idempotent_uploads
        self._read_back = ReadBack(self.client, self.batch_id, self.deadline)
        #: How often a chunk is sent again after its answer was lost; with a key of the caller's, the caller looks.
        self._repeats = 0 if self.key else self.client._retries
        self._first_key = self.key or uuid.uuid4().hex
        self._total = len(self.tasks) if isinstance(self.tasks, TaskSource) else None
        self._chunks = Chunks(self.tasks, self.chunk_size, self.checkpoint.counts if self.checkpoint else ())
        self._before = 0  # tasks that were in the batch when the upload began
        self._uploaded = 0
        #: Of the chunk that is being sent: its key, what is not known to be in the batch, and whether that may be.
        self._chunk_key = ""
        self._unsent: List[Task] = []
        self._in_doubt = False
        self._why_unknown = ""

    def run(self) -> BulkTaskResponse:
        """Send all tasks; return the batch's id and their number.

        Raises:
            BatchUploadError: Something ended it early. It says what was taken, and how to go on.
            CheckpointError: The tasks are not those of the checkpoint; nothing was sent.
            NotFoundError: The batch of the checkpoint is gone.
        """
        sent = 0
        try:
            self._look_at_batch()
            self.monitor.upload(self.batch_id, 0, self._total)
            for sent, (chunk, lines) in enumerate(self._chunks, 1):
                self._send(sent - 1, chunk, lines)
                chunk.clear()  # they are held elsewhere too, and would be until the next chunk is made
                self.monitor.upload(self.batch_id, self._uploaded, self._total)
            if self.checkpoint:
                self.checkpoint.end(sent, self._uploaded)
        except KeyboardInterrupt:
            known = f"{self._uploaded:,} tasks are in it, the next {len(self._unsent):,} may be. "
            known *= not self.checkpoint  # that knows better
            raise KeyboardInterrupt(
                f"batch {self.batch_id!r} was being uploaded: {known}{self._how_to_go_on('the others')}"
            ) from None
        except CheckpointError:
            raise
        except Exception as exc:
            if not (self._uploaded or self._unsent or self._chunks.unsent):
                raise  # the iterable failed before its first task
            raise self._error(exc) from exc
        return BulkTaskResponse(batch_id=self.batch_id, total_tasks=self._uploaded)

    def _look_at_batch(self) -> None:
        """Find out what is in a batch that is not new."""
        if self.checkpoint and self.checkpoint.taken:
            total = self._read_back.total()
            if not total and not self._deduplicates:  # what was taken a moment ago may be on its way
                total = self._read_back.settled_total(0)
            if not total:
                gone = self.checkpoint.error(f"the server has nothing of its batch {self.batch_id!r} (deleted?)")
                raise NotFoundError(gone.message, status_code=404)
        elif self._repeats and not self._deduplicates and not self.is_own:
            with suppress(NotFoundError):  # a new one, with a name of the caller's
                self._before = self._read_back.total()

    def _send(self, index: int, chunk: List[Task], lines: bytes) -> None:
        """Send a chunk until all of it was taken; after a lost answer, only what the batch does not have."""
        start, repeats = self._uploaded, self._repeats
        self._unsent, self._in_doubt = chunk, False
        self.note(chunk)
        key = f"{self._first_key}-{index}" if index else self._first_key
        key, is_known = self.checkpoint.begin(index, chunk, lines, key) if self.checkpoint else (key, bool(self.key))
        if self.checkpoint and index in self.checkpoint.taken:
            self._uploaded, self._unsent = start + len(chunk), []
            return
        self._chunk_key = key
        if self.checkpoint and is_known and not self._deduplicates:
            self.monitor.note("looking whether the last upload of the earlier run was taken")
            self._look_for(chunk, start)
        while self._unsent:
            self._read_back.check_deadline()
            if len(self._unsent) < len(chunk):
                lines = b"\n".join(task.to_line() for task in self._unsent)
            # Under a key of before, an earlier call may have sent what this one could not.
            may_be_known = is_known and self._chunk_key == key
            self._in_doubt = True
            try:
                taken_by = self.client._upload(self.batch_id, lines, self._chunk_key)
            except Exception as exc:
                self._in_doubt = may_be_known or not self.client._was_refused(exc)
                is_refused = not self._in_doubt and len(self._unsent) == len(chunk)
                # A session of the caller's may have sent it before, and that may have been taken.
                if self.checkpoint and is_refused and self.client._given_session is None:
                    self.checkpoint.refuse(index)
                # A server that deduplicates refuses tasks that were sent with another key of the provider's.
                is_other_body = may_be_known and isinstance(exc, InvalidRequestError)
                if not (self._in_doubt and repeats and (is_other_body or not self._deduplicates)):
                    raise
                self.monitor.note(f"looking whether the upload was taken all the same: {exc}")
                repeats -= 1
                try:
                    self._look_for(chunk, start)
                except APIError as failed:
                    self._why_unknown = f", and looking whether it was taken failed: {failed}"
                    raise exc
            else:
                if taken_by != self.batch_id:  # to send it again would be no help
                    raise InvalidResponseError(f"the tasks for batch {self.batch_id!r} went to batch {taken_by!r}")
                break
        self._uploaded, self._unsent = start + len(chunk), []
        if self.checkpoint:
            self.checkpoint.take(index)

    def _look_for(self, chunk: List[Task], start: int) -> None:
        """Read back which tasks of a chunk the batch does not have; its total before the chunk was ``start`` more."""
        self._in_doubt = True
        sent_before = islice(self.tasks, start) if isinstance(self.tasks, TaskSource) else None
        self._unsent = self._read_back.find_missing(chunk, self._before + start, sent_before, self.is_own)
        self._uploaded = start + len(chunk) - len(self._unsent)
        self._in_doubt, self._chunk_key = False, uuid.uuid4().hex

    def _error(self, exc: Exception) -> BatchUploadError:
        """What is known of each task."""
        unconfirmed = self._unsent if self._in_doubt else []
        maybe = f", {len(unconfirmed):,} more may have been" if unconfirmed else ""
        has_raised = not (self._unsent or self.checkpoint or isinstance(self.tasks, TaskSource))
        lacking = ", which lacks what a generator that raised had still to give" * has_raised
        first = "First look whether the batch has those of error.unconfirmed, and send them if it has not. "
        return BatchUploadError(
            f"batch {self.batch_id!r}: {self._uploaded:,} tasks were uploaded{maybe}, "
            f"then: {str(exc) or type(exc).__name__}{self._why_unknown}. "
            + first * bool(maybe and not self.checkpoint)
            + self._how_to_go_on("error.remaining", "error.batch_id")
            + lacking,
            status_code=exc.status_code if isinstance(exc, APIError) else None,
            response=exc.response if isinstance(exc, APIError) else None,
            batch_id=self.batch_id,
            uploaded=self._uploaded,
            unconfirmed=unconfirmed,
            remaining=self._chunks.rest_after(([] if unconfirmed else self._unsent) + self._chunks.unsent),
            idempotency_key=self._chunk_key if unconfirmed else None,
        )

    def _how_to_go_on(self, rest: str, batch_id: str = "") -> str:
        if self.checkpoint:
            return "The same call again goes on, by its checkpoint"
        return f"Go on with create_batch({rest}, batch_id={batch_id or repr(self.batch_id)})"
