"""What providers answer, as they document it: content, tokens, and why it ended."""

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from synthgen import TaskResponse
from synthgen._completions import is_usable

TOKENS = ("prompt_tokens", "completion_tokens", "total_tokens")
SAFETY = [{"category": "HARM_CATEGORY_HARASSMENT", "probability": "HIGH"}]


def chat(message, reason="stop", **usage):
    """A chat completion."""
    return {
        "id": "chatcmpl-B9MBs8CjcvOU2jLn4n570S5qMJKcT",
        "object": "chat.completion",
        "created": 1741569952,
        "model": "gpt-4.1-2025-04-14",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "refusal": None, "annotations": [], **message},
                "logprobs": None,
                "finish_reason": reason,
            },
            {"index": 1, "message": {"role": "assistant", "content": "another"}, "finish_reason": "length"},
        ],
        "usage": {"prompt_tokens": 19, "completion_tokens": 10, "total_tokens": 29, **usage},
    }


def responses(*output, status="completed", reason=None):
    """An answer of OpenAI's Responses."""
    return {
        "id": "resp_67ccd2bed1ec8190b14f964abc0542670bb6a6b452d3795b",
        "object": "response",
        "created_at": 1741476542,
        "status": status,
        "error": None,
        "incomplete_details": reason and {"reason": reason},
        "model": "gpt-5-mini",
        "output": [{"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "hm"}]}, *output],
        "text": {"format": {"type": "text"}},
        "usage": {
            "input_tokens": 36,
            "input_tokens_details": {"cached_tokens": 30},
            "output_tokens": 87,
            "output_tokens_details": {"reasoning_tokens": 64},
            "total_tokens": 123,
        },
    }


def said(*content):
    """A message among the output of OpenAI's Responses."""
    return {"type": "message", "id": "msg_1", "status": "completed", "role": "assistant", "content": list(content)}


def messages(*content, reason="end_turn", **usage):
    """An answer of Anthropic's Messages."""
    return {
        "id": "msg_013Zva2CMHLNnXjNJJKqJ2EF",
        "type": "message",
        "role": "assistant",
        "model": "claude-sonnet-4-5",
        "content": list(content),
        "stop_reason": reason,
        "stop_sequence": None,
        "usage": {"input_tokens": 21, "output_tokens": 305, "service_tier": "standard", **usage},
    }


def gemini(*parts, reason="STOP", **usage):
    """An answer of Gemini's generateContent."""
    return {
        "candidates": [{"content": {"parts": list(parts), "role": "model"}, "finishReason": reason, "index": 0}],
        "usageMetadata": {"promptTokenCount": 8, "candidatesTokenCount": 12, "totalTokenCount": 20, **usage},
        "modelVersion": "gemini-2.5-flash",
        "responseId": "mAitaLmkHPPlz7IPvtfUqQ4",
    }


#: For each answer: its content, its finish_reason, and its tokens.
ANSWERS = {
    "chat": (chat({"content": "Hello!"}), "Hello!", "stop", (19, 10, 29)),
    "chat, cut off": (chat({"content": "Hel"}, "length"), "Hel", "length", (19, 10, 29)),
    "chat, Mistral's word for it": (chat({"content": "Hel"}, "model_length"), "Hel", "model_length", (19, 10, 29)),
    "chat, cut off in its thoughts": (chat({"content": ""}, "length"), "", "length", (19, 10, 29)),
    "chat, filtered": (chat({"content": None}, "content_filter"), None, "content_filter", (19, 10, 29)),
    "chat, refused": (chat({"content": None, "refusal": "I can't."}), None, "stop", (19, 10, 29)),
    "chat, a call": (
        chat({"content": None, "tool_calls": [{"id": "call_1", "type": "function"}]}, "tool_calls"),
        None,
        "tool_calls",
        (19, 10, 29),
    ),
    "chat, in parts": (
        chat({"content": [{"type": "thinking", "thinking": []}, {"type": "text", "text": "He"}, {"text": "y"}]}),
        "Hey",
        "stop",
        (19, 10, 29),
    ),
    "chat, empty": (chat({"content": " \n"}), " \n", "stop", (19, 10, 29)),
    "chat, through a gateway that counts in both ways": (
        chat({"content": "Hello!"}, input_tokens=19, output_tokens=10, cache_read_input_tokens=15),
        "Hello!",
        "stop",
        (19, 10, 29),
    ),
    "text": (
        {
            "object": "text_completion",
            "choices": [{"text": "This is a test", "index": 0, "logprobs": None, "finish_reason": "length"}],
            "usage": {"prompt_tokens": 5, "completion_tokens": 7, "total_tokens": 12},
        },
        "This is a test",
        "length",
        (5, 7, 12),
    ),
    "Responses": (
        responses(
            said({"type": "output_text", "text": "One. ", "annotations": []}, {"type": "output_text", "text": "Two."})
        ),
        "One. Two.",
        "completed",
        (36, 87, 123),
    ),
    "Responses, cut off": (
        responses(said({"type": "output_text", "text": "On"}), status="incomplete", reason="max_output_tokens"),
        "On",
        "max_output_tokens",
        (36, 87, 123),
    ),
    "Responses, cut off in its thoughts": (
        responses(status="incomplete", reason="max_output_tokens"),
        None,
        "max_output_tokens",
        (36, 87, 123),
    ),
    "Responses, filtered": (
        responses(status="incomplete", reason="content_filter"),
        None,
        "content_filter",
        (36, 87, 123),
    ),
    "Responses, refused": (
        responses(said({"type": "refusal", "refusal": "I can't."})),
        None,
        "completed",
        (36, 87, 123),
    ),
    "Responses, a call": (
        responses({"type": "function_call", "call_id": "call_1", "name": "f", "arguments": "{}"}),
        None,
        "completed",
        (36, 87, 123),
    ),
    "Messages": (
        messages(
            {"type": "thinking", "thinking": "hm", "signature": "c2ln"},
            {"type": "text", "text": "Hi! "},
            {"type": "text", "text": "I'm Claude."},
        ),
        "Hi! I'm Claude.",
        "end_turn",
        (21, 305, 326),
    ),
    "Messages, with a cache": (
        messages({"type": "text", "text": "Hi!"}, cache_creation_input_tokens=1000, cache_read_input_tokens=200),
        "Hi!",
        "end_turn",
        (1221, 305, 1526),
    ),
    "Messages, without one": (
        messages({"type": "text", "text": "Hi!"}, cache_creation_input_tokens=None, cache_read_input_tokens=0),
        "Hi!",
        "end_turn",
        (21, 305, 326),
    ),
    "Messages, cut off": (
        messages({"type": "text", "text": "H"}, reason="max_tokens"),
        "H",
        "max_tokens",
        (21, 305, 326),
    ),
    "Messages, context full": (
        messages({"type": "text", "text": "H"}, reason="model_context_window_exceeded"),
        "H",
        "model_context_window_exceeded",
        (21, 305, 326),
    ),
    "Messages, refused": (messages(reason="refusal"), None, "refusal", (21, 305, 326)),
    "Messages, a call": (
        messages({"type": "tool_use", "id": "toolu_1", "name": "f", "input": {}}, reason="tool_use"),
        None,
        "tool_use",
        (21, 305, 326),
    ),
    "Gemini": (gemini({"text": "Hel"}, {"text": "lo"}), "Hello", "STOP", (8, 12, 20)),
    "Gemini, with thoughts": (
        gemini(
            {"text": "hm", "thought": True},
            {"text": "Hello", "thoughtSignature": "EjQK"},
            thoughtsTokenCount=100,
            totalTokenCount=120,
        ),
        "Hello",
        "STOP",
        (8, 112, 120),
    ),
    "Gemini, cut off in its thoughts": (
        {
            "candidates": [{"content": {"role": "model"}, "finishReason": "MAX_TOKENS", "index": 0}],
            "usageMetadata": {"promptTokenCount": 8, "totalTokenCount": 107, "thoughtsTokenCount": 99},
        },
        None,
        "MAX_TOKENS",
        (8, 99, 107),
    ),
    "Gemini, filtered": (
        {
            "candidates": [{"finishReason": "SAFETY", "index": 0, "safetyRatings": SAFETY}],
            "usageMetadata": {"promptTokenCount": 8, "totalTokenCount": 8},
        },
        None,
        "SAFETY",
        (8, 0, 8),
    ),
    "Gemini, recited": (gemini(reason="RECITATION"), None, "RECITATION", (8, 12, 20)),
    "Gemini, blocked": (
        {
            "promptFeedback": {"blockReason": "OTHER", "safetyRatings": SAFETY},
            "usageMetadata": {"promptTokenCount": 8, "totalTokenCount": 8},
        },
        None,
        "OTHER",
        (8, 0, 8),
    ),
    "Gemini, a call": (gemini({"functionCall": {"name": "f", "args": {}}}), None, "STOP", (8, 12, 20)),
    "embeddings": (
        {
            "object": "list",
            "data": [{"object": "embedding", "index": 0, "embedding": [0.0023, -0.0093]}],
            "model": "text-embedding-3-small",
            "usage": {"prompt_tokens": 8, "total_tokens": 8},
        },
        None,
        None,
        (8, 0, 8),
    ),
    "embeddings that count a total alone": (
        {
            "object": "list",
            "data": [{"object": "embedding", "embedding": [0.5], "index": 0}],
            "usage": {"total_tokens": 9},
        },
        None,
        None,
        (9, 0, 9),
    ),
}


def result(completions):
    """A task that was answered like this."""
    return TaskResponse(message_id="m", status="COMPLETED", completions=completions)


def named(*words):
    """Which answers have one of these words in their names."""
    return {name for name in ANSWERS if any(word in name for word in words)}


@pytest.mark.parametrize("name", ANSWERS)
def test_an_answer_is_read(name):
    """Its text without what was thought, its end in the provider's own word, and its tokens."""
    completions, content, reason, tokens = ANSWERS[name]
    read = result(completions)

    assert (read.content, read.finish_reason) == (content, reason)
    assert tuple(getattr(read.usage, name) for name in TOKENS) == tokens


@pytest.mark.parametrize("name", ANSWERS)
def test_an_answer_that_was_cut_off_or_filtered_says_so(name):
    """Whatever the provider's word for it is; the task is ok all the same."""
    read = result(ANSWERS[name][0])

    assert read.cut_off == (name in named("cut off", "word for it", "context full") or name == "text")
    assert read.filtered == (name in named("filtered", "refused", "recited", "blocked"))
    assert read.ok


@pytest.mark.parametrize("name", ANSWERS)
def test_an_answer_is_usable_if_there_is_something_in_it(name):
    """A text, be it cut off, a call, an embedding; not white space, thoughts, or what was filtered."""
    assert is_usable(ANSWERS[name][0]) == (
        name not in named("filtered", "refused", "recited", "blocked", "thoughts", "empty")
        or name == "Gemini, with thoughts"
    )


def test_usage_keeps_what_else_the_provider_says():
    """Such as how many of the tokens were cached ones."""
    assert result(ANSWERS["Responses"][0]).usage.input_tokens_details == {"cached_tokens": 30}


@pytest.mark.parametrize(
    "completions", [None, {}, {"choices": []}, {"candidates": []}, {"output": []}, {"content": []}]
)
def test_an_answer_may_say_nothing(completions):
    """Nothing is read from it, and nobody wants it again."""
    read = result(completions)

    assert (read.content, read.finish_reason, read.usage) == (None, None, None)
    assert not (read.cut_off or read.filtered or is_usable(completions))


KEYS = sorted(set(re.findall(r'"(\w+)":', json.dumps([answer[0] for answer in ANSWERS.values()]))))
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(KEYS),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.sampled_from(KEYS), values, max_size=5),
    max_leaves=30,
)


@given(values)
def test_any_json_can_be_read(completions):
    """Of the words that providers use, put together in any way."""
    read = result(completions)

    assert read.content is None or isinstance(read.content, str)
    assert read.finish_reason is None or isinstance(read.finish_reason, str)
    assert read.usage is None or all(getattr(read.usage, name) >= 0 for name in TOKENS)
    assert {read.cut_off, read.filtered, is_usable(completions)} <= {True, False}


@given(st.data())
def test_an_answer_with_something_else_in_its_place_can_be_read(data):
    """One value of a real answer is replaced by any other."""
    completions = json.loads(json.dumps(data.draw(st.sampled_from(list(ANSWERS.values())))[0]))
    place = completions
    while True:
        key = data.draw(st.sampled_from(list(place) if isinstance(place, dict) else list(range(len(place)))))
        if not isinstance(place[key], (dict, list)) or not place[key] or data.draw(st.booleans()):
            break
        place = place[key]
    place[key] = data.draw(values)
    read = result(completions)

    assert read.content is None or isinstance(read.content, str)
    assert read.usage is None or all(getattr(read.usage, name) >= 0 for name in TOKENS)
    assert {read.cut_off, read.filtered, is_usable(completions)} <= {True, False}
