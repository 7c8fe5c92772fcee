"""Uploads: what is sent, what is known of each task when one fails, and how to go on without loss or repetition."""

import itertools
import json
import pickle
import socket
import threading
import time

import pytest
import requests
from builders import task, tasks
from requests.adapters import HTTPAdapter
from servers import DEADLINE, DROP, Answer
from urllib3.util import Retry

from synthgen import Monitor, SynthgenClient, Task
from synthgen.exceptions import (
    AuthenticationError,
    BatchUploadError,
    ConnectionFailedError,
    InvalidResponseError,
    RateLimitError,
    ServerError,
)

MIB = 1024 * 1024
KEY = "sk-never-to-be-seen"


def take(request):
    """The answer to an upload that was taken."""
    return {"batch_id": request.query["batch_id"], "total_tasks": len(request.lines)}


#: Failures that leave open whether the upload was taken.
UNKNOWN = {
    "drop": DROP,
    **{str(status): Answer({"detail": "no"}, status) for status in (500, 502, 503, 504)},
    "web page": Answer("<html>"),
    "half a JSON": Answer(b'{"batch_id": '),
    "cut short": Answer({"batch_id": "b", "total_tasks": 2}, cut_off=True),
    "another shape": Answer([]),
    "redirect": Answer(None, 302, {"Location": "https://server.test/"}),
}
#: Answers that say that it was not.
REFUSED = {str(status): Answer({"detail": "no"}, status) for status in (400, 401, 403, 404, 413, 422, 429)}


@pytest.fixture
def client(server):
    """Its server takes uploads, until a test says otherwise."""
    server.answer("POST", "/api/v1/batches", take)
    with SynthgenClient(server.url, retries=0) as opened:
        yield opened


def fail_after(server, taken, answer):
    """Take so many uploads, answer the next like this, and take the rest."""
    server.answer("POST", "/api/v1/batches", *[take] * taken, answer, take)


def caught_from(client, given, chunk_size=2, **options):
    """The error that ends an upload."""
    with pytest.raises(BatchUploadError) as caught:
        client.create_batch(given, chunk_size, **{"batch_id": "b", **options})
    return caught.value


def sent(server):
    """The custom ids in each upload."""
    return [[line["custom_id"] for line in request.lines] for request in server.requests]


def once(values):
    """An iterator that is read once."""
    return (value for value in values)


# ------------------------------------------------------------------------------------- what is sent


def test_a_batch_is_created_in_as_many_uploads_as_it_needs(server, client):
    """All under one new id, and counted."""
    created = client.create_batch(tasks(5), 2)

    assert created.total_tasks == 5
    assert sent(server) == [["0", "1"], ["2", "3"], ["4"]]
    assert {request.query["batch_id"] for request in server.requests} == {created.batch_id}


def test_a_line_has_every_field(server, client):
    """The framework drops tasks that lack one, and takes an absent flag for false."""
    client.create_batch([Task(url="http://p.test", body={"a": 1})])

    assert server.requests[0].lines == [
        {
            "custom_id": None,
            "method": "POST",
            "url": "http://p.test",
            "api_key": None,
            "body": {"a": 1},
            "dataset": None,
            "source": None,
            "use_cache": True,
            "track_progress": True,
        }
    ]


def test_a_line_is_ascii(server, client):
    """Line separators and emoji are escaped: nobody can cut a line at them."""
    client.create_batch([task("\u2028\x85\u2029 é 🙂\n")])

    (line,) = server.requests[0].file.splitlines()
    assert all(byte < 128 for byte in line)
    assert json.loads(line)["body"]["messages"][0]["content"] == "\u2028\x85\u2029 é 🙂\n"


def test_an_upload_is_a_jsonl_file(server, client):
    """By its name, which the framework looks at."""
    client.create_batch([task()])

    assert b'filename="batch.jsonl"' in server.requests[0].body
    assert server.requests[0].headers["Content-Type"].startswith("multipart/form-data")


