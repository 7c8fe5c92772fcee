"""The embedded server under odd, slow, large and hostile requests."""

import json
import socket
import sqlite3
import threading
from contextlib import ExitStack, closing

import pytest
import requests
from hypothesis import given, settings
from hypothesis import strategies as st
from servers import DEADLINE

from synthgen.exceptions import ConfigurationError
from synthgen.local import LocalServer, webserver
from synthgen.local.uploads import read_file


def connect(api):
    host, port = api.server.url[len("http://") :].split(":")
    return socket.create_connection((host, int(port)), timeout=DEADLINE)


def exchange(api, data, finish=True):
    """What comes back on a connection of its own, until the server closes it."""
    with closing(connect(api)) as connection:
        try:
            connection.sendall(data)
            if finish:
                connection.shutdown(socket.SHUT_WR)
            answer = b""
            while True:
                received = connection.recv(1 << 16)
                answer += received
                if not received:
                    return answer
        except OSError:  # it was closed before all was sent
            return b""


def request(api, line, *headers):
    return "\r\n".join([line, f"Authorization: Bearer {api.server.api_key}", *headers, "", ""]).encode("latin-1")


def status(answer):
    return int(answer.split(b" ", 2)[1])


@pytest.fixture
def quick(monkeypatch):
    """Clients that are too slow are given up soon."""
    for name in ("_HEAD_SECONDS", "_BODY_SECONDS", "_UNWANTED_SECONDS"):
        monkeypatch.setattr(webserver, name, 0.2)


@pytest.mark.parametrize(
    "lines, expected",
    [
        (["GET /health"], 200),
        (["BREW /health HTTP/1.1"], 501),
        (["GET /health HTTP/3.0"], 505),
        (["GET /health SMTP/1.1"], 400),
        (["GET /" + "a" * 1_000_000 + " HTTP/1.1"], 414),
        (["GET /health HTTP/1.1", "X: " + "a" * 1_000_000], 431),
        (["GET /health HTTP/1.1", *(f"X-{number}: 1" for number in range(1000))], 431),
        (["GET /health HTTP/1.1", *("X: " + "a" * 60_000 for _ in range(10))], 431),
        (["POST /api/v1/batches HTTP/1.1"], 411),
        (["POST /api/v1/batches HTTP/1.1", "Transfer-Encoding: chunked"], 411),
        (["POST /api/v1/batches HTTP/1.1", "Content-Length: -1"], 400),
        (["POST /api/v1/batches HTTP/1.1", "Content-Length: ten"], 400),
        (["POST /api/v1/batches HTTP/1.1", "Content-Length: 1", "Content-Length: 2"], 400),
        (["POST /api/v1/batches HTTP/1.1", "Content-Length: 1" + 5000 * "0"], 413),
    ],
)
def test_a_request_that_makes_no_sense_gets_an_answer(api, lines, expected):
    """One with the status that says what is wrong; the server goes on."""
    answer = exchange(api, request(api, *lines))

    assert status(answer) == expected
    assert api.get("/token") == {"isValid": True}


def test_a_request_of_http_0_9_has_no_headers(api, monkeypatch):
    """Some later releases of Python have a plain dict for them."""
    parse = webserver.BaseHTTPRequestHandler.parse_request

    def parse_request(self):
        is_request = parse(self)
        self.headers = {}
        return is_request

    monkeypatch.setattr(webserver.BaseHTTPRequestHandler, "parse_request", parse_request)

    assert status(exchange(api, b"GET /health\r\n\r\n")) == 200


def test_errors_are_json(api):
    """Also those of requests that are not HTTP."""
    head, _, body = exchange(api, request(api, "GET /health SMTP/1.1")).partition(b"\r\n\r\n")

    assert b"Content-Type: application/json" in head
    assert "detail" in json.loads(body)


def test_a_body_that_is_too_large_is_refused_unread(api):
    """413 says the limit; nothing waits for the body."""
    form = "Content-Type: multipart/form-data; boundary=b"
    answer = exchange(
        api, request(api, "POST /api/v1/batches HTTP/1.1", form, f"Content-Length: {300 << 20}"), finish=False
    )

    assert status(answer) == 413
    assert b"256 MiB" in answer


def test_a_body_shorter_than_promised_is_not_taken(api, task):
    """A client that goes away in the middle leaves nothing behind."""
    body = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n'
    body += json.dumps(task()).encode() + b"\r\n--b--\r\n"
    form = "Content-Type: multipart/form-data; boundary=b"
    head = request(api, "POST /api/v1/batches HTTP/1.1", form, f"Content-Length: {len(body) + 1}")

    assert exchange(api, head + body) == b""
    assert api.get("/api/v1/batches")["total"] == 0


