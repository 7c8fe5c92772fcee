"""How tasks are run: calls, cache, retries, failures, deletions."""

import json
import sqlite3
import threading
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime

import pytest
import requests
from servers import DEADLINE, DROP, Answer

GOOD = {
    "choices": [{"message": {"role": "assistant", "content": "good"}}],
    "usage": {"prompt_tokens": 7, "completion_tokens": 4},
}


def test_a_task_is_posted_to_its_provider_with_its_key(api, model, task):
    """The provider gets the body as it was, and the key as a bearer token."""
    (result,) = api.run(task("a question"))

    (request,) = model.requests
    assert json.loads(request.body) == task("a question")["body"]
    assert request.headers["Authorization"] == "Bearer provider-key"
    assert request.headers["Content-Type"] == "application/json"
    assert result["status"] == "COMPLETED"
    assert result["completions"]["choices"][0]["message"]["content"] == "echo: a question"


def test_without_a_key_no_authorization_is_sent(api, model, task, monkeypatch, tmp_path):
    """A task without a key sends none, whatever the user's netrc says."""
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login someone password secret\n")
    monkeypatch.setenv("NETRC", str(netrc))

    api.run(task(api_key=None))

    assert "Authorization" not in model.requests[0].headers


def test_a_provider_on_this_machine_is_called_without_a_proxy(api, model, task, monkeypatch):
    """HTTP_PROXY does not catch calls to loopback."""
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")

    assert api.run(task())[0]["status"] == "COMPLETED"


def test_a_provider_elsewhere_is_called_through_the_proxy(api, model, task, monkeypatch):
    """HTTP_PROXY holds for other hosts."""
    monkeypatch.setenv("HTTP_PROXY", model.url)
    model.answer("POST", "http://provider.invalid/v1", GOOD)

    (result,) = api.run(task(url="http://provider.invalid/v1"))

    assert result["status"] == "COMPLETED"
    assert model.requests[0].path == "http://provider.invalid/v1"


@pytest.mark.parametrize(
    "usage, tokens",
    [
        ({"usage": {"prompt_tokens": 7, "completion_tokens": 4}}, (7, 4, 11)),
        ({"usage": {"input_tokens": 7, "output_tokens": 4, "cache_read_input_tokens": 20}}, (27, 4, 31)),
        ({"usageMetadata": {"promptTokenCount": 7, "candidatesTokenCount": 4, "thoughtsTokenCount": 5}}, (7, 9, 16)),
        ({"usage": None}, (0, 0, 0)),
    ],
)
def test_tokens_are_counted_whatever_the_provider_calls_them(api, model, task, usage, tokens):
    """Or the cost of a batch would be 0."""
    model.answers({"content": [{"type": "text", "text": "good"}], **usage})
    batch = api.wait(api.submit(task()))

    assert (batch["prompt_tokens"], batch["completion_tokens"], batch["total_tokens"]) == tokens


def test_an_identical_task_is_answered_from_the_cache(api, model, task):
    """A second batch of the same task costs no call and no tokens, and shows the first call's duration."""
    (first,) = api.run(task("same", custom_id="first"))
    batch_id = api.submit(task("same", custom_id="second"))
    batch = api.wait(batch_id)
    (second,) = api.export(batch_id)

    assert len(model.requests) == 1
    assert (first["cached"], second["cached"]) == (False, True)
    assert second["custom_id"] == "second"
    assert second["completions"] == first["completions"]
    assert second["duration"] == first["duration"]
    assert (batch["completed_tasks"], batch["cached_tasks"], batch["total_tokens"]) == (0, 1, 0)
    assert batch["batch_status"] == "COMPLETED"


@pytest.mark.parametrize("other", [{"use_cache": False}, {"url": "?other"}, {"prompt": "other"}])
def test_another_task_is_not_answered_from_the_cache(api, model, task, other):
    """The cache wants the same URL and body, and a task that allows it."""
    fields = dict(other)
    fields.update(url=model.url + fields["url"] if "url" in fields else model.url)
    api.run(task("same"))
    (result,) = api.run(task(**{"prompt": "same", **fields}))

    assert not result["cached"]
    assert len(model.requests) == 2


