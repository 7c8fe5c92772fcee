"""Repeats: which requests are sent again, how often, and after what pause."""

import email.utils
import ssl
import threading
import time
import warnings

import pytest
from builders import task
from hypothesis import given
from hypothesis import strategies as st
from servers import DROP, Answer, CannedServer

from synthgen import SynthgenClient
from synthgen._retry import backoff_time, parse_retry_after
from synthgen.exceptions import (
    APIError,
    BatchUploadError,
    ConnectionFailedError,
    NotFoundError,
    RateLimitError,
    ServerError,
)

RETRIES = 2
BATCHES = {"total": 0, "batches": []}


def take_upload(request):
    """The answer to an upload that was taken."""
    return {"batch_id": request.query["batch_id"], "total_tasks": 1}


#: Method and path, with what a user calls to ask that.
GET = ("GET", "/api/v1/batches", lambda client: client.get_batches())
DELETE = ("DELETE", "/api/v1/tasks/t", lambda client: client.delete_task("t"))
POST = ("POST", "/api/v1/batches", lambda client: client.create_batch([task()]))

AWAY = [Answer(None, status) for status in (500, 502, 503, 504)] + [DROP, Answer(BATCHES, hold=threading.Event())]
BROKEN = [Answer(b"{"), Answer(b""), Answer("<html>"), Answer(BATCHES, cut_off=True)]
BROKEN += [Answer(chunks=[b'{"total": '], cut_off=True)]
REFUSED = [Answer(None, status) for status in (400, 401, 403, 404, 405, 408, 409, 413, 422, 501, 302)]


def named(value):
    """The name of an answer, or of a request, in the list of tests."""
    if value is DROP:
        return "drop"
    if isinstance(value, Answer):
        return "timeout" if value.hold else str(value.status) if value.status != 200 else repr(value.body or "chunks")
    return value[0]


@pytest.fixture
def assert_tried(server):
    """Asks a server that always answers the same, and expects an error after so many requests."""

    def ask_in_vain(count, asked, answer, **options):
        method, path, ask = asked
        server.answer(method, path, answer)
        options = {"retries": RETRIES, "backoff_factor": 0, "timeout": 0.05 if answer.hold else None, **options}
        with SynthgenClient(server.url, **options) as client, pytest.raises(APIError):
            ask(client)
        # An upload's other requests look whether it was taken.
        assert [request.method for request in server.wait_for_requests(count)].count(method) == count

    return ask_in_vain


@pytest.fixture
def pauses(monkeypatch):
    """The pauses between repeats, which take no time."""
    slept = []
    monkeypatch.setattr(time, "sleep", slept.append)
    return slept


# ---------------------------------------------------------------------------------------- how often


@pytest.mark.parametrize("answer", AWAY + [Answer(None, 429)], ids=named)
@pytest.mark.parametrize("asked", [GET, DELETE], ids=named)
def test_a_get_or_delete_is_repeated_while_the_server_is_away(assert_tried, asked, answer):
    """As often as was said, then the last answer is the error."""
    assert_tried(1 + RETRIES, asked, answer)


@pytest.mark.parametrize("answer", BROKEN, ids=named)
@pytest.mark.parametrize("asked", [GET, DELETE], ids=named)
def test_a_get_or_delete_is_repeated_when_its_answer_is_cut_short_or_no_json(assert_tried, asked, answer):
    """Though urllib3's own repeats end with the headers."""
    assert_tried(1 + RETRIES, asked, answer)


@pytest.mark.parametrize("answer", REFUSED + [Answer({"batches": 7})], ids=named)
@pytest.mark.parametrize("asked", [GET, POST], ids=named)
def test_what_was_refused_or_misunderstood_is_not_repeated(assert_tried, asked, answer):
    """It would be again."""
    assert_tried(1, asked, answer)


