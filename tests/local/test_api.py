"""The REST API, next to what the framework answered to the same requests."""

import json
import re
import threading
from datetime import datetime, timezone

import pytest
import requests
from servers import DEADLINE, WIRE, Answer

from synthgen.local import usage

UNKNOWN = "/api/v1/batches/no-such-batch"


def recorded(name):
    """The framework's answer: status, headers and body."""
    return json.loads((WIRE / f"{name}.json").read_text(encoding="utf-8"))["response"]


def fits(ours, theirs):
    """Whether ours has every field of theirs, of the same type; the elements of a list are alike."""
    if isinstance(theirs, dict):
        return isinstance(ours, dict) and all(key in ours and fits(ours[key], theirs[key]) for key in theirs)
    if isinstance(theirs, list):
        return isinstance(ours, list) and all(fits(mine, theirs[0]) for mine in ours)
    return type(ours) is type(theirs)


def without_ctx(body):
    """An answer without the numbers that an error's message has, too."""
    if isinstance(body, dict) and isinstance(body.get("detail"), list):
        return {"detail": [{name: error[name] for name in error if name != "ctx"} for error in body["detail"]]}
    return body


@pytest.fixture
def mixed(api, model, task):
    """A batch of a completed, a failed and a cached task."""
    model.answers(lambda request: Answer({"error": "no"}, 400) if b"FAIL" in request.body else model.echo(request))
    api.run(task("known", source={"row": 0}, dataset="demo"))
    batch_id = api.submit(task("new", custom_id="new"), task("FAIL"), task("known"))
    api.wait(batch_id)
    return batch_id


@pytest.mark.parametrize(
    "method, path, name",
    [
        ("GET", "/", "root"),
        ("GET", "/token", "token_ok"),
        ("GET", "/api/v1/nope", "not_found_route"),
        ("GET", UNKNOWN, "batch_get_unknown"),
        ("DELETE", UNKNOWN, "batch_delete_unknown"),
        ("GET", "/api/v1/batches/my%2Fbatch%20dbd81f", "batch_get_id_with_slash"),
        ("GET", "/api/v1/batches", "batch_list_empty"),
        ("GET", "/api/v1/batches/", "batch_list_trailing_slash"),
        ("GET", UNKNOWN + "/tasks", "batch_tasks_page_unknown_batch"),
        ("GET", UNKNOWN + "/tasks?page=0", "batch_tasks_page_0"),
        ("GET", UNKNOWN + "/tasks?page_size=0", "batch_tasks_page_size_0"),
        ("GET", UNKNOWN + "/tasks?page_size=10001", "batch_tasks_page_size_10001"),
        ("GET", UNKNOWN + "/tasks?task_status=DONE", "batch_tasks_page_bad_status"),
        ("GET", UNKNOWN + "/tasks/export", "batch_tasks_export_unknown"),
        ("GET", UNKNOWN + "/tasks/export?task_status=completed", "batch_tasks_export_bad_status"),
        ("GET", UNKNOWN + "/stats?interval=5m", "batch_stats_bad_interval"),
        ("GET", UNKNOWN + "/stats?time_range=1w", "batch_stats_bad_time_range"),
        ("GET", UNKNOWN + "/stats?time_range=0h", "batch_stats_zero_time_range"),
        ("GET", UNKNOWN + "/stats?time_range=721h", "batch_stats_too_long_time_range"),
        ("GET", "/api/v1/tasks/stats", "task_stats_empty"),
        ("GET", "/api/v1/tasks/no-such-task", "task_get_unknown"),
        ("DELETE", "/api/v1/tasks/no-such-task", "task_delete_unknown"),
    ],
)
def test_an_answer_is_the_frameworks(api, method, path, name):
    """Status, content type and body are those that the framework gave, but for an error's ``ctx``."""
    theirs = recorded(name)
    response = api.ask(method, path)

    assert response.status_code == theirs["status"]
    if "content-type" in theirs["headers"]:
        assert response.headers["Content-Type"] == theirs["headers"]["content-type"]
    if theirs["status"] in (204, 307):
        assert response.content == b""
    elif theirs["headers"]["content-type"] == "application/x-ndjson":
        assert response.text == theirs["body"]
    else:
        assert json.loads(response.text.replace("','", "', '")) == without_ctx(theirs["body"])  # as pydantic 2.2 has it


def test_a_redirect_names_the_path_without_the_slash(api):
    """And keeps the query."""
    assert api.ask("GET", "/api/v1/batches/?a=b").headers["Location"] == "/api/v1/batches?a=b"


