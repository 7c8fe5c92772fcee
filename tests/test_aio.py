"""The client for asyncio: what the sync one does, and how its threads start, hold back and end."""

import asyncio
import gc
import inspect
import itertools
import signal
import subprocess
import sys
import threading
import weakref

import pytest
from builders import batch, export_line, framework_task, tasks
from framework import Framework
from servers import DEADLINE, Answer

from synthgen import BatchUploadError, Monitor, NotFoundError, SynthgenClient, Task
from synthgen.aio import AsyncSynthgenClient
from synthgen.local import DemoProvider, LocalServer

BATCH = "/api/v1/batches/b"
EXPORT = "/api/v1/batches/b/tasks/export"
UPLOADS = "/api/v1/batches"


@pytest.fixture
def run(caplog):
    """As ``asyncio.run``; in the end no thread of a client is left, and asyncio has nothing to complain about."""
    yield lambda main: asyncio.run(asyncio.wait_for(main, DEADLINE))
    gc.collect()
    assert [thread for thread in threading.enumerate() if "AsyncSynthgenClient" in thread.name] == []
    assert [record for record in caplog.records if record.name in ("asyncio", "concurrent.futures")] == []


@pytest.fixture
def framework():
    with Framework() as running:
        yield running


class Watched(Monitor):
    """Tells the loop of the first poll and the first note."""

    def __init__(self):
        self._loop = asyncio.get_running_loop()
        self.polled, self.noted = asyncio.Event(), asyncio.Event()
        self.thread = None

    def batch(self, *args):
        self.thread = threading.current_thread()
        self._loop.call_soon_threadsafe(self.polled.set)

    def note(self, text):
        self._loop.call_soon_threadsafe(self.noted.set)


class Stream:
    """The answer to an export that never ends: counts the lines sent, and tells when nobody reads them any more."""

    def __init__(self, size=0):
        self._size = size
        self.sent = 0
        self.ended = threading.Event()

    def __call__(self, request):
        return Answer(chunks=self._lines())

    def _lines(self):
        try:
            for number in itertools.count():
                yield export_line([framework_task(number, dataset="x" * self._size)])
                self.sent += 1
        finally:
            self.ended.set()


async def one_by_one(items):
    """An async iterable of these, which gives way to others before each."""
    for item in items:
        await asyncio.sleep(0)
        yield item


# ------------------------------------------------------------------------------ the same methods


def public_methods():
    return [name for name, _ in inspect.getmembers(SynthgenClient, inspect.isfunction) if not name.startswith("_")]


def parameters(function):
    """Names, kinds, defaults and annotations, but not which iterables of tasks are taken."""
    return [
        parameter.replace(annotation=None) if parameter.name == "tasks" else parameter
        for parameter in inspect.signature(function).parameters.values()
    ]


def test_it_has_the_same_methods():
    """Nothing is missing, and nothing more is there."""
    there = [name for name in vars(AsyncSynthgenClient) if not name.startswith("_")]

    assert sorted(there) == sorted(public_methods())


@pytest.mark.parametrize("name", ["__init__", *public_methods()])
def test_a_method_takes_the_same_arguments(name):
    """Names, order, kinds, defaults and types are those of the sync client."""
    assert parameters(getattr(AsyncSynthgenClient, name)) == parameters(getattr(SynthgenClient, name))


@pytest.mark.parametrize("name", sorted({*public_methods()} - {"iter_batch_tasks", "close"}))
def test_a_method_returns_the_same_when_awaited(name):
    """Each is a coroutine function, with the sync one's return type."""
    sync, awaited = getattr(SynthgenClient, name), getattr(AsyncSynthgenClient, name)

    assert inspect.iscoroutinefunction(awaited)
    assert inspect.signature(awaited).return_annotation == inspect.signature(sync).return_annotation