def test_the_order_of_keys_does_not_matter_to_the_cache(api, model, task):
    """Bodies that are equal as JSON objects are the same."""
    body = task("same")["body"]
    api.run(task("same"))
    (result,) = api.run(task("same", body=dict(reversed(list(body.items())))))

    assert result["cached"]


def test_a_failure_is_not_cached(api, model, task):
    """A task that failed is called again when it comes again."""
    model.answers(Answer({"error": "no"}, 400), GOOD)
    (first,) = api.run(task())
    (second,) = api.run(task())

    assert (first["status"], second["status"]) == ("FAILED", "COMPLETED")


def test_identical_tasks_in_flight_are_called_once(serve, model, task):
    """Those that wait for an identical task's answer keep no thread from other tasks."""
    api = serve(workers=2)
    hold = threading.Event()
    model.answers(lambda request: Answer(model.echo(request), hold=hold if b"same" in request.body else None))
    batch_id = api.submit(*[task("same", custom_id=str(number)) for number in range(50)], task("other"))

    assert api.wait(batch_id, lambda batch: batch["completed_tasks"] == 1)["pending_tasks"] == 49
    hold.set()
    batch = api.wait(batch_id)

    assert model.prompts().count("same") == 1
    assert (batch["completed_tasks"], batch["cached_tasks"]) == (2, 49)


def test_an_identical_task_with_another_key_does_not_wait(serve, model, task):
    """The account of the first may be slow, or no account at all."""
    hold = threading.Event()
    model.answers(
        lambda request: Answer(GOOD, hold=None if request.headers["Authorization"] == "Bearer quick" else hold)
    )
    api = serve(workers=2)
    slow = api.submit(task("same", api_key="slow"))
    model.wait_for_requests(1)
    quick = api.submit(task("same", api_key="quick"))

    assert api.wait(quick)["completed_tasks"] == 1
    hold.set()
    api.wait(slow)


def test_when_the_one_that_was_called_fails_two_others_are_called(api, model, task):
    """They may have better luck; the rest waits for their answers."""
    hold = threading.Event()
    model.answers(Answer({"error": "no"}, 400, hold=hold), GOOD)
    batch_id = api.submit(*[task("same") for _ in range(50)])
    model.wait_for_requests(1)
    hold.set()
    batch = api.wait(batch_id)

    assert (batch["failed_tasks"], batch["completed_tasks"], batch["cached_tasks"]) == (1, 2, 47)


def test_an_answer_is_in_the_cache_as_long_as_a_task_has_it(api, model, task):
    """Though the one that was called is deleted."""
    first = api.submit(task("same"))
    api.wait(first)
    api.run(task("same"))
    api.ask("DELETE", f"/api/v1/batches/{first}")
    (again,) = api.run(task("same"))

    assert again["cached"] and len(model.requests) == 1


def test_when_the_one_that_is_called_is_deleted_one_of_the_others_is(serve, model, task, monkeypatch):
    """Also if the database can't be read just then: the others still wait for that one."""
    hold = threading.Event()
    model.answers(Answer(GOOD, hold=hold), GOOD)
    api = serve()
    leader = api.submit(task("same"))
    model.wait_for_requests(1)
    batch_id = api.submit(*[task("same") for _ in range(5)], task("other", use_cache=False))
    api.wait(batch_id, lambda batch: batch["completed_tasks"] == 1)
    with monkeypatch.context() as broken:
        broken.setattr(api.server._store, "cached", _cant_read)
        assert api.ask("DELETE", f"/api/v1/batches/{leader}").status_code == 204
    hold.set()
    batch = api.wait(batch_id)

    assert (batch["completed_tasks"], batch["cached_tasks"]) == (2, 4)


def _cant_read(cache_key):
    raise sqlite3.OperationalError("unable to open database file")


