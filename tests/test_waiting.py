"""Waiting for a batch: done by our own count, whatever the framework says; and if it never will be, an error says why.

Time is the test's: sleeping takes none, and what a test planned happens on the way (`Clock`).
"""

import json
import threading
from decimal import Decimal

import pytest
import requests
from builders import task
from clock import Clock
from framework import Framework, echo, prompt_of
from servers import DROP, WIRE, Answer

from synthgen import Monitor, SynthgenClient
from synthgen.exceptions import (
    AuthenticationError,
    BatchIncompleteError,
    BatchStalledError,
    BatchTimeoutError,
    ConnectionFailedError,
    NotFoundError,
    ServerError,
)
from synthgen.models import TaskStatus

pytestmark = pytest.mark.slow

PROXYS_404 = Answer("<html>not here</html>", status=404)
BAD_GATEWAY_PAGE = Answer("<html>502 Bad Gateway</html>", status=502)


class Recorder(Monitor):
    """Keeps what it was told."""

    def __init__(self):
        self.batches = []
        self.notes = []
        self.finished = None
        self.closed = 0

    def batch(self, batch, submitted, cost):
        self.batches.append(batch)

    def note(self, text):
        self.notes.append(text)

    def finish(self, batch, cost):
        self.finished = batch

    def close(self):
        self.closed += 1


@pytest.fixture
def clock(monkeypatch):
    """The time of the client, from 0 on."""
    return Clock.of_client(monkeypatch)


@pytest.fixture
def server():
    with Framework() as running:
        yield running


@pytest.fixture
def client(server):
    with SynthgenClient(server.url, "k", retries=2, backoff_factor=0.01) as opened:
        yield opened


@pytest.fixture
def seen():
    return Recorder()


def make_tasks(count, **fields):
    """Tasks that ask for their own numbers."""
    return [task(f"question {i}", custom_id=str(i), **fields) for i in range(count)]


def assert_answered(results, tasks):
    """Each task has its own answer, in the order of the tasks."""
    assert [result.custom_id for result in results] == [task.custom_id for task in tasks]
    assert [result.content for result in results] == ["echo: " + prompt_of(dict(task)) for task in tasks]


def asked(server, method, path_start="/api/v1/batches"):
    return [request for request in server.requests if request.method == method and request.path.startswith(path_start)]


def upload(client, tasks):
    """A batch that the server has, and nobody has waited for."""
    return client.create_batch(tasks).batch_id


# The stand-in is like the real server.


@pytest.mark.parametrize(
    "recording, path",
    [
        ("batch_get_complete", "/api/v1/batches/b"),
        ("health_healthy", "/health"),
        ("task_get_completed", "/api/v1/tasks/{}"),
    ],
)
def test_the_stand_in_answers_with_the_fields_of_the_recordings(server, client, recording, path):
    """What is shown against it holds against the framework only if it speaks alike."""
    client.create_batch(make_tasks(2), batch_id="b")
    message_id = client.get_batch_tasks("b")[0].message_id

    played = requests.get(server.url + path.format(message_id)).json()

    assert _fields(played) == _fields(_recorded(recording))


def test_the_stand_in_exports_with_the_fields_of_the_recordings(server, client):
    """No custom_id, and a result that is empty."""
    client.create_batch(make_tasks(2), batch_id="b")

    played = requests.get(server.url + "/api/v1/batches/b/tasks/export").text

    first, recorded = (json.loads(text.splitlines()[0]) for text in (played, _recorded("batch_tasks_export_all")))
    assert _fields(first["tasks"][0]) == _fields(recorded["tasks"][0])
    assert played.endswith("}\n") and set(first) == set(recorded)


def _recorded(name):
    return json.loads((WIRE / f"{name}.json").read_text(encoding="utf-8"))["response"]["body"]


def _fields(answer):
    return sorted(answer), sorted(answer.get("services", ()))


# Done, by our own count.


def test_an_upload_ingested_late_is_waited_for(clock, server, client, seen):
    """The server's null means not yet, before the batch was first seen."""
    server.ingests = False
    clock.at(40, server.ingest)

    assert_answered(client.monitor_batch(make_tasks(3), monitor=seen), make_tasks(3))

    assert seen.batches[0] is None


def test_a_batch_completed_between_two_chunks_is_not_done(clock, server, client, seen):
    """COMPLETED says nothing of the chunk that is still in the queue."""
    server.ingests = False
    clock.at(10, lambda: server.ingest(1000))
    clock.at(60, server.ingest)
    tasks = make_tasks(1200)

    assert_answered(client.monitor_batch(tasks, monitor=seen), tasks)

    completed = [batch for batch in seen.batches if batch and batch.batch_status == TaskStatus.COMPLETED]
    assert completed[0].total_tasks == 1000
    assert len([request for request in server.requests if request.path.endswith("/export")]) == 1