@pytest.mark.parametrize("name", sorted({*public_methods()} - {"close"}))
def test_a_method_has_the_same_docstring(name):
    """One text serves both; only closing does more here."""
    assert getattr(AsyncSynthgenClient, name).__doc__ == getattr(SynthgenClient, name).__doc__


def test_its_import_brings_no_drawing_and_no_server():
    """What the async client does not need is not imported."""
    script = "import sys, synthgen.aio; print(*{'rich', 'sqlite3', 'http.server', 'synthgen.local'} & {*sys.modules})"

    assert subprocess.check_output([sys.executable, "-c", script]).strip() == b""


def test_each_method_hands_its_arguments_on(run, framework, tmp_path):
    """Submit, look, stream, export, and delete: the answers are those of the sync client."""

    async def main():
        async with AsyncSynthgenClient(framework.url) as client:
            assert (await client.check_health()).status == "healthy"
            assert (await client.create_batch(tasks(3), 2, batch_id="b")).total_tasks == 3
            assert (await client.get_batch("b")).completed_tasks == 3
            results = await client.get_batch_tasks("b", "COMPLETED")
            assert [task async for task in client.iter_batch_tasks("b", "FAILED")] == []
            assert await client.export_batch("b", tmp_path / "b.jsonl") == len(results) == 3
            assert (await client.get_task(results[0].message_id)).content == results[0].content
            await client.delete_batch("b")
            with pytest.raises(NotFoundError):
                await client.get_batch("b")

    run(main())


def test_a_batch_is_run_and_its_results_are_in_order(run):
    """monitor_batch takes an async iterable, against the embedded server as well."""

    async def main(server, provider):
        equations = [
            Task(url=provider.url, body={"messages": [{"role": "user", "content": f"solve x = {number}"}]})
            for number in range(10)
        ]
        async with AsyncSynthgenClient(server.url, server.api_key) as client:
            return await client.monitor_batch(one_by_one(equations), show_progress=False)

    with DemoProvider() as provider, LocalServer() as server:
        results = run(main(server, provider))

    assert [result.content for result in results] == [f"x = {number}" for number in range(10)]


# ------------------------------------------------------------------------------ many at once


@pytest.mark.slow
def test_a_thousand_calls_at_once(run, framework):
    """All are answered, by a few threads."""

    async def main():
        async with AsyncSynthgenClient(framework.url) as client:
            await client.create_batch(tasks(1000), batch_id="b")
            ids = [task.message_id for task in await client.get_batch_tasks("b")]
            answers = await asyncio.gather(*map(client.get_task, ids))
            assert threading.active_count() < 100
            assert [answer.message_id for answer in answers] == ids

    run(main())


def test_calls_that_were_given_up_hold_up_no_others(run, server):
    """Their threads wait for a server that is silent, and may do so for an hour."""
    silence = threading.Event()
    server.answer("GET", "/api/v1/batches/b", Answer({}, hold=silence))
    server.answer("GET", "/api/v1/batches/c", {"batch_id": "c", "batch_status": "PENDING"})

    async def main():
        async with AsyncSynthgenClient(server.url) as client:
            try:
                for _ in range(20):
                    with pytest.raises(asyncio.TimeoutError):
                        await asyncio.wait_for(client.get_batch("b"), 0.01)
                assert (await client.get_batch("c")).batch_id == "c"
            finally:
                silence.set()

    run(main())


def test_ten_batches_at_once_and_one_is_cancelled(run, framework):
    """The others end as if nothing had happened; the cancelled one is named, and goes on."""
    framework.runs = False

    async def main():
        async with AsyncSynthgenClient(framework.url) as client:
            monitors = [Watched() for _ in range(10)]
            watches = [
                asyncio.ensure_future(message_of(client.monitor_batch(tasks(count), monitor=monitor)))
                for count, monitor in enumerate(monitors, 1)
            ]
            await asyncio.gather(*(monitor.polled.wait() for monitor in monitors))
            watches[3].cancel()
            cancelled = await watches[3]
            framework.run()
            return cancelled, await asyncio.gather(*watches)

    cancelled, outcomes = run(main())

    uploads = [request for request in framework.requests if request.method == "POST"]
    batch_ids = {len(upload.lines): upload.query["batch_id"] for upload in uploads}
    assert batch_ids[4] in cancelled
    assert [len(outcome) for outcome in outcomes if outcome is not cancelled] == [1, 2, 3, 5, 6, 7, 8, 9, 10]


