"""The recorded answers of the real server: each gives the right model, or the right error, through the client.

``wire/README.md`` says how they were recorded. A recording that no test names fails the suite.
"""

import json
import re
from datetime import datetime, timezone
from enum import Enum
from pathlib import Path
from urllib.parse import unquote

import pytest
from pydantic import BaseModel
from servers import WIRE, Answer

from synthgen import SynthgenClient
from synthgen.exceptions import (
    AuthenticationError,
    BatchUploadError,
    ConnectionFailedError,
    InvalidRequestError,
    InvalidResponseError,
    NotFoundError,
    ServerError,
)
from synthgen.models import Task, TaskResponse

TASK = Task(url="http://provider.test/v1/chat/completions", body={})

#: What a client's user calls to ask what was asked in a recording.
CALLS = [
    (r"GET /health", lambda client, params: client.check_health()),
    (r"GET /api/v1/batches", lambda client, params: client.get_batches()),
    (r"GET /api/v1/batches/([^/]+)", lambda client, params, batch_id: client.get_batch(batch_id)),
    (r"DELETE /api/v1/batches/([^/]+)", lambda client, params, batch_id: client.delete_batch(batch_id)),
    (
        r"GET /api/v1/batches/([^/]+)/tasks/export",
        lambda client, params, batch_id: list(client.iter_batch_tasks(batch_id, **params)),
    ),
    (
        r"GET /api/v1/batches/([^/]+)/stats",
        lambda client, params, batch_id: client.get_batch_stats(batch_id, **params),
    ),
    (r"GET /api/v1/tasks/stats", lambda client, params: client.get_task_stats()),
    (r"GET /api/v1/tasks/([^/]+)", lambda client, params, message_id: client.get_task(message_id)),
    (r"DELETE /api/v1/tasks/([^/]+)", lambda client, params, message_id: client.delete_task(message_id)),
]


def ask(client, recorded):
    """Call the client's method that asks what the recording asked."""
    request = recorded["request"]
    asked = request["method"] + " " + request["path"]
    for pattern, call in CALLS:
        match = re.fullmatch(pattern, asked)
        if match:
            return call(client, request["params"], *(unquote(group) for group in match.groups()))
    raise LookupError(asked)


def assert_same(recorded, received):
    """Every value of the recording is in the model; times as instants, nine digits cut to microseconds."""
    if isinstance(received, BaseModel):
        assert isinstance(recorded, dict)
        for name, value in recorded.items():
            if name == "cache_hit_rate":  # recorded as a percentage, given as a ratio
                value = pytest.approx(value / 100, abs=1e-4)
            assert_same(value, getattr(received, name))
    elif isinstance(received, datetime):
        assert instant(recorded) == received
    elif isinstance(recorded, list):
        assert len(recorded) == len(received)
        for one, other in zip(recorded, received):
            assert_same(one, other)
    else:
        assert recorded == (received.value if isinstance(received, Enum) else received)


def instant(text):
    """A time of the wire: any number of digits, and a zone or, in statistics, none but UTC."""
    whole, fraction = re.fullmatch(r"(\d{4}-\d\d-\d\d.\d\d:\d\d:\d\d)(?:\.(\d+))?(?:Z|\+00:00)?", text).groups()
    time = datetime.strptime(whole.replace(" ", "T"), "%Y-%m-%dT%H:%M:%S")
    return time.replace(microsecond=int((fraction or "0")[:6].ljust(6, "0")), tzinfo=timezone.utc)


@pytest.fixture
def client(server):
    with SynthgenClient(server.url, api_key="key", retries=0) as opened:
        yield opened