def test_an_upload_ingested_line_by_line_is_waited_for(clock, server, client):
    """Every state on the way looks complete."""
    server.ingests = False
    for second in range(5):
        clock.at(second * 7, lambda: server.ingest(1))

    assert_answered(client.monitor_batch(make_tasks(5), show_progress=False), make_tasks(5))


def test_counts_that_lag_behind_are_waited_for(clock, server, client, seen):
    """What is done is shown 5 s later, by the index refresh."""
    server.refreshes = False
    clock.at(5, server.refresh)

    assert_answered(client.monitor_batch(make_tasks(3), monitor=seen), make_tasks(3))

    assert clock.now >= 5


def test_tasks_that_are_run_slowly_are_waited_for(clock, server, client, seen):
    """PENDING, PROCESSING and finished tasks side by side are a batch that goes on."""
    server.runs = False
    clock.at(5, lambda: server.start(2))
    clock.at(20, lambda: server.run(1))
    clock.at(30, server.run)

    assert_answered(client.monitor_batch(make_tasks(3), monitor=seen), make_tasks(3))

    states = {(batch.pending_tasks, batch.processing_tasks, batch.finished_tasks) for batch in seen.batches if batch}
    assert states >= {(3, 0, 0), (1, 2, 0), (1, 1, 1), (0, 0, 3)}


def test_cached_and_failed_tasks_count_as_done(clock, server, client):
    """The server's completed_tasks has neither."""
    server.provider = lambda task: {"error": "no"} if task["custom_id"] == "1" else echo(task)
    tasks = make_tasks(2) + [task("question 0", custom_id="again")]

    results = client.monitor_batch(tasks, show_progress=False)

    outcomes = [(result.custom_id, result.ok, result.cached) for result in results]
    assert outcomes == [("0", True, False), ("1", False, False), ("again", True, True)]


def test_a_batch_of_more_than_ten_thousand_tasks_comes_whole(clock, server, client):
    """The export's own total stops at 10,000, and a line holds no more."""
    tasks = make_tasks(10_050)

    assert_answered(client.monitor_batch(tasks, chunk_size=20_000, show_progress=False), tasks)


def test_polls_begin_at_once_and_slow_down(clock, server, client, seen):
    """A short batch is not kept waiting, a long one not asked for all the time."""
    server.runs = False
    clock.at(30, server.run)
    times = []
    seen.batch = lambda *args: times.append(clock.now)

    client.monitor_batch(make_tasks(2), monitor=seen, poll_interval=2)

    pauses = [after - before for before, after in zip(times, times[1:])]
    assert times[0] == 0 and pauses[0] == pytest.approx(0.1) and pauses == sorted(pauses)
    assert pauses[-1] == pytest.approx(2)


# Results that belong to tasks.


def test_an_upload_ingested_twice_gives_one_result_per_task(clock, server, client, seen):
    """A redelivered upload runs every task twice; the surplus is dropped, and said."""
    server.redelivers = True

    assert_answered(client.monitor_batch(make_tasks(4), monitor=seen), make_tasks(4))

    assert [note for note in seen.notes if note.startswith("4 more results than tasks")]


def test_a_chunk_ingested_twice_is_not_taken_for_two(clock, server, client, seen):
    """The counts add up, the results do not: the second chunk is waited for."""
    server.ingests = False
    server.redelivers = True
    clock.at(5, lambda: server.ingest(2))
    clock.at(90, server.ingest)
    tasks = make_tasks(4)

    assert_answered(client.monitor_batch(tasks, chunk_size=2, monitor=seen), tasks)


def test_results_that_are_missing_though_the_counts_add_up_are_a_note(clock, server, client, seen):
    """It says how many, and that others are there which match no task."""
    server.ingests = False
    server.redelivers = True
    clock.at(5, lambda: server.ingest(2))
    clock.at(90, server.ingest)

    client.monitor_batch(make_tasks(4), chunk_size=2, monitor=seen)

    assert "2 of 4 tasks have no result yet; 2 results match no task; looking again" in seen.notes


def test_identical_bodies_get_their_own_custom_ids(clock, server, client):
    """The export has no custom_id and no order: tasks alike are told apart one by one."""
    server.provider = lambda task: dict(echo(task), of=task["custom_id"])
    tasks = [task("the same", custom_id=str(i), use_cache=False) for i in range(20)]

    results = client.monitor_batch(tasks, show_progress=False)

    assert [result.completions["of"] for result in results] == [task.custom_id for task in tasks]


def test_tasks_alike_in_everything_share_the_results_out(clock, server, client):
    """They are interchangeable, and nobody is asked."""
    tasks = [task("the same", use_cache=False)] * 5

    results = client.monitor_batch(tasks, show_progress=False)

    assert len({result.message_id for result in results}) == 5
    assert not asked(server, "GET", "/api/v1/tasks")


# Exports on the way.


