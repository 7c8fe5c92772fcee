"""An upload whose answer was lost: the batch is looked at, and only what is not there is sent again.

Time is the test's (`Clock`), and the server is the framework, which deduplicates nothing.
"""

import itertools

import pytest
from builders import task
from clock import Clock
from framework import Framework, prompt_of
from servers import DROP, Answer

from synthgen import Monitor, SynthgenClient, Task
from synthgen.exceptions import (
    AuthenticationError,
    BatchTimeoutError,
    BatchUploadError,
    ConnectionFailedError,
    ServerError,
)

UPLOADS = "/api/v1/batches"


def tasks(count):
    """Tasks 0, 1, 2, ...; no cache hides a second call."""
    return [task(str(number), use_cache=False) for number in range(count)]


@pytest.fixture
def clock(monkeypatch):
    return Clock.of_client(monkeypatch)


@pytest.fixture
def server():
    with Framework() as running:
        yield running


@pytest.fixture
def client(clock, server):
    with SynthgenClient(server.url, "k", retries=2, backoff_factor=0.01) as opened:
        yield opened


def lose(server, *answers):
    """Answer the next uploads like this, whatever becomes of them, and the later ones as the framework does."""
    server.answer("POST", UPLOADS, *answers, server.play)


def taken_but(answer):
    """An upload that is taken, and answered like this."""
    return lambda server: lambda request: (server.play(request), answer)[1]


def sent(server):
    """The custom ids in each upload."""
    uploads = [request for request in server.requests if request.method == "POST"]
    return [[line["custom_id"] for line in request.lines] for request in uploads]


def assert_called_once(server, given):
    """Each prompt was paid for once."""
    assert server.calls == dict.fromkeys((prompt_of(dict(one)) for one in given), 1)


UNKNOWN = {
    "drop": DROP,
    "500": Answer({"detail": "no"}, 500),
    "503": Answer(None, 503),
    "page": Answer("<html>"),
    "half": Answer(b'{"batch_id": '),
    "cut": Answer({"batch_id": "b"}, cut_off=True),
    "redirect": Answer(None, 302, {"Location": "https://server.test/"}),
}


@pytest.mark.parametrize("answer", UNKNOWN.values(), ids=list(UNKNOWN))
def test_an_upload_that_was_taken_is_not_sent_again(server, client, answer):
    """Whatever its answer was."""
    lose(server, server.play, taken_but(answer)(server))

    assert client.create_batch(tasks(6), 2).total_tasks == 6

    assert sent(server) == [["0", "1"], ["2", "3"], ["4", "5"]]
    assert_called_once(server, tasks(6))


@pytest.mark.parametrize("answer", UNKNOWN.values(), ids=list(UNKNOWN))
def test_an_upload_that_was_not_taken_is_sent_again(clock, server, client, answer):
    """Once nothing of it was to be seen for half a minute."""
    lose(server, server.play, answer)

    assert client.create_batch(tasks(6), 2).total_tasks == 6

    assert sent(server) == [["0", "1"], ["2", "3"], ["2", "3"], ["4", "5"]]
    assert 30 <= clock.now < 40
    assert_called_once(server, tasks(6))


def test_a_first_upload_that_was_not_taken_is_sent_again(clock, server, client):
    """There is no batch, and on a new installation no index."""
    server.has_index = False
    lose(server, DROP)

    client.create_batch(tasks(2))

    assert sent(server) == [["0", "1"]] * 2 and clock.now >= 30


def test_what_is_ingested_late_is_waited_for(clock, server, client):
    """The worker was busy, then took the tasks one by one: none is sent again."""
    server.ingests = False
    lose(server, taken_but(DROP)(server))
    for second in range(4):
        clock.at(25 + 5 * second, lambda: server.ingest(1))

    client.create_batch(tasks(4))

    assert sent(server) == [["0", "1", "2", "3"]] and clock.now >= 40


def test_while_uploads_are_queued_nothing_is_believed(clock, server, client):
    """However long the queue stands still."""
    server.ingests = False
    lose(server, taken_but(DROP)(server))
    clock.at(600, server.ingest)

    client.create_batch(tasks(4))

    assert len(sent(server)) == 1 and 600 <= clock.now < 610


