"""The client for asyncio: the same methods, awaited.

There is no logic of its own here: each call hands one method of `SynthgenClient` to a thread. What is added
is how such a thread ends before its time, and how tasks get from a loop to a thread and back, one by one.
"""

import asyncio
import os
import threading
from collections import deque
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import closing
from itertools import islice
from typing import (
    Any,
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    BinaryIO,
    Callable,
    ContextManager,
    Coroutine,
    Deque,
    Dict,
    Generator,
    Iterable,
    Iterator,
    List,
    Optional,
    Tuple,
    TypeVar,
    Union,
)

import requests

from ._checkpoint import Checkpoint
from .client import SynthgenClient
from .models import (
    Batch,
    BatchList,
    BulkTaskResponse,
    CalendarInterval,
    HealthResponse,
    Task,
    TaskResponse,
    TaskStatsResponse,
    TaskStatus,
    UsageStatsResponse,
)
from .monitor import Monitor

__all__ = ["AsyncSynthgenClient"]

_SHORT_CALLS_AT_ONCE = 16
_UNLIMITED = 1_000_000
#: How many tasks of a stream are read before the first of them is taken.
_READ_AHEAD = 100

_Path = Union[str, "os.PathLike[str]"]
_Tasks = Union[Iterable[Task], AsyncIterable[Task]]
_Class = TypeVar("_Class", bound=type)
_Result = TypeVar("_Result")


def _documented(cls: _Class) -> _Class:
    """Give each public method without a docstring that of the method which it hands on to."""
    for name, method in vars(cls).items():
        if not name.startswith("_") and not method.__doc__:
            method.__doc__ = getattr(SynthgenClient, name).__doc__
    return cls


