"""A provider's limits: what is paced, what waits, what is given up, and what is spent."""

import heapq
import json
import math
import random
import re
import threading
import time
from collections import deque
from decimal import Decimal
from fractions import Fraction
from types import SimpleNamespace

import pytest
from servers import DEADLINE, DROP, Answer

from synthgen import BudgetExceededError, Task
from synthgen._estimates import output_limit
from synthgen.exceptions import ConfigurationError
from synthgen.local import LocalServer
from synthgen.local.pace import Account, Estimate, Limits
from synthgen.local.provider import CallPolicy, Kind, Outcome, Provider, Told, _seconds
from synthgen.local.store import Result

GOOD = {
    "choices": [{"message": {"role": "assistant", "content": "good"}}],
    "usage": {"prompt_tokens": 7, "completion_tokens": 4},
}


@pytest.fixture
def pace(serve):
    """Starts a server whose policy is as told; a minute is `window` seconds."""

    def start(policy=None, **settings):
        api = serve(**settings)
        api.server.close()
        api.server._policy = api.server._policy._replace(**(policy or {}))
        api.server.start()
        return api

    return start


# Refusals.


class Limiter:
    """Answers as long as there are tokens in its bucket, which fills at a rate; else a 429 says how long to wait."""

    def __init__(self, per_second, capacity):
        self.per_second, self.capacity, self.level = per_second, capacity, capacity
        self.filled_at = time.monotonic()
        self.refused = 0
        self.lock = threading.Lock()

    def __call__(self, request):
        with self.lock:
            now = time.monotonic()
            self.level = min(self.capacity, self.level + (now - self.filled_at) * self.per_second)
            self.filled_at = now
            if self.level >= 1:
                self.level -= 1
                return GOOD
            self.refused += 1
            missing = (1 - self.level) / self.per_second
            return Answer({"error": "slow down"}, 429, {"Retry-After": "1", "retry-after-ms": f"{missing * 1000:.1f}"})


def test_a_limit_fails_no_task_and_is_soon_learned(serve, model, task):
    """Sixteen workers beside a limit: all tasks complete, and few calls are refused."""
    limiter = Limiter(per_second=100, capacity=20)
    model.answers(limiter)
    results = serve().run(*[task(str(number)) for number in range(200)])

    assert all(result["status"] == "COMPLETED" for result in results)
    assert limiter.refused <= 60


def test_no_call_of_an_account_starts_before_its_provider_said(pace, model, task):
    """All the tasks of the key wait, no thread does: another key's tasks go on, with one worker."""
    api = pace(workers=1)
    refusal = Answer({"error": "slow down"}, 429, {"Retry-After": "400"})
    model.answers(lambda request: refusal if request.headers["Authorization"] == "Bearer slow" else GOOD)
    tasks = [task(f"{key} {number}", api_key=key) for key in ("slow", "quick") for number in range(300)]
    batch_id = api.submit(*tasks)
    api.wait(batch_id, lambda batch: batch["completed_tasks"] == 300)

    assert [request.headers["Authorization"] for request in model.requests].count("Bearer slow") == 1
    error = api.get("/health")["error"]
    assert "refuses calls since" in error and "no call before" in error
    assert error.startswith("127.0.0.1:") and "Bearer" not in error and "slow" not in error


def test_a_date_to_wait_for_is_by_the_providers_clock(model):
    """The clock here may be wrong; where the provider tells no time it has to do."""
    dates = {"Date": "Wed, 01 Jan 2020 00:00:00 GMT", "Retry-After": "Wed, 01 Jan 2020 00:00:30 GMT"}
    model.answers(Answer({}, 429, dates), Answer({}, 429, {**dates, "Date": "today"}))
    provider = Provider(CallPolicy())
    asked = [provider.call("POST", model.url, None, "{}").retry_after for _ in range(2)]
    provider.close()

    assert asked == [30, 0]


@pytest.mark.parametrize("status", [429, 503, 529])
def test_a_refusal_is_not_a_try(serve, model, task, status):
    """However often one is refused, the task does not fail for it."""
    refusal = Answer({"error": "slow down"}, status, {"Retry-After": "0.001"})
    model.answers(*[refusal] * 15, GOOD)
    (result,) = serve().run(task())

    assert result["status"] == "COMPLETED"
    assert len(model.requests) == 16


def test_a_refusal_inside_of_a_200_is_one(serve, model, task):
    """Some gateways answer 200 with the provider's error in it: its code counts."""
    refusal, failure = {"error": {"code": 429, "message": "slow"}}, {"error": {"code": 502, "message": "oops"}}
    model.answers(*[refusal] * 12, failure, GOOD)
    (result,) = serve().run(task())

    assert result["status"] == "COMPLETED"


def test_a_small_batch_does_not_wait_for_what_a_large_one_holds(pace, model, task):
    """Batches take turns at a slow account, too."""
    api = pace({"window": 0.2}, rpm=2)
    model.answers(GOOD)
    large = api.submit(*[task(str(number)) for number in range(60)])
    model.wait_for_requests(3)
    small = api.submit(task("small"))
    api.wait(small)

    assert api.batch(large)["completed_tasks"] < 40