def test_a_time_in_which_the_server_did_not_answer_does_not_count(clock, server, client):
    """It was away for most of the half minute, and may have been before it took the upload in."""
    server.ingests = False
    lose(server, taken_but(DROP)(server))
    clock.at(20, lambda: setattr(server, "away", DROP))
    pause = client._pause
    client._pause = lambda repeats, exc: (clock.sleep(5), setattr(server, "away", None), pause(repeats, exc))
    server.answer("GET", "/health", {"status": "healthy", "services": {"batch_queue_messages": 0}})
    clock.at(45, server.ingest)

    client.create_batch(tasks(4))

    assert len(sent(server)) == 1


def test_a_proxy_that_says_404_does_not_say_that_there_is_no_batch(server, client):
    """Nothing is sent again for it: the server itself would say null."""
    lose(server, taken_but(DROP)(server))
    server.answer("GET", "/api/v1/batches/b", server.play, Answer("<html>default backend - 404", 404))

    with pytest.raises(BatchUploadError) as caught:
        client.create_batch(tasks(4), batch_id="b")

    assert caught.value.unconfirmed == tasks(4) and len(sent(server)) == 1


@pytest.mark.parametrize("given", [tasks(6), [task("same", use_cache=False)] * 6], ids=["different", "alike"])
def test_of_a_chunk_that_was_taken_in_part_the_rest_is_sent(clock, server, client, given):
    """As the worker died: what is there is found by its content, and counted."""
    server.ingests = False

    def take_half(request):
        server.play(request)
        server.ingest(2)
        server._batch_queue.clear()
        server.ingests = True
        return DROP

    lose(server, take_half)

    client.create_batch(given)

    assert [len(ids) for ids in sent(server)] == [6, 4]
    assert sum(server.calls.values()) == 6
    assert clock.now >= 6


@pytest.mark.parametrize("kind", [list, lambda given: (one for one in given)], ids=["list", "iterator"])
def test_tasks_alike_to_those_of_earlier_chunks_are_counted_apart(server, client, kind):
    """Each prompt comes in every chunk: a list is read once more, of an iterator the totals tell."""
    given = [task(str(number % 2), use_cache=False) for number in range(8)]
    lose(server, server.play, taken_but(DROP)(server), DROP)

    client.create_batch(kind(given), 2)

    assert server.calls == {"0": 4, "1": 4}


def test_where_content_and_total_contradict_each_other_the_upload_ends(server, client):
    """The tasks of an iterator, taken in part, are like earlier ones: nothing is guessed."""
    given = [task(str(number % 2), use_cache=False) for number in range(4)]

    def take_one(request):
        server.ingests = False
        server.play(request)
        server.ingest(1)
        server._batch_queue.clear()
        return DROP

    lose(server, server.play, take_one)

    with pytest.raises(BatchUploadError, match="can't be told; a list, which can be read once more,") as caught:
        client.create_batch((one for one in given), 2)

    assert caught.value.uploaded == 2 and caught.value.unconfirmed == given[2:]


def test_tasks_that_come_back_in_another_form_are_not_sent_again(server, client):
    """The batch has grown by as many: they may be what a proxy, or a store, has made of these."""

    def take_otherwise(request):
        server.play(request)
        for document in server._documents:
            document["body"]["temperature"] = 1
        server.refresh()
        return DROP

    lose(server, take_otherwise)
    given = [Task(**{**dict(one), "body": {**one.body, "temperature": 1.0}}) for one in tasks(2)]

    with pytest.raises(BatchUploadError, match="can't be told") as caught:
        client.create_batch(given)

    assert caught.value.unconfirmed == given and server.calls == {"0": 1, "1": 1}


@pytest.mark.parametrize("is_alike", [True, False])
def test_what_something_else_adds_to_a_batch_is_told_from_ours_by_its_tasks(server, client, is_alike):
    """Unless it is alike: then nothing is guessed."""
    client.create_batch(tasks(3), batch_id="b")
    ours = [task("ours", use_cache=False)]

    def lose_beside_another(request):
        server.answer("POST", UPLOADS, server.play)
        with SynthgenClient(server.url, "k") as other:
            other.create_batch([*ours, task("more")] if is_alike else [task("other")], batch_id="b")
        return DROP

    lose(server, lose_beside_another)

    if is_alike:
        with pytest.raises(BatchUploadError, match="5 tasks, and had 3 before"):
            client.create_batch(ours, batch_id="b")
    else:
        client.create_batch(ours, batch_id="b")
        assert server.calls["ours"] == 1