@pytest.mark.parametrize("is_cut", [True, False], ids=["cut off", "as if whole"])
def test_a_truncated_export_is_read_again(clock, server, client, is_cut):
    """Status 200 promises nothing."""
    server.broken_exports = [(0, is_cut), (3, is_cut), (7, is_cut)]

    assert_answered(client.monitor_batch(make_tasks(10), show_progress=False), make_tasks(10))

    assert clock.now < 1  # no wait for what the counts know to be there


# Never done.


def test_a_task_that_never_arrived_is_named(clock, server, client, seen):
    """A task dropped at ingestion: all others come back, and the error says why, as far as health tells."""
    server.loses = lambda task: int(task["custom_id"]) % 500 == 3
    tasks = make_tasks(1200)

    with pytest.raises(BatchIncompleteError) as caught:
        client.monitor_batch(tasks, monitor=seen)

    error = caught.value
    assert "3 of 1,200 tasks never arrived" in str(error)
    assert "batch queue: 1 consumer, 0 waiting" in str(error)
    assert [task.custom_id for task in error.missing] == ["3", "503", "1003"]
    assert_answered(error.results, [task for task in tasks if task not in error.missing])
    assert error.batch_id in str(error) and error.health.services.batch_queue_consumers == 1
    assert 300 <= clock.now < 320


def test_a_batch_that_never_arrived_is_incomplete(clock, server, client):
    """The server's null for ever, and an empty queue: every task is missing."""
    server.loses = lambda task: True

    with pytest.raises(BatchIncompleteError, match="2 of 2 tasks never arrived") as caught:
        client.monitor_batch(make_tasks(2), show_progress=False)

    assert len(caught.value.missing) == 2 and not caught.value.results


def test_the_missing_tasks_can_be_submitted_again(clock, server, client):
    """`missing` are tasks, with their keys."""
    server.loses = lambda task: task["custom_id"] == "1"
    with pytest.raises(BatchIncompleteError) as caught:
        client.monitor_batch(make_tasks(3, api_key="sk"), show_progress=False)
    server.loses = lambda task: False

    results = client.monitor_batch(caught.value.missing, show_progress=False)

    assert_answered(results, make_tasks(3)[1:2])
    assert asked(server, "POST")[-1].lines[0]["api_key"] == "sk"


def test_an_upload_in_a_queue_that_is_consumed_is_no_stall(clock, server, client, seen):
    """A worker may be busy with somebody else's upload."""
    server.ingests = False
    clock.at(2000, server.ingest)

    assert_answered(client.monitor_batch(make_tasks(2), poll_interval=10, monitor=seen), make_tasks(2))

    assert any("batch queue: 1 consumer, 1 waiting" in note for note in seen.notes)


def test_an_upload_that_nobody_ingests_is_a_stall(clock, server, client):
    """The batch queue holds it, and has no consumer."""
    server.ingests = False
    server.batch_consumers = 0

    with pytest.raises(BatchStalledError, match="batch queue: 0 consumers, 1 waiting") as caught:
        client.monitor_batch(make_tasks(2), show_progress=False)

    assert caught.value.batch is None and caught.value.batch_id in str(caught.value)


def test_tasks_that_nobody_runs_are_a_stall(clock, server, client):
    """PENDING for ever, and no consumer: the error says so, and names the batch."""
    server.runs = False
    server.task_consumers = 0

    with pytest.raises(BatchStalledError, match="2 tasks wait; task queue: 0 consumers, 2 waiting") as caught:
        client.monitor_batch(make_tasks(2), show_progress=False)

    assert caught.value.batch.pending_tasks == 2
    assert caught.value.health.services.queue_consumers == 0
    assert 300 <= clock.now < 320


def test_a_consumer_that_comes_in_time_prevents_a_stall(clock, server, client):
    """Nobody there for less than stall_timeout is a restart."""
    server.runs = False
    server.task_consumers = 0
    clock.at(250, server.run)

    assert_answered(client.monitor_batch(make_tasks(2), show_progress=False), make_tasks(2))


def test_a_moving_counter_sets_the_stall_clock_back(clock, server, client):
    """A slow batch is not a stalled one, however long it takes."""
    server.runs = False
    server.task_consumers = 0
    for i in range(10):
        clock.at(250 * i, lambda: server.run(1))

    assert_answered(client.monitor_batch(make_tasks(10), poll_interval=10, show_progress=False), make_tasks(10))

    assert clock.now > 2000


def test_tasks_left_behind_by_a_worker_that_died_are_not_waited_for(clock, server, client):
    """They were ingested again, and run: every task has its result, though the first of each are PENDING for ever."""
    server.runs = False
    server.redelivers = True
    tasks = make_tasks(3)
    clock.at(1, lambda: server.run_last(3))

    results = client.monitor_batch(tasks, monitor=Monitor(), stall_timeout=60)

    assert [result.content for result in results] == [f"echo: {prompt_of(dict(task))}" for task in tasks]