class SlowLine:
    """Takes one upload, at so many bytes a second, and how long that took."""

    def __init__(self, bytes_per_second):
        self._pause = 65536 / bytes_per_second
        self.seconds = 0.0
        self._listener = socket.socket()
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        self._listener.bind(("127.0.0.1", 0))
        self._listener.listen(1)
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self._serve)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *exc_info):
        self._thread.join(DEADLINE)
        self._listener.close()

    def _serve(self):
        connection, _ = self._listener.accept()
        started = time.monotonic()
        with connection:
            connection.settimeout(DEADLINE)
            received = b""
            while not received.endswith(b"--\r\n"):  # of the form's end
                part = connection.recv(65536)
                if not part:
                    return
                received = received[-10:] + part
                time.sleep(self._pause)
            self.seconds = time.monotonic() - started
            body = json.dumps({"batch_id": "b", "total_tasks": 1}).encode("ascii")
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))


@pytest.mark.slow
def test_sending_may_take_longer_than_connecting(monkeypatch):
    """On a slow line: a time-out is that nothing moves, not that all of an upload takes long."""
    monkeypatch.setattr("synthgen.client._CONNECT_TIMEOUT", 1.0)
    with SlowLine(bytes_per_second=5 << 20) as line, SynthgenClient(line.url, retries=0) as client:
        client.create_batch([task("x" * (20 << 20))], batch_id="b")

    assert line.seconds > 1.0


@pytest.mark.slow
def test_a_chunk_is_cut_at_8_mib_and_a_larger_task_goes_alone(server, client):
    """Whatever the number of tasks allowed."""
    given = [task("a", source={"pad": "x" * size}) for size in (3 * MIB, 3 * MIB, 3 * MIB, 10, 9 * MIB, 10, 10)]

    client.create_batch(given)

    assert [len(ids) for ids in sent(server)] == [2, 2, 1, 2]
    assert [len(request.file) < 8 * MIB for request in server.requests] == [True, True, False, True]


def test_tasks_are_read_as_they_are_sent(server, client):
    """One chunk is in memory at a time."""
    uploads_when_read = []

    def generate():
        for one in tasks(6):
            uploads_when_read.append(len(server.requests))
            yield one

    client.create_batch(generate(), 2)

    assert uploads_when_read == [0, 0, 1, 1, 2, 2]


def test_the_monitor_is_told_of_each_chunk(client):
    """The total is known of what has a length."""
    told = []

    class Recorder(Monitor):
        def upload(self, batch_id, uploaded, total):
            told.append((batch_id, uploaded, total))

    client.create_batch(tasks(3), 2, batch_id="b", monitor=Recorder())
    client.create_batch(once(tasks(1)), 2, batch_id="c", monitor=Recorder())

    assert told == [("b", 0, 3), ("b", 2, 3), ("b", 3, 3), ("c", 0, None), ("c", 1, None)]


def test_a_connection_that_went_stale_between_chunks_is_replaced(server, client):
    """The server closed it while the next tasks were made."""

    def generate():
        yield task("0")
        server.hang_up()
        yield task("1")

    assert client.create_batch(generate(), 1).total_tasks == 2
    assert sent(server) == [["0"], ["1"]]


# ------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("given", [[], (), iter([])], ids=["list", "tuple", "iterator"])
def test_no_tasks_are_no_batch(server, client, given):
    """Nothing is sent."""
    with pytest.raises(ValueError, match="no tasks"):
        client.create_batch(given)

    assert server.requests == []


@pytest.mark.parametrize("chunk_size", [0, -1, 1.5, "10", None])
def test_a_chunk_has_a_task_at_least(server, client, chunk_size):
    """Nothing is sent."""
    with pytest.raises(ValueError, match="chunk_size"):
        client.create_batch(tasks(1), chunk_size)

    assert server.requests == []