def test_many_of_the_same_in_a_batch_of_your_own_are_not_guessed_about(server, client):
    """The index lags: those of a call before may come to be seen only now."""
    same = [task("same", use_cache=False)] * 2
    server.refreshes = False
    client.create_batch(same, batch_id="b")
    lose(server, lambda request: (server.refresh(), DROP)[1])

    with pytest.raises(BatchUploadError, match="can't be told") as caught:
        client.create_batch(same, batch_id="b")

    assert caught.value.unconfirmed == same


class WithProgress:
    """What draws a bar over an iterator: it has a length, and can be read once."""

    def __init__(self, given):
        self._given, self._length = iter(given), len(given)

    def __len__(self):
        return self._length

    def __iter__(self):
        yield from self._given


def test_what_has_a_length_is_not_read_twice(server, client):
    """Though a chunk of it was taken in part."""

    def take_one(request):
        server.ingests = False
        server.play(request)
        server.ingest(1)
        server._batch_queue.clear()
        server.ingests = True
        return DROP

    lose(server, server.play, take_one)

    assert client.create_batch(WithProgress(tasks(8)), 2).total_tasks == 8
    assert_called_once(server, tasks(8))


@pytest.mark.parametrize("lost", [1, 2], ids=["one", "all"])
@pytest.mark.parametrize("kind", [list, iter])
def test_a_total_that_lacks_tasks_lost_earlier_is_no_proof(server, client, kind, lost):
    """As many are missing as the chunk has: it was taken, and is not sent again."""
    given = tasks(2 + lost)
    server.loses = lambda one: one["custom_id"] in ["0", "1"][:lost]
    lose(server, server.play, taken_but(DROP)(server))

    try:
        client.create_batch(kind(given), 2)
    except BatchUploadError as error:
        assert kind is iter and error.unconfirmed == given[2:]

    assert set(server.calls.values()) == {1}


def test_a_queue_that_is_never_empty_ends_the_looking(clock, server, client):
    """It is everybody's, and may be long: after an hour the chunk is unconfirmed."""
    services = {"batch_queue_messages": 1, "batch_queue_consumers": 1}
    server.answer("GET", "/health", {"status": "healthy", "services": services})
    lose(server, DROP)

    with pytest.raises(BatchUploadError, match="does not come to rest") as caught:
        client.create_batch(tasks(2))

    assert len(caught.value.unconfirmed) == 2 and 3600 <= clock.now < 3700


@pytest.mark.parametrize("was_taken", [True, False])
def test_an_upload_to_a_batch_that_exists_is_looked_for_too(server, client, was_taken):
    """Its total before is known, and its tasks are compared."""
    client.create_batch(tasks(3), batch_id="b")
    lose(server, taken_but(DROP)(server) if was_taken else DROP)

    client.create_batch([task("3"), task("4")], batch_id="b")

    assert_called_once(server, tasks(5))


def test_a_batch_that_was_redelivered_is_not_sent_again(server, client):
    """Its tasks are there twice."""
    server.redelivers = True
    lose(server, taken_but(DROP)(server))

    client.create_batch(tasks(3))

    assert len(sent(server)) == 1


def test_an_export_that_ends_early_is_not_believed(server, client):
    """Tasks that are not in it may be in the batch."""
    server.redelivers = True
    server.runs = False
    lose(server, taken_but(DROP)(server))
    server.broken_exports = [(2, False)] * 9

    with pytest.raises(BatchUploadError, match="ended after 2 of 6") as caught:
        client.create_batch(tasks(3))

    assert caught.value.unconfirmed == tasks(3)


def test_an_upload_is_sent_again_as_often_as_any_request(server, client):
    """Then its tasks are unconfirmed, as each try may have been taken."""
    lose(server, *[DROP] * 3)

    with pytest.raises(BatchUploadError) as caught:
        client.create_batch(tasks(2), batch_id="b")

    assert len(sent(server)) == 3 and caught.value.unconfirmed == tasks(2)


def test_a_server_that_stays_away_leaves_the_chunk_unconfirmed(server, client):
    """The error is that of the upload, and says that it was looked for."""

    def go_away(request):
        server.away = DROP
        return DROP

    lose(server, server.play, go_away)

    with pytest.raises(BatchUploadError, match="looking whether it was taken failed") as caught:
        client.create_batch(tasks(6), 2)

    error = caught.value
    assert isinstance(error.__cause__, ConnectionFailedError) and "POST" in str(error.__cause__)
    assert (error.uploaded, error.unconfirmed, error.remaining) == (2, tasks(6)[2:4], tasks(6)[4:])


