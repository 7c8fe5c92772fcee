"""Requests: what is sent, and the error that each kind of answer becomes. For repeats see test_retries.py."""

import gzip
import logging
import pickle
import ssl
import threading
import traceback

import pytest
import requests
from builders import batch, framework_task, task
from servers import DROP, Answer

import synthgen
from synthgen import SynthgenClient, Task
from synthgen.exceptions import (
    APIError,
    AuthenticationError,
    BatchUploadError,
    ConnectionFailedError,
    InvalidRequestError,
    InvalidResponseError,
    NotFoundError,
    RateLimitError,
    ServerError,
)

KEY = "sk-never-to-be-seen"
BATCHES = {"total": 0, "batches": []}


@pytest.fixture
def client(server):
    """Repeats nothing: each answer is seen."""
    with SynthgenClient(server.url, KEY, retries=0) as opened:
        yield opened


# ------------------------------------------------------------------------------------- what is sent


def test_a_request_carries_the_key_and_says_who_asks(server, client):
    """As a bearer token, with the version of this package."""
    server.answer("GET", "/api/v1/batches", BATCHES)

    client.get_batches()

    headers = server.requests[0].headers
    assert headers["Authorization"] == f"Bearer {KEY}"
    assert headers["User-Agent"] == f"synthgen-client/{synthgen.__version__}"


def test_without_a_key_no_authorization_is_sent(server):
    """Not even an empty one."""
    server.answer("GET", "/api/v1/batches", BATCHES)

    with SynthgenClient(server.url) as client:
        client.get_batches()

    assert "Authorization" not in server.requests[0].headers


def test_a_netrc_file_does_not_replace_the_key(server, client, monkeypatch, tmp_path):
    """Requests would prefer it to a header."""
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login someone password else")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    server.answer("GET", "/api/v1/batches", BATCHES)

    client.get_batches()

    assert server.requests[0].headers["Authorization"] == f"Bearer {KEY}"


def test_a_base_url_with_a_path_prefix_is_kept_whole(server):
    """For a server behind a proxy that serves others too."""
    server.answer("GET", "/team/synthgen/api/v1/batches", BATCHES)

    with SynthgenClient(server.url + "/team/synthgen/") as client:
        assert client.get_batches().total == 0


@pytest.mark.parametrize(
    "identifier, path",
    [
        ("a b", "a%20b"),
        ("a/b", "a%2Fb"),
        ("a?b#c", "a%3Fb%23c"),
        ("50%", "50%25"),
        ("%2e%2e", "%252e%252e"),
        ("../up", "..%2Fup"),
        ("é☃", "%C3%A9%E2%98%83"),
        ("...", "..."),
        ("\r\nX: y", "%0D%0AX%3A%20y"),
    ],
)
def test_an_id_goes_into_the_path_whole(server, client, identifier, path):
    """Percent-encoded, so that it reaches no other resource."""
    server.answer("DELETE", f"/api/v1/tasks/{path}", Answer(status=204))

    client.delete_task(identifier)

    assert server.requests[0].path == f"/api/v1/tasks/{path}"


@pytest.mark.parametrize("identifier", ["", ".", "..", None, 7, "\ud800"])
@pytest.mark.parametrize(
    "method",
    ["get_batch", "delete_batch", "iter_batch_tasks", "get_batch_tasks", "get_batch_stats", "get_task", "delete_task"],
)
def test_an_id_that_is_none_is_refused_when_the_method_is_called(server, client, method, identifier):
    """Dots would reach another resource, however they are encoded; nothing is asked."""
    with pytest.raises(ValueError):
        getattr(client, method)(identifier)

    assert server.requests == []


@pytest.mark.parametrize("interval", ["1h", synthgen.CalendarInterval.HOUR_SHORT])
def test_an_interval_may_be_text_too(server, client, interval):
    """It is sent as the API names it."""
    server.answer("GET", "/api/v1/batches/b/stats", {"summary": {}, "time_series": []})

    client.get_batch_stats("b", "7d", interval)

    assert server.requests[0].query == {"time_range": "7d", "interval": "1h"}


# ---------------------------------------------------------------------------------- what an answer means