def test_a_small_batch_does_not_wait_for_what_has_piled_up_for_another_account(serve, model, task):
    """While a provider was away, many tasks were read for it; those that come for another one take turns with them."""
    api, hold = serve(workers=1), threading.Event()
    refusal = Answer({"error": "slow down"}, 429, {"Retry-After": "0.5"})
    model.answers(refusal, *[GOOD] * 8, Answer(GOOD, hold=hold), GOOD)
    api.submit(*[task(f"large {number}", api_key="large") for number in range(300)])
    model.wait_for_requests(10)
    small = api.submit(*[task(f"small {number}") for number in range(10)])
    hold.set()
    api.wait(small)

    assert model.prompts().index("small 0") <= 12
    assert model.prompts().index("small 9") <= 50


# A pace, by a clock of its own.


def account(**limits):
    return Account("provider", CallPolicy(), Limits(**limits))


def good(tokens=0, *told):
    return Outcome(Kind.ANSWERED, result=Result(True, "{}", 0, 0, 0, tokens), told=told)


def delays(paced, count, tokens=0, outcome=None):
    """When each of so many calls could start, the earlier ones being answered at once."""
    now, times = 1000.0, []
    for _ in range(count):
        estimate = Estimate(tokens, 0)
        now += paced.delay(estimate, now)
        times.append(round(now - 1000, 3))
        paced.ended(paced.start(estimate, 0.0, now), outcome or good(), now)
    return times


def test_known_limits_hold_from_the_first_call():
    """Never more in a minute than the provider allows, whichever way it counts."""
    assert delays(account(rpm=3), 7) == [0, 0, 0, 61, 61, 61, 122]
    assert delays(account(tpm=100), 4, 50, good(50)) == [0, 0, 61, 61]


def test_tokens_are_corrected_by_the_usage():
    """A call that took fewer tokens than it might have makes room."""
    assert delays(account(tpm=100), 5, 50, good(25)) == [0, 0, 0, 61, 61]


def test_a_call_larger_than_the_limit_waits_for_an_empty_minute():
    """It can't be sent otherwise; that it is too large is the provider's to say."""
    assert delays(account(tpm=100), 2, 500, good(500)) == [0, 61]


def test_what_a_provider_says_of_its_limit_is_kept_to():
    """When nearly nothing remains, calls come as fast as it fills again, and none is refused for that."""
    near = Told("requests", limit=60, remaining=0, full_in=60)
    times = delays(account(), 4, outcome=good(0, near))

    assert times[0] == times[1] == 0  # the first answer tells
    assert [round(late - early) for early, late in zip(times[1:], times[2:])] == [1, 1]


@pytest.mark.parametrize("waits, logged", [([0.0] * 3, 0), ([0.0] * 9, 1), ([400.0] * 9, 1), ([0.0, 400.0], 1)])
def test_the_words_of_a_long_trouble_are_logged_once(caplog, waits, logged):
    """What is refused now and then is paced, and no news; health, which is open to anybody, shows no such words."""
    paced, now = account(), 1000.0
    for trouble in (1, 2):
        refusals = [Outcome(Kind.REFUSED, "daily quota", retry_after=seconds) for seconds in waits]
        for outcome in [*refusals, good()]:
            now += paced.delay(Estimate(), now)
            paced.ended(paced.start(Estimate(), 0.0, now), outcome, now)
        assert len(caplog.records) == trouble * logged

    assert caplog.messages == ["provider refuses calls: daily quota"] * 2 * logged


def test_calls_that_are_refused_whatever_the_rate_do_not_stop_it():
    """A provider that refuses every tenth call by chance is not called slower and slower."""
    paced, now, calls = account(), 1000.0, 0
    for number in range(2000):
        now += paced.delay(Estimate(), now)
        outcome = Outcome(Kind.REFUSED, retry_after=1.0) if number % 10 == 9 else good()
        paced.ended(paced.start(Estimate(), 0.0, now), outcome, now + 0.01)
        now += 0.01
        calls += 1

    assert now - 1000 < 2000


def fixed(limit, phase):
    """Lets so many calls through from one full minute to the next."""
    counts = {}

    def lets_through(now):
        minute = (now - phase) // 60
        counts[minute] = counts.get(minute, 0) + 1
        return counts[minute] <= limit

    return lets_through


def sliding(limit, _):
    """Lets so many calls through in any minute."""
    let_through = deque([-math.inf] * limit, maxlen=limit)

    def lets_through(now):
        is_allowed = let_through[0] <= now - 60
        if is_allowed:
            let_through.append(now)
        return is_allowed

    return lets_through


def bucket(limit, capacity):
    """Lets as many calls through as there are tokens, of which so many fit in, and come back in a minute."""
    level, filled_at = capacity, 0.0

    def lets_through(now):
        nonlocal level, filled_at
        level, filled_at = min(level + (now - filled_at) * limit / 60, capacity), now
        is_allowed = level >= 1
        level -= is_allowed
        return is_allowed

    return lets_through