def test_a_refusal_to_look_is_none_of_the_upload(server, client):
    """It stays unconfirmed: only its own answer can say that it was refused."""
    server.answer("GET", "/health", Answer({"detail": "no"}, 401))
    lose(server, taken_but(Answer(None, 500))(server))

    with pytest.raises(BatchUploadError) as caught:
        client.create_batch(tasks(2))

    assert isinstance(caught.value.__cause__, ServerError) and caught.value.unconfirmed == tasks(2)


def test_a_chunk_that_is_refused_when_sent_again_remains(server, client):
    """What was found of it is uploaded, the rest is surely not there."""
    lose(server, server.play, DROP, Answer({"detail": "no"}, 401))

    with pytest.raises(BatchUploadError) as caught:
        client.create_batch(tasks(6), 2)

    error = caught.value
    assert isinstance(error.__cause__, AuthenticationError)
    assert (error.uploaded, error.unconfirmed, error.remaining) == (2, [], tasks(6)[2:])


def test_while_rabbitmq_is_down_nothing_is_believed(clock, server, client):
    """The server calls its queues empty then."""
    server.ingests = False
    lose(server, taken_but(DROP)(server))
    healthy = server.play
    answers = itertools.chain([True], itertools.repeat(False))

    def health(request):
        server.down = {"rabbitmq"} if next(answers) else set()
        return healthy(request)

    server.answer("GET", "/health", health)
    clock.at(20, server.ingest)

    client.create_batch(tasks(2))

    assert len(sent(server)) == 1


def test_a_health_that_is_not_told_is_waited_for(server, client):
    """More often than the retries: the batch itself answers, so the server is not away."""
    server.answer("GET", "/health", *[DROP] * 9, server.play)
    lose(server, DROP)

    assert client.create_batch(tasks(2)).total_tasks == 2

    assert len(sent(server)) == 2


@pytest.mark.parametrize("options", [{"retries": 0}, {"idempotent_uploads": True, "retries": 1}])
def test_without_repeats_or_with_deduplication_nothing_is_looked_at(clock, server, options):
    """The one sends nothing again, the other knows by its key."""
    lose(server, *[DROP] * 2)

    with SynthgenClient(server.url, "k", backoff_factor=0, **options) as client, pytest.raises(BatchUploadError):
        client.create_batch(tasks(2))

    assert {request.method for request in server.requests} == {"POST"}


def test_a_time_that_is_over_uploads_nothing_more(clock, server, client):
    """What was not sent remains; so says the error, whose cause is the time-out."""

    def slow(request):
        clock.sleep(20)
        return server.play(request)

    server.answer("POST", UPLOADS, slow)

    with pytest.raises(BatchUploadError) as caught:
        client.monitor_batch(tasks(6), chunk_size=2, timeout=30, show_progress=False)

    assert isinstance(caught.value.__cause__, BatchTimeoutError)
    assert (caught.value.uploaded, caught.value.unconfirmed, len(caught.value.remaining)) == (4, [], 2)


def test_a_time_that_is_over_ends_the_looking(clock, server, client):
    """The chunk in doubt is unconfirmed."""
    lose(server, DROP)

    with pytest.raises(BatchUploadError) as caught:
        client.monitor_batch(tasks(2), timeout=20, show_progress=False)

    assert isinstance(caught.value.__cause__, BatchTimeoutError)
    assert len(caught.value.unconfirmed) == 2 and 20 <= clock.now < 23


def test_the_monitor_is_told_of_the_looking(server, client):
    """It may take half a minute."""
    notes = []

    class Notes(Monitor):
        def note(self, text):
            notes.append(text)

    lose(server, taken_but(DROP)(server))

    client.create_batch(tasks(2), monitor=Notes())

    assert len(notes) == 1 and "looking whether the upload was taken" in notes[0]


def test_monitor_batch_survives_lost_uploads(server, client):
    """Nothing of it is to be seen in its results."""
    lose(server, taken_but(DROP)(server), server.play, DROP, Answer(None, 500))
    given = [Task(**{**dict(one), "custom_id": f"id-{index}"}) for index, one in enumerate(tasks(8))]

    results = client.monitor_batch(given, chunk_size=2, show_progress=False)

    assert [result.custom_id for result in results] == [one.custom_id for one in given]
    assert_called_once(server, given)