@pytest.mark.parametrize(
    "status, kind",
    [
        (400, InvalidRequestError),
        (401, AuthenticationError),
        (403, AuthenticationError),
        (404, NotFoundError),
        (405, InvalidRequestError),
        (413, InvalidRequestError),
        (422, InvalidRequestError),
        (429, RateLimitError),
        (500, ServerError),
        (502, ServerError),
        (503, ServerError),
        (504, ServerError),
        (599, ServerError),
    ],
)
def test_each_status_is_an_error_of_its_kind(server, client, status, kind):
    """With the status, the server's words, and what was asked."""
    server.answer("GET", "/api/v1/batches", Answer({"detail": "the reason why"}, status))

    with pytest.raises(APIError) as caught:
        client.get_batches()

    assert type(caught.value) is kind
    assert caught.value.message == f"GET {server.url}/api/v1/batches: {status}, the reason why"
    assert caught.value.status_code == caught.value.response.status_code == status


def test_a_list_of_details_is_put_into_words(server, client):
    """FastAPI's way to say what is wrong with a request."""
    detail = [{"type": "missing", "loc": ["body", "file"], "msg": "Field required", "input": None}, "and more"]
    server.answer("GET", "/api/v1/batches", Answer({"detail": detail}, 422))

    with pytest.raises(InvalidRequestError, match="422, body.file: Field required; and more"):
        client.get_batches()


def test_a_long_list_of_details_is_cut(server, client):
    """Each line of an upload may have one."""
    detail = [{"loc": ["body", str(line)], "msg": "wrong"} for line in range(300)]
    server.answer("GET", "/api/v1/batches", Answer({"detail": detail}, 422))

    with pytest.raises(InvalidRequestError, match="body.4: wrong; and 295 more$"):
        client.get_batches()


def test_an_error_page_is_called_one(server, client):
    """Its text is in the response, not in the message."""
    server.answer("GET", "/api/v1/batches", Answer("<html><h1>Bad Gateway</h1></html>", 502))

    with pytest.raises(ServerError, match="502, with a web page: is there a proxy in between") as caught:
        client.get_batches()

    assert caught.value.response.text == "<html><h1>Bad Gateway</h1></html>"


def test_a_web_page_with_status_200_is_no_answer_of_this_api(server, client):
    """The base URL is likely another server's."""
    server.answer("GET", "/api/v1/batches", "<!doctype html><title>Welcome to nginx!</title>")

    with pytest.raises(InvalidResponseError, match="a web page: is the base URL that of a Synthgen server") as caught:
        client.get_batches()

    assert caught.value.status_code == 200 and "nginx" in caught.value.response.text


@pytest.mark.parametrize(
    "body", [b"", b"{", b'{"total": 1', b"\xff", b"[" * 100_000], ids=["empty", "open", "cut", "binary", "deep"]
)
def test_what_is_no_json_is_no_answer_of_this_api(server, client, body):
    """However it fails to be JSON."""
    server.answer("GET", "/api/v1/batches", Answer(body))

    with pytest.raises(InvalidResponseError, match="200, but no JSON"):
        client.get_batches()


@pytest.mark.parametrize("answer", [[], "text", 7, None, {"batches": [{"batch_id": 7}]}])
def test_json_of_another_shape_is_no_answer_of_this_api(server, client, answer):
    """Pydantic's own error stays behind ours."""
    server.answer("GET", "/api/v1/batches", answer)

    with pytest.raises(InvalidResponseError, match=f"GET {server.url}/api/v1/batches: "):
        client.get_batches()


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("method, ask", [("GET", "get_batch"), ("DELETE", "delete_batch")])
def test_a_redirect_is_not_followed(server, client, status, method, ask):
    """The error names where it leads to: a key is not carried there."""
    server.answer(method, "/api/v1/batches/b", Answer(None, status, {"Location": f"{server.url}/elsewhere"}))

    with pytest.raises(InvalidResponseError, match=f"{status}, redirects to {server.url}/elsewhere") as caught:
        getattr(client, ask)("b")

    assert len(server.requests) == 1
    assert caught.value.status_code == status


@pytest.mark.parametrize("location", ["http://[bad", "/caf\xe9"])
def test_a_redirect_to_a_malformed_url_is_no_answer_either(server, client, location):
    """requests parses it all the same."""
    server.answer("GET", "/api/v1/batches", Answer(None, 302, {"Location": location}))

    with pytest.raises(InvalidResponseError, match="malformed URL"):
        client.get_batches()