def simulated(lets_through, count, workers=16, latency=0.3):
    """How often calls were refused, with no word of how long to wait, and how long all took, by a clock of its own."""
    paced, now, running, ended, refused = account(), 1000.0, [], 0, 0
    while ended < count:
        while running and running[0][0] <= now:
            _, _, call, is_let_through = heapq.heappop(running)
            paced.ended(call, good() if is_let_through else Outcome(Kind.REFUSED), now)
            ended += is_let_through
            refused += not is_let_through
        is_free = len(running) < min(workers, count - ended)
        delay = paced.delay(Estimate(), now) if is_free else math.inf
        if delay <= 0:
            call = paced.start(Estimate(), 0.0, now)
            end = now + latency * random.uniform(0.9, 1.1)
            heapq.heappush(running, (end, random.random(), call, lets_through(now + latency / 3)))
        elif ended < count:
            now = min(now + delay, running[0][0] if running else math.inf)
    return refused, now - 1000


@pytest.mark.parametrize("limit, count", [(20, 240), (60, 600), (500, 2500)])
@pytest.mark.parametrize(
    "kind, detail", [(fixed, 0), (fixed, 7), (fixed, 31), (fixed, 59), (sliding, 0), (bucket, 5), (bucket, 20)]
)
def test_a_limit_that_nobody_tells_is_learned(monkeypatch, kind, detail, limit, count):
    """Whichever way the provider counts, few calls are refused, and little time is lost."""
    for seed in range(3):
        monkeypatch.setattr("random.uniform", random.Random(seed).uniform)
        refused, seconds = simulated(kind(limit, detail), count)

        assert refused <= 0.1 * count
        assert seconds <= 1.2 * 60 * count / limit


@pytest.mark.parametrize("start, end", [(5, 15), (5, 65), (100, 110), (100, 160)])
def test_a_provider_that_has_too_much_to_do_is_soon_called_as_before(start, end):
    """It refuses everything for some time, with no word of how long: that is no limit by the minute."""
    refused, seconds = simulated(lambda now: not start < now - 1000 < end, 20_000)

    assert refused < 30
    assert seconds < 20_000 / 16 * 0.3 + (end - start) + 120


def test_a_limit_by_the_minute_that_is_raised_is_found_out():
    """One call more is tried now and then; when several were let through, the pace is tried anew."""
    lets_through = [sliding(20, 0), sliding(200, 0)]
    _, seconds = simulated(lambda now: lets_through[now > 1200](now), 800)

    assert seconds < 1000  # 2,400 at the first limit


@pytest.mark.parametrize(
    "text, seconds",
    [("1s", 1), ("20ms", 0.02), ("6m0s", 360), ("2m59.56s", 179.56), ("1h2m3s", 3723), ("7", 7), ("1d", 86400)],
)
def test_the_time_until_a_limit_is_reset_is_read(text, seconds):
    """As OpenAI and those like it write it."""
    assert _seconds(text, None) == pytest.approx(seconds)


@pytest.mark.parametrize("zone", ["GMT", "-0000", ""])
@pytest.mark.parametrize("text", ["2020-01-01T00:01:00Z", "1577836860", "1577836860000"])
def test_a_time_of_reset_is_by_the_providers_clock(text, zone):
    """Anthropic gives a time, others the seconds or milliseconds since 1970; the clock here may be wrong."""
    assert _seconds(text, f"Wed, 01 Jan 2020 00:00:30 {zone}") == 30


@pytest.mark.parametrize(
    "text, date",
    [
        ("soon", None),
        ("2020-01-01T00:01:00Z", "no date"),
        ("2020-01-01T00:01:00Z", "Wed, 01 Jan 2020 00.00.30.00 GMT"),
        ("2020-01-01T00:01:00Z", "01 Jan , 00:00:30"),
        ("4102444800", "Wed, 01 Jan 2020 00:00:30 GMT"),
    ],
)
def test_what_is_no_time_of_reset_is_nothing(text, date):
    """It costs no answer, and stops no account for years."""
    with pytest.raises(ValueError):
        _seconds(text, date)


def test_a_long_text_that_is_no_duration_takes_no_time():
    """Twice as long, twice the time: none of our threads runs meanwhile."""
    started = time.process_time()
    with pytest.raises(ValueError):
        _seconds("9" * 30_000 + "x", None)

    assert time.process_time() - started < 1


@pytest.mark.parametrize(
    "reset, date",
    [
        ("2020-01-01T00:01:00Z", "today"),
        ("9" * 400, "Wed, 01 Jan 2020 00:00:30 GMT"),
    ],
)
def test_an_answer_is_not_lost_to_its_headers(serve, model, task, reset, date):
    """Though its date cannot be read, or its numbers are too large."""
    limit = {f"anthropic-ratelimit-requests-{name}": "1" for name in ("limit", "remaining")}
    reset = {"anthropic-ratelimit-requests-reset": reset, "Date": date}
    model.answers(Answer(GOOD, headers={**limit, **reset}))

    assert serve().run(task())[0]["status"] == "COMPLETED"


