"""A network that breaks three requests in ten: every result exactly once, no call paid for twice."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
from collections import Counter
from contextlib import contextmanager
from itertools import chain
from subprocess import PIPE
from typing import NamedTuple

import pytest
from builders import task
from faults import NOT_ASCII, FaultyProxy
from framework import Framework, echo, prompt_of
from servers import DEADLINE, DROP, Answer, CannedServer

from synthgen import Monitor, SynthgenClient, TaskResponse
from synthgen.exceptions import BatchUploadError, NotFoundError
from synthgen.local import LocalServer

pytestmark = pytest.mark.slow

PATH = "/v1/chat/completions"
SERVE = """
import sys
from synthgen.local import LocalServer
with LocalServer(sys.argv[1], api_key="k", workers=8) as server:
    print(server.url, flush=True)
    sys.stdin.read()
"""


class Upstream(NamedTuple):
    """A server, and a provider that counts its calls."""

    url: str
    api_key: str
    provider_url: str
    calls: "Counter[str]"
    #: Faults that its answers leave no room for.
    without: "frozenset[str]"


@contextmanager
def framework(deduplicates=True):
    """What the framework does; with deduplication, which it lacks."""
    with Framework() as server:
        server.deduplicates = deduplicates
        yield Upstream(server.url, "k", "http://provider.test" + PATH, server.calls, frozenset())


@contextmanager
def local_server():
    """The embedded server."""
    calls = Counter()
    lock = threading.Lock()

    def answer(request):
        task = {"body": json.loads(request.body)}
        with lock:
            calls[prompt_of(task)] += 1
        return echo(task)

    with CannedServer() as provider, LocalServer() as server:
        provider.answer("POST", PATH, answer)
        yield Upstream(server.url, server.api_key, provider.url + PATH, calls, NOT_ASCII)


def make_tasks(upstream, count):
    """Tasks with prompts of their own, of characters that a cut can part; no cache hides a second call."""
    fields = {"url": upstream.provider_url, "use_cache": False}
    return [task(f"{i}: \u2028 é 😀", custom_id=f"id-{i}", **fields) for i in range(count)]


def make_client(upstream, proxy, **settings):
    settings = {"retries": 10, "backoff_factor": 0.01, "timeout": 1, **settings}
    return SynthgenClient(proxy.url, upstream.api_key, **settings)


def assert_answered_once(results, tasks, calls):
    """Each task has its own answer, and was paid for once."""
    assert_answered(results, tasks)
    assert calls == Counter(prompt_of(dict(task)) for task in tasks)


def assert_answered(results, tasks):
    """Each task has its own answer, in the order of the tasks."""
    assert [result.custom_id for result in results] == [task.custom_id for task in tasks]
    assert [result.content for result in results] == ["echo: " + prompt_of(dict(task)) for task in tasks]


def inject_the_rest(proxy, client, batch_id):
    """Ask for a batch until every kind of fault was there."""
    for _ in range(300):
        if not proxy.missing:
            break
        assert len(client.get_batch_tasks(batch_id)) == 1


def some_seeds(*more):
    """Two, and more where they are cheap."""
    return pytest.mark.parametrize("seed", [1, 2, *more])


@pytest.mark.parametrize("serving", [framework, local_server])
@some_seeds(3)
def test_a_thousand_tasks_come_back_once_each(serving, seed):
    """To a server that deduplicates, uploads too are repeated after any failure."""
    with serving() as upstream, FaultyProxy(upstream.url, seed, without=upstream.without) as proxy:
        tasks = make_tasks(upstream, 1001)
        with make_client(upstream, proxy, idempotent_uploads=True) as client:
            results = client.monitor_batch(tasks[:-1], chunk_size=100, poll_interval=0.05, monitor=Monitor())
            assert_answered_once(results, tasks[:-1], upstream.calls)

            one = client.monitor_batch(tasks[-1:], poll_interval=0.05, monitor=Monitor())[0]
            inject_the_rest(proxy, client, one.batch_id)

        assert not proxy.missing and proxy.lost_uploads
        assert_answered_once(results + [one], tasks, upstream.calls)


@pytest.fixture
def soon(monkeypatch):
    """What an upload whose answer was lost has put into the batch is to be seen at once, here."""
    for name, value in SOON.items():
        monkeypatch.setattr(f"synthgen._read_back.{name}", value)


SOON = {"_UNSEEN_AFTER": 0.3, "SETTLED_AFTER": 0.1}


@some_seeds(3, 4, 5)
def test_without_deduplication_a_thousand_tasks_come_back_once_each_too(soon, seed):
    """After a lost answer the batch is read back, and only what is not there is sent again."""
    with framework(deduplicates=False) as upstream, FaultyProxy(upstream.url, seed) as proxy:
        tasks = make_tasks(upstream, 1000)
        with make_client(upstream, proxy) as client:
            results = client.monitor_batch(tasks, chunk_size=100, poll_interval=0.05, monitor=Monitor())

    assert proxy.lost_uploads
    assert_answered_once(results, tasks, upstream.calls)


RUN = """
import sys
from synthgen import SynthgenClient, __main__, _read_back
vars(_read_back).update(SOON)
SynthgenClient.run_batch.__kwdefaults__.update(poll_interval=0.05)
__main__._CHUNK_SIZE = 20
sys.exit(__main__.main(sys.argv[1:]))
"""


@some_seeds()
def test_a_run_killed_at_any_moment_and_started_again_pays_for_each_task_once(seed, tmp_path):
    """Twenty times, before or after a request was heard, with the same words each time."""
    rng = random.Random(seed)
    environment = {**os.environ, "SYNTHGEN_API_KEY": "k", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with Framework() as server:
        tasks = make_tasks(Upstream(server.url, "k", "http://provider.test" + PATH, server.calls, frozenset()), 600)
        (tmp_path / "tasks.jsonl").write_bytes(b"\n".join(task.to_line() for task in tasks))
        command = [sys.executable, "-c", RUN.replace("SOON", repr(SOON)), "run", "tasks.jsonl", "-o", "out.jsonl"]
        process, kills, left = None, 0, 0

        def answer(request):
            nonlocal left, kills
            left -= 1
            if left or kills == 20:
                return play(request)
            kills += 1
            if rng.random() < 0.5:
                play(request)
            process.kill()
            return DROP

        play, server.play = server.play, answer
        while True:
            left = rng.randrange(1, 9)
            process = subprocess.Popen(
                [*command, "--base-url", server.url], cwd=str(tmp_path), env=environment, stderr=PIPE
            )
            _, said = process.communicate(timeout=DEADLINE)
            if process.returncode == 0:
                break
            assert process.returncode == -signal.SIGKILL, said

    results = [TaskResponse.model_validate_json(line) for line in (tmp_path / "out.jsonl").read_bytes().splitlines()]
    assert kills == 20
    assert_answered_once(results, tasks, server.calls)
    assert sorted(os.listdir(str(tmp_path))) == ["out.jsonl", "tasks.jsonl"]


@pytest.mark.parametrize("serving", [lambda: framework(deduplicates=False), local_server], ids=["framework", "local"])
@some_seeds()
def test_resuming_by_hand_loses_nothing_and_pays_nothing_twice(serving, seed):
    """Without repeats, what is unconfirmed is looked for in the batch before it is sent again."""
    with serving() as upstream, FaultyProxy(upstream.url, seed, without=upstream.without) as proxy:
        tasks = make_tasks(upstream, 1000)
        with make_client(upstream, proxy, retries=0) as uploader, make_client(upstream, proxy) as client:
            known, todo = 0, tasks
            while todo:
                try:
                    uploader.create_batch(todo, 100, batch_id="b")
                    break
                except BatchUploadError as error:
                    proxy.wait_until_idle()
                    total = total_tasks(client, "b")
                    was_taken = total > known + error.uploaded
                    known, todo = total, [*([] if was_taken else error.unconfirmed), *error.remaining]

            results = client.monitor_batch(tasks, "b", poll_interval=0.05, monitor=Monitor())

    assert proxy.lost_uploads
    assert_answered_once(results, tasks, upstream.calls)


def total_tasks(client, batch_id):
    """How many tasks a batch has; none while there is no batch."""
    try:
        return client.get_batch(batch_id).total_tasks
    except NotFoundError:
        return 0


#: Nothing listens on the port of tcpmux.
NOBODY = "http://127.0.0.1:1"


def test_a_server_killed_in_the_middle_gives_every_result(tmp_path):
    """After kill -9 and a restart on its file, at worst the calls that were going on are made once more, each time."""
    calls = Counter()
    lock = threading.Lock()
    processes = []

    def start():
        processes.append(subprocess.Popen([sys.executable, "-c", SERVE, str(tmp_path / "db")], stdin=PIPE, stdout=PIPE))
        return processes[-1].stdout.readline().decode("ascii").strip()

    def kill():
        processes[-1].kill()
        processes[-1].communicate()

    def answer(request):
        prompt = prompt_of({"body": json.loads(request.body)})
        with lock:
            calls[prompt] += 1
            if sum(calls.values()) in (100, 600):
                proxy.upstream = NOBODY  # another server may be given the port of the one that dies
                kill()
                proxy.upstream = start()
        return echo({"body": json.loads(request.body)})

    with CannedServer() as provider, FaultyProxy(start(), seed=1, without=NOT_ASCII) as proxy:
        provider.answer("POST", PATH, answer)
        upstream = Upstream(proxy.upstream, "k", provider.url + PATH, calls, NOT_ASCII)
        tasks = make_tasks(upstream, 1000)
        try:
            # A start takes a second or two, and faults go on meanwhile.
            with make_client(upstream, proxy, idempotent_uploads=True, retries=14) as client:
                results = client.monitor_batch(tasks, chunk_size=100, poll_interval=0.05, monitor=Monitor())
        finally:
            kill()

    assert len(processes) == 3
    assert_answered(results, tasks)
    assert len(calls) == 1000 and max(calls.values()) <= len(processes)


@some_seeds(3, 4)
def test_resuming_under_the_same_key_takes_a_chunk_once(seed):
    """With no retries at all, going on from each error until there is none."""
    with framework() as upstream, FaultyProxy(upstream.url, seed) as proxy:
        tasks = make_tasks(upstream, 1000)
        with make_client(upstream, proxy, retries=0) as client:
            upload_until_done(client, tasks, "b")
            proxy.rate = 0.0
            results = client.monitor_batch(tasks, "b", poll_interval=0.05, monitor=Monitor())

    assert proxy.lost_uploads
    assert_answered_once(results, tasks, upstream.calls)


def test_a_chunk_that_is_refused_under_a_key_given_may_still_have_been_taken():
    """By the call before, which left it unconfirmed: it stays so, and keeps its key."""
    with framework() as upstream, FaultyProxy(upstream.url, 0, rate=0.0) as proxy:
        tasks = make_tasks(upstream, 3)
        proxy.answer("POST", "/api/v1/batches", Answer({"detail": "slow down"}, 429))
        with make_client(upstream, proxy, retries=0) as client, pytest.raises(BatchUploadError) as caught:
            client.create_batch(tasks, batch_id="b", idempotency_key="as-before")

    assert caught.value.unconfirmed == tasks and not caught.value.remaining
    assert caught.value.idempotency_key == "as-before"


def upload_until_done(client, tasks, batch_id):
    key, todo, rest = None, tasks, []
    while todo:
        try:
            client.create_batch(todo, 100, batch_id=batch_id, idempotency_key=key)
            key, todo, rest = None, rest, []
        except BatchUploadError as error:
            rest = [*error.remaining, *rest]
            key, todo = error.idempotency_key, error.unconfirmed
            if not todo:
                todo, rest = rest, []


@some_seeds(3, 4, 5, 6)
def test_an_upload_that_ends_early_accounts_for_every_task(seed):
    """Confirmed, unconfirmed and remaining are all tasks, in order; the server has the first, or the first two."""
    with framework(deduplicates=False) as upstream, FaultyProxy(upstream.url, seed) as proxy:
        tasks = make_tasks(upstream, 1000)
        with make_client(upstream, proxy, retries=0) as client, pytest.raises(BatchUploadError) as caught:
            for number in range(100):  # of batches, until one is broken
                upstream.calls.clear()
                client.create_batch(iter(tasks), 100, batch_id=f"b-{number}")
        proxy.wait_until_idle()

    error = caught.value
    assert list(chain(tasks[: error.uploaded], error.unconfirmed, error.remaining)) == tasks
    ran = [task for task in tasks if upstream.calls[prompt_of(dict(task))]]
    assert ran in (tasks[: error.uploaded], tasks[: error.uploaded + len(error.unconfirmed)])
    assert set(upstream.calls.values()) <= {1}
