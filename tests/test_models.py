"""Models: strict in what is sent, easy in what is received."""

import json
import pickle
import traceback
from collections import OrderedDict, namedtuple
from datetime import date, datetime, timedelta, timezone
from decimal import Decimal
from enum import Enum
from pathlib import PurePath
from typing import List, Optional
from uuid import UUID

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import BaseModel, Field, RootModel, ValidationError

from synthgen.exceptions import ContentError
from synthgen.models import (
    Batch,
    BatchList,
    CalendarInterval,
    HealthResponse,
    HealthStatus,
    ServiceStatus,
    StatsSummary,
    Task,
    TaskResponse,
    TaskStatsResponse,
    TaskStatus,
    TimeSeriesDataPoint,
    UsageStatsResponse,
)

URL = "http://provider.test/v1/chat/completions"
KEY = "sk-never-to-be-seen"

texts = st.text(st.characters(blacklist_categories=["Cs"]))
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda values: st.lists(values, max_size=3) | st.dictionaries(texts, values, max_size=3),
    max_leaves=10,
)
bodies = st.dictionaries(texts, json_values, max_size=3)


def task(**fields):
    return Task(**{"url": URL, "body": {}, **fields})


def refusal(**fields):
    with pytest.raises(ValidationError) as caught:
        task(**fields)
    return caught.value


# ---------------------------------------------------------------------------------------------- sent


@given(body=bodies, source=st.none() | bodies, custom_id=st.none() | texts, dataset=st.none() | texts)
def test_a_task_is_sent_as_one_ascii_line_that_says_the_same(body, source, custom_id, dataset):
    """Whatever a task holds, its line is ASCII without a newline, and reads back equal."""
    made = task(body=body, source=source, custom_id=custom_id, dataset=dataset)

    line = made.to_line()

    assert line.isascii() and b"\n" not in line
    assert json.loads(line) == made.model_dump()
    assert Task.model_validate_json(line) == made


def test_a_line_holds_every_field():
    """A server takes an absent use_cache for false, so nothing is left out."""
    assert json.loads(task().to_line()) == {
        "custom_id": None,
        "method": "POST",
        "url": URL,
        "api_key": None,
        "body": {},
        "dataset": None,
        "source": None,
        "use_cache": True,
        "track_progress": True,
    }


def test_integer_keys_are_sent_as_text():
    """JSON knows no other keys."""
    assert json.loads(task(body={"logit_bias": {50256: -100}}).to_line())["body"] == {"logit_bias": {"50256": -100}}


@pytest.mark.parametrize(
    "value", [float("nan"), float("-inf"), {1, 2}, b"bytes", datetime(2026, 1, 1), "\ud800", {"\udfff": 1}, {(1, 2): 3}]
)
@pytest.mark.parametrize("field", ["body", "source"])
def test_what_json_cannot_say_is_refused_by_its_field(field, value):
    """The error comes when the task is made, and names the field."""
    (error,) = refusal(**{field: {"deep": [{"down": value}]}}).errors()

    assert error["loc"] == (field,)
    assert "JSON" in error["msg"]


class Word(str, Enum):
    """Text that is not its value, which a serializer might take in its place."""

    ONE = "one"
    __str__ = Enum.__str__

    def __new__(cls, text):
        member = str.__new__(cls, text)
        member._value_ = f"the value of {text}"
        return member


class Kind(Enum):
    ONE = 1


#: What json takes as it is, what it takes for something else, and what it refuses; pydantic-core would take it all.
odd = st.sampled_from(
    [Word.ONE, Kind.ONE, TaskStatus.FAILED, (1, [2]), namedtuple("Pair", "a b")(1, 2), OrderedDict(b=1, a=2), {1: 2}]
    + [{None: 1}, {True: 1, False: 0}, {1.5: 1}, {1: 1, "1": 2}, {(1,): 1}, {Word.ONE: 1}, {b"k": 1}, {"\udfff": 1}]
    + [2**63, -(2**63) - 1, 10**308, 10**309, -(10**400), 1e22, 5e-324, -0.0, 0.1, float("nan"), float("-inf")]
    + ["\ud800", "\U0001f642\u2028\x7f\x00", b"b", bytearray(b"b"), {1}, frozenset([1]), range(2), Decimal("1.5")]
    + [datetime(2026, 1, 1), date(2026, 1, 1), timedelta(1), UUID(int=1), PurePath("p"), object(), Batch, 1j]
)
anything = st.recursive(
    odd | json_values,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=5,
)