def test_a_monitor_is_called_from_the_thread_of_its_call(run, framework):
    """Not from the loop, which a slow monitor would hold up."""

    async def main():
        monitor = Watched()
        async with AsyncSynthgenClient(framework.url) as client:
            await client.monitor_batch(tasks(1), monitor=monitor)
        assert monitor.thread not in (None, threading.current_thread())

    run(main())


# ------------------------------------------------------------------------------ cancelling


def test_cancelling_does_not_wait_for_the_answer(run, server):
    """The awaiter is free while the request still hangs; closing the client waits for it."""
    answered = threading.Event()
    server.answer("GET", BATCH, Answer(batch(1), hold=answered))

    async def main():
        client = AsyncSynthgenClient(server.url)
        call = asyncio.ensure_future(client.get_batch("b"))
        await in_thread(server.wait_for_requests, 1)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        closing = asyncio.ensure_future(client.close())
        await asyncio.sleep(0)
        assert not closing.done()
        answered.set()
        await closing

    run(main())


def test_a_cancelled_pause_ends(run, server):
    """A server that asks to wait for a minute does not hold up the end."""
    server.answer("GET", "/health", {"status": "healthy", "services": {}})
    server.answer("GET", BATCH, Answer({"detail": "later"}, 429, {"Retry-After": "60"}))

    async def main():
        async with AsyncSynthgenClient(server.url) as client:
            monitor = Watched()
            call = asyncio.ensure_future(client.monitor_batch(batch_id="b", monitor=monitor))
            await monitor.noted.wait()
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call

    run(main())


def test_a_cancelled_upload_names_its_batch_and_sends_no_more(run, server):
    """The chunk that is on its way arrives; the next is not sent."""
    arrived = threading.Event()
    server.answer("POST", UPLOADS, Answer({"batch_id": "b", "total_tasks": 1}, hold=arrived))

    async def main():
        async with AsyncSynthgenClient(server.url, retries=0) as client:
            call = asyncio.ensure_future(message_of(client.create_batch(tasks(2), 1, batch_id="b")))
            await in_thread(server.wait_for_requests, 1)
            call.cancel()
            message = await call
            arrived.set()
        return message

    assert "monitor_batch(batch_id='b')" in run(main())
    assert len(server.requests) == 1


def test_a_cancelled_upload_is_not_sent_again(run, server):
    """Though its server asked for that a minute later, which the end does not wait for."""
    server.answer("POST", UPLOADS, Answer({"detail": "later"}, 429, {"Retry-After": "60"}))

    async def main():
        async with AsyncSynthgenClient(server.url) as client:
            call = asyncio.ensure_future(client.create_batch(tasks(1)))
            await in_thread(server.wait_for_requests, 1)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call

    run(main())

    assert len(server.requests) == 1


def test_cancelled_matching_asks_for_no_more_tasks(run, server):
    """Those that are alike are asked for several at a time; the others no more."""
    answered = threading.Event()
    (one,) = tasks(1)
    alike = [one.model_copy(update={"custom_id": str(number)}) for number in range(100)]
    server.answer("GET", "/health", {"status": "healthy", "services": {}})
    server.answer("GET", BATCH, batch(100))
    server.answer("GET", EXPORT, Answer(chunks=[export_line(framework_task(number, one) for number in range(100))]))
    for number in range(100):
        server.answer("GET", f"/api/v1/tasks/{number}", Answer(framework_task(number), hold=answered))

    async def main():
        async with AsyncSynthgenClient(server.url) as client:
            call = asyncio.ensure_future(client.monitor_batch(alike, "b", show_progress=False))
            await in_thread(server.wait_for_requests, 6)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            answered.set()

    run(main())

    assert len(server.requests) < 50