@pytest.mark.parametrize("batch_id", ["", ".", "..", "a/b", "/", 7])
def test_an_id_that_could_not_be_read_back_is_refused(server, client, batch_id):
    """One with a slash can be posted to, and never asked for."""
    with pytest.raises(ValueError):
        client.create_batch(tasks(1), batch_id=batch_id)

    assert server.requests == []


@pytest.mark.parametrize("given", [task(), {"url": "http://p.test"}, "tasks.jsonl", b"{}"])
def test_what_is_no_list_of_tasks_is_refused(server, client, given):
    """All of them can be iterated over, and hold no tasks."""
    with pytest.raises(TypeError, match=f"not one {type(given).__name__}"):
        client.create_batch(given)

    assert server.requests == []


@pytest.mark.parametrize("kind", [list, tuple])
def test_a_list_with_something_else_in_it_is_refused_before_anything_is_sent(server, client, kind):
    """Wherever it is."""
    with pytest.raises(TypeError, match=r"not dict \(at 3\)"):
        client.create_batch(kind([*tasks(3), {"url": "http://p.test"}]), 1)

    assert server.requests == []


def test_an_iterator_with_something_else_in_it_ends_there(server, client):
    """What was read before it is not lost."""
    error = caught_from(client, once([*tasks(3), {"url": "http://p.test"}]))

    assert isinstance(error.__cause__, TypeError) and error.uploaded == 2
    assert next(iter(error.remaining)).custom_id == "2"


@pytest.mark.parametrize("key", ["", "a\nb", "€"])
def test_an_idempotency_key_fits_a_header(server, client, key):
    """Nothing is sent."""
    with pytest.raises(ValueError, match="idempotency key"):
        client.create_batch(tasks(1), idempotency_key=key)

    assert server.requests == []


# -------------------------------------------------------------- never sent, sent, or may have been sent


@pytest.mark.parametrize("status", [307, 308])
def test_a_chunk_that_is_to_be_sent_elsewhere_was_not_taken(server, client, status):
    """Both say that the request has not been carried out."""
    fail_after(server, 0, Answer(None, status, {"Location": "https://server.test/"}))

    error = caught_from(client, tasks(2))

    assert error.unconfirmed == [] and len(list(error.remaining)) == 2


def test_tasks_that_went_to_another_batch_are_not_sent_again(server):
    """They are taken: to look for them in the right batch, and to send them once more, would run them twice."""
    server.answer("POST", "/api/v1/batches", {"batch_id": "another", "total_tasks": 2})
    with SynthgenClient(server.url, backoff_factor=0) as client:
        error = caught_from(client, tasks(2), batch_id=None)

    assert "went to batch 'another'" in str(error) and len(error.unconfirmed) == 2
    assert [request.method for request in server.requests] == ["POST"]


@pytest.mark.parametrize("answer", UNKNOWN.values(), ids=list(UNKNOWN))
def test_a_chunk_without_a_clear_answer_is_unconfirmed(server, client, answer):
    """It was sent, once, and may have been taken; the rest surely was not."""
    given = tasks(6)
    fail_after(server, 1, answer)

    error = caught_from(client, given)

    assert (error.batch_id, error.uploaded) == ("b", 2)
    assert (error.unconfirmed, error.remaining) == (given[2:4], given[4:])
    assert sent(server) == [["0", "1"], ["2", "3"]]


def test_a_chunk_whose_answer_does_not_come_in_time_is_unconfirmed(server):
    """It was sent, once."""
    server.answer("POST", "/api/v1/batches", Answer(hold=threading.Event()))

    with SynthgenClient(server.url, timeout=0.05, retries=0) as client:
        error = caught_from(client, tasks(3))

    assert (error.unconfirmed, error.remaining) == (tasks(3)[:2], tasks(3)[2:])
    assert len(server.wait_for_requests(1)) == 1