def test_health_tells_of_a_refusal_for_longer_than_any_calendar(serve, model, task):
    """It may be a mistake; whoever asks has to see it."""
    model.answers(Answer({"error": "no"}, 429, {"Retry-After": "1e18"}))
    api = serve()
    api.submit(task())
    model.wait_for_requests(1)
    deadline, pause = time.monotonic() + DEADLINE, threading.Event()
    while api.get("/health")["error"] is None:
        assert time.monotonic() < deadline
        pause.wait(0.01)

    assert re.search("no call before (3000|2999)-", api.get("/health")["error"])


def test_a_limit_in_the_headers_is_kept_to(pace, model, task):
    """The provider says that nothing remains for long: no call follows those that ran."""
    headers = {"x-ratelimit-limit-requests": "1", "x-ratelimit-remaining-requests": "0"}
    model.answers(Answer(GOOD, headers={**headers, "x-ratelimit-reset-requests": "60s"}))
    api = pace(workers=2)
    batch_id = api.submit(*[task(str(number)) for number in range(50)])
    batch = api.wait(batch_id, lambda batch: batch["completed_tasks"] >= 2)

    assert len(model.requests) <= 4
    assert batch["failed_tasks"] == 0


@pytest.mark.parametrize(
    "body, tokens",
    [
        ({"max_tokens": 10}, 10),
        ({"max_tokens": 10, "n": 3}, 30),
        ({"max_tokens": 10, "n": 2, "best_of": 5}, 50),
        ({"generationConfig": {"maxOutputTokens": 10, "candidateCount": 4}}, 40),
        ({"max_tokens": 10, "n": None}, 10),
        ({"n": 3}, None),
    ],
)
def test_each_of_several_answers_may_be_as_long_as_one(body, tokens):
    """For the limits and the budget."""
    assert output_limit(body) == tokens


# No account.


@pytest.mark.parametrize(
    "answer",
    [
        Answer({"error": "wrong key"}, 401),
        Answer({"error": "not allowed"}, 403),
        Answer({"error": "pay"}, 402),
        Answer({"error": {"code": "insufficient_quota", "message": "check your plan"}}, 429),
        Answer({"error": {"message": "Your credit balance is too low to access the API"}}, 400),
        Answer({"error": {"message": "Quota exceeded for metric: free_tier_requests, limit: 0\nRetry in 7 s."}}, 429),
    ],
)
def test_without_an_account_no_more_calls_are_made(serve, model, task, answer):
    """After some in a row the rest of the tasks fail without a call, and their error says why."""
    api = serve(workers=2)
    model.answers(answer)
    results = api.run(*[task(str(number)) for number in range(100)])

    assert len(model.requests) <= 7
    assert all(result["status"] == "FAILED" for result in results)
    assert results[-1]["completions"]["error"].startswith("not called: 127.0.0.1:")
    assert "denied 5 calls in a row" in results[-1]["completions"]["error"]


def test_tasks_that_come_later_are_called_again(serve, model, task):
    """By then the account may be in order."""
    api = serve(workers=1)
    model.answers(*[Answer({"error": "wrong key"}, 401)] * 5, GOOD)
    first = api.run(*[task(str(number)) for number in range(10)])
    (second,) = api.run(task("more"))

    assert {result["status"] for result in first} == {"FAILED"}
    assert second["status"] == "COMPLETED"


def test_one_success_shows_that_there_is_an_account(serve, model, task):
    """A key that is refused some things only is called on."""
    api = serve(workers=1)
    model.answers(lambda request: GOOD if b"good" in request.body else Answer({"error": "moderated"}, 403))
    results = api.run(*[task(f"{'good' if number % 4 == 3 else 'bad'} {number}") for number in range(40)])

    assert len(model.requests) == 40
    assert sum(result["status"] == "COMPLETED" for result in results) == 10


def test_a_limit_that_is_not_0_is_a_refusal(serve, model, task):
    """In the same words."""
    refusal = Answer({"error": {"message": "Quota exceeded for metric: free_tier_requests, limit: 05"}}, 429)
    model.answers(*[refusal] * 6, GOOD)
    (result,) = serve().run(task())

    assert result["status"] == "COMPLETED"


@pytest.mark.parametrize(
    "words",
    [
        "Request too large for gpt-4o: Limit 30000, Requested 33000.",
        "Limit 30000, Requested 33000. The input or output tokens must be reduced in order to run successfully.",
    ],
)
def test_a_call_that_no_minute_has_room_for_fails_with_the_providers_words(serve, model, task, words):
    """It would be refused for ever."""
    large = Answer({"error": {"message": words, "code": "rate_limit_exceeded"}}, 429)
    model.answers(lambda request: large if b"large" in request.body else GOOD)
    results = serve().run(task("large"), task("small"))

    assert [result["status"] for result in results] == ["FAILED", "COMPLETED"]
    assert words in results[0]["completions"]["error"]
    assert len(model.requests) == 2