@pytest.mark.parametrize(
    "name",
    [
        "batch_get_after_midrun_delete",
        "batch_get_after_task_delete",
        "batch_get_all_cached",
        "batch_get_bad_lines",
        "batch_get_between_chunks",
        "batch_get_both_chunks",
        "batch_get_cached_and_failed",
        "batch_get_complete",
        "batch_get_pending",
        "batch_get_processing",
        "batch_get_rabbit_down",
        "batch_list",
        "batch_list_empty",
        "batch_stats_default",
        "batch_stats_interval_1M",
        "batch_stats_interval_1d",
        "batch_stats_interval_1y",
        "batch_stats_interval_hour",
        "batch_stats_interval_minute",
        "batch_stats_interval_quarter",
        "batch_stats_interval_week",
        "batch_stats_ok",
        "batch_stats_pending",
        "batch_stats_processing",
        "batch_stats_unknown",
        "health_healthy",
        "task_get_cached",
        "task_get_completed",
        "task_get_failed",
        "task_get_flaky_completed",
        "task_get_pending",
        "task_get_processing",
        "task_stats",
        "task_stats_empty",
        "task_stats_processing",
    ],
)
def test_an_answer_becomes_a_model_that_says_the_same(server, client, name):
    """Every field of the recording is equal in what the client returns."""
    recorded = server.recording(name)

    received = ask(client, recorded)

    assert isinstance(received, BaseModel)
    assert_same(recorded["response"]["body"], received)


@pytest.mark.parametrize("name", ["health_unhealthy_elasticsearch", "health_unhealthy_rabbitmq"])
def test_an_unhealthy_server_is_an_answer(server, client, name):
    """It says so with a 503, and the same object under `detail`."""
    recorded = server.recording(name)

    assert_same(recorded["response"]["body"]["detail"], ask(client, recorded))


@pytest.mark.parametrize(
    "name",
    [
        "batch_tasks_export_all",
        "batch_tasks_export_both_chunks",
        "batch_tasks_export_duplicate_lines",
        "batch_tasks_export_failed",
        "batch_tasks_export_none_match",
        "batch_tasks_export_pending",
        "batch_tasks_export_processing",
        "batch_tasks_export_several_lines",
    ],
)
def test_an_export_becomes_its_tasks(server, client, name):
    """All of them, in the order of the recording, every field equal."""
    recorded = server.recording(name)
    tasks = exported(recorded)
    server.answer("GET", batch_path(recorded), batch_of(tasks))

    assert_same(tasks, ask(client, recorded))


@pytest.mark.parametrize(
    "name",
    ["batch_tasks_export_broken_midstream", "batch_tasks_export_no_index", "batch_tasks_export_storage_down"],
)
def test_an_export_that_breaks_off_gives_what_came_and_an_error(server, client, name):
    """What was read before the break is not lost."""
    recorded = server.recording(name)
    tasks = exported(recorded)
    server.answer("GET", batch_path(recorded), {**batch_of(tasks), "total_tasks": len(tasks) + 1})
    received = []

    with pytest.raises(ConnectionFailedError):
        for task in client.iter_batch_tasks(batch_path(recorded).rpartition("/")[2]):
            received.append(task)

    assert_same(tasks, received)


def exported(recorded):
    """The tasks in the lines of a recorded export."""
    return [task for line in recorded["response"]["body"].splitlines() for task in json.loads(line)["tasks"]]


def batch_path(recorded):
    """Where the client asks for the batch of a recorded export, to know how many tasks it has."""
    return recorded["request"]["path"][: -len("/tasks/export")]


def batch_of(tasks):
    """A batch that counts these tasks."""
    statuses = [task["status"] for task in tasks]
    counts = {f"{status.lower()}_tasks": statuses.count(status) for status in set(statuses)}
    return {"batch_id": "b", "batch_status": "COMPLETED", "total_tasks": len(tasks), **counts}


@pytest.mark.parametrize(
    "name",
    [
        "batch_get_all_bad",
        "batch_get_deleted",
        "batch_get_not_ingested_yet",
        "batch_get_unknown",
        "task_get_unknown",
    ],
)
def test_null_is_not_found(server, client, name):
    """The server says so with 200 and null; the error has the status that it should have had."""
    recorded = server.recording(name)
    assert recorded["response"]["body"] is None

    with pytest.raises(NotFoundError, match=re.escape(recorded["request"]["path"])) as caught:
        ask(client, recorded)

    assert caught.value.status_code == 404


