"""Keys stay where they belong: ours in the header to our server, a provider's in the upload, and neither elsewhere."""

import html
import json
import logging
import pickle
import traceback
from urllib.parse import unquote

import pytest
from builders import task
from framework import echo
from hypothesis import given
from hypothesis import strategies as st
from servers import DROP, Answer, CannedServer

from synthgen import SynthgenClient
from synthgen.exceptions import (
    APIError,
    BatchIncompleteError,
    BatchStalledError,
    BatchTimeoutError,
    BatchUploadError,
    InvalidResponseError,
    SynthgenError,
)
from synthgen.local import LocalServer

#: Enough of both keys to know them by, however they were quoted.
SENTINEL = "never-seen"
OURS = f"ours-{SENTINEL}"
PROVIDERS = f"sk-{SENTINEL}"
TASKS = [task(str(number), api_key=PROVIDERS) for number in range(3)]


def telling_all(request):
    """What a server in debug mode, or a proxy's error page, may repeat: the whole request."""
    lines = [f"{name}: {value}" for name, value in request.headers.items()]
    return "\n".join([*lines, request.body.decode("utf-8")])


def page(status):
    return lambda request: Answer("<html><pre>" + telling_all(request), status, {"X-Asked": telling_header(request)})


def words(status):
    return lambda request: Answer({"detail": telling_all(request)}, status, {"Retry-After": "0"})


def values(status):
    detail = [{"type": "t", "loc": ["body", "file"], "msg": "no"}]
    return lambda request: Answer({"detail": [dict(detail[0], input=telling_all(request))]}, status)


def other_shape(request):
    return Answer({"headers": dict(request.headers), "data": telling_all(request), "total": telling_all(request)})


def redirect(request):
    return Answer("", 307, {"Location": "http://elsewhere.test/?was=" + telling_header(request)})


def telling_header(request):
    return request.headers.get("Authorization", "")


ANSWERS = {
    "401 page": page(401),
    "403 words": words(403),
    "404 words": words(404),
    "413 page": page(413),
    "422 values": values(422),
    "429 words": words(429),
    "500 words": words(500),
    "502 page": page(502),
    "200 page": page(200),
    "200 other shape": other_shape,
    "200 bytes": lambda request: Answer(request.body + telling_all(request).encode("utf-8")),
    "307": redirect,
    "cut off": lambda request: Answer(telling_all(request), cut_off=True),
    "dropped": DROP,
}

CALLS = {
    "get_batches": lambda client: client.get_batches(),
    "get_task": lambda client: client.get_task("m-1"),
    "delete_batch": lambda client: client.delete_batch("b"),
    "export": lambda client: client.get_batch_tasks("b"),
    "create_batch": lambda client: client.create_batch(TASKS, batch_id="b"),
    "create_batch of an iterator": lambda client: client.create_batch(iter(TASKS), batch_id="b"),
    "monitor_batch": lambda client: client.monitor_batch(TASKS, show_progress=False),
}
PATHS = ["/api/v1/batches", "/api/v1/batches/b", "/api/v1/batches/b/tasks/export", "/api/v1/tasks/m-1"]


@pytest.fixture
def client(server, monkeypatch):
    monkeypatch.setattr("synthgen._read_back._UNSEEN_AFTER", 0.01)
    monkeypatch.setattr("synthgen._read_back.SETTLED_AFTER", 0.01)
    with SynthgenClient(server.url, OURS, retries=1, backoff_factor=0) as opened:
        yield opened


def all_that_is_shown(error):
    """Whatever a user may print, log or store of an error."""
    yield str(error)
    yield repr(error)
    yield "".join(traceback.format_exception(type(error), error, error.__traceback__))
    yield repr(vars(error))
    response = getattr(error, "response", None)
    if response is not None:
        yield from (response.text, repr(dict(response.headers)), response.url, repr(response))
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        yield pickle.dumps(error, protocol).decode("latin-1")


def assert_unseen(*texts):
    for text in texts:
        assert SENTINEL not in text


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("answer", ANSWERS.values(), ids=ANSWERS)
def test_no_error_and_no_log_shows_a_key(server, client, caplog, answer, call):
    """Though the answer repeats the whole request, headers and all."""
    for path in PATHS:
        for method in ("GET", "POST", "DELETE"):
            server.answer(method, path, answer)
    server.answer("GET", "/health", {"status": "healthy"})
    with caplog.at_level(logging.DEBUG):
        try:
            call(client)
        except APIError as exc:
            logging.getLogger("a user's").exception("failed: %r", exc)
            assert_unseen(*all_that_is_shown(exc))

    assert "DEBUG" in caplog.text
    assert_unseen(caplog.text)
    assert SENTINEL in telling_all(server.requests[-1])