@pytest.mark.parametrize("sent", [b"", b"GET /health HT", b"GET /health HTTP/1.1\r\nX: y\r\n"])
def test_a_client_that_says_no_more_is_given_up(quick, monkeypatch, api, sent):
    """Its connection does not stay for ever."""
    monkeypatch.setattr(webserver, "_MAX_IDLE", 0.2)

    assert exchange(api, sent, finish=False) == b""


def test_a_slow_upload_is_given_up(quick, api):
    """A body that does not come in time is not waited for."""
    form = "Content-Type: multipart/form-data; boundary=b"
    head = request(api, "POST /api/v1/batches HTTP/1.1", form, "Content-Length: 1000")

    assert exchange(api, head + b"--b", finish=False) == b""


def test_expect_100_continue_is_answered_before_the_body(api, task):
    """A client that asks first is told to go on, or what is wrong."""
    files = {"file": ("batch.jsonl", json.dumps(task()))}
    prepared = requests.Request("POST", api.server.url, files=files).prepare()
    headers = [f"{name}: {value}" for name, value in prepared.headers.items()]
    with closing(connect(api)) as connection:
        connection.sendall(request(api, "POST /api/v1/batches HTTP/1.1", "Expect: 100-continue", *headers))
        assert connection.recv(1 << 16) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(prepared.body)
        assert status(connection.recv(1 << 16)) == 200

    answer = exchange(api, request(api, "POST /nowhere HTTP/1.1", "Expect: 100-continue", *headers), finish=False)
    assert status(answer) == 404


def test_many_requests_on_one_connection(api):
    """Sent at once, they are answered one after the other."""
    answer = exchange(api, request(api, "GET /token HTTP/1.1") * 20)

    assert answer.count(b"HTTP/1.1 200 OK") == answer.count(b'{"isValid": true}') == 20


def test_an_old_client_gets_an_export_that_ends_with_the_connection(api, task):
    """HTTP/1.0 knows no chunks."""
    batch_id = api.submit(task())
    api.wait(batch_id)
    head, _, body = exchange(api, request(api, f"GET /api/v1/batches/{batch_id}/tasks/export HTTP/1.0")).partition(
        b"\r\n\r\n"
    )

    assert b"chunked" not in head
    assert json.loads(body)["total"] == 1


def test_a_client_that_leaves_in_mid_export_does_no_harm(api, task, capfd):
    """No traceback is printed, and the server goes on."""
    batch_id = api.submit(*[task(f"{number}", source={"x": "y" * 10_000}) for number in range(300)])
    api.wait(batch_id)
    for _ in range(5):
        with closing(connect(api)) as connection:
            connection.sendall(request(api, f"GET /api/v1/batches/{batch_id}/tasks/export HTTP/1.1"))
            connection.recv(100)

    assert len(api.export(batch_id)) == 300
    assert capfd.readouterr().err == ""


def test_a_failure_in_mid_export_breaks_it_off(serve, task, tmp_path, caplog):
    """The status is sent by then: a body without its end is how the client gets to know."""
    api = serve(database=tmp_path / "tasks.db")
    batch_id = api.submit(*[task(source={"x": "y" * 8_000_000}) for _ in range(3)])
    api.wait(batch_id)
    with closing(connect(api)) as connection:
        connection.sendall(request(api, f"GET /api/v1/batches/{batch_id}/tasks/export HTTP/1.1"))
        begun = connection.recv(100)
        assert status(begun) == 200
        with closing(sqlite3.connect(str(tmp_path / "tasks.db"))) as database:
            database.execute("ALTER TABLE tasks RENAME TO gone")
        received = begun + b"".join(iter(lambda: connection.recv(1 << 20), b""))

    assert b'{"tasks"' in received and not received.endswith(b"0\r\n\r\n")
    assert "OperationalError while answering a request" in caplog.text


def test_idle_connections_give_way_to_new_ones(api, monkeypatch):
    """More clients than there may be connections all get their answers."""
    monkeypatch.setattr(webserver, "_MAX_CONNECTIONS", 4)
    monkeypatch.setattr(webserver, "_MIN_IDLE", 0.02)
    api.session.close()
    with ExitStack() as opened:
        for _ in range(12):
            connection = opened.enter_context(closing(connect(api)))
            connection.sendall(request(api, "GET /token HTTP/1.1"))
            assert status(connection.recv(1 << 16)) == 200