@pytest.mark.parametrize("answer", REFUSED.values(), ids=list(REFUSED))
def test_a_chunk_that_was_refused_remains(server, client, answer):
    """It was surely not taken, nor was the rest."""
    given = tasks(6)
    fail_after(server, 1, answer)

    error = caught_from(client, given)

    assert (error.batch_id, error.uploaded) == ("b", 2)
    assert (error.unconfirmed, error.remaining) == ([], given[2:])


def test_a_proxy_that_takes_no_such_uploads_is_told_with_what_helps(server, client):
    """nginx's limit is 1 MB where nobody has set another."""
    fail_after(server, 0, Answer("<html>413 Request Entity Too Large</html>", 413))

    assert "give a smaller chunk_size" in str(caught_from(client, tasks(2)))


def test_a_chunk_for_which_there_was_no_connection_remains(server, client):
    """It was never sent."""
    given = tasks(4)

    def generate():
        yield from given[:2]
        server.close()
        yield from given[2:]

    error = caught_from(client, generate())

    assert (error.uploaded, error.unconfirmed, list(error.remaining)) == (2, [], given[2:])


def test_a_chunk_for_a_host_that_was_not_found_remains(client, monkeypatch):
    """It was never sent."""

    def not_found(*args, **options):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", not_found)

    error = caught_from(client, tasks(2))

    assert (error.unconfirmed, error.remaining) == ([], tasks(2))


def test_a_chunk_for_a_proxy_that_is_not_there_remains(server, client, monkeypatch):
    """It was never sent."""
    monkeypatch.setenv("http_proxy", server.url)
    server.close()

    error = caught_from(client, tasks(2))

    assert (error.unconfirmed, error.remaining) == ([], tasks(2))


@pytest.mark.parametrize(
    "answer",
    [*UNKNOWN.values(), Answer(None, 429), Answer("<html>no such page", 404)],
    ids=[*UNKNOWN, "429", "404 of a proxy"],
)
def test_where_earlier_tries_may_have_been_taken_the_chunk_is_unconfirmed(server, answer):
    """With uploads that are repeated, the last try alone does not tell."""
    server.answer("POST", "/api/v1/batches", Answer(None, 503), answer)

    with SynthgenClient(server.url, retries=1, backoff_factor=0, idempotent_uploads=True) as client:
        error = caught_from(client, tasks(4))

    assert (error.unconfirmed, error.remaining) == (tasks(4)[:2], tasks(4)[2:])


def test_with_a_plain_session_of_your_own_a_chunk_that_was_refused_remains(server):
    """Nothing repeated it: the one try was refused."""
    fail_after(server, 0, REFUSED["429"])

    with requests.Session() as session, SynthgenClient(server.url, session=session) as client:
        error = caught_from(client, tasks(4))

    assert (error.unconfirmed, error.remaining) == ([], tasks(4))


def test_where_the_retries_of_a_session_of_your_own_may_have_sent_a_chunk_it_is_unconfirmed(server):
    """The refusal that is seen may not be the answer to the first try."""
    server.answer("POST", "/api/v1/batches", Answer(None, 503), REFUSED["429"])
    policy = Retry(1, status_forcelist=[503], allowed_methods=["POST"], respect_retry_after_header=False)

    with requests.Session() as session, SynthgenClient(server.url, session=session, retries=0) as client:
        session.mount("http://", HTTPAdapter(max_retries=policy))
        error = caught_from(client, tasks(4))

    assert (error.unconfirmed, error.remaining) == (tasks(4)[:2], tasks(4)[2:])
    assert sent(server) == [["0", "1"]] * 2


def test_what_the_caller_is_handling_meanwhile_says_nothing_of_an_upload(server, client):
    """Going on in an ``except`` block is not mistaken for the failure that it handles."""
    fail_after(server, 0, UNKNOWN["cut short"])
    gone = SynthgenClient("http://127.0.0.1:1", retries=0)

    try:
        gone.get_batches()
    except ConnectionFailedError as exc:
        try:
            raise exc.__cause__
        except OSError:
            error = caught_from(client, tasks(2))

    assert error.unconfirmed == tasks(2)