@pytest.mark.parametrize("method", ["get_batch", "get_task"])
def test_null_is_not_found(server, client, method):
    """The framework says so with status 200; the error has the status that it should have had."""
    server.answer("GET", "/api/v1/batches/x-404", None)
    server.answer("GET", "/api/v1/tasks/x-404", None)

    with pytest.raises(NotFoundError, match="x-404") as caught:
        getattr(client, method)("x-404")

    assert caught.value.status_code == 404


def test_a_wrong_key_gives_the_servers_words(server, client):
    """And does not go on about keys that were not given."""
    server.answer("GET", "/api/v1/batches", Answer({"detail": "Invalid authentication credentials"}, 401))

    with pytest.raises(AuthenticationError, match="401, Invalid authentication credentials$"):
        client.get_batches()


def test_a_missing_key_is_told_where_to_go(server):
    """The argument, the variable, and the file."""
    server.answer("GET", "/api/v1/batches", Answer({"detail": "Not authenticated"}, 401))

    with SynthgenClient(server.url) as client, pytest.raises(AuthenticationError) as caught:
        client.get_batches()

    for place in ("Not authenticated", "api_key=", "SYNTHGEN_API_KEY", "config file"):
        assert place in caught.value.message


@pytest.mark.parametrize("header, seconds", [("7", 7), ("0.5", 0.5), ("soon", 0), (None, None)])
def test_a_rate_limit_says_how_long_to_wait(server, client, header, seconds):
    """As far as the server did."""
    server.answer("GET", "/api/v1/batches", Answer(None, 429, header and {"Retry-After": header}))

    with pytest.raises(RateLimitError) as caught:
        client.get_batches()

    assert caught.value.retry_after == seconds


# ----------------------------------------------------------------------------------- when none comes


def test_a_server_that_is_not_there_is_said_to_be_so(server, client):
    """With what can be done about it."""
    server.close()

    with pytest.raises(ConnectionFailedError, match="no connection: .*refused.*Is a server running there") as caught:
        client.get_batches()

    assert f"GET {server.url}/api/v1/batches" in caught.value.message and "urllib3" not in caught.value.message
    assert caught.value.status_code is None and caught.value.response is None


def test_a_host_that_can_not_be_is_an_error_of_ours(client):
    """A label of a host name may not be empty."""
    with SynthgenClient("http://server..test", retries=0) as client, pytest.raises(ConnectionFailedError):
        client.get_batches()


@pytest.mark.parametrize(
    "proxy",
    [
        "http://user:sk-secret@proxy.test:port",
        "http://user:sk-secret@:80",
        "http://user:sk-secret/x@proxy.test",
        "http://user:x sk-secret@proxy.test:port",
        "http://user:sk-secret#x@proxy.test",
        "user:sk-secret@proxy.test:port",
    ],
)
def test_a_malformed_proxy_is_said_to_be_so_without_its_password(server, client, monkeypatch, proxy):
    """The environment's, which urllib3 repeats whole; a password that was not percent-encoded is a common reason."""
    monkeypatch.setenv("HTTP_PROXY", proxy)

    with pytest.raises(ConnectionFailedError, match="a proxy to it .*is malformed") as caught:
        client.get_batches()

    assert "secret" not in caught.value.message
    assert server.requests == []


@pytest.mark.parametrize("retries", [0, 1])
def test_a_timeout_says_how_long_it_was_and_that_the_work_may_go_on(server, retries):
    """Also when it was the last of several."""
    server.answer("GET", "/api/v1/batches", Answer(BATCHES, hold=threading.Event()))

    with SynthgenClient(server.url, timeout=0.05, retries=retries, backoff_factor=0) as client:
        with pytest.raises(ConnectionFailedError, match=r"no answer within 0\.05 s\. What was asked for may go on"):
            client.get_batches()


def test_a_dropped_connection_is_said_to_be_so(server, client):
    """No answer is not the same as no server."""
    server.answer("GET", "/api/v1/batches", DROP)

    with pytest.raises(ConnectionFailedError, match="no answer: Remote end closed connection"):
        client.get_batches()