@example(Decimal("1.5"))
@given(anything)
def test_what_is_sent_is_what_the_json_module_would_say(value):
    """The same values are refused, when a task is made and when it was changed since, and the same ones come back."""
    body = {"value": value}
    try:
        text = json.dumps(body, allow_nan=False, ensure_ascii=False)
        text.encode("utf-8")
    except (TypeError, ValueError):
        assert refusal(body=body).errors()[0]["loc"] == ("body",)
        made = task()
        made.body = body
        with pytest.raises((TypeError, ValueError)):
            made.to_line()
    else:
        line = task(body=body).to_line()
        assert repr(json.loads(line)["body"]) == repr(json.loads(text))
        assert line.isascii()


@pytest.mark.parametrize("depth", [200, 300, 400])
def test_a_body_may_be_nested_deeper_than_pydantic_goes(depth):
    """As deep as json goes."""
    body = {}
    for _ in range(depth):
        body = {"deeper": [body]}

    assert json.loads(task(body=body).to_line())["body"] == body


def test_a_template_that_is_filled_in_anew_makes_other_tasks():
    """All of a body is the task's own, however deep."""
    template = {"model": "m", "messages": [{"role": "user", "content": None}]}
    made = []
    for question in ("one", "two"):
        template["messages"][0]["content"] = question
        made.append(Task(url="http://x", body=template, source=template))

    assert [one.body["messages"][0]["content"] for one in made] == ["one", "two"]
    assert [one.source["messages"][0]["content"] for one in made] == ["one", "two"]


@pytest.mark.parametrize("name", ["custom_id", "url", "dataset", "source"])
@pytest.mark.parametrize("value", [{1, 2}, b"bytes", datetime(2026, 1, 1), float("nan"), "\ud800"], ids=repr)
def test_no_field_is_changed_to_what_json_cannot_say_unseen(name, value):
    """Nor made so without validation: what pydantic-core would put in its place is not sent."""
    changed, unchecked = task(), Task.model_construct(**{"url": URL, "body": {}, name: value})
    setattr(changed, name, value)

    for one in (changed, unchecked):
        with pytest.raises((TypeError, ValueError)):
            one.to_line()


def test_a_body_that_holds_itself_is_refused():
    """A cycle has no end in JSON."""
    body = {}
    body["self"] = body

    assert refusal(body=body).errors()[0]["loc"] == ("body",)


@pytest.mark.parametrize("field", ["custom_id", "method", "url", "api_key", "dataset"])
def test_a_lone_surrogate_is_refused_in_any_text(field):
    """It has no UTF-8, and would be refused by the server, with all else in the chunk."""
    assert refusal(**{field: URL + "\ud800"}).errors()[0]["loc"] == (field,)


def test_an_unknown_field_is_refused():
    """A mistyped option would be ignored by the server, and paid for."""
    (error,) = refusal(use_cahce=False).errors()

    assert error["loc"] == ("use_cahce",)


@pytest.mark.parametrize("missing", ["url", "body"])
def test_a_task_needs_a_url_and_a_body(missing):
    """What is missing is named."""
    fields = {"url": URL, "body": {}}
    del fields[missing]

    with pytest.raises(ValidationError) as caught:
        Task(**fields)

    assert caught.value.errors()[0]["loc"] == (missing,)


@pytest.mark.parametrize("url", ["", "provider.test/v1", "ftp://provider.test", "/v1/chat/completions"])
def test_a_url_that_is_not_http_is_refused(url):
    """The server could only fail with it, later and for every task."""
    assert "http" in refusal(url=url).errors()[0]["msg"]


