"""The client: submit tasks, follow a batch, stream its results.

Everything that touches the network is here; models.py only describes data and monitor.py only shows it.
All times are in seconds unless a name says otherwise.
"""

import io
import logging
import math
import os
import time
import uuid
from collections.abc import Sized
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, nullcontext
from http.cookiejar import DefaultCookiePolicy
from itertools import count
from typing import (
    TYPE_CHECKING,
    Any,
    BinaryIO,
    ContextManager,
    Dict,
    Generator,
    Iterable,
    Iterator,
    List,
    NoReturn,
    Optional,
    Set,
    Tuple,
    Type,
    TypeVar,
    Union,
)
from urllib.parse import quote

import requests
from pydantic import BaseModel, TypeAdapter, ValidationError
from requests.adapters import HTTPAdapter
from urllib3.filepost import encode_multipart_formdata

from ._answers import WIRE_ERRORS, check_status, no_answer, parse, read_json
from ._checkpoint import Checkpoint
from ._chunks import TaskSource, as_task
from ._config import read_config
from ._files import replacing
from ._matching import ResultList
from ._options import RunOptions, check_checkpoint, check_chunk_size
from ._read_back import ReadBack
from ._retry import LONGEST_RETRY_AFTER, backoff_time, innermost, never_sent, parse_retry_after, pausing, retry_policy
from ._stream import iter_tasks
from ._uploads import Upload
from ._version import __version__
from ._waiting import AWAY_ERRORS, BatchWait, describe_queues, is_not_ingested
from .exceptions import (
    APIError,
    BatchIncompleteError,
    ConnectionFailedError,
    InvalidResponseError,
    NotFoundError,
    RateLimitError,
    ServerError,
)
from .models import (
    Batch,
    BatchList,
    BulkTaskResponse,
    CalendarInterval,
    HealthResponse,
    HealthStatus,
    Task,
    TaskResponse,
    TaskStatsResponse,
    TaskStatus,
    UsageStatsResponse,
    is_header_value,
)
from .monitor import GuardedMonitor, Monitor, choose_monitor

if TYPE_CHECKING:
    from ._results import ResultFile

__all__ = ["SynthgenClient"]

logger: logging.Logger = logging.getLogger(__name__)

_BATCHES = "/api/v1/batches"
_TASKS = "/api/v1/tasks"

_CONNECT_TIMEOUT = 10.0
_HEALTH_TIMEOUT = 30.0  # the framework needs 8 s and more to say that Elasticsearch is down
_READ_BYTES = 256 * 1024
_IDLE_CONNECTIONS = 64  # kept for so many threads
_LOOK_UPS_AT_ONCE = 16

_task_list = TypeAdapter(List[TaskResponse])

_Path = Union[str, "os.PathLike[str]"]
_Results = Union[ResultList, "ResultFile"]
_Item = TypeVar("_Item")
_Model = TypeVar("_Model", bound=BaseModel)