def test_when_the_one_that_is_called_is_deleted_another_is_called(api, model, task):
    """Nobody waits for the answer of a deleted task."""
    hold = threading.Event()
    model.answers(Answer(GOOD, hold=hold), GOOD)
    batch_id = api.submit(*[task("same") for _ in range(3)])
    model.wait_for_requests(1)
    running = api.export(batch_id, task_status="PROCESSING")
    api.ask("DELETE", f"/api/v1/tasks/{running[0]['message_id']}")
    batch = api.wait(batch_id)
    hold.set()

    assert len(running) == 1
    assert (batch["total_tasks"], batch["completed_tasks"], batch["cached_tasks"]) == (2, 1, 1)


@pytest.mark.parametrize(
    "fault",
    [
        DROP,
        Answer(GOOD, cut_off=True),
        Answer("<html>busy</html>"),
        Answer(b'{"choices": ['),
        Answer([1, 2]),
        Answer({"error": "slow down"}, 429, {"Retry-After": "0.01"}),
        Answer({"error": "slow down"}, 429, {"Retry-After": "soon"}),
        Answer({"error": "oops"}, 500),
        Answer("bad gateway", 502),
    ],
)
def test_a_failure_that_may_pass_is_tried_again(api, model, task, fault):
    """Two failures, then an answer: the task completes."""
    model.answers(fault, fault, GOOD)
    (result,) = api.run(task())

    assert result["status"] == "COMPLETED"
    assert len(model.requests) == 3


def test_an_answer_with_nan_is_taken_with_null(api, model, task):
    """As Python's json writes it; the answer is whole, and was paid for."""
    model.answers(Answer(json.dumps({**GOOD, "score": float("nan"), "range": [float("-inf")]}).encode("ascii")))
    (result,) = api.run(task())

    assert result["status"] == "COMPLETED" and len(model.requests) == 1
    assert result["completions"] == {**GOOD, "score": None, "range": [None]}


def test_a_time_out_is_tried_again(api, model, task):
    """A provider that says nothing in time is asked again."""
    api.close()
    api.server._policy = api.server._policy._replace(read_timeout=0.1)
    api.server.start()
    model.answers(Answer(hold=threading.Event()), GOOD)

    assert api.run(task())[0]["status"] == "COMPLETED"


def test_a_provider_that_is_not_there_is_tried_again_and_then_given_up(serve, task):
    """The error says what happened, and how often it was tried."""
    (result,) = serve().run(task(url="http://127.0.0.1:1/v1"))

    assert result["status"] == "FAILED"
    assert "refused" in result["completions"]["error"]
    assert "(tried 11 times)" in result["completions"]["error"]


def test_health_shows_nothing_of_what_a_provider_said_in_a_200(api, model, task):
    """It may be the prompt, and anybody may ask for health."""
    hold = threading.Event()
    model.answers(Answer({"error": {"code": 502, "message": "no: my prompt"}}), Answer(GOOD, hold=hold))
    batch_id = api.submit(task())
    model.wait_for_requests(2)
    error = api.get("/health")["error"]
    hold.set()
    api.wait(batch_id)

    assert error.endswith("Provider error") and "prompt" not in error


def test_health_tells_of_calls_that_are_being_repeated(api, model, task):
    """How many and why, but no key, since it needs none; and nothing of it when they have worked."""
    hold = threading.Event()
    model.answers(Answer({"error": "no provider-key here"}, 500), Answer(GOOD, hold=hold), GOOD)
    batch_id = api.submit(task(url=model.url + "?key=secret"))
    model.wait_for_requests(2)
    meanwhile = api.get("/health")
    hold.set()
    api.wait(batch_id)
    api.run(task("another"))  # what was stored before it is done with

    assert meanwhile["status"] == "healthy"
    assert meanwhile["error"].startswith("calls that failed and will be made again: 1; the last: 127.0.0.1:")
    assert "Server error (500" in meanwhile["error"]
    assert "provider-key" not in meanwhile["error"] and "secret" not in meanwhile["error"]
    assert api.get("/health")["error"] is None


def test_a_provider_that_always_fails_is_given_up(api, model, task):
    """After ten retries the task fails with the provider's words."""
    model.answers(Answer({"error": "oops"}, 500))
    (result,) = api.run(task())

    assert len(model.requests) == 11
    assert result["status"] == "FAILED"
    assert result["completions"]["error"].startswith('Server error (500 Internal Server Error): {"error": "oops"}')