@pytest.mark.parametrize("key", [KEY + "\n", KEY + "\r\nX: y", " " + KEY, KEY + "\u20ac"])
def test_a_key_that_cannot_be_a_header_is_refused_unseen(key):
    """The error says what is wrong with the key, and does not show it."""
    error = refusal(api_key=key)

    assert error.errors()[0]["loc"] == ("api_key",)
    assert KEY not in str(error)


def test_the_key_is_in_no_text_of_a_task():
    """Tasks get printed and logged; keys must not."""
    made = task(api_key=KEY)

    assert KEY not in repr(made) + str(made) + f"{made}"


@pytest.mark.parametrize(
    "fields",
    [
        {"api_key": KEY, "url": "nowhere"},
        {"api_key": KEY, "unknown": KEY},
        {"api_key": [KEY]},
        {"api_key": KEY, "body": {"nan": float("nan")}},
        {"api_key": KEY + "\n"},
    ],
)
def test_the_key_is_in_no_form_of_a_refusal(fields):
    """Not in the text, the list of errors, their JSON, the traceback, or a pickle of the texts."""
    error = refusal(**fields)

    shown = [str(error), repr(error), str(error.errors()), error.json()]
    shown += traceback.format_exception(type(error), error, error.__traceback__)
    assert KEY not in "".join(shown)
    assert error.__cause__ is None and error.__context__ is None


@pytest.mark.parametrize("text", ['{"api_key": "KEY", ', '{"api_key": "KEY", "url": 1}', '["KEY"]'])
def test_the_key_is_in_no_refusal_of_json_text(text):
    """A broken line of a file is refused without being shown."""
    with pytest.raises(ValidationError) as caught:
        Task.model_validate_json(text.replace("KEY", KEY))

    assert KEY not in str(caught.value) + str(caught.value.errors()) + caught.value.json()


def test_a_body_changed_to_what_json_cannot_say_is_not_sent():
    """The check when a task is made can't see later changes; the one when it is sent does."""
    made = task(body={"temperature": 1})
    made.body["temperature"] = float("nan")

    with pytest.raises(ValueError):
        made.to_line()


def test_a_task_pickles_whole():
    """A process pool may make the tasks."""
    made = task(api_key=KEY, body={"a": [1]})

    assert pickle.loads(pickle.dumps(made)) == made


# ------------------------------------------------------------------------------------------ received


@pytest.mark.parametrize("member", [*TaskStatus, *HealthStatus, *CalendarInterval], ids=str)
def test_an_enum_prints_as_its_value(member):
    """The same on every Python, however it is put into text."""
    assert [str(member), f"{member}", "%s" % member, "{}".format(member)] == [member.value] * 4  # noqa: UP030,UP031,UP032
    assert json.dumps(member) == json.dumps(member.value)


@pytest.mark.parametrize(
    "model, required",
    [
        (Batch, {"batch_id": "b", "batch_status": "COMPLETED"}),
        (BatchList, {}),
        (HealthResponse, {"status": "healthy"}),
        (ServiceStatus, {}),
        (StatsSummary, {}),
        (TaskResponse, {"message_id": "m", "status": "COMPLETED"}),
        (TaskStatsResponse, {}),
        (TimeSeriesDataPoint, {"timestamp": "2026-11-22 11:00:00"}),
        (UsageStatsResponse, {}),
    ],
)
def test_an_answer_may_hold_less_and_more(model, required):
    """Missing fields have defaults, unknown ones are kept, and the whole survives a pickle."""
    received = model.model_validate({**required, "of_a_newer_server": [1]})

    assert received.model_extra == {"of_a_newer_server": [1]}
    assert all(getattr(received, name) == 0 for name in model.model_fields if name.endswith(("_tasks", "_tokens")))
    assert pickle.loads(pickle.dumps(received)) == received


@pytest.mark.parametrize("status", list(TaskStatus))
def test_a_known_status_is_an_enum_member(status):
    """In a task and in a batch."""
    assert TaskResponse(message_id="m", status=status.value).status is status
    assert Batch(batch_id="b", batch_status=status.value).batch_status is status