def test_a_cancelled_download_closes_its_connection(run, server):
    """The thread does not read to the end what nobody wants."""
    stream = Stream()
    server.answer("GET", BATCH, batch(0, pending_tasks=1))
    server.answer("GET", EXPORT, stream)

    async def main():
        async with AsyncSynthgenClient(server.url) as client:
            call = asyncio.ensure_future(client.get_batch_tasks("b"))
            await in_thread(server.wait_for_requests, 2)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call

    run(main())

    assert stream.ended.wait(DEADLINE)


def test_a_cancelled_upload_cancels_its_iterable(run, framework):
    """An async iterable that waits for its next task is freed, too."""
    waiting, ended = None, []

    async def endless():
        try:
            yield tasks(1)[0]
            waiting.set()
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            ended.append(True)
            raise

    async def main():
        nonlocal waiting
        waiting = asyncio.Event()
        async with AsyncSynthgenClient(framework.url) as client:
            call = asyncio.ensure_future(client.create_batch(endless()))
            await waiting.wait()
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call

    run(main())

    assert ended == [True]
    assert framework.requests == []


@pytest.mark.parametrize(
    "options, how",
    [
        ({}, "come back to it with monitor_batch(batch_id="),
        ({"checkpoint": "x.checkpoint"}, "the same call goes on with the rest, by its checkpoint"),
    ],
    ids=["alone", "checkpoint"],
)
def test_ctrl_c_names_the_batch(run, framework, options, how, tmp_path, monkeypatch):
    """What asyncio makes of Ctrl-C reaches the call as a cancellation, which says how to come back."""
    monkeypatch.chdir(tmp_path)
    framework.runs = False
    messages = []

    async def main():
        async with AsyncSynthgenClient(framework.url) as client:
            monitor = Watched()
            interrupt = asyncio.ensure_future(monitor.polled.wait())
            interrupt.add_done_callback(lambda _: signal.raise_signal(signal.SIGINT))
            try:
                await client.monitor_batch(tasks(1), monitor=monitor, **options)
            except asyncio.CancelledError as error:
                messages.append(str(error))
                raise

    with pytest.raises(KeyboardInterrupt):
        asyncio.run(main())

    assert how in messages[0]


# ------------------------------------------------------------------------------ closing


def test_closing_cancels_what_still_runs(run, framework):
    """When one of several batches fails, leaving the block does not wait for the others."""
    framework.runs = False

    async def main():
        async with AsyncSynthgenClient(framework.url) as client:
            monitor = Watched()
            call = asyncio.ensure_future(client.monitor_batch(tasks(1), monitor=monitor))
            await monitor.polled.wait()
        with pytest.raises(asyncio.CancelledError):
            await call

    run(main())


def test_closing_the_client_ends_an_upload_that_waits_for_its_tasks(run, framework):
    """As a cancellation, whatever the call is in."""

    async def main():
        waits = asyncio.Event()

        async def source():
            yield tasks(1)[0]
            waits.set()
            await asyncio.Event().wait()

        client = AsyncSynthgenClient(framework.url)
        call = asyncio.ensure_future(client.create_batch(source(), 1))
        await waits.wait()
        await client.close()
        with pytest.raises(asyncio.CancelledError):
            await call

    run(main())


def test_a_closed_client_says_so(run):
    """Closing twice is fine; a call after it is a mistake, and no other error."""

    async def main():
        client = AsyncSynthgenClient()
        await client.close()
        await client.close()
        with pytest.raises(RuntimeError, match="closed"):
            await client.get_batches()
        with pytest.raises(RuntimeError, match="closed"):
            await client.iter_batch_tasks("b").__anext__()

    run(main())


