"""The demo provider: equations out of prompts, in OpenAI's form."""

import pytest
import requests
from hypothesis import given
from hypothesis import strategies as st

from synthgen.local import DemoProvider
from synthgen.local.demo import solve


@pytest.fixture(scope="module")
def demo():
    with DemoProvider() as running:
        yield running


def ask(demo, **body):
    with requests.Session() as session:
        session.trust_env = False
        return session.post(demo.url, json=body, timeout=30)


@pytest.mark.parametrize(
    "prompt, answer",
    [
        ("solve 7x - 3 = 25", "x = 4"),
        ("2x + 4 = 10", "x = 3"),
        ("4 = 10 - 3x", "x = 2"),
        ("x/2 + 1 = 4", "x = 6"),
        ("3x = 7", "x = 7/3"),
        ("0.1y + .2 = 0.3", "y = 1"),
        ("What is z, if 3z - 2 = z + 9?", "z = 11/2"),
        ("Solve for a: 2(a + 3) = 10 - (a - 1)*2.", "a = 3/2"),
        ("solve −2x = 4×3, please!", "x = -6"),
        ("2x + 1 = 2x + 5", "no solution"),
        ("2x + 1 = 1 + x + x", "any x"),
        ("First a = 1. Then solve 10x = 5.", "x = 1/2"),
    ],
)
def test_an_equation_is_read_out_of_the_prompt_and_solved(prompt, answer):
    """Exactly: with fractions, brackets, decimals, any letter, and words around it."""
    assert solve(prompt) == answer


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "hello",
        "x + y = 2",
        "x*x = 4",
        "2 = 2",
        "x =",
        "= x",
        "x = 1/0",
        "1/x = 2",
        "x ** 2 = 4",
        "((x = 3",
        "2 3 = x",
        "x=1=x",
    ],
)
def test_what_is_no_linear_equation_has_no_solution(prompt):
    """Neither does it raise."""
    assert solve(prompt) is None


@given(prompt=st.text(alphabet="0123456789xya+-*/().= \\", max_size=40) | st.text(max_size=40))
def test_any_text_can_be_asked(prompt):
    """There is an answer, or none, but no error."""
    assert solve(prompt) is None or isinstance(solve(prompt), str)


@given(a=st.integers(1, 10**6), b=st.integers(-(10**6), 10**6), x=st.integers(-(10**6), 10**6))
def test_the_solution_is_right(a, b, x):
    """For any equation made from its solution."""
    assert solve(f"solve {a}x + {b} = {a * x + b}") == f"x = {x}"


def test_an_answer_has_openais_form(demo):
    """With the model that was asked for, and tokens that add up."""
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "solve 2x + 4 = 10"}]
    answer = ask(demo, model="demo", messages=messages).json()
    usage = answer["usage"]

    assert answer["choices"][0]["message"] == {"role": "assistant", "content": "x = 3"}
    assert (answer["model"], answer["object"]) == ("demo", "chat.completion")
    assert usage == {"prompt_tokens": 9, "completion_tokens": 3, "total_tokens": 12}


def test_the_last_message_of_the_user_counts(demo):
    """Its content may be a list of parts."""
    messages = [
        {"role": "user", "content": "solve x = 1"},
        {"role": "user", "content": [{"type": "text", "text": "solve"}, {"type": "text", "text": "x = 2"}]},
        {"role": "assistant", "content": "x = 3"},
    ]

    assert ask(demo, messages=messages).json()["choices"][0]["message"]["content"] == "x = 2"


def test_a_prompt_without_an_equation_gets_a_polite_answer(demo):
    """A 200 that says what can be asked."""
    response = ask(demo, messages=[{"role": "user", "content": "Hello!"}])

    assert response.status_code == 200
    assert "linear equations" in response.json()["choices"][0]["message"]["content"]


@pytest.mark.parametrize(
    "method, path, body, status",
    [
        ("POST", "/elsewhere", b"{}", 404),
        ("GET", "", b"", 405),
        ("POST", "", b"not json", 400),
        ("POST", "", b"[]", 400),
        ("POST", "", b'{"messages": 5}', 400),
        ("POST", "", b'{"messages": [5, {"role": "system"}]}', 400),
    ],
)
def test_a_wrong_request_gets_an_error_in_openais_form(demo, method, path, body, status):
    """With a message and a type."""
    with requests.Session() as session:
        session.trust_env = False
        response = session.request(method, demo.url + path, data=body, timeout=30)

    assert response.status_code == status
    assert response.json()["error"]["type"] == "invalid_request_error"


def test_it_can_be_closed_twice():
    """With ends it too."""
    with DemoProvider() as provider:
        provider.close()
