"""A model provider that solves linear equations, so that a whole job runs with no model and can be checked."""

import ast
import json
import operator
import re
import time
import uuid
from contextlib import suppress
from fractions import Fraction
from typing import Any, Callable, Dict, List, Optional

from .webserver import HTTPError, Request, Response, WebServer, json_response

_PATH = "/v1/chat/completions"
_HELP = "I solve linear equations in one unknown. Ask me, for example: solve 2x + 4 = 10"
_MAX_EQUATION = 100
_SIGNS = str.maketrans({"−": "-", "–": "-", "·": "*", "×": "*", "⋅": "*", "÷": "/"})
#: What is no part of an equation: words, and the marks of a sentence.
_WORDS = re.compile(r"[^\W\d_]{2,}|[^\w\s.+\-*/()=]|[.](?!\d)|_")
#: Where 2x and 2(x + 1) have no sign.
_IMPLIED_TIMES = re.compile(r"(?<=[\w)])\s*(?=[^\W\d]|\()")
_OPERATORS: Dict[type, Callable[..., Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
}


class DemoProvider:
    """An OpenAI-compatible endpoint on this machine, whose model reads an equation out of the prompt and solves it.

    It listens from the start until closed.

    Args:
        port: Where to listen; 0 takes a free port.

    Attributes:
        url: The endpoint, for the `url` of a task.
    """

    def __init__(self, port: int = 0) -> None:
        self._server = WebServer("127.0.0.1", port, _respond, _error_body)
        self.url: str = self._server.url + _PATH

    def __enter__(self) -> "DemoProvider":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop listening; twice is fine."""
        self._server.close()


def solve(text: str) -> Optional[str]:
    """The solution of the equation in a text, e.g. ``x = 7/3``; None if there is no equation to be found."""
    for piece in reversed(_WORDS.split(text.translate(_SIGNS))):
        unknowns = set(filter(str.isalpha, piece))
        if piece.count("=") == len(unknowns) == 1 and len(piece) <= _MAX_EQUATION:
            with suppress(KeyError, SyntaxError, ValueError, ZeroDivisionError):  # something else
                return _solution(_IMPLIED_TIMES.sub("*", piece).split("="), unknowns.pop())
    return None


def _solution(sides: List[str], unknown: str) -> str:
    """Where two expressions are equal: two points of their difference give the line, a third shows that it is one."""
    left, right = (ast.parse(side.strip(), mode="eval").body for side in sides)
    points = ({unknown: Fraction(x)} for x in (0, 1, 9))
    at_0, at_1, at_9 = (_value(left, point) - _value(right, point) for point in points)
    slope = at_1 - at_0
    if at_9 != at_0 + 9 * slope:
        raise ValueError("not linear")
    if slope:
        return f"{unknown} = {-at_0 / slope}"
    return "no solution" if at_0 else f"any {unknown}"


def _value(node: ast.AST, names: Dict[str, Fraction]) -> Fraction:
    """The value of an expression, exactly."""
    if isinstance(node, ast.BinOp):
        return _OPERATORS[type(node.op)](_value(node.left, names), _value(node.right, names))
    if isinstance(node, ast.UnaryOp):
        return _OPERATORS[type(node.op)](_value(node.operand, names))
    if isinstance(node, ast.Name):
        return names[node.id]
    return Fraction(repr(ast.literal_eval(node)))  # as it is written: 0.1 is 1/10


def _respond(request: Request) -> Response:
    if request.path != _PATH:
        raise HTTPError(404, f"there is only {_PATH} here")
    if request.method != "POST":
        raise HTTPError(405, "ask with POST", {"Allow": "POST"})
    try:
        asked = json.loads(request.body().decode("utf-8"))
        messages = [(message.get("role"), _text(message.get("content"))) for message in asked["messages"]]
        prompt = [text for role, text in messages if role == "user"][-1]
    except (AttributeError, LookupError, RecursionError, TypeError, ValueError):
        raise HTTPError(400, "the body must be JSON with 'messages', a list with one of the role 'user'") from None
    answer = solve(prompt) or _HELP
    tokens_in, tokens_out = sum(_tokens(text) for _, text in messages), _tokens(answer)
    completion = {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": asked.get("model"),
        "choices": [{"index": 0, "message": {"role": "assistant", "content": answer}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": tokens_in, "completion_tokens": tokens_out, "total_tokens": tokens_in + tokens_out},
    }
    return json_response(completion)


def _text(content: Any) -> str:
    """The text of a message's content: text, or a list of parts."""
    parts = content if isinstance(content, list) else [{"text": content}]
    return " ".join(str(part["text"]) for part in parts if part.get("text"))


def _tokens(text: str) -> int:
    """About as many tokens as a model would count: words, numbers and marks."""
    return len(re.findall(r"\w+|[^\w\s]", text))


def _error_body(error: HTTPError) -> Any:
    kind = "invalid_request_error" if error.status < 500 else "server_error"
    return {"error": {"message": error.detail, "type": kind, "param": None, "code": None}}