def test_one_client_serves_several_loops(run, framework):
    """It is made where no loop runs, and used in one after the other."""
    client = AsyncSynthgenClient(framework.url)

    first = asyncio.run(client.create_batch(one_by_one(tasks(1)), batch_id="b"))
    second = asyncio.run(client.get_batch("b"))
    run(client.close())

    assert (first.total_tasks, second.total_tasks) == (1, 1)


def test_a_client_keeps_no_loop_that_was_closed(run, framework):
    """A script may start one for each batch."""
    client = AsyncSynthgenClient(framework.url)

    async def main():
        await asyncio.gather(*(client.check_health() for _ in range(20)))  # more than are made at a time
        return weakref.ref(asyncio.get_running_loop())

    loops = [asyncio.run(main()) for _ in range(3)]
    run(client.close())
    gc.collect()

    assert [loop() for loop in loops[:2]] == [None, None]


# ------------------------------------------------------------------------------ streams


def test_a_stream_gives_each_task_once_and_at_once(run, server):
    """The first task is there before the second is sent; and there may be more than are read ahead."""
    taken = threading.Event()
    lines = [export_line(framework_task(number) for number in part) for part in ([0], range(1, 301))]
    server.answer("GET", BATCH, batch(301))
    server.answer("GET", EXPORT, Answer(chunks=[lines[0], taken, lines[1]]))

    async def main():
        ids = []
        async with AsyncSynthgenClient(server.url) as client:
            async for task in client.iter_batch_tasks("b"):
                taken.set()
                ids.append(task.message_id)
        return ids

    assert run(main()) == [str(number) for number in range(301)]


def test_a_slow_consumer_holds_the_reading_back(run, server):
    """While the next task is not asked for, an endless stream comes to rest: no more is sent than buffers hold."""
    most = 1000
    stream = Stream(size=64 * 1024)
    server.answer("GET", BATCH, batch(0, pending_tasks=1))
    server.answer("GET", EXPORT, stream)
    server.answer("GET", "/api/v1/tasks/stats", {})

    async def main():
        async with AsyncSynthgenClient(server.url) as client:
            results = client.iter_batch_tasks("b")
            await results.__anext__()
            before = 0
            while before < stream.sent < most:
                before = stream.sent
                for _ in range(50):
                    await client.get_task_stats()
            await results.aclose()
            return stream.sent

    assert run(main()) < most


def test_a_stream_that_is_left_early_closes_its_connection(run, server):
    """After aclose the server finds that nobody reads any more."""
    stream = Stream()
    server.answer("GET", BATCH, batch(0, pending_tasks=1))
    server.answer("GET", EXPORT, stream)

    async def main():
        async with AsyncSynthgenClient(server.url) as client:
            results = client.iter_batch_tasks("b")
            async for _ in results:
                break
            await results.aclose()
            assert await in_thread(stream.ended.wait, DEADLINE)

    run(main())


def test_a_stream_that_nobody_refers_to_closes_its_connection(run, server):
    """A plain break is enough, as for a sync generator."""
    stream = Stream()
    server.answer("GET", BATCH, batch(0, pending_tasks=1))
    server.answer("GET", EXPORT, stream)

    async def main():
        async with AsyncSynthgenClient(server.url) as client:
            async for _ in client.iter_batch_tasks("b"):
                break
            gc.collect()
            assert await in_thread(stream.ended.wait, DEADLINE)

    run(main())


def test_a_cancelled_consumer_ends_the_reading(run, server):
    """A stream that is waited for ends with the task that it has come to."""
    more = threading.Event()
    server.answer("GET", BATCH, batch(0, pending_tasks=1))
    lines = [export_line([framework_task(number)]) for number in range(3)]
    server.answer("GET", EXPORT, Answer(chunks=[lines[0], more, lines[1], lines[2]]))

    async def main():
        async with AsyncSynthgenClient(server.url) as client:
            results = client.iter_batch_tasks("b")
            await results.__anext__()
            following = asyncio.ensure_future(results.__anext__())
            await asyncio.sleep(0)
            following.cancel()
            with pytest.raises(asyncio.CancelledError):
                await following
            with pytest.raises(StopAsyncIteration):
                await results.__anext__()
            more.set()

    run(main())