class SynthgenClient:
    """Talks to a Synthgen server: the framework, or the embedded one.

    Each setting is taken from its argument, else from the environment (``SYNTHGEN_BASE_URL``,
    ``SYNTHGEN_API_KEY``, ``SYNTHGEN_TIMEOUT``; empty means unset), else from the JSON file, else the default.

    GETs and DELETEs are repeated when the connection or the server fails. An upload is repeated only when it
    surely was not taken: sent twice, its tasks would be run and paid for twice.

    Threads may share a client, and so may a forked process, unless the session is yours.

    Args:
        base_url: Where the server is, path prefix included; ``http://localhost:8002`` by default.
        api_key: The server's key; none by default.
        timeout: The longest wait for the next bytes of an answer, in seconds; 3600 by default.
        config_file: A JSON file: an object with any of ``base_url``, ``api_key`` and ``timeout``.
        retries: How often a request is repeated; 0 for never.
        backoff_factor: The pauses before the repeats are 0, then about 2, 4, 8, ... times this, in seconds
            (``urllib3.util.Retry``), unless the server says how long.
        session: Your own session, for proxies, CAs or client certificates. The client neither changes nor
            closes it. Requests are repeated as its adapters say; those of requests never do.
        idempotent_uploads: The server takes an upload with the same Idempotency-Key only once (the embedded
            server does), so that uploads too are repeated after any failure but a refusal.

    Raises:
        ConfigurationError: A setting is malformed, or the file can't be read.
    """

    def __init__(
        self,
        base_url: Optional[str] = None,
        api_key: Optional[str] = None,
        timeout: Optional[float] = None,
        config_file: Optional[_Path] = None,
        *,
        retries: int = 5,
        backoff_factor: float = 0.5,
        session: Optional[requests.Session] = None,
        idempotent_uploads: bool = False,
    ) -> None:
        self.base_url: str
        self.timeout: float
        self.base_url, self._api_key, self.timeout = read_config(base_url, api_key, timeout, config_file)
        self._idempotent_uploads = idempotent_uploads
        self._retries = retries
        self._backoff_factor = backoff_factor
        self._given_session = session
        self._sessions: Dict[Tuple[int, int], requests.Session] = {}
        self._trust_env = True  # False keeps proxies out
        self._server_name: Optional[str] = None  # in checkpoints, where the URL will be another next time
        retry_policy(retries, backoff_factor)  # raises if a number is wrong

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.base_url!r})"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a client can't be pickled, since its key would be; make one in each process")

    def __enter__(self) -> "SynthgenClient":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections; may be called twice. A session of your own stays open."""
        for session in list(self._sessions.values()):
            session.close()

    # The life of a batch, in its order.

    def check_health(self) -> HealthResponse:
        """The state of the server and of what it stands on; also when that is unhealthy. Never repeated."""
        try:
            return self._get(HealthResponse, "/health", retries=0, read_timeout=_HEALTH_TIMEOUT)
        except ServerError as exc:  # 503, with the same object under `detail`
            try:
                return HealthResponse.model_validate(exc.response.json()["detail"] if exc.response else None)
            except (ValueError, KeyError, TypeError):  # a proxy's own 503
                raise exc from None

    def create_batch(
        self,
        tasks: Iterable[Task],
        chunk_size: int = 1000,
        *,
        batch_id: Optional[str] = None,
        idempotency_key: Optional[str] = None,
        monitor: Optional[Monitor] = None,
        checkpoint: Optional[_Path] = None,
    ) -> BulkTaskResponse:
        """Submit tasks, in as many uploads as needed, and return the batch's id and the number sent.

        When the answer to an upload is lost, the batch itself is looked at, for half a minute where nothing of it is
        to be seen, and only what is not there is sent again: that is as sure as reading can make it.

        Args:
            tasks: Any iterable, read once and as it is sent: one chunk is in memory at a time.
            chunk_size: The most tasks in one upload; one is also cut at 8 MiB, a larger task goes alone.
            batch_id: The batch to add them to; a new one by default.
            idempotency_key: What names this upload to a server that deduplicates; made up by default. A list
                given with a key is cut by its bytes alone, so that what was one upload stays one.
            monitor: Told of each chunk.
            checkpoint: A file to note in what was taken. The same call made again, by whatever process, goes on.

        Raises:
            BatchUploadError: The upload ended early. It says what was taken, and how to go on.
            CheckpointError: The checkpoint is of other tasks or another server, or in use; nothing was sent.
            NotFoundError: The batch of the checkpoint is gone.
            ValueError: There are no tasks for a new batch, or the id can't be one.
        """
        check_chunk_size(chunk_size)
        check_checkpoint(checkpoint, batch_id, idempotency_key)
        is_own, batch_id = batch_id is None, _new_batch_id(batch_id)
        tasks = _checked_tasks(tasks)
        if idempotency_key is not None:
            if not idempotency_key or not is_header_value(idempotency_key):
                raise ValueError("an idempotency key must be text that fits a header")
            chunk_size = max(chunk_size, len(tasks) if isinstance(tasks, Sized) else 0)
        with _watching(monitor) as told, self._noting(checkpoint, batch_id, chunk_size) as noted:
            upload = Upload(self, tasks, chunk_size, batch_id, told, noted, is_own=is_own, key=idempotency_key)
            created = upload.run()
        if not created.total_tasks and is_own:  # nothing may be left of an upload that goes on
            raise ValueError("there are no tasks to upload")
        return created

    def monitor_batch(
        self,
        tasks: Optional[Iterable[Task]] = None,
        batch_id: Optional[str] = None,
        cost_by_1m_input_token: float = 0.0,
        cost_by_1m_output_token: float = 0.0,
        *,
        chunk_size: int = 1000,
        poll_interval: float = 2.0,
        timeout: Optional[float] = None,
        stall_timeout: Optional[float] = 300.0,
        show_progress: bool = True,
        monitor: Optional[Monitor] = None,
        checkpoint: Optional[_Path] = None,
    ) -> List[TaskResponse]:
        """Submit tasks, wait, and return one result per task, in their order, each with its ``custom_id``.

        Tasks may have failed: look at ``ok`` of each result.

        With ``batch_id`` alone, wait for a batch that exists, and return its results as the server gives them.
        With both, come back to a batch: nothing is sent, and the tasks serve for order and matching.

        Args:
            tasks: What to run. None of them: an empty list is returned.
            batch_id: A batch that exists.
            cost_by_1m_input_token: Price of a million input tokens, for the display.
            cost_by_1m_output_token: Price of a million output tokens, for the display.
            chunk_size: The most tasks in one upload.
            poll_interval: The longest pause between two polls, in seconds.
            timeout: The longest wait for the batch to end, in seconds, uploading included; None for ever. No request,
                with its repeats, is broken off for it, and no upload begun after it.
            stall_timeout: How long nothing may move, in seconds, before the reason is looked for; None for ever.
            show_progress: Draw the progress on stderr: with rich on a terminal, else in lines.
            monitor: Is told of the progress, in place of that.
            checkpoint: See `create_batch`. When all was uploaded, the results come from the batch that it names.

        Raises:
            BatchUploadError: The upload ended early; see `create_batch`.
            CheckpointError: See `create_batch`.
            BatchTimeoutError: ``timeout`` ran out. The batch goes on.
            BatchStalledError: Tasks wait, and nothing on the server runs them.
            BatchIncompleteError: Some tasks will have no result; it holds those of the others.
            ServerError: The server is unhealthy, and would lose the tasks; nothing was sent.
            NotFoundError: There is no such batch, or it was deleted meanwhile.
            ValueError: Neither tasks nor a batch id is given, or a number is out of range.
        """
        call = "monitor_batch(" + "tasks=tasks, " * (tasks is not None)
        prices = cost_by_1m_input_token, cost_by_1m_output_token
        options = RunOptions(call, batch_id, prices, chunk_size, poll_interval, timeout, stall_timeout, checkpoint)
        if tasks is None and batch_id is None:
            raise ValueError("monitor_batch needs tasks to run, or the id of a batch to wait for, or both")
        todo = None if tasks is None else list(map(as_task, _checked_tasks(tasks), count()))
        if todo is not None and not todo:
            return []
        results = ResultList(todo)
        with _watching(monitor, show_progress) as told:
            batch = self._run(options, todo, results, told)
            found = list(results)
            told.results(list(found))  # a list of its own, which it may sort
            told.finish(batch, batch.cost(*options.prices))
        return found

    def run_batch(
        self,
        tasks: Iterable[Task],
        path: Union[_Path, BinaryIO],
        batch_id: Optional[str] = None,
        cost_by_1m_input_token: float = 0.0,
        cost_by_1m_output_token: float = 0.0,
        *,
        chunk_size: int = 1000,
        poll_interval: float = 2.0,
        timeout: Optional[float] = None,
        stall_timeout: Optional[float] = 300.0,
        show_progress: bool = True,
        monitor: Optional[Monitor] = None,
        checkpoint: Optional[_Path] = None,
    ) -> Batch:
        """Submit tasks, wait, and write one result per task to a file, as a line of JSON, in their order.

        As `monitor_batch`, with the same arguments and errors, in memory that does not grow with the weight of tasks
        and results: those wait for their turn in a temporary file beside the output. Each has its ``custom_id``.

        Args:
            tasks: Any iterable, read once. Where it can be read only once, the ``missing`` of a `BatchIncompleteError`
                is empty.
            path: The file, complete or not there: it is written beside its place and moved there at the end. Or a
                binary file that is open, which is written to at the end.

        Returns:
            The batch when last seen; ``failed_tasks`` tells how many tasks failed.

        Raises:
            OSError: The file can't be written; found out before anything is sent. Or the disk is full: nothing is
                lost, since the results stay in the batch.
        """
        from ._results import ResultFile, in_pieces  # not every Python has sqlite3

        prices = cost_by_1m_input_token, cost_by_1m_output_token
        call = "run_batch(tasks, path, "
        options = RunOptions(call, batch_id, prices, chunk_size, poll_interval, timeout, stall_timeout, checkpoint)
        tasks = _checked_tasks(tasks)
        output: ContextManager[BinaryIO]
        if isinstance(path, (str, os.PathLike)):
            if checkpoint is not None and os.path.realpath(path) == os.path.realpath(checkpoint):
                raise ValueError(f"{os.fspath(path)} can't be the output and the checkpoint, too")
            output = replacing(path)
        else:
            try:
                path.write(b"")
            except (AttributeError, TypeError, ValueError) as exc:
                what = "that of a file, or a binary file that is open for writing"
                raise TypeError(f"path must be {what}, not {path!r} ({exc})") from None
            output = nullcontext(path)
        with _watching(monitor, show_progress) as told, output as file, closing(ResultFile(beside=file)) as results:
            batch = self._run(options, tasks, results, told)
            with _naming_batch(batch.batch_id, options):
                for some in in_pieces(results):
                    file.writelines(result.to_line() for result in some)
                    told.results(some)
                file.flush()
            told.finish(batch, batch.cost(*options.prices))
        return batch

    def get_batches(self) -> BatchList:
        """All batches, newest first."""
        return self._get(BatchList, _BATCHES)

    def get_batch(self, batch_id: str) -> Batch:
        """A batch's state and counters.

        Raises:
            NotFoundError: There is no such batch, or the server has not ingested any of it yet.
        """
        return self._get_batch(batch_id)

    def iter_batch_tasks(
        self, batch_id: str, task_status: Optional[Union[TaskStatus, str]] = None
    ) -> Generator[TaskResponse, None, None]:
        """The tasks of a batch, each once, as their bytes arrive.

        A stream that breaks is read again, and what was given is not given twice. Of a finished batch you get
        as many tasks as it counts, or an error; of a running one, what the server has just now.

        Args:
            batch_id: The batch.
            task_status: Only the tasks with this status.

        Raises:
            NotFoundError: There is no such batch.
            ConnectionFailedError: The stream broke, and so did the repeats.
        """
        _batch_path(batch_id)  # raises now, and not when the first task is asked for
        return self._iter_export(batch_id, task_status, with_source=False)

    def get_batch_tasks(
        self,
        batch_id: str,
        task_status: Optional[Union[TaskStatus, str]] = None,
        *,
        monitor: Optional[Monitor] = None,
    ) -> List[TaskResponse]:
        """The tasks of a batch, as a list; see `iter_batch_tasks`."""
        tasks = self.iter_batch_tasks(batch_id, task_status)
        with _watching(monitor) as told:
            return list(_counted(tasks, told, None))

    def export_batch(
        self,
        batch_id: str,
        path: _Path,
        task_status: Optional[Union[TaskStatus, str]] = None,
        *,
        monitor: Optional[Monitor] = None,
    ) -> int:
        """Write a batch's tasks to a file, one JSON object a line as the server sent it; return their number.

        The file is complete or not there: it is written beside its place and moved there at the end.

        Raises:
            OSError: The file can't be written; found out before anything is asked.
        """
        written = 0
        with _watching(monitor) as told, replacing(path) as file, closing(
            self._iter_export(batch_id, task_status, with_source=True)
        ) as export:
            for written, (_, source) in enumerate(_counted(export, told, None), 1):
                file.write(source.replace(b"\n", b" ") + b"\n")  # in JSON a line break is a space: a text has \\n
        return written

    def get_batch_stats(
        self,
        batch_id: str,
        time_range: str = "24h",
        interval: Union[CalendarInterval, str] = CalendarInterval.HOUR_SHORT,
    ) -> UsageStatsResponse:
        """What a batch did over time.

        Args:
            batch_id: The batch. Of an unknown one, all is 0.
            time_range: How far back: a number and ``m`` (up to 1440), ``h`` (up to 720) or ``d`` (up to 365).
            interval: The size of a bucket, e.g. ``"1h"``.
        """
        params = {"time_range": time_range, "interval": str(interval)}
        return self._get(UsageStatsResponse, f"{_batch_path(batch_id)}/stats", params=params)

    def delete_batch(self, batch_id: str) -> None:
        """Delete a batch and its tasks; one that does not exist is no error.

        Wait for its end first: there is no cancel, and the framework may call the provider again and again for
        the deleted tasks of a running batch.
        """
        self._request("DELETE", _batch_path(batch_id))

    # Single tasks.

    def get_task(self, message_id: str) -> TaskResponse:
        """A task with its result.

        Raises:
            NotFoundError: There is no such task.
        """
        path = f"{_TASKS}/{_quoted(message_id, 'message id')}"
        return self._get(TaskResponse, path, null="no such task (was it deleted?)")

    def delete_task(self, message_id: str) -> None:
        """Delete a task.

        Raises:
            NotFoundError: There is no such task.
        """
        self._request("DELETE", f"{_TASKS}/{_quoted(message_id, 'message id')}")

    def get_task_stats(self) -> TaskStatsResponse:
        """Counters over all tasks of the server."""
        return self._get(TaskStatsResponse, f"{_TASKS}/stats")

    # Uploads.

    def _noting(self, path: Optional[_Path], batch_id: str, chunk_size: int) -> ContextManager[Optional[Checkpoint]]:
        """The checkpoint, if one is wanted."""
        if path is None:
            return nullcontext()

        def has_batch(batch_id: str) -> bool:
            return ReadBack(self, batch_id, math.inf).total() > 0

        return closing(Checkpoint(path, self._server_name or self.base_url, batch_id, chunk_size, has_batch))

    def _upload(self, batch_id: str, lines: bytes, key: str) -> str:
        """Post a chunk; gives the batch that took it."""
        body, content_type = encode_multipart_formdata({"file": ("batch.jsonl", lines, "application/x-jsonlines")})
        headers = {"Idempotency-Key": key, "Content-Type": content_type}
        data = self._request("POST", _BATCHES, params={"batch_id": batch_id}, body=body, headers=headers)
        return parse(BulkTaskResponse, data, self._name("POST", _BATCHES)).batch_id

    def _was_refused(self, exc: Exception) -> bool:
        """Whether an upload that ended like this was surely not taken."""
        status = isinstance(exc, APIError) and exc.status_code or 0
        if isinstance(exc, APIError) and exc._in_doubt:
            return False
        refused = 400 <= status < 500 or status in (307, 308)  # 303 says that it was taken, 301 and 302 say nothing
        may_repeat = self._idempotent_uploads
        if self._given_session is not None:  # its adapter may have a policy of its own
            adapter = self._given_session.get_adapter(self.base_url)
            may_repeat = may_repeat or getattr(getattr(adapter, "max_retries", None), "total", None) != 0
        if may_repeat:  # an earlier try may have been taken before one that surely was not
            return refused and not isinstance(exc, RateLimitError)
        return refused or never_sent(exc.__cause__)

    # Waiting.

    def _show_health(self, monitor: Monitor, required: bool) -> None:
        """Ask for the server's health, show it, and raise ServerError where uploads would be lost."""
        for repeats in count(1):
            try:
                health = self.check_health()
                break
            except AWAY_ERRORS as exc:
                if repeats > self._retries:
                    raise
                monitor.note(f"no answer yet, trying again: {exc}")
                self._pause(repeats, exc)
        monitor.health(health)
        stores = {"Elasticsearch": health.services.elasticsearch, "RabbitMQ": health.services.rabbitmq}
        down = [name for name, status in stores.items() if status == HealthStatus.UNHEALTHY]
        if required and down:
            raise ServerError(
                f"{self.base_url}: {' and '.join(down)} is down ({health.error or 'no reason given'}). "
                "Nothing was sent: the server would have lost the tasks",
                status_code=503,
            )

    def _run(self, options: RunOptions, tasks: Optional[Iterable[Task]], results: _Results, monitor: Monitor) -> Batch:
        """Submit tasks, or note those of a batch that exists; wait, until each has a result; return the batch."""
        deadline = time.monotonic() + (math.inf if options.timeout is None else options.timeout)
        batch_id = _new_batch_id(options.batch_id)
        to_submit = tasks if options.batch_id is None else None
        if to_submit is not None:
            self._show_health(monitor, required=True)
        with self._noting(options.checkpoint, batch_id, options.chunk_size) as noted:
            if to_submit is not None:
                upload = Upload(
                    self, to_submit, options.chunk_size, batch_id, monitor, noted, results.note, deadline=deadline
                )
                batch_id = upload.run().batch_id
            elif tasks is not None:
                results.note(map(as_task, tasks, count()))
            if results.tasks == 0:
                raise ValueError("there are no tasks to run")
            wait = BatchWait(self, options, monitor, batch_id, results.tasks, deadline)
            with _naming_batch(batch_id, options):
                if to_submit is None:
                    self._show_health(monitor, required=False)
                return self._collect(wait, tasks, results)

    def _collect(self, wait: BatchWait, tasks: Optional[Iterable[Task]], results: _Results) -> Batch:
        """Wait for the batch, download it, and match; as often as it takes."""
        batch_id, monitor = wait.batch_id, wait.monitor
        failures = 0
        while True:
            stuck = wait.wait()
            matched = surplus = 0
            try:
                if wait.batch is not None:
                    with closing(self._iter_export(batch_id, None, results.needs_source)) as export:
                        received = _counted(export, monitor, wait.batch.finished_tasks)
                        matched, surplus = results.match(received, lambda ids: self._look_up(ids, monitor))
            except (NotFoundError, *AWAY_ERRORS) as exc:
                failures += 1
                if wait.poll():  # else it is waited for
                    is_proxys = isinstance(exc, NotFoundError) and not is_not_ingested(exc)
                    if not is_proxys or failures > self._retries:
                        raise
                    wait.came_early()
                continue
            expected = wait.expected
            if wait.batch is not None and matched >= expected:
                if surplus:
                    monitor.note(
                        f"{surplus:,} more results than tasks: some were run more than once, or are of other tasks"
                    )
                return wait.batch
            lacking = f"{expected - matched:,} of {expected:,} tasks"
            unmatched = f"; {surplus:,} results match no task" if surplus else ""
            if wait.waiting or (stuck is None and (matched or surplus < expected)):  # else it is full of other tasks
                monitor.note(f"{lacking} have no result yet{unmatched}; looking again")
                wait.came_early()
                continue
            why = describe_queues(stuck) if stuck else "are these the tasks of that batch?"
            missing = set(results.missing())
            again = tasks if isinstance(tasks, TaskSource) else ()  # others can't be read once more
            raise BatchIncompleteError(
                f"batch {batch_id!r}: {lacking} never arrived; {why}{unmatched}",
                batch_id=batch_id,
                results=list(results),
                missing=[task for index, task in enumerate(again) if index in missing],
                health=stuck,
            )

    def _look_up(self, message_ids: List[str], monitor: Monitor) -> Iterator[Optional[TaskResponse]]:
        """Each task as the server has it by itself, which is with its custom_id; None for one that is gone."""

        def get_task(message_id: str) -> Optional[TaskResponse]:
            try:
                return self.get_task(message_id)
            except NotFoundError as exc:
                if not is_not_ingested(exc):
                    raise
                return None

        # A session of the caller's may know nothing of threads.
        with ThreadPoolExecutor(1 if self._given_session else _LOOK_UPS_AT_ONCE) as pool:
            yield from _counted(pool.map(get_task, message_ids), monitor, len(message_ids))

    # Exports.

    def _iter_export(
        self, batch_id: str, task_status: Optional[Union[TaskStatus, str]], with_source: bool
    ) -> Generator[Any, None, None]:
        """Each task once, beside its JSON if wanted, whatever becomes of the streams that they come in."""
        path = f"{_batch_path(batch_id)}/tasks/export"
        before = self._get_batch(batch_id)
        seen: Set[str] = set()
        repeats = 0  # in a row that brought nothing new
        while True:
            known = len(seen)
            try:
                with closing(self._stream_export(path, task_status, with_source)) as stream:
                    for tasks, source in stream:
                        for task in tasks:
                            if task.message_id not in seen:
                                seen.add(task.message_id)
                                yield (task, source) if with_source else task
                after = self._get_batch(batch_id)
                expected = min(_expected(before, task_status), _expected(after, task_status))
                if len(seen) >= expected:
                    return
                raise ConnectionFailedError(
                    f"{self._name('GET', path)}: it ended after {len(seen):,} of {expected:,} tasks"
                )
            except AWAY_ERRORS as exc:
                is_refusal = isinstance(exc, (RateLimitError, ServerError)) and not repeats
                if is_refusal and self._given_session is not None:
                    raise  # to repeat it was for the caller's adapters, as for any other request
                if len(seen) > known:
                    repeats = 0
                if repeats >= self._retries:
                    raise
                logger.debug("reading the export again: %s", exc)
                repeats += 1
                self._pause(repeats, exc)

    def _stream_export(
        self, path: str, task_status: Optional[Union[TaskStatus, str]], with_source: bool
    ) -> Generator[Tuple[Iterable[TaskResponse], bytes], None, None]:
        what = self._name("GET", path)
        params = None if task_status is None else {"task_status": str(task_status)}
        # A truncated gzip stream would end without an error.
        headers = {"Accept-Encoding": "identity"}
        with self._send("GET", path, params=params, headers=headers, retries=0) as response:
            check_status(response, what, self._api_key)
            try:
                for values, source in iter_tasks(response.iter_content(_READ_BYTES), one_by_one=with_source):
                    try:
                        tasks: Iterable[TaskResponse] = _task_list.validate_python(values)
                    except ValidationError:  # for parse to say where, after those before it
                        tasks = (parse(TaskResponse, value, what) for value in values)
                    yield tasks, source
            except (EOFError, *WIRE_ERRORS) as exc:
                raise ConnectionFailedError(f"{what}: the stream broke off: {innermost(exc)}") from exc
            except ValueError as exc:
                raise InvalidResponseError(
                    f"{what}: this is no export: {exc}", status_code=response.status_code
                ) from exc

    # The one way to the network.

    def _get_batch(self, batch_id: str, **options: Any) -> Batch:
        null = "no such batch (was it deleted, or is it not ingested yet?)"
        return self._get(Batch, _batch_path(batch_id), null=null, **options)

    def _get(self, model: Type[_Model], path: str, *, null: str = "", **options: Any) -> _Model:
        """The answer to a GET, as a model; where ``null`` says what the server's null means, that is an error."""
        what = self._name("GET", path)
        data = self._request("GET", path, **options)
        if data is None and null:
            raise NotFoundError(f"{what}: {null}", status_code=404)
        return parse(model, data, what)

    def _pause(self, repeats: int, error: APIError) -> None:
        """Before a repeat, for as long as the server asks for, or the backoff; raise the error if that is too long."""
        asked = parse_retry_after(error.response.headers.get("Retry-After", "")) if error.response else 0.0
        if asked > LONGEST_RETRY_AFTER:
            raise error
        self._sleep(asked or backoff_time(self._backoff_factor, repeats))

    def _sleep(self, seconds: float) -> None:
        """Every pause between requests; `aio` can end one early."""
        time.sleep(seconds)

    def _session_for(self, retries: int) -> requests.Session:
        """The caller's session, or ours with so many retries: requests knows no retries per request.

        A forked process makes its own; two that write to the same connections would mix up their answers.
        """
        if self._given_session is not None:
            return self._given_session
        key = os.getpid(), retries
        if key not in self._sessions:
            policy = retry_policy(retries, self._backoff_factor, idempotent_uploads=self._idempotent_uploads)
            session = requests.Session()
            session.trust_env = self._trust_env
            session.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))  # no state between requests
            session.mount("http://", HTTPAdapter(max_retries=policy, pool_maxsize=_IDLE_CONNECTIONS))
            session.mount("https://", HTTPAdapter(max_retries=policy, pool_maxsize=_IDLE_CONNECTIONS))
            return self._sessions.setdefault(key, session)
        return self._sessions[key]

    def _authorize(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        if self._api_key:
            request.headers["Authorization"] = f"Bearer {self._api_key}"
        return request

    def _name(self, method: str, path: str) -> str:
        return f"{method} {self.base_url}{path}"

    def _request(self, method: str, path: str, *, retries: Optional[int] = None, **options: Any) -> Any:
        """Make a request and return its JSON; None for an answer without a body.

        The adapter repeats it until there are headers; here it is repeated when the body was cut short or is
        not JSON, within the same number.
        """
        what = self._name(method, path)
        left = self._retries if retries is None else retries
        lost = False  # whether an answer was: an earlier try may have been carried out
        while True:
            response = self._send(method, path, retries=left, **options)
            history = getattr(response.raw.retries, "history", None) or ()
            left -= len(history)
            lost = lost or any(attempt.status != 429 and not never_sent(attempt.error) for attempt in history)
            if method == "DELETE" and response.status_code == 404 and lost:
                response.close()
                return None
            try:
                check_status(response, what, self._api_key)
            except APIError as exc:
                exc._in_doubt = lost
                raise
            try:
                return read_json(response, what, self._api_key)
            except (ConnectionFailedError, InvalidResponseError) as exc:
                if left <= 0 or (method == "POST" and not self._idempotent_uploads):
                    raise
                lost = True
                left -= 1
                self._pause(self._retries - left, exc)

    def _send(
        self,
        method: str,
        path: str,
        *,
        retries: int,
        headers: Optional[Dict[str, str]] = None,
        read_timeout: Optional[float] = None,
        body: Optional[bytes] = None,
        **options: Any,
    ) -> requests.Response:
        """Send a request, and return the answer when its headers are there, whatever the status."""
        session = self._session_for(retries)
        pauses = pausing.set(self._sleep)
        wait = self.timeout if read_timeout is None else min(read_timeout, self.timeout)
        started = time.monotonic()
        try:
            response = session.request(
                method,
                self.base_url + path,
                # A file is sent piece by piece; bytes would all have to go within the connect time-out.
                data=None if body is None else io.BytesIO(body),
                headers={"User-Agent": f"synthgen-client/{__version__}", **(headers or {})},
                # A callable: ~/.netrc would replace a header. Without a key a caller's session keeps its own.
                auth=self._authorize if self._api_key or not session.auth else session.auth,
                timeout=(_CONNECT_TIMEOUT, wait),
                allow_redirects=False,  # requests would turn a POST into a GET
                stream=True,
                verify=session.verify,  # else REQUESTS_CA_BUNDLE wins over what a caller's session says
                **options,
            )
        except WIRE_ERRORS as exc:
            if not isinstance(exc, requests.HTTPError) or exc.response is None:
                raise no_answer(exc, self._name(method, path), wait) from exc
            response = exc.response  # a hook of the caller's session raised for its status
        except ValueError:  # not shown: a proxy's URL may hold a password
            what = self._name(method, path)
            raise InvalidResponseError(f"{what}: redirects to a malformed URL, or the proxy has one") from None
        finally:
            pausing.reset(pauses)
        response.raw.enforce_content_length = True  # urllib3 1.26 would end a short body without an error
        logger.debug("%s %s -> %d in %.3f s", method, path, response.status_code, time.monotonic() - started)
        return response


def _watching(monitor: Optional[Monitor], show_progress: bool = False) -> ContextManager[Monitor]:
    """The monitor, or ours, which may be silent; its own errors stop nothing, and it is closed at the end."""
    if monitor is None:
        monitor = choose_monitor() if show_progress else Monitor()
    return closing(GuardedMonitor(monitor))


@contextmanager
def _naming_batch(batch_id: str, options: RunOptions) -> Iterator[None]:
    """Ctrl-C, a server that fails and a full disk say which batch they leave, and how to come back to that."""
    how = options.way_back(batch_id)
    not_lost = f" (batch {batch_id!r} is not lost: come back to it with {how})"
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"batch {batch_id!r} goes on; come back to it with {how}") from None
    except OSError as exc:
        if exc.strerror:  # not a time-out of ours, which says so itself
            exc.strerror += not_lost
        raise
    except APIError as exc:
        if not (isinstance(exc, NotFoundError) and is_not_ingested(exc)):  # else it is gone
            exc.message += not_lost
            exc.args = (exc.message,)
        raise