def test_an_unknown_status_stays_text():
    """A server with a new status does not break an old client."""
    assert TaskResponse(message_id="m", status="PAUSED").status == "PAUSED"
    assert Batch(batch_id="b", batch_status="PAUSED").batch_status == "PAUSED"
    assert HealthResponse(status="degraded").status == "degraded"


@pytest.mark.parametrize(
    "text, microsecond",
    [
        ("2026-11-22T11:39:52.517865+00:00", 517865),
        ("2026-11-22T11:39:52.524256310Z", 524256),
        ("2026-11-22T11:39:52Z", 0),
    ],
)
def test_both_forms_of_timestamps_are_instants(text, microsecond):
    """The framework's API writes one, its worker another of nine digits."""
    received = TaskResponse(message_id="m", status="COMPLETED", completed_at=text)

    assert received.completed_at == datetime(2026, 11, 22, 11, 39, 52, microsecond, tzinfo=timezone.utc)


def test_a_bucket_starts_in_utc():
    """The wire names no zone."""
    assert TimeSeriesDataPoint(timestamp="2026-11-22 11:00:00").timestamp.utcoffset() == timedelta(0)


def completed(completions, status="COMPLETED"):
    return TaskResponse(message_id="m", status=status, completions=completions)


def test_the_content_is_the_text_of_the_first_choice():
    """Of several, the first; of the older completions API, its text."""
    chat = {"choices": [{"message": {"content": "x = 3"}}, {"message": {"content": "x = 4"}}]}

    assert completed(chat).content == "x = 3"
    assert completed({"choices": [{"text": "x = 3"}]}).content == "x = 3"


@pytest.mark.parametrize(
    "completions",
    [None, {}, {"choices": []}, {"choices": None}, {"choices": [None]}, {"choices": [{"message": {"content": None}}]}],
)
def test_there_may_be_no_content(completions):
    """Then it is None, not an error."""
    assert completed(completions).content is None


def test_the_usage_is_the_providers():
    """Tokens it counted; None where it did not say."""
    usage = completed({"usage": {"prompt_tokens": 4, "completion_tokens": 5, "total_tokens": 9}}).usage

    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (4, 5, 9)
    assert completed({"choices": []}).usage is None


@pytest.mark.parametrize(
    "completions, error",
    [
        ({"error": "HTTP 400"}, "HTTP 400"),
        ({"error": {"message": "context too long", "code": 400}}, "context too long"),
        ({"error": {"code": 400}}, "{'code': 400}"),
        (None, "no reason given"),
    ],
)
def test_a_failed_task_says_why(completions, error):
    """As text, whatever shape the provider gave it."""
    failed = completed(completions, "FAILED")

    assert failed.error == error
    assert not failed.ok


def test_a_completed_task_has_no_error():
    """And is ok."""
    assert completed({"choices": []}).ok
    assert completed({"choices": []}).error is None


class Step(BaseModel):
    """A part of what a model is asked for."""

    text: str
    tokens: Optional[int] = None


class Solution(BaseModel):
    """What a model is asked for."""

    x: float
    steps: List[Step] = Field(min_length=1)
    checked: Optional[bool] = None


SOLUTION = '{"x": 3, "steps": [{"text": "2x = 6"}]}'


def answered(content, reason="stop", status="COMPLETED", **message):
    """A task with this content."""
    choice = {"message": {"content": content, **message}, "finish_reason": reason}
    return TaskResponse(message_id="m-1", custom_id="eq-1", status=status, completions={"choices": [choice]})


def not_parsed(result, model=Solution):
    """Why there is no such model in a result."""
    with pytest.raises(ContentError) as caught:
        result.parse(model)
    assert caught.value.__cause__ is caught.value.__context__ is None  # with all of what the provider said
    return str(pickle.loads(pickle.dumps(caught.value)))