def test_only_the_accepting_thread_asks_whether_others_run(api, monkeypatch):
    """Until 3.12, is_alive() can fail where two ask it of one that has just ended; nobody would listen any more."""
    monkeypatch.setattr(webserver, "_MIN_IDLE", 0.01)
    asked_by, is_alive = set(), threading.Thread.is_alive

    def noting_is_alive(thread):
        asked_by.add(threading.current_thread().name)
        return is_alive(thread)

    monkeypatch.setattr(threading.Thread, "is_alive", noting_is_alive)
    with closing(connect(api)) as idle:
        idle.settimeout(0.3)
        with pytest.raises(socket.timeout):
            idle.recv(1)
        exchange(api, request(api, "GET /token HTTP/1.1"))

    assert asked_by <= {"synthgen-accept"}  # which may be about to


def test_a_connection_that_gets_no_thread_is_closed_and_the_next_one_served(api, monkeypatch):
    """The system may be out of threads for a while; the server goes on listening."""
    refusals, start = [RuntimeError("can't start new thread")], threading.Thread.start

    def start_or_refuse(thread):
        if refusals:
            raise refusals.pop()
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_or_refuse)

    assert exchange(api, request(api, "GET /token HTTP/1.1")) == b""
    assert status(exchange(api, request(api, "GET /token HTTP/1.1"))) == 200


def test_a_failure_while_answering_is_a_500_without_details(api, caplog):
    """The client is told nothing of it, the log where it was, and neither what the request held."""
    api.server._store.close()
    api.server._store.close = lambda: None
    response = api.ask("GET", "/api/v1/batches/sk-secret")

    assert (response.status_code, "sk-secret" in response.text) == (500, False)
    assert "sk-secret" not in caplog.text


@settings(max_examples=60)
@given(data=st.binary(max_size=200), in_head=st.booleans())
def test_any_bytes_get_an_answer_or_a_close(running, data, in_head):
    """Never a hang, and the server goes on."""
    start = request(running, "GET /token HTTP/1.1")[:-2] if in_head else b""
    exchange(running, start + data)

    assert running.get("/token") == {"isValid": True}


@settings(max_examples=60)
@given(
    parts=st.lists(
        st.sampled_from(
            [b"--b", b"--", b"\r\n", b"\n", b'Content-Disposition: form-data; name="file"; filename="a.jsonl"']
        )
        | st.binary(max_size=20),
        max_size=12,
    )
)
def test_any_form_gets_an_answer(running, parts):
    """Whatever its parts, an upload is taken or refused."""
    content_type = {"Content-Type": "multipart/form-data; boundary=b"}
    response = running.ask("POST", "/api/v1/batches", data=b"".join(parts), headers=content_type)

    assert response.status_code in (200, 400, 422)


@settings(max_examples=60)
@given(content=st.binary(max_size=100) | st.text(max_size=50).map(str.encode), name=st.text(max_size=20))
def test_any_file_in_a_proper_form_comes_whole(running, content, name):
    """The content is what the client put in, whatever bytes it has."""
    files = {"other": ("x", b"y"), "file": (name + ".jsonl", content)}
    prepared = requests.Request("POST", "http://host/", files=files).prepare()

    assert read_file(prepared.headers["Content-Type"], prepared.body) == content


def test_a_port_in_use_is_refused(api):
    """The error names the port."""
    port = int(api.server.url.rpartition(":")[2])

    with pytest.raises(ConfigurationError, match=f"port {port}"):
        LocalServer(port=port).start()


@pytest.mark.parametrize("settings", [{"workers": 0}, {"api_key": ""}, {"api_key": "a\nb"}])
def test_a_setting_of_no_use_is_refused(settings):
    """Before anything is opened."""
    with pytest.raises(ConfigurationError):
        LocalServer(**settings)


def test_closing_twice_is_fine_and_starting_again_too(api):
    """A closed server has no thread, and no address."""
    threads = threading.active_count()
    api.server.close()
    api.server.close()
    assert threading.active_count() <= threads - 16
    with pytest.raises(ConfigurationError, match="not started"):
        print(api.server.url)
    api.server.start()
    assert api.get("/token") == {"isValid": True}


def test_the_key_is_in_no_repr(api):
    """Only where it listens is."""
    assert repr(api.server) == f"<LocalServer {api.server.url}>"