@pytest.mark.parametrize(
    "answer", [Answer(BATCHES, cut_off=True), Answer(chunks=[b'{"total": '], cut_off=True)], ids=["length", "chunks"]
)
def test_an_answer_cut_short_is_said_to_be_so(server, client, answer):
    """Also by urllib3 1.26, which takes half a body for the whole; and whatever the caller is handling meanwhile."""
    server.answer("GET", "/api/v1/batches", answer)

    try:
        raise OSError("something else")
    except OSError:
        with pytest.raises(ConnectionFailedError, match="the answer broke off") as caught:
            client.get_batches()

    assert "something else" not in caught.value.message


def test_an_error_whose_body_breaks_off_is_that_error_still(server, client):
    """The status says enough."""
    server.answer("GET", "/api/v1/batches", Answer({"detail": "x" * 1000}, 500, cut_off=True))

    with pytest.raises(ServerError):
        client.get_batches()


# ------------------------------------------------------------------------------- the answer in an error


def caught_from(server, client, answer):
    """The error for this answer."""
    server.answer("GET", "/api/v1/batches", answer)
    with pytest.raises(APIError) as caught:
        client.get_batches()
    return caught.value


def test_the_response_of_an_error_is_true(server, client):
    """A ``requests.Response`` would be false."""
    response = caught_from(server, client, Answer({"detail": "no"}, 400)).response

    assert response
    assert (response.url, response.headers["Content-Type"]) == (f"{server.url}/api/v1/batches", "application/json")
    assert response.json() == {"detail": "no"}


@pytest.mark.parametrize("status", [200, 500])
@pytest.mark.parametrize("encode", [bytes, gzip.compress], ids=["plain", "gzip"])
def test_the_text_of_a_response_is_cut_at_64_kib(server, client, encode, status):
    """Also of one that was compressed to less."""
    headers = {"Content-Encoding": "gzip"} if encode is gzip.compress else {}
    error = caught_from(server, client, Answer(encode(b"<" * 1_000_000), status, headers))

    assert 0 < len(error.response.text) <= 64 * 1024


def test_an_error_pickles_without_keys(server):
    """Neither our key, nor a provider's in the tasks that were not sent."""
    server.answer("POST", "/api/v1/batches", Answer({"detail": "no"}, 400))

    with SynthgenClient(server.url, KEY) as client, pytest.raises(BatchUploadError) as caught:
        client.create_batch([task(api_key=KEY)])

    pickled = pickle.dumps(caught.value)
    assert KEY.encode() not in pickled
    assert pickle.loads(pickled).response.json() == {"detail": "no"}


def test_a_page_that_repeats_the_key_shows_it_nowhere(server, client):
    """Not in the message, the response, or a traceback."""
    error = caught_from(server, client, Answer({"detail": f"sent: Bearer {KEY}"}, 400))

    shown = "".join(traceback.format_exception(type(error), error, error.__traceback__)) + error.response.text
    assert "sent: Bearer" in shown and KEY not in shown


@pytest.mark.parametrize("answer", [BATCHES, DROP, Answer("<html>", 500), Answer(BATCHES, cut_off=True)])
def test_no_log_holds_a_key(server, client, caplog, answer):
    """Ours or urllib3's, at DEBUG; ours says what was asked, and what came."""
    server.answer("GET", "/api/v1/batches", answer)
    server.answer("POST", "/api/v1/batches", answer)

    with caplog.at_level(logging.DEBUG):
        for ask in (client.get_batches, lambda: client.create_batch([task(api_key=KEY)])):
            try:
                ask()
            except APIError as exc:
                logging.getLogger("test").exception("caught %r", exc)

    assert "/api/v1/batches" in caplog.text and KEY not in caplog.text


# ------------------------------------------------------------------------------------------- sessions


def test_a_session_of_your_own_is_left_as_it_was(server):
    """Not closed, nothing mounted, nothing set."""
    server.answer("GET", "/api/v1/batches", BATCHES)
    closed = []

    class Session(requests.Session):
        def close(self):
            closed.append(self)
            super().close()

    def state(session):
        return {name: repr(value) for name, value in vars(session).items()}

    with Session() as session:
        before = state(session)
        with SynthgenClient(server.url, KEY, session=session) as client:
            client.get_batches()
        assert state(session) == before and closed == []