def test_a_provider_that_is_waited_for_is_only_a_note(clock, server, client, seen):
    """Ten tries with 300 s between them: nothing moves for most of an hour, and nothing is wrong."""
    server.runs = False
    clock.at(10, server.start)
    clock.at(3000, server.run)

    assert_answered(client.monitor_batch(make_tasks(2), poll_interval=10, monitor=seen), make_tasks(2))

    quiet = [note for note in seen.notes if note.startswith("nothing has moved")]
    assert 8 <= len(quiet) <= 10 and "provider" in quiet[0]


def test_what_the_server_says_of_trouble_while_nothing_moves_is_one_note(clock, server, client, seen):
    """Long before a stall: a provider that is not there should not look like a slow one."""
    trouble = "calls that failed and will be made again: 2; the last: no connection"
    server.runs = False
    batch_id = upload(client, make_tasks(2))
    health = requests.get(server.url + "/health").json()
    server.answer("GET", "/health", dict(health, error=trouble))
    clock.at(100, server.run)
    noted = []
    seen.note = lambda text: noted.append((text, clock.now))

    client.monitor_batch(make_tasks(2), batch_id, monitor=seen)

    ((text, when),) = noted
    assert text == trouble and 10 <= when < 15


def test_a_server_in_trouble_is_not_asked_about_it_while_something_moves(clock, server, client, seen):
    """The progress says enough."""
    server.runs = False
    batch_id = upload(client, make_tasks(10))
    health = requests.get(server.url + "/health").json()
    server.answer("GET", "/health", dict(health, error="one provider of many is away"))
    for i in range(10):
        clock.at(5 * i, lambda: server.run(1))

    client.monitor_batch(make_tasks(10), batch_id, monitor=seen)

    assert seen.notes == []


def test_queues_that_cannot_be_asked_are_not_taken_for_empty(clock, server, client, seen):
    """With RabbitMQ down health says 0 messages, but the upload is still in its queue."""
    server.ingests = False
    clock.at(10, lambda: server.down.add("rabbitmq"))
    clock.at(1000, server.down.clear)
    clock.at(1001, server.ingest)

    assert_answered(client.monitor_batch(make_tasks(2), poll_interval=10, monitor=seen), make_tasks(2))

    assert any("RabbitMQ" in note for note in seen.notes)


def test_a_health_that_is_not_told_is_no_reason_to_call_the_server_away(clock, server, client, seen):
    """As behind a proxy that lets only the API through: the silence is noted, and the wait goes on."""
    server.runs = False
    batch_id = upload(client, make_tasks(2))
    clock.at(100, lambda: server.answer("GET", "/health", BAD_GATEWAY_PAGE))
    clock.at(1000, server.run)

    assert_answered(client.monitor_batch(make_tasks(2), batch_id, poll_interval=10, monitor=seen), make_tasks(2))

    assert len(seen.notes) == 3 and all("does not tell its health" in note for note in seen.notes)


def test_without_a_stall_timeout_nothing_is_a_stall(clock, server, client):
    """None waits as long as it takes."""
    server.runs = False
    server.task_consumers = 0
    clock.at(50_000, server.run)

    results = client.monitor_batch(make_tasks(2), stall_timeout=None, poll_interval=600, show_progress=False)

    assert_answered(results, make_tasks(2))


# Time-outs.


def test_a_timeout_names_the_batch_and_its_state(clock, server, client):
    """The batch goes on, and the message says how to come back."""
    server.runs = False
    clock.at(3, lambda: server.run(1))

    with pytest.raises(BatchTimeoutError, match="1 of 3 tasks finished") as caught:
        client.monitor_batch(make_tasks(3), timeout=30, show_progress=False)

    assert caught.value.batch.pending_tasks == 2
    assert f"monitor_batch(tasks=tasks, batch_id={caught.value.batch_id!r})" in str(caught.value)
    assert clock.now == 30


def test_a_timeout_is_no_reason_to_call_the_server_away(clock, server, client, seen):
    """The last poll has the time that an answer needs."""
    server.runs = False
    batch_id = upload(client, make_tasks(3))

    def answer_slowly(request):
        threading.Event().wait(0.05)
        return server.play(request)

    clock.at(29, lambda: server.answer("GET", f"/api/v1/batches/{batch_id}", answer_slowly))
    with pytest.raises(BatchTimeoutError):
        client.monitor_batch(make_tasks(3), batch_id, timeout=30, monitor=seen)

    assert seen.notes == []


def test_a_batch_that_ends_in_the_last_moment_is_returned(clock, server, client):
    """There is a last look when the time is over."""
    server.runs = False
    clock.at(29.999, server.run)

    assert_answered(client.monitor_batch(make_tasks(3), timeout=30, show_progress=False), make_tasks(3))