# Away.


def test_a_provider_that_never_answers_is_given_up_for_all_its_tasks(serve, model, task):
    """With the tries of one task: those of the others are not made."""
    api = serve(workers=4)
    model.answers(DROP)
    results = api.run(*[task(str(number)) for number in range(500)])

    assert len(model.requests) < 40
    assert all(result["status"] == "FAILED" for result in results)
    error = results[-1]["completions"]["error"]
    assert error.startswith("not called: 127.0.0.1:") and "has never answered, tried 11 times since" in error


def test_while_a_provider_is_away_its_tasks_use_up_no_tries(pace, model, task):
    """One call at a time finds out when it is back; then all tasks complete."""
    api = pace({"longest_pause": 0.005}, workers=4)
    answers = iter([GOOD] + [DROP] * 60)
    model.answers(lambda request: next(answers, GOOD))
    results = api.run(task("first"))
    results += api.run(*[task(str(number)) for number in range(40)])

    assert all(result["status"] == "COMPLETED" for result in results)


def test_a_provider_that_stays_away_is_given_up(pace, model, task):
    """Though it had answered; after an hour, which is shorter here."""
    api = pace({"given_up_after": 0.2, "longest_pause": 0.01}, workers=2)
    model.answers(GOOD, DROP)
    api.run(task("first"))
    results = api.run(*[task(str(number)) for number in range(100)])

    assert all(result["status"] == "FAILED" for result in results)
    assert "no longer answers" in results[-1]["completions"]["error"]


def test_health_says_that_a_provider_is_away(pace, task):
    """Which, since when, and until when it is not called."""
    api = pace({"backoff": 30.0, "longest_pause": 60.0}, workers=8)
    api.submit(*[task(str(number), url="http://127.0.0.1:1/v1?key=secret") for number in range(30)])
    deadline = time.monotonic() + DEADLINE
    while "is away" not in (api.get("/health")["error"] or ""):
        assert time.monotonic() < deadline
    error = api.get("/health")["error"]

    assert error.startswith("127.0.0.1:1 is away since 20")
    assert "no call before 20" in error and "secret" not in error


def test_health_says_that_tasks_wait_for_a_provider_that_was_given_up(pace, task):
    """More tasks have come, but the time until which it is not called is not over."""
    api = pace({"retries": 0, "backoff": 30.0, "longest_pause": 60.0}, workers=8)
    tasks = [task(str(number), url="http://127.0.0.1:1/v1") for number in range(30)]
    api.run(*tasks)
    assert api.get("/health")["error"] is None
    api.submit(*tasks)
    deadline = time.monotonic() + DEADLINE
    while "is away" not in (api.get("/health")["error"] or ""):
        assert time.monotonic() < deadline

    assert "no call before 20" in api.get("/health")["error"]


def test_a_call_that_was_refused_takes_no_tokens():
    """Others have them."""
    paced, now = account(tpm=1000), 1000.0
    paced.ended(paced.start(Estimate(0, 600), 0.0, now), Outcome(Kind.REFUSED, retry_after=1.0), now)

    assert paced.delay(Estimate(0, 600), now + 1) == 0.0


def test_trouble_lasts_until_calls_may_start():
    """Though one that started since the first refusal was answered; and it says when a call tries again."""
    paced, now = account(), 1000.0
    paced.waiting.append(SimpleNamespace(id=1))
    first, second = (paced.start(Estimate(), 0.0, now) for _ in range(2))
    paced.ended(first, Outcome(Kind.REFUSED, retry_after=10.0), now + 1)
    probe = paced.start(Estimate(), 0.0, now + 11)
    assert paced.trouble(now + 12).endswith("a call tries it again")
    paced.ended(second, Outcome(Kind.REFUSED, retry_after=1000.0), now + 13)
    paced.ended(probe, good(), now + 14)

    assert paced.delay(Estimate(), now + 15) == 998.0
    assert "no call before" in paced.trouble(now + 15)
    assert paced.trouble(now + 1014) is None


def test_health_says_how_long_a_limit_in_the_headers_holds_tasks_up():
    """Of fifty calls a day each waits for half an hour; one that waits for less than a minute is no news."""
    paced, now = account(), 1000.0
    told = Told("requests", limit=50, remaining=0, full_in=86400)
    paced.ended(paced.start(Estimate(), 0.0, now), good(0, told), now)
    paced.ended(paced.start(Estimate(), 0.0, now), good(0, told), now)
    assert paced.trouble(now) is None  # nothing waits
    paced.waiting.append(SimpleNamespace(id=1))

    assert paced.delay(Estimate(), now) > 1700
    assert "no call before" in paced.trouble(now)
    assert paced.trouble(now + 1720) is None