def test_a_wrong_method_is_a_405_that_names_the_right_ones(api):
    """As the framework's, with all methods in Allow."""
    response = api.ask("PUT", "/api/v1/batches", data=b"x")

    assert (response.status_code, response.json()) == (405, recorded("method_not_allowed")["body"])
    assert response.headers["Allow"] == "POST, GET"
    assert api.ask("HEAD", "/health").status_code == 405


@pytest.mark.parametrize(
    "header, name",
    [(None, "token_401_no_header"), ("Bearer wrong", "token_401_wrong_key"), ("Basic wrong", "token_401_wrong_key")],
)
@pytest.mark.parametrize("path", ["/token", "/api/v1/batches", "/api/v1/tasks/x", UNKNOWN + "/tasks/export"])
def test_without_the_key_nothing_is_told(api, header, name, path):
    """401, in the framework's words."""
    del api.session.headers["Authorization"]
    theirs = recorded(name)
    response = api.ask("GET", path, headers={"Authorization": header})

    assert (response.status_code, response.json()) == (401, theirs["body"])
    assert response.headers["WWW-Authenticate"] == "Bearer"


def test_an_upload_with_a_wrong_key_is_a_401(api, task):
    """Though its body is never looked at, the client gets to see the answer."""
    api.session.headers["Authorization"] = "Bearer wrong"
    response = api.upload(json.dumps(task("x" * 1_000_000)))

    assert (response.status_code, response.json()) == (401, recorded("batch_post_401")["body"])


def test_health_tells_without_a_key(api):
    """All services are there, with as many consumers as there are workers."""
    del api.session.headers["Authorization"]
    health = api.get("/health")

    assert fits(health, recorded("health_healthy")["body"])
    assert (health["status"], health["services"]["task_queue_consumers"]) == ("healthy", 16)


def test_a_batch_has_the_frameworks_fields(api, mixed):
    """And its counters: cached tasks are not completed ones, and their tokens do not count."""
    batch = api.batch(mixed)

    assert fits(batch, recorded("batch_get_complete")["body"])
    assert {key: batch[key] for key in batch if key.endswith(("_tasks", "tokens", "status"))} == {
        "batch_status": "FAILED",
        "total_tasks": 3,
        "completed_tasks": 1,
        "failed_tasks": 1,
        "pending_tasks": 0,
        "processing_tasks": 0,
        "cached_tasks": 1,
        "total_tokens": 5,
        "prompt_tokens": 2,
        "completion_tokens": 3,
    }


def test_the_list_of_batches_is_newest_first(api, mixed):
    """With every field of a batch."""
    batches = api.get("/api/v1/batches")

    assert fits(batches, recorded("batch_list")["body"])
    assert batches["total"] == 2
    assert batches["batches"][0] == api.batch(mixed)


@pytest.mark.parametrize("name", ["batch_tasks_export_all", "batch_tasks_page_default"])
def test_a_task_in_a_list_has_the_frameworks_fields(api, mixed, name):
    """And custom_id, method and url besides; never the key."""
    body = recorded(name)["body"]
    theirs = (json.loads(body) if isinstance(body, str) else body)["tasks"][0]
    theirs["completions"] = {}  # a provider's own
    new = next(task for task in api.export(mixed) if task["custom_id"] == "new")

    assert fits(new, theirs)
    assert set(new) - set(theirs) == {"custom_id", "method", "url"}


def test_a_single_task_has_the_frameworks_fields(api, mixed):
    """Completed, failed or cached, it is what the list says."""
    for listed in api.export(mixed):
        ours = api.get(f"/api/v1/tasks/{listed['message_id']}")
        assert ours == listed
        assert set(recorded("task_get_completed")["body"]) <= set(ours)


def test_an_export_is_newest_first_in_short_lines(api, task):
    """So that the first task is there at once, whatever the batch's size."""
    batch_id = api.submit(*[task(f"{number}", custom_id=f"{number}") for number in range(250)])
    api.wait(batch_id)
    response = api.ask("GET", f"/api/v1/batches/{batch_id}/tasks/export")
    lines = [json.loads(line) for line in response.text.split("\n") if line]

    assert response.headers["Transfer-Encoding"] == "chunked"
    assert [len(line["tasks"]) for line in lines] == [100, 100, 50]
    assert {line["total"] for line in lines} == {250}
    ids = [int(task["custom_id"]) for line in lines for task in line["tasks"]]
    assert ids == sorted(range(250), reverse=True)