def test_a_poll_without_an_answer_ends_long_before_the_clients_timeout(server, client, seen, monkeypatch):
    """A server that accepts and is silent is a note, after the poll's own read time-out."""
    monkeypatch.setattr("synthgen._waiting.LONGEST_POLL", 0.1)
    path = "/api/v1/batches/b"
    client.create_batch(make_tasks(2), batch_id="b")
    server.answer("GET", path, Answer(hold=threading.Event()), server.play)

    assert_answered(client.monitor_batch(make_tasks(2), "b", monitor=seen), make_tasks(2))

    assert "no answer within 0.1 s" in seen.notes[0] and seen.notes[1].startswith("the server is back")


def test_a_poll_waits_no_longer_than_the_client(server, seen):
    """A client's own read time-out holds for polls too."""
    with SynthgenClient(server.url, "k", timeout=0.1) as client:
        client.create_batch(make_tasks(2), batch_id="b")
        server.answer("GET", "/api/v1/batches/b", Answer(hold=threading.Event()), server.play)

        client.monitor_batch(make_tasks(2), "b", monitor=seen)

    assert "no answer within 0.1 s" in seen.notes[0]


# A server that is away.


@pytest.mark.parametrize(
    "away",
    [
        DROP,
        BAD_GATEWAY_PAGE,
        Answer({"detail": "starting"}, 503, {"Retry-After": "1"}),
        Answer({"detail": "slow down"}, 429, {"Retry-After": "5"}),
        Answer({"detail": "no such index"}, 500),
        Answer("<html>default backend - 404", 404),
        Answer("<html>maintenance</html>"),
        Answer(b'{"batch_id": "b", "batch_sta'),
        Answer({"unexpected": True}),
    ],
    ids=["dropped", "502 page", "503", "429", "500", "404 page", "page with 200", "half JSON", "another shape"],
)
def test_a_server_that_is_away_for_a_minute_is_a_note(clock, server, client, seen, away):
    """Whatever a proxy says meanwhile, the wait goes on, and ends when the server is back."""
    server.runs = False
    clock.at(10, lambda: setattr(server, "away", away))
    clock.at(70, lambda: setattr(server, "away", None))
    clock.at(75, server.run)

    assert_answered(client.monitor_batch(make_tasks(2), monitor=seen), make_tasks(2))

    left, back = seen.notes
    assert left.startswith("server away since 00:00:1") and "still trying" in left
    assert back.startswith("the server is back after ")


@pytest.mark.parametrize("asked_for, pause", [("20", 20), ("3600", 60), ("soon", 0.1)])
def test_a_poll_that_is_one_too_many_is_repeated_when_the_server_says(clock, server, client, seen, asked_for, pause):
    """Retry-After is obeyed, up to a minute."""
    batch_id = upload(client, make_tasks(2))
    refusal = Answer({"detail": "slow down"}, 429, {"Retry-After": asked_for})
    server.answer("GET", f"/api/v1/batches/{batch_id}", refusal, server.play)

    client.monitor_batch(make_tasks(2), batch_id, monitor=seen)

    assert clock.now == pytest.approx(pause)


def test_a_server_that_is_away_when_the_results_are_due_is_a_note(clock, server, client, seen):
    """A restart in the middle of the download costs time, and nothing else."""
    server.broken_exports = [(3, True)]
    tasks = make_tasks(10)
    batch_id = upload(client, tasks)
    export = f"/api/v1/batches/{batch_id}/tasks/export"

    def go_away(request):
        server.away = DROP
        clock.at(clock.now + 60, lambda: setattr(server, "away", None))
        return DROP

    server.answer("GET", export, go_away, server.play)

    assert_answered(client.monitor_batch(tasks, batch_id, monitor=seen), tasks)

    assert any(note.startswith("the server is back") for note in seen.notes)


def test_an_export_that_never_ends_well_ends_the_wait(clock, server, client):
    """The server is there and says that all is done, but its export is always short."""
    server.broken_exports = [(3, True)] * 100

    with pytest.raises(ConnectionFailedError, match="tasks/export.* come back to it with monitor_batch"):
        client.monitor_batch(make_tasks(10), show_progress=False)


def test_a_proxys_404_in_the_download_is_asked_again(clock, server, client, seen):
    """The batch was seen a moment ago."""
    batch_id = upload(client, make_tasks(2))
    path = f"/api/v1/batches/{batch_id}"
    server.answer("GET", path, server.play, PROXYS_404, server.play)
    server.answer("GET", f"{path}/tasks/export", PROXYS_404, server.play)

    assert_answered(client.monitor_batch(make_tasks(2), batch_id, monitor=seen), make_tasks(2))


def test_a_proxy_that_always_says_404_to_the_download_ends_the_wait(clock, server, client):
    """It says how to come back, since the batch is there."""
    batch_id = upload(client, make_tasks(2))
    server.answer("GET", f"/api/v1/batches/{batch_id}/tasks/export", PROXYS_404)

    with pytest.raises(NotFoundError, match="404, with a web page.* come back to it with monitor_batch"):
        client.monitor_batch(make_tasks(2), batch_id, show_progress=False)