@pytest.mark.parametrize(
    "content",
    [
        SOLUTION,
        f"\n  {SOLUTION}\n",
        f"```json\n{SOLUTION}\n```",
        f"```\n{SOLUTION}\n```\n",
        f" ```JSON {SOLUTION}```",
        SOLUTION.replace("2x = 6", "```json\\n{}\\n```"),
    ],
)
def test_content_is_parsed_as_a_model(content):
    """From JSON alone, or in one fence: what is in it is converted, what is optional may be missing."""
    solution = answered(content).parse(Solution)

    assert (solution.x, len(solution.steps), solution.checked) == (3.0, 1, None)
    assert solution.steps[0].text in ("2x = 6", "```json\n{}\n```")


def test_a_list_is_parsed_as_a_root_model():
    """Where the whole of it is one."""
    assert answered("[1, 2]").parse(RootModel[List[int]]).root == [1, 2]


@pytest.mark.parametrize(
    "content",
    [
        "",
        "x = 3",
        f"The answer is {SOLUTION}",
        f"Here it is:\n```json\n{SOLUTION}\n```",
        f"```json\n{SOLUTION}\n```\nAnything else?",
        f"```json\n{SOLUTION}",
        f"```json\n{SOLUTION}\n```\n```json\n{SOLUTION}\n```",
        SOLUTION[:-1],
        SOLUTION * 2,
        SOLUTION.replace("2x", "\ud800"),
        "[" * 100_000,
    ],
)
def test_content_that_is_not_json_alone_is_refused(content):
    """What is before or after it may matter: a script can look into the content itself."""
    assert not_parsed(answered(content)).startswith("task 'eq-1': the content does not fit Solution: Invalid JSON: ")


def test_content_of_another_shape_is_refused_with_the_places():
    """Each that is wrong, in the order of the model."""
    assert not_parsed(answered('{"x": "three", "steps": [{"text": "a"}, {"tokens": 1}]}')) == (
        "task 'eq-1': the content does not fit Solution: x: Input should be a valid number, unable to parse string as "
        "a number; steps.1.text: Field required"
    )
    assert not_parsed(answered("[]")).startswith("task 'eq-1': the content does not fit Solution: Input should be")


def test_of_many_wrong_places_the_first_are_told():
    """A long list may be wrong everywhere."""
    told = not_parsed(answered(json.dumps(["a"] * 1000)), RootModel[List[int]])

    assert "4: Input should" in told and "5: Input should" not in told and told.endswith("; ...")


@pytest.mark.parametrize(
    "result, wrong",
    [
        (answered(SOLUTION, "length"), "the token limit cut the content off (finish_reason: length)"),
        (answered(SOLUTION, "content_filter"), "the provider filtered the answer, or the model refused ("),
        (answered(None, refusal="I can't."), "the provider filtered the answer, or the model refused ("),
        (answered(None, "tool_calls"), "there is no content (finish_reason: tool_calls)"),
        (answered(None, status="PENDING"), "it is PENDING"),
    ],
)
def test_an_answer_that_is_not_whole_is_not_parsed(result, wrong):
    """The error says what it is instead, also where what there is would do."""
    assert not_parsed(result).startswith(f"task 'eq-1': {wrong}")


def test_a_failed_task_is_named_by_its_message_id_where_it_has_no_other():
    """With the reason for which it failed."""
    failed = TaskResponse(message_id="m-1", status="FAILED", completions={"error": "HTTP 400"})

    assert not_parsed(failed) == "task 'm-1': it is FAILED: HTTP 400"


@given(json_values)
def test_parsing_ends_in_a_model_or_a_content_error(completions):
    """Whatever a provider sent."""
    for content in (completions, json.dumps(completions)):
        for result in (completed(content), answered(content)):
            try:
                assert result.parse(Solution).steps
            except ContentError:
                pass