def test_the_empty_export_of_an_unknown_batch_is_not_found(server, client):
    """The server sends no tasks, and null for the batch."""
    server.recording("batch_get_unknown")

    with pytest.raises(NotFoundError, match="no-such-batch"):
        ask(client, server.recording("batch_tasks_export_unknown"))


@pytest.mark.parametrize(
    "name", ["batch_delete_again", "batch_delete_ok", "batch_delete_unknown", "task_delete_ok"]
)
def test_a_deletion_returns_nothing(server, client, name):
    """A 204 claims to be JSON and has no body."""
    assert ask(client, server.recording(name)) is None


@pytest.mark.parametrize(
    "name, kind",
    [
        ("batch_delete_midrun", ServerError),
        ("batch_delete_midrun_2", ServerError),
        ("batch_delete_storage_down", ServerError),
        ("batch_get_id_with_slash", NotFoundError),
        ("batch_get_no_index", ServerError),
        ("batch_get_storage_down", ServerError),
        ("batch_list_no_index", ServerError),
        ("batch_list_storage_down", ServerError),
        ("batch_stats_bad_interval", InvalidRequestError),
        ("batch_stats_bad_time_range", InvalidRequestError),
        ("batch_stats_storage_down", ServerError),
        ("batch_stats_too_long_time_range", InvalidRequestError),
        ("batch_stats_zero_time_range", InvalidRequestError),
        ("batch_tasks_export_401", AuthenticationError),
        ("batch_tasks_export_bad_status", InvalidRequestError),
        ("batches_401_wrong_key", AuthenticationError),
        ("task_delete_again", NotFoundError),
        ("task_delete_storage_down", ServerError),
        ("task_delete_unknown", NotFoundError),
        ("task_get_401", AuthenticationError),
        ("task_get_storage_down", ServerError),
        ("task_stats_no_index", ServerError),
        ("task_stats_storage_down", ServerError),
    ],
)
def test_an_error_is_the_right_one_and_keeps_the_answer(server, client, name, kind):
    """Its class, its status, what was asked, and what the server said."""
    recorded = server.recording(name)
    if recorded["request"]["path"].endswith("/export"):
        server.answer("GET", batch_path(recorded), batch_of([]))

    with pytest.raises(kind) as caught:
        ask(client, recorded)

    assert_tells(caught.value, kind, recorded)
    assert recorded["request"]["path"] in caught.value.message


def assert_tells(error, kind, recorded):
    """The error is of this very class, and holds the recorded answer."""
    body = recorded["response"]["body"]
    assert type(error) is kind
    assert error.status_code == error.response.status_code == recorded["response"]["status"]
    assert error.response.json() == body
    words = body["detail"] if isinstance(body["detail"], str) else body["detail"][0]["msg"]
    assert words[:100] in error.message


@pytest.mark.parametrize(
    "name",
    [
        "batch_post_all_bad",
        "batch_post_all_cached",
        "batch_post_bad_lines",
        "batch_post_chunk_1",
        "batch_post_chunk_2",
        "batch_post_deleted_midrun",
        "batch_post_duplicate_lines",
        "batch_post_mid",
        "batch_post_ok",
        "batch_post_ok_own_id",
        "batch_post_storage_down",
        "batch_post_untracked",
    ],
)
def test_an_upload_that_was_taken_is_counted(server, client, name):
    """As many tasks as the server counted lines, in the batch that it named."""
    taken = server.recording(name)["response"]["body"]

    received = client.create_batch([TASK] * taken["total_tasks"], batch_id=taken["batch_id"])

    assert_same(taken, received)