def test_a_proxys_404_in_place_of_the_health_ends_no_wait(clock, server, client, seen):
    """It is asked for while nothing moves."""
    server.runs = False
    batch_id = upload(client, make_tasks(2))
    server.answer("GET", "/health", server.play, PROXYS_404)
    clock.at(60, server.run)

    assert_answered(client.monitor_batch(make_tasks(2), batch_id, monitor=seen), make_tasks(2))


def test_tasks_that_only_a_look_up_tells_apart_are_not_mixed_up_by_a_proxy(clock, server, client, seen):
    """Its 404 says nothing of the task, and is asked again."""
    server.provider = lambda one: {**echo(one), "choices": [{"message": {"content": f"from {one['custom_id']}"}}]}
    hosts = [task("same", custom_id=host, url=f"http://{host}/", use_cache=False) for host in "abcdef"]
    batch_id = upload(client, hosts)
    for result in client.get_batch_tasks(batch_id):
        server.answer("GET", f"/api/v1/tasks/{result.message_id}", PROXYS_404, server.play)

    results = client.monitor_batch(hosts, batch_id, monitor=seen)

    assert [result.content for result in results] == [f"from {host}" for host in "abcdef"]


def test_the_time_that_a_server_is_away_is_no_stall(clock, server, client):
    """The stall clock stands still meanwhile."""
    server.runs = False
    server.task_consumers = 0
    clock.at(10, lambda: setattr(server, "away", DROP))
    clock.at(1000, lambda: setattr(server, "away", None))
    clock.at(1250, server.run)

    assert_answered(client.monitor_batch(make_tasks(2), poll_interval=10, show_progress=False), make_tasks(2))


def test_a_proxy_that_fails_now_and_then_hides_no_stall(clock, server, client):
    """Each of its failures ends in a moment, and there is one in each stall time-out."""
    server.loses = lambda lost: lost["custom_id"] == "0"
    for moment in range(200, 5000, 200):
        clock.at(moment, lambda: setattr(server, "away", BAD_GATEWAY_PAGE))
        clock.at(moment + 5, lambda: setattr(server, "away", None))

    with pytest.raises(BatchIncompleteError, match="1 of 2 tasks never arrived"):
        client.monitor_batch(make_tasks(2), show_progress=False)


def test_a_server_that_stays_away_ends_with_the_timeout(clock, server, client):
    """It is a note until then."""
    server.runs = False
    clock.at(1, lambda: setattr(server, "away", DROP))

    with pytest.raises(BatchTimeoutError) as caught:
        client.monitor_batch(make_tasks(2), timeout=60, show_progress=False)

    assert caught.value.batch.total_tasks == 2


def test_an_index_that_is_not_there_yet_is_waited_for(clock, server, client, seen):
    """Any read of a new installation is a 500, until the first task is ingested."""
    server.has_index = False
    server.ingests = False
    clock.at(20, server.ingest)

    assert_answered(client.monitor_batch(make_tasks(2), monitor=seen), make_tasks(2))

    assert seen.notes == []


def test_an_index_that_never_comes_is_a_stall(clock, server, client):
    """The first job on a new installation, whose worker was not started."""
    server.has_index = False
    server.ingests = False
    server.batch_consumers = 0

    with pytest.raises(BatchStalledError, match="batch queue: 0 consumers, 1 waiting"):
        client.monitor_batch(make_tasks(2), show_progress=False)


def test_a_key_that_is_refused_ends_the_wait(clock, server, client):
    """It will not get better by waiting."""
    server.runs = False
    clock.at(10, lambda: setattr(server, "away", Answer({"detail": "Invalid authentication credentials"}, 401)))

    with pytest.raises(AuthenticationError):
        client.monitor_batch(make_tasks(2), show_progress=False)


def test_a_batch_deleted_meanwhile_ends_the_wait(clock, server, client):
    """Once the batch was seen, null means that it is gone."""
    server.runs = False
    batch_id = upload(client, make_tasks(2))
    clock.at(10, lambda: client.delete_batch(batch_id))

    with pytest.raises(NotFoundError, match=batch_id):
        client.monitor_batch(make_tasks(2), batch_id, show_progress=False)


# Before anything is sent.


@pytest.mark.parametrize("service, name", [("elasticsearch", "Elasticsearch"), ("rabbitmq", "RabbitMQ")])
def test_an_unhealthy_server_is_sent_nothing(clock, server, client, service, name):
    """The framework would answer 200, and lose the tasks."""
    server.down = {service}

    with pytest.raises(ServerError, match=f"{name} is down.*Nothing was sent"):
        client.monitor_batch(make_tasks(2), show_progress=False)

    assert not asked(server, "POST")