def test_large_tasks_have_lines_of_their_own(api, task):
    """A line is held in memory whole."""
    batch_id = api.submit(*[task("x" * (3 << 19)) for _ in range(3)])
    response = api.ask("GET", f"/api/v1/batches/{batch_id}/tasks/export")

    assert [len(json.loads(line)["tasks"]) for line in response.text.splitlines()] == [1, 1, 1]


@pytest.mark.parametrize("status, count", [("COMPLETED", 2), ("FAILED", 1), ("PENDING", 0), ("PROCESSING", 0)])
def test_an_export_can_be_of_one_status(api, mixed, status, count):
    """COMPLETED includes the cached ones."""
    assert [task["status"] for task in api.export(mixed, task_status=status)] == [status] * count


def test_a_page_is_a_part_of_the_export(api, task):
    """Of completed tasks, unless told otherwise; beyond the end it is empty."""
    batch_id = api.submit(*[task(f"{number}") for number in range(5)])
    api.wait(batch_id)
    path, everything = f"/api/v1/batches/{batch_id}/tasks", api.export(batch_id)

    assert api.get(path) == {"total": 5, "page": 1, "page_size": 100, "tasks": everything}
    assert api.get(path, page=2, page_size=2)["tasks"] == everything[2:4]
    assert api.get(path, page=9, page_size=2)["tasks"] == []
    assert api.get(path, task_status="FAILED")["total"] == 0


@pytest.mark.parametrize(
    "interval, start",
    [
        ("minute", "%Y-%m-%d %H:%M:00"),
        ("1h", "%Y-%m-%d %H:00:00"),
        ("day", "%Y-%m-%d 00:00:00"),
        ("1M", "%Y-%m-01 00:00:00"),
        ("1y", "%Y-01-01 00:00:00"),
    ],
)
def test_statistics_come_in_calendar_intervals(api, mixed, interval, start):
    """Each point has the tasks that ended in it; tokens include the cached ones'."""
    stats = api.get(f"/api/v1/batches/{mixed}/stats", interval=interval, time_range="5m")
    points, summary = stats["time_series"], stats["summary"]
    now = datetime.now(timezone.utc)

    assert fits(stats, recorded("batch_stats_ok")["body"])
    assert (stats["interval"], stats["time_range"]) == (interval, "5m")
    assert sum(point["total_tasks"] for point in points) == summary["total_tasks"] == 3
    assert (summary["completed_tasks"], summary["failed_tasks"], summary["cached_tasks"]) == (1, 1, 1)
    assert (summary["total_tokens"], summary["total_completion_tokens"]) == (10, 6)
    assert summary["cache_hit_rate"] == 33.33
    assert abs((datetime.strptime(points[-1]["timestamp"], "%Y-%m-%d %H:%M:%S") - now.replace(tzinfo=None)).days) < 366
    assert datetime.strptime(points[-1]["timestamp"], "%Y-%m-%d %H:%M:%S").strftime(start) == points[-1]["timestamp"]


def test_statistics_over_all_tasks_count_the_cached_tokens(api, mixed):
    """Their counters are the batches' together."""
    stats = api.get("/api/v1/tasks/stats")

    assert fits(stats, recorded("task_stats")["body"])
    assert (stats["total_tasks"], stats["completed_tasks"], stats["cached_tasks"], stats["failed_tasks"]) == (
        4,
        2,
        1,
        1,
    )
    assert (stats["total_tokens"], stats["prompt_tokens"], stats["completion_tokens"]) == (15, 6, 9)


def test_deleting_a_task_takes_it_out_of_the_counters(api, mixed):
    """A second delete is a 404, and the last task's takes the batch with it."""
    for left, listed in enumerate(reversed(api.export(mixed))):
        path = f"/api/v1/tasks/{listed['message_id']}"
        assert api.ask("DELETE", path).status_code == 204
        assert api.ask("DELETE", path).json() == {"detail": f"Task with message_id {listed['message_id']} not found"}
        assert api.get(path) is None
        batch = api.batch(mixed)
        assert (batch or {"total_tasks": 0})["total_tasks"] == 2 - left
        if batch:
            assert batch["completed_tasks"] + batch["cached_tasks"] + batch["failed_tasks"] == batch["total_tasks"]

    assert api.batch(mixed) is None


def test_a_deleted_batch_is_gone(api, mixed):
    """204, also the second time; its id can be used again."""
    for _ in range(2):
        response = api.ask("DELETE", f"/api/v1/batches/{mixed}")
        assert (response.status_code, response.content) == (204, b"")
        assert response.headers["Content-Type"] == "application/json"

    assert api.batch(mixed) is None
    assert api.export(mixed) == []