@pytest.mark.parametrize(
    "answer, error",
    [
        (Answer({"error": "bad"}, 400), 'Client error (400 Bad Request): {"error": "bad"}'),
        (Answer({}, 404), "Client error (404 Not Found): {}"),
        (Answer({"error": {"message": "quota"}}), 'Provider error: {"error": {"message": "quota"}}'),
    ],
)
def test_a_failure_that_would_come_again_is_final(api, model, task, answer, error):
    """A refusal, or an error object inside a 200, fails the task at once with the provider's words."""
    model.answers(answer)
    (result,) = api.run(task())

    assert len(model.requests) == 1
    assert (result["status"], result["completions"]) == ("FAILED", {"error": error})


@pytest.mark.parametrize("location", ["/elsewhere", "http://[elsewhere/", "http://elsewhere:port/"])
def test_a_redirect_is_not_followed(api, model, task, location):
    """The key goes to nobody else; the error says where it would have gone, whether that is a URL or not."""
    model.answers(Answer({}, 307, {"Location": location}))
    (result,) = api.run(task())

    assert len(model.requests) == 1
    assert f"to {location}: not followed" in result["completions"]["error"]


@pytest.mark.parametrize("status", [200, 307, 500])
def test_of_an_answer_no_more_is_read_than_fits(api, model, task, monkeypatch, status):
    """Whatever its status; it may be endless."""
    monkeypatch.setattr("synthgen.local.provider._MAX_ANSWER_BYTES", 1 << 20)
    model.answers(Answer(None, status, {"Location": "/elsewhere"}, chunks=[bytes(2 << 20), threading.Event()]))
    (result,) = api.run(task())

    assert "the answer is larger than 1 MiB" in result["completions"]["error"]


@pytest.mark.parametrize("url", ["no scheme", "ftp://host/", "http://", "http://[", "http://.example/"])
def test_a_url_that_makes_no_sense_fails_its_task_only(api, task, url):
    """The other tasks of the batch complete."""
    bad, good = api.run(task(url=url, use_cache=False), task())

    assert (bad["status"], good["status"]) == ("FAILED", "COMPLETED")
    assert "error" in bad["completions"]


def test_an_error_never_holds_the_key(api, model, task):
    """A provider that repeats the key does not get it into a result."""
    model.answers(Answer({"error": "wrong key provider-key"}, 401))
    (result,) = api.run(task())

    assert "provider-key" not in json.dumps(result)
    assert "wrong key" in result["completions"]["error"]


def test_retry_after_is_obeyed_without_a_thread_waiting(serve, model, task):
    """With one thread, a task that has to wait lets that of another account go first."""
    api = serve(workers=1)
    later = format_datetime(datetime.now(timezone.utc) + timedelta(seconds=30), usegmt=True)
    model.answers(Answer({}, 429, {"Retry-After": later}), GOOD)
    batch_id = api.submit(task("first"), task("second", api_key="another"))
    batch = api.wait(batch_id, lambda batch: batch["completed_tasks"] == 1)

    assert batch["processing_tasks"] == 1
    assert model.prompts() == ["first", "second"]


def test_progress_is_shown_where_it_is_tracked(api, model, task):
    """A task that is being called is PROCESSING with track_progress, PENDING without; the counters add up."""
    hold = threading.Event()
    model.answers(Answer(GOOD, hold=hold))
    batch_id = api.submit(task("tracked"), task("untracked", track_progress=False))
    model.wait_for_requests(2)
    batch = api.batch(batch_id)
    untracked, tracked = api.export(batch_id)
    (processing,) = api.export(batch_id, task_status="PROCESSING")
    (pending,) = api.export(batch_id, task_status="PENDING")
    hold.set()

    assert (batch["batch_status"], batch["processing_tasks"], batch["pending_tasks"]) == ("PROCESSING", 1, 1)
    assert (tracked["status"], tracked["completions"], tracked["duration"]) == ("PROCESSING", None, 0)
    assert tracked["started_at"] == tracked["completed_at"]
    assert (untracked["status"], untracked["completions"], untracked["started_at"]) == ("PENDING", {}, None)
    assert processing == tracked
    assert pending == untracked