def test_a_server_that_is_away_at_first_is_sent_nothing(clock, server, client):
    """Without a word about its health no task is risked."""
    server.away = BAD_GATEWAY_PAGE

    with pytest.raises(ServerError, match="502"):
        client.monitor_batch(make_tasks(2), show_progress=False)

    assert not asked(server, "POST")


def test_an_unhealthy_server_may_be_come_back_to(clock, server, client):
    """What is in the batch is not lost by waiting for it."""
    batch_id = upload(client, make_tasks(2))
    server.down = {"rabbitmq"}

    assert_answered(client.monitor_batch(make_tasks(2), batch_id, show_progress=False), make_tasks(2))


def test_a_monitor_that_sorts_the_results_sorts_its_own(clock, server, client, seen):
    """Those that are returned stay in the order of the tasks."""
    seen.results = lambda results: results.reverse()

    assert_answered(client.monitor_batch(make_tasks(3), monitor=seen), make_tasks(3))


def test_no_tasks_are_no_batch(server, client):
    """An empty list is returned, and nothing asked."""
    assert client.monitor_batch([], show_progress=False) == []
    assert not server.requests


def test_neither_tasks_nor_a_batch_is_refused(client):
    """There is nothing to wait for."""
    with pytest.raises(ValueError, match="needs tasks"):
        client.monitor_batch()


@pytest.mark.parametrize(
    "setting", [{"poll_interval": -1}, {"stall_timeout": float("nan")}, {"poll_interval": None}, {"timeout": "60"}]
)
def test_a_time_that_makes_no_sense_is_refused_before_anything_is_sent(server, client, setting):
    """Found out later, it would leave a batch behind that is paid for."""
    with pytest.raises(ValueError, match=next(iter(setting))):
        client.monitor_batch(make_tasks(1), show_progress=False, **setting)

    assert not server.requests


@pytest.mark.parametrize("price", [None, "a dollar", -1, float("nan")])
def test_a_price_that_is_no_number_is_refused_before_anything_is_sent(server, client, price):
    """As for times."""
    with pytest.raises(ValueError, match="prices must be numbers"):
        client.monitor_batch(make_tasks(1), None, price, show_progress=False)

    assert not server.requests


def test_a_price_may_be_exact(clock, server, client, seen):
    """As money often is."""
    client.monitor_batch(make_tasks(1), None, Decimal("0.15"), monitor=seen)


# Coming back.


def test_coming_back_with_the_tasks_sends_nothing(clock, server, client):
    """They serve for order and matching."""
    tasks = make_tasks(5)
    batch_id = upload(client, tasks)
    uploads = len(asked(server, "POST"))

    assert_answered(client.monitor_batch(tasks[::-1], batch_id, show_progress=False), tasks[::-1])

    assert len(asked(server, "POST")) == uploads


def test_coming_back_to_a_batch_full_of_other_tasks_ends_at_once(clock, server, client):
    """It is as large as it should be, and no result is of these tasks: time will not change that."""
    batch_id = upload(client, [task(f"another {i}") for i in range(2)])

    with pytest.raises(BatchIncompleteError, match="are these the tasks of that batch") as caught:
        client.monitor_batch(make_tasks(2), batch_id, show_progress=False)

    assert "2 results match no task" in str(caught.value)
    assert len(caught.value.missing) == 2 and caught.value.results == []
    assert clock.now < 1


def test_a_batch_id_alone_gives_the_results_as_they_come(clock, server, client):
    """Without tasks there is no order, and no custom_id."""
    batch_id = upload(client, make_tasks(5))

    results = client.monitor_batch(batch_id=batch_id, show_progress=False)

    assert sorted(result.content for result in results) == [f"echo: question {i}" for i in range(5)]


def test_a_batch_id_alone_waits_until_the_total_has_settled(clock, server, client):
    """Counts lag 5 s behind: COMPLETED is believed when the total was the same for longer."""
    server.ingests = False
    batch_id = upload(client, make_tasks(3))
    for second in (1, 5, 10):
        clock.at(second, lambda: server.ingest(1))

    assert len(client.monitor_batch(batch_id=batch_id, show_progress=False)) == 3

    assert clock.now >= 16


def test_a_batch_id_alone_waits_until_the_batch_queue_is_empty(clock, server, client):
    """The rest of the batch may be in it."""
    server.ingests = False
    batch_id = upload(client, make_tasks(3))
    server.ingest(2)
    clock.at(100, server.ingest)

    assert len(client.monitor_batch(batch_id=batch_id, show_progress=False)) == 3