@pytest.mark.parametrize("answer", AWAY + BROKEN, ids=named)
def test_an_upload_that_may_have_been_taken_is_not_repeated(assert_tried, answer):
    """Its tasks would be run and paid for twice."""
    assert_tried(1, POST, answer)


def test_an_upload_that_was_not_taken_for_now_is_repeated(assert_tried):
    """A 429 says so."""
    assert_tried(1 + RETRIES, POST, Answer(None, 429))


@pytest.mark.parametrize("answer", AWAY + BROKEN + [Answer(None, 429)], ids=named)
def test_an_upload_to_a_server_that_deduplicates_is_repeated(assert_tried, answer):
    """As a GET is."""
    assert_tried(1 + RETRIES, POST, answer, idempotent_uploads=True)


@pytest.mark.parametrize("answer", REFUSED, ids=named)
def test_a_refusal_ends_an_upload_to_a_server_that_deduplicates_too(assert_tried, answer):
    """A plain one, by a status of 4xx."""
    assert_tried(1, POST, answer, idempotent_uploads=True)


@pytest.mark.parametrize("answer", AWAY + BROKEN + [Answer(None, 429, {"Retry-After": "0"})], ids=named)
@pytest.mark.parametrize("asked", [GET, DELETE, POST], ids=named)
def test_retries_0_means_none_anywhere(assert_tried, asked, answer):
    """Whatever is asked, and whatever fails."""
    assert_tried(1, asked, answer, retries=0, idempotent_uploads=True)


@pytest.mark.parametrize("asked", [GET, DELETE, POST], ids=named)
def test_a_refused_connection_is_tried_again(server, caplog, asked):
    """An upload, too: it was surely not taken."""
    server.close()

    with SynthgenClient(server.url, retries=RETRIES, backoff_factor=0) as client, pytest.raises(APIError):
        asked[2](client)

    assert len([record for record in caplog.records if "Retrying" in record.getMessage()]) == RETRIES


def test_a_refused_connection_is_not_tried_again_with_retries_0(server, caplog):
    """None anywhere."""
    server.close()

    with SynthgenClient(server.url, retries=0) as client, pytest.raises(ConnectionFailedError):
        client.get_batches()

    assert caplog.records == []


@pytest.mark.parametrize("answer", AWAY + BROKEN, ids=named)
def test_health_is_asked_for_once(server, answer):
    """Whoever asks wants to know how things are now."""
    server.answer("GET", "/health", answer)

    with SynthgenClient(server.url, timeout=0.05 if answer.hold else None) as client, pytest.raises(APIError):
        client.check_health()

    assert len(server.wait_for_requests(1)) == 1


def test_failures_of_several_kinds_are_survived_together(server):
    """Each counts as one."""
    server.answer("GET", "/api/v1/batches", DROP, Answer(None, 503), Answer(b"{"), Answer(None, 429), BATCHES)

    with SynthgenClient(server.url, retries=4, backoff_factor=0) as client:
        assert client.get_batches().total == 0

    assert len(server.requests) == 5


@pytest.mark.parametrize("answers", [[AWAY[1], BROKEN[0]], [BROKEN[3], AWAY[1]]], ids=["away first", "broken first"])
def test_failures_of_several_kinds_share_the_number_of_retries(server, answers):
    """Headers that are an error and a body that is none are the same to the user: another try."""
    server.answer("GET", "/api/v1/batches", *answers, *answers, *answers)
    with SynthgenClient(server.url, retries=RETRIES, backoff_factor=0) as client, pytest.raises(APIError):
        client.get_batches()

    assert len(server.requests) == 1 + RETRIES


def test_the_last_answer_is_the_error(server):
    """It says why, where urllib3's own error would not."""
    server.answer("GET", "/api/v1/batches", DROP, Answer(None, 502), Answer({"detail": "disk full"}, 503))

    with SynthgenClient(server.url, retries=2, backoff_factor=0) as client, pytest.raises(ServerError) as caught:
        client.get_batches()

    assert "disk full" in caught.value.message and caught.value.status_code == 503


