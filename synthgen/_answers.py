"""What an answer means: its JSON, its model, or the error that it stands for."""

import json
import re
from typing import Any, Dict, Optional, Type, TypeVar

import requests
from pydantic import BaseModel, ValidationError
from urllib3.exceptions import HTTPError

from ._retry import innermost, never_sent, parse_retry_after, timed_out
from .exceptions import (
    APIError,
    AuthenticationError,
    ConnectionFailedError,
    ErrorResponse,
    InvalidRequestError,
    InvalidResponseError,
    NotFoundError,
    RateLimitError,
    ServerError,
)
from .models import reasons

#: All that requests and urllib3 raise for what happens on the wire; requests' own errors are OSErrors too.
WIRE_ERRORS = (requests.RequestException, HTTPError, OSError)

#: What a status stands for; all others, their hundreds tell.
_KINDS: Dict[int, Type[APIError]] = {401: AuthenticationError, 403: AuthenticationError, 404: NotFoundError}
_MAX_ERROR_TEXT = 64 * 1024
#: A task's ``"api_key": "..."``, as it stands or quoted once more, in JSON, in HTML, or as Python shows it.
_QUOTE = r"(?:\\*[\"']|\\+u0022|&(?:quot|#34|#39|#x27);)"
_PROVIDER_KEY = re.compile(rf"(api_key{_QUOTE} *: *({_QUOTE})).*?(?=\2|$)", re.DOTALL)

_Model = TypeVar("_Model", bound=BaseModel)

# Every function is told `what` was asked for, e.g. "GET http://localhost:8002/health", to say so in its errors.


def check_status(response: requests.Response, what: str, api_key: Optional[str]) -> None:
    """Raise the error that the status stands for."""
    status = response.status_code
    if status < 300:
        return
    try:
        with response:
            body = response.raw.read(_MAX_ERROR_TEXT, decode_content=True)
    except WIRE_ERRORS:
        body = b""  # the status says enough
    error = _error_response(response, body, api_key)
    if status < 400:
        location = error.headers.get("Location", "nowhere")
        raise InvalidResponseError(
            f"{what}: {status}, redirects to {location}. Redirects are not followed: is the base URL right?",
            status_code=status,
            response=error,
        )
    message = f"{what}: {status}, {_detail(error)}"
    if status == 429:
        header = error.headers.get("Retry-After")
        retry_after = None if header is None else parse_retry_after(header)
        raise RateLimitError(message, status_code=status, response=error, retry_after=retry_after)
    kind = _KINDS.get(status, ServerError if status >= 500 else InvalidRequestError)
    if status == 413 and what.startswith("POST"):
        message += ". Uploads are too large for it: give a smaller chunk_size (--chunk-size), from the first on"
    if kind is AuthenticationError and not api_key:
        message += '. No API key was given: pass api_key=..., set SYNTHGEN_API_KEY, or put "api_key" into a config file'
    raise kind(message, status_code=status, response=error)


def read_json(response: requests.Response, what: str, api_key: Optional[str]) -> Any:
    """The body as JSON, None for a 204; an error if it was cut short or is no JSON. The response is closed."""
    try:
        with response:
            body = response.content
    except WIRE_ERRORS as exc:
        raise ConnectionFailedError(f"{what}: the answer broke off: {innermost(exc)}") from exc
    if response.status_code == 204:
        return None
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as exc:
        error = _error_response(response, body, api_key)
        raise InvalidResponseError(
            f"{what}: {response.status_code}, but {'a web page' if _is_web_page(error) else 'no JSON'}: "
            "is the base URL that of a Synthgen server?",
            status_code=response.status_code,
            response=error,
        ) from exc


def parse(model: Type[_Model], data: Any, what: str) -> _Model:
    """The JSON as a model; an error if it has another shape."""
    try:
        return model.model_validate(data)
    except ValidationError as exc:
        message = f"{what}: the answer is no {model.__name__}: {reasons(exc)}"
        raise InvalidResponseError(message, status_code=200) from exc


def no_answer(error: Exception, what: str, read_timeout: float) -> ConnectionFailedError:
    """The error for a request that got no answer, in words that say what to try."""
    reason = str(innermost(error)) or type(error).__name__
    if isinstance(error, requests.exceptions.InvalidURL):  # its text may hold a proxy's password
        reason = "the URL of the server, or of a proxy to it (HTTP_PROXY, HTTPS_PROXY), is malformed"
    elif timed_out(error):
        reason = f"no answer within {read_timeout:g} s. What was asked for may go on; look with get_batch"
    elif isinstance(error, requests.exceptions.ProxyError):
        reason = f"the proxy failed: {reason}"
    elif isinstance(error, requests.exceptions.SSLError):
        reason = f"TLS failed: {reason}"
    elif never_sent(error):
        reason = f"no connection: {reason}. Is a server running there? `synthgen serve` starts one"
    else:
        reason = f"no answer: {reason}"
    return ConnectionFailedError(f"{what}: {reason}")


def _error_response(response: requests.Response, body: bytes, api_key: Optional[str]) -> ErrorResponse:
    def hide_keys(text: str) -> str:  # an error page may repeat the request, and the tasks in it
        for form in (api_key, api_key.replace("/", "\\/")) if api_key else ():
            text = text.replace(form, "[API key]")
        return _PROVIDER_KEY.sub(r"\1[API key]", text)

    headers = {name: hide_keys(value) for name, value in response.headers.items()}
    text = hide_keys(body[:_MAX_ERROR_TEXT].decode("utf-8", "replace"))
    return ErrorResponse(response.status_code, headers, text, response.url)


def _detail(error: ErrorResponse) -> str:
    """The server's own words."""
    try:
        detail = error.json()["detail"]
    except (ValueError, KeyError, TypeError):
        if _is_web_page(error):
            return "with a web page: is there a proxy in between, or another server?"
        return error.text.strip()[:200] or "without a word"
    if isinstance(detail, list):  # FastAPI's form: {"loc": [...], "msg": ...}
        problems = [
            f"{'.'.join(map(str, item.get('loc', ())))}: {item.get('msg')}" if isinstance(item, dict) else str(item)
            for item in detail
        ]
        return "; ".join(problems[:5] + [f"and {len(problems) - 5:,} more"] * (len(problems) > 5))
    return str(detail)


def _is_web_page(error: ErrorResponse) -> bool:
    return error.text.lstrip()[:1] == "<"