@pytest.mark.parametrize("hides", ["rabbitmq", "all"])
def test_where_nobody_tells_of_the_queues_a_batch_has_ended_after_the_stall_time_out(clock, server, client, hides):
    """RabbitMQ is down, or a proxy lets only the API through: more may be on its way, but not for ever."""
    batch_id = upload(client, make_tasks(3))
    if hides == "all":
        server.answer("GET", "/health", server.play, PROXYS_404)
    server.down = {"rabbitmq"}

    clock.at(3, lambda: setattr(server, "away", DROP))
    clock.at(400, lambda: setattr(server, "away", None))  # the time that it was away for is no rest

    assert len(client.monitor_batch(batch_id=batch_id, show_progress=False)) == 3
    assert 690 <= clock.now < 710


@pytest.mark.parametrize("tasks", [None, make_tasks(2)], ids=["alone", "with its tasks"])
def test_an_unknown_batch_id_is_not_found(clock, server, client, tasks):
    """It may be on its way to the index: only after 6 s, and an empty batch queue, it is unknown."""
    with pytest.raises(NotFoundError, match="b-404"):
        client.monitor_batch(tasks, batch_id="b-404", show_progress=False)

    assert 6 <= clock.now < 10


def test_a_stall_timeout_shorter_than_the_settling_finds_no_stall(clock, server, client):
    """A batch that is done does not stand still."""
    batch_id = upload(client, make_tasks(3))

    assert len(client.monitor_batch(batch_id=batch_id, stall_timeout=1, show_progress=False)) == 3


@pytest.mark.parametrize("tasks", [None, make_tasks(2)], ids=["alone", "with its tasks"])
def test_an_unknown_batch_is_not_found_with_a_short_stall_timeout_too(clock, server, client, tasks):
    """It never was there, so nothing of it is missing."""
    with pytest.raises(NotFoundError):
        client.monitor_batch(tasks, batch_id="b-404", stall_timeout=1, show_progress=False)


# Ctrl-C.


def test_ctrl_c_names_the_batch_and_how_to_come_back(clock, server, client, seen):
    """The batch goes on; whoever pressed it needs its id."""
    server.runs = False
    clock.at(5, _press_ctrl_c)

    with pytest.raises(KeyboardInterrupt) as caught:
        client.monitor_batch(make_tasks(2), monitor=seen)

    assert f"monitor_batch(tasks=tasks, batch_id={seen.batches[-1].batch_id!r})" in str(caught.value)
    assert seen.closed == 1


def test_ctrl_c_while_the_health_is_asked_for_names_the_batch_that_is_there(clock, server, client):
    """The server may be away when somebody comes back to a batch."""
    server.away = Answer(None, 502)
    clock.at(0, _press_ctrl_c)

    with pytest.raises(KeyboardInterrupt, match="batch_id='b'"):
        client.monitor_batch(batch_id="b", show_progress=False)


def test_ctrl_c_while_uploading_names_the_batch_too(clock, server, client):
    """Some tasks are in it already."""
    tasks = iter(make_tasks(3))

    def interrupted():
        yield from tasks
        _press_ctrl_c()

    with pytest.raises(KeyboardInterrupt, match="2 tasks are in it.*batch_id='b'"):
        client.create_batch(interrupted(), 2, batch_id="b")


def _press_ctrl_c():
    raise KeyboardInterrupt


# Monitors.


def test_the_monitor_is_told_the_end_and_closed_once(clock, server, client, seen):
    """After finish comes close, and nothing more."""
    client.monitor_batch(make_tasks(2), monitor=seen)

    assert seen.finished.completed_tasks == 2 and seen.closed == 1


@pytest.mark.parametrize(
    "break_it, error",
    [
        (lambda server: server.down.add("rabbitmq"), ServerError),
        (lambda server: setattr(server, "away", Answer({"detail": "no"}, 403)), AuthenticationError),
        (lambda server: setattr(server, "loses", lambda task: True), BatchIncompleteError),
        (lambda server: vars(server).update(runs=False, task_consumers=0), BatchStalledError),
        (lambda server: setattr(server, "broken_exports", [(0, True)] * 100), ConnectionFailedError),
    ],
    ids=["unhealthy", "refused", "incomplete", "stalled", "export broken"],
)
def test_the_monitor_is_closed_once_whatever_happens(clock, server, client, seen, break_it, error):
    """It has a terminal to give back."""
    break_it(server)

    with pytest.raises(error):
        client.monitor_batch(make_tasks(2), monitor=seen)

    assert seen.closed == 1 and seen.finished is None


@pytest.mark.parametrize("event", ["health", "upload", "batch", "download", "note", "finish", "close"])
def test_a_monitor_that_raises_does_not_end_the_batch(clock, server, client, event):
    """The batch is worth more than its display; a warning says what happened."""

    def fail(*args):
        raise RuntimeError("the display broke")

    monitor = Monitor()
    setattr(monitor, event, fail)
    server.redelivers = True  # so that there is a note

    with pytest.warns(RuntimeWarning, match=f"Monitor.{event} raised RuntimeError: the display broke"):
        results = client.monitor_batch(make_tasks(2), monitor=monitor)

    assert_answered(results, make_tasks(2))