def _counted(items: Iterable[_Item], monitor: Monitor, total: Optional[int]) -> Iterator[_Item]:
    """The items; the monitor is told of the first, each hundredth and the last."""
    received = 0
    for received, item in enumerate(items, 1):
        if received % 100 == 1:
            monitor.download(received, total)
        yield item
    monitor.download(received, total)


def _expected(batch: Batch, task_status: Optional[Union[TaskStatus, str]]) -> int:
    """How many tasks an export holds at least; 0 where only a finished batch could tell."""
    if not batch.done:
        return 0
    counts: Dict[Optional[str], int] = {
        None: batch.total_tasks,
        TaskStatus.COMPLETED: batch.completed_tasks + batch.cached_tasks,
        TaskStatus.FAILED: batch.failed_tasks,
    }
    return counts.get(task_status, 0)


def _checked_tasks(tasks: Iterable[Task]) -> Iterable[Task]:
    """The tasks; those of a list are looked at now, before anything is sent, others as they are read."""
    # A model and a text are iterable, too, but of something else.
    if isinstance(tasks, (BaseModel, dict, str, bytes)) or not isinstance(tasks, Iterable):
        raise TypeError(f"tasks must be an iterable of Task, not one {type(tasks).__name__}")
    return list(map(as_task, tasks, count())) if isinstance(tasks, (list, tuple)) else tasks


def _new_batch_id(batch_id: Optional[str]) -> str:
    """The id given, or one made up, fit to be posted to."""
    if batch_id is None:
        return str(uuid.uuid4())
    if "/" in str(batch_id):
        raise ValueError(f"a batch id can't have a slash ({batch_id!r}): it could not be asked for")
    _quoted(batch_id, "batch id")
    return batch_id


def _batch_path(batch_id: str) -> str:
    return f"{_BATCHES}/{_quoted(batch_id, 'batch id')}"


def _quoted(text: str, what: str) -> str:
    if not isinstance(text, str) or text in ("", ".", ".."):  # dots would name another resource
        raise ValueError(f"{text!r} is no {what}")
    return quote(text, safe="")
