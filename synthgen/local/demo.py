"""A model provider that solves linear equations, so that a whole job runs with no model and can be checked."""

import ast
import json
import re
import time
import uuid
from contextlib import suppress
from fractions import Fraction
from typing import Any, Dict, Optional

from .webserver import HTTPError, Request, Response, WebServer, json_response

__all__ = ["DemoProvider", "solve"]

_PATH = "/v1/chat/completions"
_HELP = "I solve linear equations in one unknown. Ask me, for example: solve 2x + 4 = 10"
_MAX_EQUATION = 100
_SIGNS = str.maketrans({"−": "-", "–": "-", "·": "*", "×": "*", "⋅": "*", "÷": "/"})
#: What is no part of an equation: words, and the marks of a sentence.
_WORDS = re.compile(r"[^\W\d_]{2,}|[^\w\s.+\-*/()=]|[.](?!\d)|_")
#: Where 2x and 2(x + 1) have no sign.
_IMPLIED_TIMES = re.compile(r"(?<=[\w)])\s*(?=[^\W\d]|\()")


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
        self.url = self._server.url + _PATH

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
        left, equals, right = piece.partition("=")
        unknowns = set(filter(str.isalpha, piece))
        if equals and len(unknowns) == 1 and len(piece) <= _MAX_EQUATION:
            with suppress(SyntaxError, ValueError, ZeroDivisionError):  # something else
                return _solution(left, right, unknowns.pop())
    return None


def _solution(left: str, right: str, unknown: str) -> str:
    """Where two expressions are equal: two points of their difference give the line, a third shows that it is one."""
    at_0, at_1, at_9 = (_value(left, Fraction(x)) - _value(right, Fraction(x)) for x in (0, 1, 9))
    slope = at_1 - at_0
    if at_9 != at_0 + 9 * slope:
        raise ValueError("not linear")
    if slope:
        return f"{unknown} = {-at_0 / slope}"
    return "no solution" if at_0 else f"any {unknown}"


def _value(expression: str, unknown: Fraction) -> Fraction:
    """The value of an expression, exactly, for a value of its unknown."""
    return _evaluate(ast.parse(_IMPLIED_TIMES.sub("*", expression.strip()), mode="eval").body, unknown)


def _evaluate(node: ast.AST, unknown: Fraction) -> Fraction:
    if isinstance(node, ast.BinOp):
        left, right = _evaluate(node.left, unknown), _evaluate(node.right, unknown)
        if isinstance(node.op, ast.Add):
            return left + right
        if isinstance(node.op, ast.Sub):
            return left - right
        if isinstance(node.op, ast.Mult):
            return left * right
        if isinstance(node.op, ast.Div):
            return left / right
    elif isinstance(node, ast.UnaryOp):
        operand = _evaluate(node.operand, unknown)
        return -operand if isinstance(node.op, ast.USub) else operand
    elif isinstance(node, ast.Name) and len(node.id) == 1:
        return unknown
    elif isinstance(node, ast.Constant):
        return Fraction(repr(node.value))
    raise ValueError("not an expression")


def _respond(request: Request) -> Response:
    if request.path != _PATH:
        raise HTTPError(404, f"there is only {_PATH} here")
    if request.method != "POST":
        raise HTTPError(405, "ask with POST", {"Allow": "POST"})
    try:
        asked = json.loads(request.body().decode("utf-8"))
    except (ValueError, RecursionError):
        raise HTTPError(400, "the body is not JSON") from None
    messages = asked.get("messages") if isinstance(asked, dict) else None
    if not isinstance(messages, list):
        raise HTTPError(400, "'messages' must be a list")
    prompts = [_text(message) for message in messages if isinstance(message, dict) and message.get("role") == "user"]
    if not prompts:
        raise HTTPError(400, "'messages' must have one of the role 'user'")
    answer = solve(prompts[-1]) or _HELP
    return json_response(_completion(asked.get("model"), sum(map(_tokens, map(_text, messages))), answer))


def _text(message: Any) -> str:
    """The text of a message, whose content may be text or a list of parts."""
    content = message.get("content") if isinstance(message, dict) else None
    parts = content if isinstance(content, list) else [{"text": content}]
    return " ".join(str(part["text"]) for part in parts if isinstance(part, dict) and part.get("text"))


def _tokens(text: str) -> int:
    """About as many tokens as a model would count: words, numbers and marks."""
    return len(re.findall(r"\w+|[^\w\s]", text))


def _completion(model: Any, prompt_tokens: int, answer: str) -> Dict[str, Any]:
    completion_tokens = _tokens(answer)
    return {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": model,
        "choices": [{"index": 0, "message": {"role": "assistant", "content": answer}, "finish_reason": "stop"}],
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
        },
    }


def _error_body(error: HTTPError) -> Any:
    kind = "invalid_request_error" if error.status < 500 else "server_error"
    return {"error": {"message": error.detail, "type": kind, "param": None, "code": None}}