@pytest.mark.parametrize("batch_id", ["plain", "with space", "Größe ☃", "100%", "%2e%2e", "a?b#c&d=e;f", "...", "-"])
def test_any_other_text_is_a_batch_id(api, task, batch_id):
    """Percent-encoded in a path it is decoded exactly once."""
    assert api.submit(task(), batch_id=batch_id) == batch_id
    path = "/api/v1/batches/" + requests.utils.quote(batch_id, safe="")
    assert api.get(path)["batch_id"] == batch_id
    assert api.ask("DELETE", path).status_code == 204
    assert api.get(path) is None


@pytest.mark.parametrize("batch_id", ["a/b", "/", ".", ".."])
def test_an_id_that_could_not_be_asked_for_is_refused(api, task, batch_id):
    """422, and nothing is taken."""
    response = api.upload(json.dumps(task()), batch_id=batch_id)

    assert response.status_code == 422
    assert response.json()["detail"][0]["loc"] == ["query", "batch_id"]
    assert api.get("/api/v1/batches")["total"] == 0


def test_an_empty_batch_id_counts_as_none(api, task):
    """As with the framework, the server makes one up."""
    assert re.fullmatch("[0-9a-f-]{36}", api.submit(task(), batch_id=""))


def test_an_upload_to_an_existing_batch_is_added_to_it(api, task):
    """That is how a batch comes in chunks."""
    for number in range(3):
        api.submit(task(f"{number}", custom_id=f"{number}"), batch_id="b")
    batch = api.wait("b")

    assert (batch["total_tasks"], batch["completed_tasks"]) == (3, 3)
    assert [task["custom_id"] for task in api.export("b")] == ["2", "1", "0"]


def test_the_fields_of_a_task_come_back_as_they_were(api, task):
    """Any Unicode, nested and large values, in custom_id, body, dataset and source."""
    odd = '\u2028\u0085 é \U0001f600 \\ " \x00 \ud83d\ude00'
    sent = task("x", custom_id=odd, dataset=odd, source={odd: [None, 1.5, 10**30, {"deep": [[]]}]})
    sent["body"]["extra"] = {odd: odd, "number": 0.1}
    (result,) = api.run(sent)

    assert {name: result[name] for name in ("custom_id", "dataset", "source", "body", "method", "url")} == {
        name: json.loads(json.dumps(sent[name])) for name in ("custom_id", "dataset", "source", "body", "method", "url")
    }
    assert "provider-key" not in json.dumps(result)


def test_lines_end_at_newlines_alone(api, task):
    """Raw U+2028, U+0085 and carriage returns end none; blank lines hold no task; a byte order mark is no harm."""
    line = json.dumps(task("a\u2028b\u0085c"), ensure_ascii=False)
    response = api.upload(f"\ufeff{line}\r\n\n{line}\n\n".encode())

    assert response.json()["total_tasks"] == 2


@pytest.mark.parametrize("name", ["batch_post_no_file", "batch_post_wrong_extension"])
def test_an_upload_without_its_file_is_refused_in_the_frameworks_words(api, task, name):
    """No form at all, or a file of another name."""
    theirs = recorded(name)
    no_file = name == "batch_post_no_file"
    response = api.ask("POST", "/api/v1/batches") if no_file else api.upload(json.dumps(task()), name="batch.json")

    assert (response.status_code, response.json()) == (theirs["status"], theirs["body"])


def test_malformed_lines_are_refused_by_their_numbers(api, task):
    """422 with the number and the fault of each, never its content, and nothing of the upload is taken."""
    lines = (json.dumps(task()), "sk-secret is not json", "[1,2]", '{"custom_id": "x", "method": "POST", "body": {}}')
    more = (json.dumps(task(api_key="sk-secret\n")), json.dumps(task(body=["sk-secret"])), '{"custom_id": null', "")
    nan = json.dumps(task(body={"temperature": float("nan")}))
    lone = json.dumps(task(custom_id="\ud800"))
    response = api.upload("\n".join([*lines, *more, nan, lone]).encode() + b"\n\xff\xfe\n")

    assert response.status_code == 422
    assert [error["msg"].partition(":")[0] for error in response.json()["detail"]] == [
        f"line {number}" for number in (2, 3, 4, 5, 6, 7, 9, 10, 11)
    ]
    assert "'url' is missing" in response.text
    assert "sk-secret" not in response.text
    assert api.get("/api/v1/batches")["total"] == 0