def test_a_result_is_a_row_of_a_table():
    """Flat; what the row is from is a JSON text, since it may be anything."""
    usage = {"input_tokens": 4, "output_tokens": 5}
    completions = {"content": [{"type": "text", "text": "x = 3"}], "stop_reason": "end_turn", "usage": usage}
    fields = {"custom_id": "a", "dataset": "d", "duration": 56, "source": {"row": [17, "é"]}, "cached": True}

    assert TaskResponse(message_id="m", status="COMPLETED", completions=completions, **fields).to_row() == {
        "custom_id": "a",
        "message_id": "m",
        "ok": True,
        "content": "x = 3",
        "error": None,
        "finish_reason": "end_turn",
        "prompt_tokens": 4,
        "completion_tokens": 5,
        "total_tokens": 9,
        "cached": True,
        "duration_ms": 56,
        "dataset": "d",
        "source": '{"row": [17, "é"]}',
    }


def test_a_failed_task_is_a_row_too():
    """With the same columns, and None in place of what there is not."""
    row = completed({"error": "HTTP 400"}, "FAILED").to_row()

    assert list(row) == list(completed({}).to_row())
    assert {name: value for name, value in row.items() if value is not None} == {
        "message_id": "m", "ok": False, "error": "HTTP 400", "cached": False,
    }  # fmt: skip


@given(json_values, st.sampled_from(["COMPLETED", "FAILED", "PENDING", "PAUSED"]))
def test_no_answer_of_a_provider_breaks_the_conveniences(completions, status):
    """They look into whatever a provider sent."""
    received = completed(completions, status)

    assert received.content is None or isinstance(received.content, str)
    assert received.error is None or isinstance(received.error, str)
    assert received.usage is None or received.usage.total_tokens is not None


def batch(**counts):
    return Batch(batch_id="b", batch_status="COMPLETED", **counts)


def test_a_batch_costs_its_tokens_at_the_prices_given():
    """Prices are per million tokens."""
    cost = batch(prompt_tokens=2_000_000, completion_tokens=500_000).cost(0.01, 0.04)

    assert (cost.input, cost.output, cost.total) == pytest.approx((0.02, 0.02, 0.04))


def test_a_batch_without_prices_costs_nothing():
    """Prices are optional."""
    assert batch(prompt_tokens=10, completion_tokens=10).cost().total == 0.0


@pytest.mark.parametrize(
    "counts, done",
    [
        ({}, False),
        ({"total_tasks": 3, "completed_tasks": 1, "cached_tasks": 1, "failed_tasks": 1}, True),
        ({"total_tasks": 3, "cached_tasks": 3}, True),
        ({"total_tasks": 3, "completed_tasks": 2}, False),
        ({"total_tasks": 3, "completed_tasks": 3, "pending_tasks": 1}, False),
        ({"total_tasks": 3, "completed_tasks": 3, "processing_tasks": 1}, False),
    ],
)
def test_a_batch_is_done_when_every_task_has_an_outcome(counts, done):
    """Completed, cached or failed, and nothing waiting."""
    assert batch(**counts).done is done


def test_the_task_queue_has_two_names():
    """Older servers say queue_consumers and queue_messages."""
    older = ServiceStatus.model_validate({"queue_consumers": 3, "queue_messages": 7})
    newer = ServiceStatus.model_validate({"task_queue_consumers": 3, "task_queue_messages": 7})

    assert older == newer
    assert older.queue_consumers == older.task_queue_consumers == 3
    assert older.task_queue_messages == 7


def test_the_summary_counts_its_cache_hits_itself():
    """The server sends a percentage of a total that stops at 10,000; the ratio is of all that ended."""
    summary = StatsSummary(completed_tasks=5, cached_tasks=3, failed_tasks=2, total_tasks=10, cache_hit_rate=120.0)

    assert summary.cache_hit_rate == 0.3
    assert f"{summary.cache_hit_rate:.2%}" == "30.00%"
    assert StatsSummary().cache_hit_rate == 0.0


def test_the_summary_takes_tokens_by_both_names():
    """Older servers leave the total_ out."""
    older = StatsSummary.model_validate({"prompt_tokens": 4, "completion_tokens": 5})
    newer = StatsSummary.model_validate({"total_prompt_tokens": 4, "total_completion_tokens": 5})

    assert (older.total_prompt_tokens, older.total_completion_tokens) == (4, 5)
    assert older == newer