def test_flags_are_false_where_they_are_absent(api, model, task):
    """A line without use_cache is called each time."""
    line = task("same")
    del line["use_cache"], line["track_progress"]
    api.run(line)
    api.run(line)

    assert len(model.requests) == 2


def test_a_deleted_task_is_not_called(serve, model, task):
    """Neither one that waits for a thread nor one of a deleted batch."""
    api = serve(workers=1)
    hold = threading.Event()
    model.answers(lambda request: Answer(model.echo(request), hold=hold if b"block" in request.body else None))
    first = api.submit(task("block"), task("deleted"), task("kept"))
    second = api.submit(task("deleted too"))
    model.wait_for_requests(1)
    deleted = api.export(first)[1]
    assert api.ask("DELETE", f"/api/v1/tasks/{deleted['message_id']}").status_code == 204
    assert api.ask("DELETE", f"/api/v1/batches/{second}").status_code == 204
    hold.set()
    api.wait(first)

    assert model.prompts() == ["block", "kept"]
    assert api.batch(second) is None


def test_the_result_of_a_batch_deleted_meanwhile_is_dropped(api, model, task):
    """A batch that was deleted while its task was called does not come back."""
    hold = threading.Event()
    model.answers(Answer(GOOD, hold=hold), GOOD)
    batch_id = api.submit(task("gone"))
    model.wait_for_requests(1)
    api.ask("DELETE", f"/api/v1/batches/{batch_id}")
    hold.set()
    api.run(task("other"))

    assert api.batch(batch_id) is None
    assert api.get("/api/v1/tasks/stats")["total_tasks"] == 1


def test_a_small_batch_does_not_wait_for_a_large_one(serve, model, task):
    """Batches take turns: a batch submitted second ends long before a large first one."""
    api = serve(workers=2)
    large = api.submit(*[task(f"large {number}", track_progress=False) for number in range(500)])
    model.wait_for_requests(1)
    small = api.submit(task("small"))
    api.wait(small)

    assert api.batch(large)["pending_tasks"] > 0


@pytest.mark.slow
def test_twenty_threads_submit_and_poll(api, model, task):
    """No request fails, each custom_id is there once, and the counters equal the rows."""
    results = {}

    def work(number):
        tasks = [task(f"{number}-{index}", custom_id=f"{number}-{index}") for index in range(20)]
        results[number] = api.run(*tasks)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE)
    batches = api.get("/api/v1/batches")["batches"]

    custom_ids = [result["custom_id"] for tasks in results.values() for result in tasks]
    assert sorted(custom_ids) == sorted(f"{number}-{index}" for number in range(20) for index in range(20))
    assert len(batches) == 20
    assert all((batch["total_tasks"], batch["completed_tasks"]) == (20, 20) for batch in batches)
    assert api.get("/api/v1/tasks/stats")["completed_tasks"] == len(model.requests) == 400


def test_chunks_of_a_batch_uploaded_at_the_same_time_all_run(api, task):
    """In whatever order they come."""

    def submit(chunk):
        headers = {"Authorization": f"Bearer {api.server.api_key}"}
        lines = "\n".join(json.dumps(task(f"{chunk}-{index}")) for index in range(20))
        files = {"file": ("batch.jsonl", lines)}
        with requests.Session() as session:
            session.post(api.server.url + "/api/v1/batches?batch_id=b", files=files, headers=headers, timeout=DEADLINE)

    threads = [threading.Thread(target=submit, args=(chunk,)) for chunk in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE)

    assert api.wait("b")["completed_tasks"] == 200


def test_a_task_deleted_while_its_call_fails_is_no_trouble_any_more(serve, model, task):
    """Nothing will be called again for it."""
    hold = threading.Event()
    model.answers(Answer({"error": "busy"}, 500, hold=hold), model.echo)
    api = serve(workers=1)
    batch_id = api.submit(task())
    model.wait_for_requests(1)
    assert api.ask("DELETE", f"/api/v1/batches/{batch_id}").status_code == 204
    hold.set()
    api.run(task("another"))  # by the same thread, when it is done with the other

    assert api.get("/health")["error"] is None