def test_an_unknown_batch_is_an_error_of_the_stream(run, framework):
    """An error in the thread is raised where the tasks are awaited; a wrong id, where the method is called."""

    async def main():
        async with AsyncSynthgenClient(framework.url) as client:
            with pytest.raises(NotFoundError, match="b-404"):
                await client.iter_batch_tasks("b-404").__anext__()
            with pytest.raises(ValueError, match="batch id"):
                client.iter_batch_tasks("..")

    run(main())


# ------------------------------------------------------------------------------ async iterables of tasks


def test_an_async_iterable_is_read_as_it_is_sent(run, framework):
    """When a chunk arrives, no task of the next has been drawn."""
    drawn, drawn_at_upload = [], []

    async def source():
        for task in tasks(5):
            drawn.append(task)
            yield task

    def take(request):
        drawn_at_upload.append(len(drawn))
        return framework.play(request)

    framework.answer("POST", UPLOADS, take)

    async def main():
        async with AsyncSynthgenClient(framework.url) as client:
            return await client.create_batch(source(), 2)

    assert run(main()).total_tasks == 5
    assert drawn_at_upload == [2, 4, 5]


def test_an_error_of_the_iterable_is_the_cause(run, framework):
    """It ends the upload as an error of a sync iterable does."""

    async def source():
        for task in tasks(3):
            yield task
        raise LookupError("the database went away")

    async def main():
        async with AsyncSynthgenClient(framework.url, retries=0) as client:
            with pytest.raises(BatchUploadError) as caught:
                await client.create_batch(source(), 2, batch_id="b")
            await client.create_batch(caught.value.remaining, batch_id="b")
        return caught.value

    error = run(main())

    assert isinstance(error.__cause__, LookupError)
    assert error.uploaded == 2
    assert custom_ids(framework.requests) == ["0", "1", "2"]


def test_an_upload_goes_on_with_what_an_async_iterable_has_left(run, framework):
    """What was refused and what was never drawn are sent by a second call."""
    framework.answer("POST", UPLOADS, framework.play, Answer({"detail": "no"}, 400), framework.play)

    async def main():
        async with AsyncSynthgenClient(framework.url, retries=0) as client:
            with pytest.raises(BatchUploadError) as caught:
                await client.create_batch(one_by_one(tasks(7)), 2, batch_id="b")
            await client.create_batch(caught.value.remaining, batch_id="b")

    run(main())

    assert custom_ids(framework.requests[2:]) == ["2", "3", "4", "5", "6"]


def test_what_an_async_iterable_has_left_does_not_block_its_loop(run, framework):
    """A loop that would have to wait for itself is an error that says so."""
    framework.answer("POST", UPLOADS, Answer({"detail": "no"}, 400))

    async def main():
        async with AsyncSynthgenClient(framework.url) as client:
            with pytest.raises(BatchUploadError) as caught:
                await client.create_batch(one_by_one(tasks(3)), 2)
            with pytest.raises(RuntimeError, match="only be read in a thread"):
                list(caught.value.remaining)

    run(main())


# ------------------------------------------------------------------------------ helpers


async def message_of(call):
    """What a call returns, or what its cancellation says."""
    try:
        return await call
    except asyncio.CancelledError as error:
        return str(error)


def in_thread(function, *args):
    """Wait for something that blocks, in a thread of its own."""
    future = asyncio.get_running_loop().create_future()
    loop = asyncio.get_running_loop()
    threading.Thread(target=lambda: loop.call_soon_threadsafe(future.set_result, function(*args))).start()
    return future


def custom_ids(uploads):
    """Of the tasks, in the order in which they were sent."""
    return [line["custom_id"] for request in uploads for line in request.lines]