def test_health_says_until_when_a_task_has_to_wait(serve, model, task):
    """Its provider failed, and asked for a long pause."""
    model.answers(Answer({"error": "oops"}, 500, {"Retry-After": "4000"}))
    api = serve()
    api.submit(task())
    deadline = time.monotonic() + DEADLINE
    while api.get("/health")["error"] is None:
        assert time.monotonic() < deadline

    assert re.search("Server error .*; no call before 20", api.get("/health")["error"])


def test_a_task_that_always_fails_has_its_own_tries(serve, model, task):
    """The provider is not away: the other tasks complete, and this one fails."""
    api = serve(workers=2)
    model.answers(lambda request: Answer({"error": "oops"}, 500) if b"poison" in request.body else GOOD)
    results = api.run(*[task("poison" if number == 5 else str(number)) for number in range(50)])

    assert [result["status"] for result in results].count("FAILED") == 1
    assert "(tried 11 times)" in results[5]["completions"]["error"]


def test_tasks_that_always_fail_hold_up_nothing(serve, model, task):
    """What is left of a batch, when all others were answered, says nothing of the provider; and each says its tries."""
    api = serve(workers=4)
    model.answers(lambda request: Answer({"error": "oops"}, 500) if b"poison" in request.body else GOOD)
    results = api.run(*[task(f"poison {number}" if number < 8 else str(number)) for number in range(50)])

    asked = [json.loads(request.body)["messages"][0]["content"] for request in model.requests]
    assert sum("poison" in text for text in asked) == 8 * 11 and len(set(asked)) == 50
    assert all("(tried 11 times)" in result["completions"]["error"] for result in results[:8])


@pytest.mark.parametrize("is_reached", [True, False])
def test_a_task_that_failed_before_others_were_answered_does_not_tell_that_a_provider_is_away(is_reached):
    """But where nobody is reached, any task tells."""
    paced, now = account(), 1000.0
    for started in range(10):
        paced.ended(paced.start(Estimate(), 0.0, now + started), good(), now + started)
        call = paced.start(Estimate(), 0.0, now + started, failed_at=now - 1)
        paced.ended(call, Outcome(Kind.FAILED, "oops", is_reached=is_reached), now + started)
    for started in range(20, 30):
        call = paced.start(Estimate(), 0.0, now + started, failed_at=now + 1)
        paced.ended(call, Outcome(Kind.FAILED, "oops", is_reached=is_reached), now + started)

    assert paced.is_away == (not is_reached)


@pytest.mark.parametrize("status", [408, 409, 425])
def test_a_conflict_that_may_pass_is_tried_again(serve, model, task, status):
    """As are 5xx."""
    model.answers(Answer({"error": "not now"}, status), GOOD)
    (result,) = serve().run(task())

    assert result["status"] == "COMPLETED"


# What is no answer.


def test_a_stream_fails_at_once_and_says_what_to_change(serve, model, task):
    """It is not read, and not asked for again."""
    events = [b"data: {}\n\n", threading.Event()]
    model.answers(Answer(headers={"Content-Type": "text/event-stream"}, chunks=events))
    (result,) = serve().run(task())

    assert len(model.requests) == 1
    assert 'remove "stream" from the body' in result["completions"]["error"]


def test_a_refusal_of_a_stream_is_a_refusal(serve, model, task):
    """Some providers say it as a stream, too."""
    model.answers(Answer({"error": "slow"}, 429, {"Content-Type": "text/event-stream", "Retry-After": "0.001"}), GOOD)
    (result,) = serve().run(task())

    assert result["status"] == "COMPLETED"


@pytest.mark.parametrize("reason, content", [("content_filter", "half of"), ("stop", ""), ("stop", None)])
def test_an_empty_or_filtered_answer_is_not_for_others(serve, model, task, reason, content):
    """Neither for an identical task that waited for it, nor for one that comes later."""
    api = serve(workers=1)
    empty = {"choices": [{"message": {"content": content}, "finish_reason": reason}]}
    hold = threading.Event()
    model.answers(Answer(empty, hold=hold), empty, GOOD)
    batch_id = api.submit(task("same"), task("same"))
    model.wait_for_requests(1)
    hold.set()
    batch = api.wait(batch_id)
    (later,) = api.run(task("same"))

    assert (batch["completed_tasks"], batch["cached_tasks"]) == (2, 0)
    assert (later["status"], later["cached"], later["completions"]) == ("COMPLETED", False, GOOD)


# The method.


def test_the_method_of_a_task_is_what_is_sent(serve, model, task):
    """And its answer is not another method's."""
    model.answer("PUT", "/v1/chat/completions", GOOD)
    api = serve()
    posted, put = api.run(task("same"), task("same", method="PUT"))

    assert sorted(request.method for request in model.requests) == ["POST", "PUT"]
    assert not posted["cached"] and not put["cached"]


def test_a_method_without_a_body_is_refused(serve, task):
    """At the upload, with its line."""
    response = serve().upload(json.dumps(task(method="GET")))

    assert response.status_code == 422
    assert "line 1: 'method' must be 'POST', 'PUT' or 'PATCH'" in response.text