@pytest.mark.parametrize(
    "name, kind",
    [
        ("batch_post_401", AuthenticationError),
        ("batch_post_no_file", InvalidRequestError),
        ("batch_post_not_utf8", ServerError),
        ("batch_post_object_store_down", ServerError),
        ("batch_post_rabbit_down", ServerError),
        ("batch_post_wrong_extension", InvalidRequestError),
    ],
)
def test_an_upload_that_was_not_taken_is_an_upload_error_with_its_cause(server, client, name, kind):
    """Refused, all of it remains; after a 5xx nobody knows."""
    recorded = server.recording(name)

    with pytest.raises(BatchUploadError) as caught:
        client.create_batch([TASK], batch_id="b")

    assert_tells(caught.value.__cause__, kind, recorded)
    unconfirmed, remaining = caught.value.unconfirmed, list(caught.value.remaining)
    assert (unconfirmed, remaining) == (([TASK], []) if kind is ServerError else ([], [TASK]))


@pytest.mark.parametrize(
    "name", ["batch_post_empty_file", "batch_post_empty_id", "batch_post_id_with_slash"]
)
def test_an_upload_that_could_not_be_read_back_is_not_sent(server, client, name):
    """The server takes an empty file for one task, and ids that it can't be asked for."""
    recorded = server.recording(name)
    tasks = [TASK] if recorded["request"]["multipart"]["file"]["body"] else []

    with pytest.raises(ValueError):
        client.create_batch(tasks, batch_id=recorded["request"]["params"].get("batch_id"))

    assert server.requests == []


# The client has no method for what these answer, and still has to take them for what they are.


@pytest.mark.parametrize(
    "name, kind",
    [
        ("batch_tasks_page_0", InvalidRequestError),
        ("batch_tasks_page_bad_status", InvalidRequestError),
        ("batch_tasks_page_size_0", InvalidRequestError),
        ("batch_tasks_page_size_10001", InvalidRequestError),
        ("batch_tasks_page_storage_down", ServerError),
        ("method_not_allowed", InvalidRequestError),
        ("not_found_route", NotFoundError),
        ("token_401_no_header", AuthenticationError),
        ("token_401_wrong_key", AuthenticationError),
    ],
)
def test_an_error_is_the_right_one_wherever_it_comes(server, client, name, kind):
    """The status decides, and not what was asked."""
    recorded = server.recording(name)
    response = recorded["response"]
    server.answer("GET", "/api/v1/batches", Answer(response["body"], response["status"], response["headers"]))

    with pytest.raises(kind) as caught:
        client.get_batches()

    assert_tells(caught.value, kind, recorded)


@pytest.mark.parametrize("name", ["root", "token_ok"])
def test_an_answer_to_something_else_is_invalid(server, client, name):
    """A batch has an id; these have none."""
    server.answer("GET", "/api/v1/batches/b", server.recording(name)["response"]["body"])

    with pytest.raises(InvalidResponseError, match="batch_id"):
        client.get_batch("b")


def test_a_redirect_is_not_followed(server, client):
    """requests would make a GET of an upload."""
    response = server.recording("batch_list_trailing_slash")["response"]
    headers = {**response["headers"], "Location": "https://elsewhere.test/"}
    server.answer("GET", "/api/v1/batches", Answer(b"", response["status"], headers))

    with pytest.raises(InvalidResponseError, match="https://elsewhere.test/") as caught:
        client.get_batches()

    assert caught.value.status_code == 307


@pytest.mark.parametrize(
    "name",
    [
        "batch_tasks_page",
        "batch_tasks_page_2",
        "batch_tasks_page_default",
        "batch_tasks_page_failed",
        "batch_tasks_page_past_end",
        "batch_tasks_page_unknown_batch",
    ],
)
def test_a_page_holds_the_same_tasks_as_an_export(server, name):
    """For those who page through a batch with a client of their own: the model is that of an export's task."""
    tasks = server.recording(name)["response"]["body"]["tasks"]

    assert_same(tasks, [TaskResponse.model_validate(task) for task in tasks])


def test_every_recording_is_named_by_a_test():
    """What was recorded and is not looked at proves nothing."""
    sources = "".join(path.read_text(encoding="utf-8") for path in Path(__file__).parent.rglob("test_*.py"))

    assert [path.stem for path in WIRE.glob("*.json") if f'"{path.stem}"' not in sources] == []