# ------------------------------------------------------------------------------------------- the error


@pytest.mark.parametrize(
    "answer, cause",
    [
        (DROP, ConnectionFailedError),
        (Answer({"detail": "no"}, 401), AuthenticationError),
        (Answer({"detail": "no"}, 429), RateLimitError),
        (Answer({"detail": "no"}, 500), ServerError),
        (Answer("<html>"), InvalidResponseError),
    ],
    ids=["drop", "401", "429", "500", "page"],
)
def test_the_error_is_raised_from_its_cause_and_tells_it(server, client, answer, cause):
    """With its status and response."""
    fail_after(server, 0, answer)

    error = caught_from(client, tasks(2))

    assert type(error.__cause__) is cause
    assert (error.status_code, error.response) == (error.__cause__.status_code, error.__cause__.response)
    assert str(error.__cause__) in error.message and "batch 'b': 0 tasks were uploaded" in error.message


def test_the_error_says_how_to_go_on(server, client):
    """And how many tasks are in doubt."""
    fail_after(server, 1, DROP)

    error = caught_from(client, tasks(5))

    assert "2 tasks were uploaded, 2 more may have been" in error.message
    assert "create_batch(error.remaining, batch_id=error.batch_id)" in error.message


def test_the_error_of_a_list_pickles_with_what_remains_and_without_keys(server, client):
    """Only what is read once is lost."""
    fail_after(server, 0, Answer(None, 400))

    error = pickle.loads(pickle.dumps(caught_from(client, [task(api_key=KEY)])))

    assert error.remaining == [task()]
    fail_after(server, 0, Answer(None, 400))
    assert pickle.loads(pickle.dumps(caught_from(client, once([task()])))).remaining is None


def test_an_error_of_the_callers_own_iterable_is_the_cause(server, client):
    """What was read and not yet sent remains."""

    def generate():
        yield from tasks(3)
        raise LookupError("line 4 of my file")

    error = caught_from(client, generate())

    assert isinstance(error.__cause__, LookupError) and "line 4 of my file" in error.message
    assert error.message.endswith(", which lacks what a generator that raised had still to give")
    assert (error.uploaded, error.unconfirmed) == (2, [])
    assert [one.custom_id for one in error.remaining] == ["2"]


def test_an_iterable_that_fails_before_its_first_task_is_not_our_affair(server, client):
    """Nothing was read, and nothing is to be gone on with."""

    def generate():
        raise LookupError("no such file")
        yield

    with pytest.raises(LookupError, match="no such file"):
        client.create_batch(generate())


@pytest.mark.parametrize("value", [float("nan"), {1}, "\ud800"], ids=repr)
def test_a_body_changed_to_what_json_can_not_say_ends_the_upload_there(server, client, value):
    """Nothing of its chunk was sent, and the error says which task it is."""
    given = tasks(4)
    given[3].body["x"] = value

    error = caught_from(client, given)

    assert "the task at 3 " in str(error)
    assert isinstance(error.__cause__, ValueError) and (error.uploaded, error.remaining) == (2, given[2:])


def test_ctrl_c_names_the_batch(server, client):
    """It stays a KeyboardInterrupt, with how far the upload was."""

    def generate():
        yield from tasks(3)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match="batch 'b' .* 2 tasks are in it"):
        client.create_batch(generate(), 2, batch_id="b")


# --------------------------------------------------------------------------------------------- going on