# Money.


def priced(model, completion_tokens, hold=None):
    """Every answer takes 1,000 output tokens, or so many."""
    usage = {"prompt_tokens": 0, "completion_tokens": completion_tokens, "total_tokens": completion_tokens}
    model.answers(Answer({**GOOD, "usage": usage}, hold=hold))


def limited(task, prompt, limit=1000):
    made = task(prompt)
    return {**made, "body": {**made["body"], "max_tokens": limit}}


def stuck(api, batch_id, waiting):
    """The batch, when so many of its tasks wait for money."""
    deadline = time.monotonic() + DEADLINE
    while api.get("/health")["budget"]["waiting"] != waiting:
        assert time.monotonic() < deadline, api.get("/health")
    # The last results may still be on their way to the disk; one that just got there counts as pending for a moment.
    return api.wait(batch_id, lambda batch: batch["pending_tasks"] == waiting and not batch["processing_tasks"])


def test_no_more_is_spent_than_may_be(serve, model, task):
    """Calls in flight included: with a cap of ten calls' cost, ten are made by sixteen workers, and the rest waits."""
    api = serve(max_cost=10.0, output_cost=1000.0)
    priced(model, 1000)
    batch_id = api.submit(*[limited(task, str(number)) for number in range(30)])
    batch = stuck(api, batch_id, 20)

    assert (batch["completed_tasks"], batch["pending_tasks"], len(model.requests)) == (10, 20, 10)
    assert api.get("/health")["budget"] == {"spent": 10.0, "cap": 10.0, "waiting": 20}
    assert "the budget of 10 is used up" in api.get("/health")["error"]


def test_what_calls_leave_of_their_limit_is_spent_on_others(serve, model, task):
    """A call that answers in fewer tokens than it may makes room for more."""
    api = serve(max_cost=10.0, output_cost=1000.0)
    priced(model, 500)
    batch_id = api.submit(*[limited(task, str(number)) for number in range(30)])
    stuck(api, batch_id, 11)

    assert len(model.requests) == 19


def test_a_call_without_a_limit_is_taken_for_the_largest_seen(serve, model, task):
    """Or for 1,000 tokens at least."""
    api = serve(max_cost=10.0, output_cost=1000.0, workers=1)
    priced(model, 4000)
    batch_id = api.submit(*[task(str(number)) for number in range(30)])
    stuck(api, batch_id, 28)

    assert len(model.requests) == 2


def test_what_the_cache_answers_costs_nothing(serve, model, task, tmp_path):
    """With no money left, identical tasks still complete; after a restart they count for nothing, either."""
    settings = {"database": tmp_path / "tasks.db", "max_cost": 1.0, "output_cost": 1000.0}
    api = serve(**settings)
    priced(model, 1000)
    api.run(limited(task, "same"))
    (again,) = api.run(limited(task, "same"))
    api.close()

    assert again["cached"]
    assert serve(**settings).get("/health")["budget"]["spent"] == 1.0


def test_a_higher_cap_goes_on_where_the_lower_one_stopped(serve, model, task, tmp_path):
    """What was spent before the restart counts."""
    database, price = tmp_path / "tasks.db", {"output_cost": 1000.0}
    priced(model, 1000)
    api = serve(database=database, max_cost=4.0, **price)
    batch_id = api.submit(*[limited(task, str(number)) for number in range(10)])
    stuck(api, batch_id, 6)
    api.close()
    api = serve(database=database, max_cost=7.0, **price)
    stuck(api, batch_id, 3)
    api.close()
    api = serve(database=database, max_cost=70.0, **price)

    assert api.wait(batch_id)["completed_tasks"] == 10
    assert len(model.requests) == 10


def test_what_was_deleted_was_spent(serve, model, task, tmp_path):
    """A batch or a task, after a restart, too."""
    settings = {"database": tmp_path / "tasks.db", "max_cost": 10.0, "output_cost": 1000.0}
    api = serve(**settings)
    priced(model, 1000)
    tasks = api.run(*[limited(task, str(number)) for number in range(4)])
    api.ask("DELETE", f"/api/v1/tasks/{tasks[0]['message_id']}")
    batch_id = api.submit(*[limited(task, str(number)) for number in range(1, 7)])  # three from the cache
    api.wait(batch_id)
    api.ask("DELETE", f"/api/v1/batches/{batch_id}")
    api.close()

    assert serve(**settings).get("/health")["budget"]["spent"] == 7.0


def test_what_was_deleted_while_it_was_called_was_spent(serve, model, task, tmp_path):
    """Its call was not broken off."""
    settings, hold = {"database": tmp_path / "tasks.db", "max_cost": 10.0, "output_cost": 1000.0}, threading.Event()
    api = serve(**settings)
    priced(model, 1000, hold)
    batch_id = api.submit(*[limited(task, str(number)) for number in range(4)])
    model.wait_for_requests(4)
    api.ask("DELETE", f"/api/v1/batches/{batch_id}")
    hold.set()
    api.run(limited(task, "last"))
    api.close()

    assert serve(**settings).get("/health")["budget"]["spent"] == 5.0