# ----------------------------------------------------------------------------------------- deletions


@pytest.mark.parametrize("lost", [DROP, Answer(None, 504), Answer(b"{"), Answer(BATCHES, cut_off=True)], ids=named)
def test_a_delete_whose_answer_was_lost_and_that_then_finds_nothing_has_succeeded(server, lost):
    """The first try did it."""
    server.answer("DELETE", "/api/v1/tasks/t", lost, Answer(None, 404))

    with SynthgenClient(server.url, backoff_factor=0) as client:
        assert client.delete_task("t") is None

    assert len(server.requests) == 2


def test_a_delete_that_was_put_off_and_then_finds_nothing_is_an_error(server):
    """An answer of 429 says that it was not done."""
    server.answer("DELETE", "/api/v1/tasks/t", Answer(None, 429), Answer(None, 404))
    with SynthgenClient(server.url, backoff_factor=0) as client, pytest.raises(NotFoundError):
        client.delete_task("t")


def test_a_delete_that_finds_nothing_at_once_is_an_error(server):
    """There never was such a task."""
    server.answer("DELETE", "/api/v1/tasks/t", Answer(None, 404))

    with SynthgenClient(server.url) as client, pytest.raises(NotFoundError):
        client.delete_task("t")


# ------------------------------------------------------------------------------------------- pauses


@given(st.just(0) | st.floats(0.001, 1000), st.integers(0, 10_000))
def test_a_pause_doubles_up_to_two_minutes_less_up_to_a_half(factor, repeats):
    """None before the first repeat, and no overflow after thousands."""
    longest = 0 if repeats <= 1 else min(factor * 2.0 ** min(repeats - 1, 1000), 120)

    assert longest / 2 <= backoff_time(factor, repeats) <= longest


@pytest.mark.parametrize("answer", [Answer(None, 503), Answer(b"{")], ids=named)
def test_the_pauses_grow_and_are_no_two_alike(server, pauses, answer):
    """Clients that failed together do not come back together."""
    server.answer("GET", "/api/v1/batches", answer)

    for _ in range(2):
        with SynthgenClient(server.url, retries=4, backoff_factor=1) as client, pytest.raises(APIError):
            client.get_batches()

    slept = [pause for pause in pauses if pause]
    for pause, longest in zip(slept, [2, 4, 8] * 2):
        assert longest / 2 <= pause <= longest
    assert len(slept) == len(set(slept)) == 6


@pytest.mark.parametrize("asked, answer", [(GET, BATCHES), (POST, take_upload)], ids=["GET", "POST"])
@pytest.mark.parametrize("header, pause", [("7", 7), ("1.5", 1.5), ("60", 60)])
def test_the_server_says_how_long_to_wait(server, pauses, asked, answer, header, pause):
    """In seconds, whole or not."""
    server.answer(*asked[:2], Answer(None, 429, {"Retry-After": header}), answer)

    with SynthgenClient(server.url) as client:
        asked[2](client)

    assert pauses == [pause]


def test_the_server_says_until_when_to_wait(server, pauses):
    """As a date, in whole seconds."""
    until = email.utils.formatdate(time.time() + 40, usegmt=True)
    server.answer("GET", "/api/v1/batches", Answer(None, 503, {"Retry-After": until}), BATCHES)

    with SynthgenClient(server.url) as client:
        client.get_batches()

    assert 0 < pauses[0] <= 40


@pytest.mark.parametrize(
    "header", ["soon", "", "-7", "nan", "1.5.1", "Mon, 31 Feb 2026", "Sun, 06 Nov 1994 08:49:37 GMT"]
)
def test_a_wait_that_is_none_is_passed_over(server, pauses, header):
    """Malformed, negative or past: the pause is ours."""
    server.answer("GET", "/api/v1/batches", Answer(None, 429, {"Retry-After": header}), BATCHES)

    with SynthgenClient(server.url) as client:
        assert client.get_batches().total == 0

    assert pauses == []