@_documented
class AsyncSynthgenClient:
    """`SynthgenClient` for asyncio: the same arguments, and the same methods, awaited.

    `create_batch` and `monitor_batch` take an async iterable of tasks, too. Each call runs in a thread; so does a
    monitor of your own: it is called from there, not from the loop.

    A call that is cancelled frees its awaiter at once. If it had begun to upload a batch, the ``CancelledError``
    names it: what was uploaded is run. No read can be broken from another thread, so that of the call ends with
    the request that it is in: a poll takes 30 s at most, others may take ``timeout``. `close` waits for that.

    An ``async for`` over `iter_batch_tasks` that is left early keeps its connection until the iterator is closed:
    by ``aclose()``, or when nothing refers to it any more.

    A client belongs to no loop: it may be made where none runs, and be used from several.
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
        self._client = SynthgenClient(
            base_url,
            api_key,
            timeout,
            config_file,
            retries=retries,
            backoff_factor=backoff_factor,
            session=session,
            idempotent_uploads=idempotent_uploads,
        )
        self.base_url: str = self._client.base_url
        self.timeout: float = self._client.timeout
        self._threads = ThreadPoolExecutor(_UNLIMITED, thread_name_prefix=type(self).__name__)
        self._slots: Dict[asyncio.AbstractEventLoop, asyncio.Semaphore] = {}
        self._running: Dict[Future[Any], _Call] = {}
        self._closed = False

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.base_url!r})"

    async def __aenter__(self) -> "AsyncSynthgenClient":
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Cancel the calls that still run, wait for their threads, and close the connections; may be called twice."""
        self._closed = True
        for call in list(self._running.values()):
            call.cancel()
        try:
            await asyncio.gather(*map(asyncio.wrap_future, list(self._running)), return_exceptions=True)
            self._threads.shutdown()  # at once: they have nothing left to do
        finally:
            self._client.close()

    # The life of a batch, in its order.

    async def check_health(self) -> HealthResponse:
        return await self._run_short(lambda client: client.check_health())

    async def create_batch(
        self,
        tasks: _Tasks,
        chunk_size: int = 1000,
        *,
        batch_id: Optional[str] = None,
        idempotency_key: Optional[str] = None,
        monitor: Optional[Monitor] = None,
        checkpoint: Optional[_Path] = None,
    ) -> BulkTaskResponse:
        return await self._run(
            lambda client: client.create_batch(
                client.iterable(tasks),
                chunk_size,
                batch_id=batch_id,
                idempotency_key=idempotency_key,
                monitor=monitor,
                checkpoint=checkpoint,
            ),
        )

    async def monitor_batch(
        self,
        tasks: Optional[_Tasks] = None,
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
        return await self._run(
            lambda client: client.monitor_batch(
                None if tasks is None else client.iterable(tasks),
                batch_id,
                cost_by_1m_input_token,
                cost_by_1m_output_token,
                chunk_size=chunk_size,
                poll_interval=poll_interval,
                timeout=timeout,
                stall_timeout=stall_timeout,
                show_progress=show_progress,
                monitor=monitor,
                checkpoint=checkpoint,
            ),
        )

    async def run_batch(
        self,
        tasks: _Tasks,
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
        return await self._run(
            lambda client: client.run_batch(
                client.iterable(tasks),
                path,
                batch_id,
                cost_by_1m_input_token,
                cost_by_1m_output_token,
                chunk_size=chunk_size,
                poll_interval=poll_interval,
                timeout=timeout,
                stall_timeout=stall_timeout,
                show_progress=show_progress,
                monitor=monitor,
                checkpoint=checkpoint,
            ),
        )

    async def get_batches(self) -> BatchList:
        return await self._run_short(lambda client: client.get_batches())

    async def get_batch(self, batch_id: str) -> Batch:
        return await self._run_short(lambda client: client.get_batch(batch_id))

    def iter_batch_tasks(
        self, batch_id: str, task_status: Optional[Union[TaskStatus, str]] = None
    ) -> AsyncGenerator[TaskResponse, None]:
        call = _Call(self._client)
        return self._stream(call, call.iter_batch_tasks(batch_id, task_status))

    async def get_batch_tasks(
        self,
        batch_id: str,
        task_status: Optional[Union[TaskStatus, str]] = None,
        *,
        monitor: Optional[Monitor] = None,
    ) -> List[TaskResponse]:
        return await self._run(lambda client: client.get_batch_tasks(batch_id, task_status, monitor=monitor))

    async def export_batch(
        self,
        batch_id: str,
        path: _Path,
        task_status: Optional[Union[TaskStatus, str]] = None,
        *,
        monitor: Optional[Monitor] = None,
    ) -> int:
        return await self._run(lambda client: client.export_batch(batch_id, path, task_status, monitor=monitor))

    async def get_batch_stats(
        self,
        batch_id: str,
        time_range: str = "24h",
        interval: Union[CalendarInterval, str] = CalendarInterval.HOUR_SHORT,
    ) -> UsageStatsResponse:
        return await self._run_short(lambda client: client.get_batch_stats(batch_id, time_range, interval))

    async def delete_batch(self, batch_id: str) -> None:
        await self._run_short(lambda client: client.delete_batch(batch_id))

    # Single tasks.

    async def get_task(self, message_id: str) -> TaskResponse:
        return await self._run_short(lambda client: client.get_task(message_id))

    async def delete_task(self, message_id: str) -> None:
        await self._run_short(lambda client: client.delete_task(message_id))

    async def get_task_stats(self) -> TaskStatsResponse:
        return await self._run_short(lambda client: client.get_task_stats())

    # Threads.

    async def _run(self, function: Callable[["_Call"], _Result]) -> _Result:
        """The result of a function that gets the client as this call has it, in a thread."""
        call = _Call(self._client)
        call.loop = asyncio.get_running_loop()
        try:
            return await asyncio.wrap_future(self._start(call, lambda: function(call)))
        except asyncio.CancelledError as exc:
            call.cancel()
            if call.batch_id is None:
                raise
            how = f"come back to it with monitor_batch(batch_id={call.batch_id!r})"
            how = "the same call goes on with the rest, by its checkpoint" if call.has_checkpoint else how
            raise asyncio.CancelledError(f"batch {call.batch_id!r} goes on with what was uploaded; {how}") from exc

    async def _run_short(self, function: Callable[["_Call"], _Result]) -> _Result:
        """The same for one request: so many at a time, without those that were cancelled and whose threads go on."""
        loop = asyncio.get_running_loop()
        if loop not in self._slots:
            for other in [other for other in list(self._slots) if other.is_closed()]:
                self._slots.pop(other, None)
            self._slots[loop] = asyncio.Semaphore(_SHORT_CALLS_AT_ONCE)
        async with self._slots[loop]:
            return await self._run(function)

    def _start(self, call: "_Call", function: Callable[[], _Result]) -> "Future[_Result]":
        if self._closed:
            raise RuntimeError("the client is closed")
        future = self._threads.submit(function)
        self._running[future] = call
        future.add_done_callback(self._running.pop)
        return future

    async def _stream(
        self, call: "_Call", tasks: Generator[TaskResponse, None, None]
    ) -> AsyncGenerator[TaskResponse, None]:
        """The tasks, read in a thread; so many at a time, and the next when those have been taken."""
        loop = asyncio.get_running_loop()
        buffer: Deque[Optional[TaskResponse]] = deque()
        arrived = asyncio.Event()

        def put(task: Optional[TaskResponse]) -> None:
            buffer.append(task)
            if len(buffer) == 1:  # else the consumer has something to do
                loop.call_soon_threadsafe(arrived.set)

        def read() -> int:
            count = 0
            try:
                for count, task in enumerate(islice(tasks, _READ_AHEAD), 1):
                    put(task)
                return count
            finally:
                put(None)

        reading = self._start(call, read)
        try:
            while True:
                while not buffer:
                    await arrived.wait()
                    arrived.clear()
                task = buffer.popleft()
                if task is not None:
                    yield task
                elif await asyncio.wrap_future(reading) == _READ_AHEAD:
                    reading = self._start(call, read)
                else:
                    return
        finally:
            call.cancel()
            reading.add_done_callback(lambda _: tasks.close())  # now, or when the read that it is in ends


class _Call(SynthgenClient):
    """The client as one call has it: with the settings and connections of all, but it can be cancelled.

    `cancel` may be called from any thread. The call ends with an ``asyncio.CancelledError``, which no
    ``except Exception`` holds up, before its next request, in a pause, or before the next task of a stream.

    Attributes:
        loop: Where the call is awaited.
        batch_id: The batch that it began to upload.
        has_checkpoint: Whether that is noted in one.
    """

    loop: asyncio.AbstractEventLoop

    def __init__(self, client: SynthgenClient) -> None:
        self.__dict__.update(client.__dict__)  # in place of super().__init__, which would open connections of its own
        self.batch_id: Optional[str] = None
        self.has_checkpoint = False
        self._cancelled = threading.Event()
        self._awaited: Optional[Future[Any]] = None

    def cancel(self) -> None:
        self._cancelled.set()
        if self._awaited is not None:
            self._awaited.cancel()

    def iterable(self, tasks: _Tasks) -> Iterable[Task]:
        """The tasks, for the thread of this call."""
        return _Drawn(tasks, self) if isinstance(tasks, AsyncIterable) else tasks

    def wait_for(self, function: Callable[[], Coroutine[Any, Any, _Result]]) -> _Result:
        """Run a coroutine on the loop, and wait in this other thread for what becomes of it."""
        self._check()
        if _in_a_loop() or not self.loop.is_running():
            raise RuntimeError("tasks from an async iterable can only be read in a thread, and while its loop runs")
        self._awaited = future = asyncio.run_coroutine_threadsafe(function(), self.loop)
        if self._cancelled.is_set():  # since the check, when there was nothing to cancel yet
            future.cancel()
        try:
            return future.result()
        except CancelledError:  # that of concurrent.futures is an Exception
            raise asyncio.CancelledError("the tasks' iterable was cancelled, or the client closed") from None

    def _check(self) -> None:
        if self._cancelled.is_set():
            raise asyncio.CancelledError("the client was closed")

    def _send(self, method: str, path: str, **options: Any) -> requests.Response:
        self._check()
        return super()._send(method, path, **options)

    def _sleep(self, seconds: float) -> None:
        self._cancelled.wait(seconds)
        self._check()

    def _noting(self, path: Optional[_Path], *args: Any) -> ContextManager[Optional[Checkpoint]]:
        self.has_checkpoint = path is not None
        return super()._noting(path, *args)

    def _upload(self, batch_id: str, lines: bytes, key: str) -> str:
        self.batch_id = batch_id
        return super()._upload(batch_id, lines, key)

    def _stream_export(self, *args: Any, **options: Any) -> Generator[Tuple[Iterable[TaskResponse], bytes], None, None]:
        with closing(super()._stream_export(*args, **options)) as stream:
            for tasks in stream:
                self._check()
                yield tasks


class _Drawn(Iterator[Task]):
    """The tasks of an async iterable, for a thread: each is drawn on the loop when it is asked for."""

    def __init__(self, tasks: AsyncIterable[Task], call: _Call) -> None:
        self._tasks = tasks
        self._iterator: Optional[AsyncIterator[Task]] = None
        self._call = call

    def __next__(self) -> Task:
        try:
            return self._call.wait_for(self._draw)
        except StopAsyncIteration:
            raise StopIteration from None

    async def _draw(self) -> Task:
        if self._iterator is None:
            self._iterator = self._tasks.__aiter__()
        return await self._iterator.__anext__()


def _in_a_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