@pytest.mark.parametrize("limit, spent", [(500, 2.0), (None, 4.0)])
def test_an_answer_that_does_not_tell_its_tokens_counts_for_the_most_it_may_have(
    serve, model, task, tmp_path, limit, spent
):
    """After a restart, too."""
    settings = {"database": tmp_path / "tasks.db", "max_cost": spent, "output_cost": 1000.0}
    model.answers({"choices": []})
    api = serve(**settings)
    batch_id = api.submit(*[limited(task, str(number), limit) for number in range(6)])
    stuck(api, batch_id, 2)
    api.close()
    api = serve(**settings)
    stuck(api, batch_id, 2)

    assert api.get("/health")["budget"]["spent"] == spent
    assert len(model.requests) == 4


def test_what_an_answer_counts_for_is_what_was_put_aside_for_it(serve, model, task, tmp_path):
    """Whatever others have taken meanwhile; before and after a restart."""
    settings, hold = {"database": tmp_path / "tasks.db", "max_cost": 100.0, "output_cost": 1000.0}, threading.Event()
    long = {**GOOD, "usage": {"prompt_tokens": 0, "completion_tokens": 5000, "total_tokens": 5000}}
    model.answers(lambda request: Answer({"choices": []}, hold=hold) if model.prompt(request) == "untold" else long)
    api = serve(**settings)
    batch_id = api.submit(task("untold"))
    model.wait_for_requests(1)
    api.run(task("long"))
    hold.set()
    api.wait(batch_id)
    before = api.get("/health")["budget"]["spent"]
    api.close()

    assert before == serve(**settings).get("/health")["budget"]["spent"] == 6.0


def test_the_client_says_that_the_money_is_used_up(model, monkeypatch):
    """With what was spent, the cap, and how many tasks wait."""
    monkeypatch.setattr("synthgen._waiting._ASK_AFTER", 0.05)
    priced(model, 1000)
    tasks = [Task(url=model.url, body={"messages": [{"content": str(i)}], "max_tokens": 1000}) for i in range(9)]
    with LocalServer(max_cost=4.0, output_cost=1000.0) as server, server.client() as client:
        with pytest.raises(BudgetExceededError, match="higher max_cost") as caught:
            client.monitor_batch(tasks, show_progress=False)

    error = caught.value
    assert (error.spent, error.cap, error.waiting) == (4.0, 4.0, 5)
    assert error.batch_id


def test_a_task_that_was_called_before_may_wait_for_money(model, monkeypatch):
    """It failed, and meanwhile another one cost more than there was room for: it counts as waiting, not as running."""
    monkeypatch.setattr("synthgen._waiting._ASK_AFTER", 0.05)
    has_failed = threading.Event()

    def answer(request):
        if b"bad" in request.body:
            has_failed.set()
            return Answer({"error": "oops"}, 500, {"Retry-After": "0.5"})
        has_failed.wait(DEADLINE)
        return {**GOOD, "usage": {"prompt_tokens": 0, "completion_tokens": 4000}}

    model.answers(answer)
    bodies = [{"messages": [{"content": name}], "max_tokens": 1000} for name in ("bad", "good")]
    tasks = [Task(url=model.url, body=body) for body in bodies]
    with LocalServer(max_cost=4.5, output_cost=1000.0) as server, server.client() as client:
        with pytest.raises(BudgetExceededError) as caught:
            client.monitor_batch(tasks, show_progress=False, timeout=10.0)
        health = client.check_health()

    assert (caught.value.spent, caught.value.waiting, health.budget.waiting) == (4.0, 1, 1)
    assert "the budget of 4.5 is used up" in health.error


def test_limits_and_prices_may_be_any_numbers(serve, model, task):
    """Money often is a Decimal, which does not go with floats."""
    limits = {"rpm": Decimal(600), "tpm": Fraction(10**6), "max_cost": Decimal(20)}
    api = serve(**limits, input_cost=Decimal("0.15"), output_cost=1)
    (result,) = api.run(task())

    assert result["status"] == "COMPLETED"
    assert api.get("/health")["budget"]["cap"] == 20


@pytest.mark.parametrize(
    "settings",
    [
        {"max_cost": 1.0},
        {"rpm": 0},
        {"rpm": 0.5},
        {"tpm": -1},
        {"max_cost": 0, "input_cost": 1},
        {"max_cost": 1, "input_cost": 1, "output_cost": -1},
        {"max_cost": 1, "input_cost": math.nan},
        {"max_cost": 1, "input_cost": "much"},
        {"tpm": [1]},
    ],
)
def test_limits_that_make_no_sense_are_refused(settings):
    """A cap without prices or with impossible ones, and what is not more than nothing."""
    with pytest.raises(ConfigurationError):
        LocalServer(**settings)