@pytest.mark.parametrize("header", ["61", "3600.5", "1e999", "Fri, 31 Dec 2100 23:59:59 GMT"])
@pytest.mark.parametrize("asked", [GET, POST], ids=named)
def test_asked_to_wait_for_long_the_client_raises_at_once(server, pauses, asked, header):
    """And says how long it would have been."""
    server.answer(*asked[:2], Answer(None, 429, {"Retry-After": header}))

    with SynthgenClient(server.url) as client, pytest.raises(APIError) as caught:
        asked[2](client)

    error = caught.value if asked is GET else caught.value.__cause__
    assert isinstance(error, RateLimitError) and error.retry_after > 60
    assert pauses == [] and len(server.requests) == 1


@given(st.text() | st.text("0123456789 .:,+-GMTSunNov\t\x0b\x1c"))
def test_any_retry_after_is_a_number_of_seconds(text):
    """Never a crash, and never negative."""
    assert parse_retry_after(text) >= 0


@pytest.mark.parametrize("text", ["-Apr-3 a b", "Mon, 01 Jan 2020 1.2.3.4 GMT"])
def test_a_retry_after_that_an_old_python_cant_read_is_none(text):
    """Its ``email.utils`` raises IndexError, or UnboundLocalError."""
    assert parse_retry_after(text) == 0


# ---------------------------------------------------------------------------------------------- TLS


@pytest.fixture
def tls_server(monkeypatch, tmp_path):
    """Starts a server with a certificate for these names, whose issuer is trusted, or is not."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of cryptography, on an old Python
        import trustme
    servers = []

    def start(*names, trusted):
        authority = trustme.CA()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert(*names).configure_cert(context)
        if trusted:
            authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
            monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "ca.pem"))
        servers.append(CannedServer(context))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def test_a_trusted_certificate_is_accepted(tls_server):
    """From the environment's file of authorities."""
    server = tls_server("127.0.0.1", trusted=True)
    server.answer("GET", "/api/v1/batches", BATCHES)

    with SynthgenClient(server.url) as client:
        assert client.get_batches().total == 0


@pytest.mark.parametrize("name, trusted", [("127.0.0.1", False), ("other.test", True)], ids=["issuer", "name"])
@pytest.mark.parametrize("idempotent", [False, True])
def test_a_certificate_that_is_refused_stays_so(tls_server, caplog, name, trusted, idempotent):
    """Nothing is repeated, and an upload was surely not taken."""
    server = tls_server(name, trusted=trusted)
    options = {"backoff_factor": 0, "idempotent_uploads": idempotent}

    with SynthgenClient(server.url, **options) as client, pytest.raises(ConnectionFailedError, match="TLS failed"):
        client.get_batches()
    with SynthgenClient(server.url, **options) as client, pytest.raises(BatchUploadError) as caught:
        client.create_batch([task()])

    assert server.requests == [] and "Retrying" not in caplog.text
    if not idempotent:
        assert caught.value.unconfirmed == [] and caught.value.remaining == [task()]


@pytest.mark.parametrize(
    "asked, count", [(GET, 1 + RETRIES), (DELETE, 1 + RETRIES), (POST, 1)], ids=["GET", "DELETE", "POST"]
)
def test_tls_that_fails_in_the_answer_is_like_a_dropped_connection(tls_server, asked, count):
    """Urllib3 alone would send an upload again."""
    server = tls_server("127.0.0.1", trusted=True)
    server.answer(*asked[:2], lambda request: server.hang_up(b"this is no TLS record"))

    with SynthgenClient(server.url, retries=RETRIES, backoff_factor=0) as client, pytest.raises(APIError, match="TLS"):
        asked[2](client)

    assert [request.method for request in server.requests].count(asked[0]) == count