@pytest.mark.parametrize("content", ["", "\n\n", "\ufeff"])
def test_an_upload_of_no_task_is_refused(api, content):
    """There would be no batch to ask for."""
    assert api.upload(content).json()["detail"][0]["msg"] == "the file has no tasks"


@pytest.mark.parametrize(
    "field, value",
    [
        ("custom_id", 5),
        ("url", None),
        ("method", 1),
        ("body", None),
        ("api_key", 1),
        ("source", "text"),
        ("use_cache", 1),
        ("track_progress", "yes"),
    ],
)
def test_a_field_of_a_wrong_type_is_refused(api, task, field, value):
    """422 with the line and the field."""
    response = api.upload(json.dumps(task(**{field: value})))

    assert response.status_code == 422
    assert response.json()["detail"][0]["msg"].startswith(f"line 1: '{field}' must be ")


def test_the_same_upload_under_the_same_key_is_taken_once(api, model, task):
    """The answer is the same, and each task runs once."""
    content = json.dumps(task("once", use_cache=False))
    first, second = (api.upload(content, key="k").json() for _ in range(2))
    batch = api.wait(first["batch_id"])

    assert first == second
    assert (batch["total_tasks"], len(model.requests)) == (1, 1)


def test_another_upload_under_the_same_key_is_refused(api, task):
    """422, be it other content or another batch."""
    api.upload(json.dumps(task("one")), key="k", batch_id="b")
    other_content = api.upload(json.dumps(task("two")), key="k", batch_id="b")
    other_batch = api.upload(json.dumps(task("one")), key="k", batch_id="c")

    assert (other_content.status_code, other_batch.status_code) == (422, 422)
    assert "Idempotency-Key" in other_content.text
    assert api.get("/api/v1/batches")["total"] == 1


def test_the_key_of_an_upload_to_a_deleted_batch_may_be_used_again(api, task):
    """Nothing of the batch is left that it could repeat."""
    api.submit(task("one"), key="k", batch_id="b")
    api.ask("DELETE", "/api/v1/batches/b")

    assert api.submit(task("two"), task("three"), key="k", batch_id="b") == "b"
    assert api.wait("b")["total_tasks"] == 2


def test_an_upload_repeated_at_the_same_time_is_taken_once(api, model, task):
    """Whichever comes first, all get the same answer."""
    content = "\n".join(json.dumps(task(f"{number}", use_cache=False)) for number in range(20))
    answers = []
    threads = [threading.Thread(target=lambda: answers.append(requests_upload(api, content))) for _ in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE)
    batch = api.wait(answers[0]["batch_id"])

    assert len(answers) == 10
    assert all(answer == answers[0] for answer in answers)
    assert (batch["total_tasks"], len(model.requests)) == (20, 20)


def test_an_upload_whose_tasks_were_all_deleted_can_be_sent_again(api, task):
    """One by one: the batch went with the last of them."""
    content = json.dumps(task())
    batch_id = api.upload(content, key="k", batch_id="b").json()["batch_id"]
    (stored,) = api.export(batch_id)
    assert api.ask("DELETE", f"/api/v1/tasks/{stored['message_id']}").status_code == 204
    assert api.get("/api/v1/batches/b") is None

    assert api.upload(content, key="k", batch_id="b").status_code == 200
    assert api.wait("b")["total_tasks"] == 1


def requests_upload(api, content):
    """An upload on a connection of its own."""
    headers = {"Authorization": f"Bearer {api.server.api_key}", "Idempotency-Key": "k"}
    files = {"file": ("batch.jsonl", content)}
    return requests.post(api.server.url + "/api/v1/batches", files=files, headers=headers, timeout=DEADLINE).json()


@pytest.mark.parametrize("interval", ["minute", "hour", "1d", "week", "1M", "quarter", "1y"])
def test_an_interval_begins_where_the_frameworks_does(interval):
    """Weeks on Mondays; the figures are the framework's too, for the same tasks."""
    theirs = recorded(f"batch_stats_interval_{interval}")["body"]
    ended = datetime.strptime(theirs["current_time"], "%Y-%m-%dT%H:%M:%S.%f%z").replace(minute=39, second=0)
    tasks = {"total_tasks": 6, "completed_tasks": 2, "failed_tasks": 1, "cached_tasks": 3}
    tasks.update(duration=334, completed_duration=278)
    tokens = {"total_tokens": 41, "prompt_tokens": 18, "completion_tokens": 23}
    minutes = [{"minute": int(ended.timestamp()) // 60, **tasks, **tokens}]

    assert usage.time_series(minutes, interval) == theirs["time_series"]
    assert usage.summary(minutes) == theirs["summary"]