@pytest.mark.parametrize("answer", [REFUSED["429"], REFUSED["401"], *UNKNOWN.values()], ids=["429", "401", *UNKNOWN])
@pytest.mark.parametrize("kind", [list, once])
def test_going_on_from_errors_sends_every_task_once(server, client, kind, answer):
    """With one failure after the other; here what was unconfirmed was not taken, and is sent again by hand."""
    taken = []
    failing = itertools.cycle([False, True])

    def answer_to(request):
        if next(failing):
            return answer
        taken.extend(line["custom_id"] for line in request.lines)
        return take(request)

    server.answer("POST", "/api/v1/batches", answer_to)
    todo, uploaded = kind(tasks(9)), 0
    while todo:
        try:
            uploaded += client.create_batch(todo, 2, batch_id="b").total_tasks
            break
        except BatchUploadError as error:
            uploaded += error.uploaded
            todo = itertools.chain(error.unconfirmed, error.remaining)

    assert taken == [str(number) for number in range(9)] and uploaded == 9
    assert {request.query["batch_id"] for request in server.requests} == {"b"}


@pytest.mark.parametrize("kind", [list, once])
def test_going_on_with_nothing_left_sends_nothing(server, client, kind):
    """The last chunk is unconfirmed, so none remains: that is no mistake, as it would be for a new batch."""
    fail_after(server, 1, DROP)
    error = caught_from(client, kind(tasks(4)))

    created = client.create_batch(error.remaining, batch_id=error.batch_id)

    assert (created.batch_id, created.total_tasks) == ("b", 0)
    assert sent(server) == [["0", "1"], ["2", "3"]]


def test_what_remains_of_a_list_can_be_looked_at(server, client):
    """It is a list; of an iterator it is one, read on where it stopped."""
    fail_after(server, 0, Answer(None, 400))
    assert caught_from(client, tasks(3)).remaining == tasks(3)

    fail_after(server, 0, Answer(None, 400))
    rest = caught_from(client, once(tasks(3))).remaining
    assert next(rest) == tasks(1)[0] and len(list(rest)) == 2


# ----------------------------------------------------------------------------------------- idempotency


def keys(server):
    """The Idempotency-Key of each upload."""
    return [request.headers["Idempotency-Key"] for request in server.requests]


def test_every_chunk_has_a_key_of_its_own(server, client):
    """Also one that has the same tasks as another, in this batch or the next."""
    for _ in range(2):
        client.create_batch([task()] * 4, 2, batch_id="b")

    assert len(set(keys(server))) == 4


@pytest.mark.parametrize("answer", [Answer(None, 503), DROP, Answer(b"{"), Answer(None, 429)])
def test_a_repeat_has_the_key_and_the_bytes_of_the_first_try(server, answer):
    """So that a server can tell that it is one."""
    server.answer("POST", "/api/v1/batches", answer, take, answer, take)

    with SynthgenClient(server.url, backoff_factor=0, idempotent_uploads=True) as client:
        assert client.create_batch(tasks(2), 1).total_tasks == 2

    first, again, second, second_again = keys(server)
    assert first == again != second == second_again
    assert sent(server) == [["0"], ["0"], ["1"], ["1"]]


@pytest.mark.parametrize("taken", [0, 1, 2])
def test_what_is_unconfirmed_is_sent_again_under_its_own_key(server, client, taken):
    """As one upload, the same bytes, however small the chunks are now."""
    fail_after(server, taken, DROP)
    error = caught_from(client, tasks(6))

    client.create_batch(error.unconfirmed, 1, batch_id="b", idempotency_key=error.idempotency_key)

    lost, again = server.requests[-2:]
    assert lost.headers["Idempotency-Key"] == again.headers["Idempotency-Key"] == error.idempotency_key
    assert lost.file == again.file


def test_a_key_of_your_own_names_the_first_chunk(server, client):
    """And, with a number, the others."""
    client.create_batch(once(tasks(5)), 2, idempotency_key="mine")

    assert keys(server) == ["mine", "mine-1", "mine-2"]


def test_a_chunk_that_was_refused_leaves_no_key(server, client):
    """There is nothing to be sent again under it."""
    fail_after(server, 0, Answer(None, 400))

    assert caught_from(client, tasks(2)).idempotency_key is None