def test_a_session_of_your_own_may_raise_for_a_status(server):
    """By a hook, as many do: the error is the one that the status stands for."""
    server.answer("GET", "/api/v1/batches", Answer({"detail": "no"}, 401))
    with requests.Session() as session:
        session.hooks["response"] = lambda response, **options: response.raise_for_status()
        with pytest.raises(AuthenticationError, match="401, no"):
            SynthgenClient(server.url, session=session).get_batches()


def test_a_session_of_your_own_may_say_what_it_usually_sends(server):
    """An upload is a form nevertheless."""
    server.answer("POST", "/api/v1/batches", lambda request: {**request.query, "total_tasks": len(request.lines)})
    with requests.Session() as session:
        session.headers["Content-Type"] = "application/json"
        created = SynthgenClient(server.url, session=session).create_batch([Task(url="http://p.test", body={})])

    assert created.total_tasks == 1


def test_a_session_of_your_own_keeps_its_authorization_where_there_is_no_key(server):
    """As for a proxy that asks for a password."""
    server.answer("GET", "/api/v1/batches", BATCHES)
    with requests.Session() as session:
        session.auth = ("me", "secret")
        SynthgenClient(server.url, session=session).get_batches()
        SynthgenClient(server.url, KEY, session=session).get_batches()

    sent = [request.headers["Authorization"] for request in server.requests]
    assert sent == ["Basic bWU6c2VjcmV0", f"Bearer {KEY}"]


def test_the_certificates_of_a_session_win_over_the_environment(monkeypatch):
    """Requests would take REQUESTS_CA_BUNDLE, and fail on it."""
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", "/nowhere")
    asked = []

    class Recorder(requests.adapters.HTTPAdapter):
        def send(self, request, **options):
            asked.append(options["verify"])
            raise requests.ConnectionError(ssl.SSLError("stop here"))

    with requests.Session() as session:
        session.mount("https://", Recorder())
        session.verify = "/my/own/ca.pem"
        with pytest.raises(ConnectionFailedError):
            SynthgenClient("https://server.test", session=session).get_batches()

    assert asked == ["/my/own/ca.pem"]


def test_cookies_are_refused(server, client):
    """No request depends on an earlier one."""
    server.answer("GET", "/api/v1/batches", Answer(BATCHES, headers={"Set-Cookie": "session=1; Path=/"}))

    client.get_batches()
    client.get_batches()

    assert "Cookie" not in server.requests[1].headers


def test_a_client_may_be_closed_twice(server):
    """By ``with``, and by hand."""
    server.answer("GET", "/api/v1/batches", BATCHES)

    with SynthgenClient(server.url) as client:
        client.get_batches()
        client.close()
    client.close()


def test_threads_share_a_client(server, client):
    """Every answer goes to the thread that asked."""
    for number in range(20):
        server.answer("GET", f"/api/v1/tasks/{number}", framework_task(number))
    wrong = []

    def ask(number):
        for _ in range(5):
            if client.get_task(str(number)).message_id != str(number):
                wrong.append(number)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert wrong == [] and len(server.requests) == 100


# --------------------------------------------------------------------------------------------- health


HEALTHY = {"status": "healthy", "services": {"rabbitmq": "healthy"}, "error": None}


def test_an_unhealthy_server_is_an_answer(server, client):
    """Though its status is 503."""
    server.answer("GET", "/health", Answer({"detail": {**HEALTHY, "status": "unhealthy"}}, 503))

    assert client.check_health().status == synthgen.HealthStatus.UNHEALTHY


@pytest.mark.parametrize("answer", ["<html>", {"detail": "no server"}, {"detail": None}, [], {}])
def test_a_503_of_a_proxy_is_an_error(server, client, answer):
    """It tells nothing of the server's health."""
    server.answer("GET", "/health", Answer(answer, 503))

    with pytest.raises(ServerError):
        client.check_health()


def test_unknown_fields_and_statuses_are_taken(server, client):
    """A newer server does not break an older client."""
    server.answer("GET", "/api/v1/batches/b", {**batch(1), "batch_status": "PAUSED", "new": 1})

    received = client.get_batch("b")

    assert (received.batch_status, received.new) == ("PAUSED", 1)