@pytest.mark.parametrize(
    "quoted",
    [
        json.dumps,
        repr,
        lambda value: json.dumps(json.dumps(value)),
        lambda value: json.dumps(value).replace('"', "\\u0022"),
        lambda value: html.escape(json.dumps(value)),
        lambda value: html.escape(repr(value)),
        lambda value: json.dumps(value).replace('"', "&#34;"),
        lambda value: json.dumps(value).replace(":", " :"),
        lambda value: json.dumps({**value, "api_key": "sk-/'&" + PROVIDERS}).replace("/", "\\/"),
    ],
    ids=["JSON", "Python", "JSON in JSON", "escaped", "HTML", "Python in HTML", "markupsafe", "spaced", "odd key"],
)
def test_an_error_that_repeats_a_task_shows_no_key_however_it_is_quoted(server, client, quoted):
    """Only its provider's key tells where that is: the client does not know which of many it may be."""
    server.answer("GET", "/api/v1/batches", Answer("<html>" + quoted({"url": "u", "api_key": PROVIDERS}), 400))

    with pytest.raises(APIError) as caught:
        client.get_batches()

    assert_unseen(*all_that_is_shown(caught.value))
    assert "[API key]" in caught.value.response.text


@pytest.mark.parametrize(
    "error",
    [
        BatchUploadError("m", unconfirmed=TASKS, remaining=TASKS),
        BatchIncompleteError("m", missing=TASKS),
        BatchTimeoutError("m"),
        BatchStalledError("m"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_that_holds_tasks_shows_no_key(error):
    """The tasks have their keys still, to be submitted again; their pickles do not."""
    assert_unseen(*all_that_is_shown(error))


def test_a_client_shows_no_key(client):
    """Nor does it go into a pickle, and so into a file or a queue."""
    assert_unseen(repr(client), str(client))
    with pytest.raises(TypeError, match="in each process"):
        pickle.dumps(client)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_no_key_goes_to_another_host(server, client, status):
    """A redirect is an error, and nothing is sent to where it points."""
    with CannedServer() as elsewhere:
        for path in PATHS:
            for method in ("GET", "POST", "DELETE"):
                server.answer(method, path, Answer("", status, {"Location": elsewhere.url + path}))
        server.answer("GET", "/health", {"status": "healthy"})
        for call in CALLS.values():
            with pytest.raises(SynthgenError) as caught:
                call(client)
            assert isinstance(caught.value.__cause__ or caught.value, InvalidResponseError)

        assert not elsewhere.requests


def test_a_netrc_file_replaces_the_key_in_no_request(monkeypatch, tmp_path, server):
    """From the health check to the export."""
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login me password other\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    with CannedServer() as provider, LocalServer(api_key=OURS) as local, local.client() as client:
        provider.answer("POST", "/v1", completion)

        results = client.monitor_batch(tasks_for(provider), show_progress=False)

    assert all(result.ok for result in results)
    assert {request.headers["Authorization"] for request in provider.requests} == {f"Bearer {PROVIDERS}"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "call, prefix",
    [
        (SynthgenClient.get_batch, "/api/v1/batches/"),
        (SynthgenClient.delete_batch, "/api/v1/batches/"),
        (SynthgenClient.get_task, "/api/v1/tasks/"),
    ],
    ids=["get_batch", "delete_batch", "get_task"],
)
def test_an_id_never_reaches_another_resource(call, prefix):
    """Whatever is in it, it is one segment of the path, and comes out as it went in."""
    with CannedServer() as server, SynthgenClient(server.url, OURS, retries=0) as client:

        @given(st.text())
        def check(identifier):
            before = len(server.requests)
            try:
                call(client, identifier)
            except ValueError:
                assert identifier in ("", ".", "..") and len(server.requests) == before
            except APIError:
                path = server.requests[-1].path
                assert path.startswith(prefix) and unquote(path[len(prefix) :]) == identifier
                assert not set(path[len(prefix) :]) & set("/?#")

        check()


# With the embedded server.


def completion(request):
    return echo({"body": {"messages": [{"content": "hello"}]}})


def tasks_for(provider):
    return [task(str(number), url=provider.url + "/v1", api_key=PROVIDERS) for number in range(20)]


def test_after_a_batch_no_key_is_left_anywhere(tmp_path, caplog, capfd):
    """Not in results, their pickles, logs, on the screen, or in any of the database's files."""
    database = tmp_path / "tasks.db"
    failing = lambda request: Answer({"error": {"message": telling_all(request)}}, 400)  # noqa: E731
    with caplog.at_level(logging.DEBUG), CannedServer() as provider, LocalServer(database, api_key=OURS) as local:
        provider.answer("POST", "/v1", failing, completion)
        with local.client() as client:
            results = client.monitor_batch(tasks_for(provider))
            assert sum(not result.ok for result in results) == 1
            assert_unseen(repr(local), repr(results), pickle.dumps(results).decode("latin-1"))
            files = {path.name: path.read_bytes().decode("latin-1") for path in tmp_path.iterdir()}
            client.delete_batch(results[0].batch_id)

    assert {"tasks.db", "tasks.db-wal", "tasks.db-shm"} <= set(files)
    assert_unseen(caplog.text, *capfd.readouterr(), *files.values())
    assert len({request.headers["Authorization"] for request in provider.requests}) == 1
