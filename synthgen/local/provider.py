"""One call to a model provider, and what its answer means."""

import contextlib
import io
import ipaddress
import json
import random
import socket
import ssl
import threading
import time
import weakref
from functools import partial
from http.client import responses
from http.cookiejar import DefaultCookiePolicy
from typing import Any, NamedTuple, Optional, Union
from urllib.parse import urlsplit

import requests
from requests.adapters import HTTPAdapter
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

from .._completions import usage
from .._retry import innermost, parse_retry_after
from .store import Result

__all__ = ["CallPolicy", "Provider", "TryAgain"]

_MAX_ANSWER_BYTES = 64 << 20
_MAX_ERROR_CHARACTERS = 8 << 10
#: Failures that may not come again.
_PASSING = (
    requests.ConnectionError,
    requests.exceptions.ChunkedEncodingError,
    requests.exceptions.ContentDecodingError,
)


class CallPolicy(NamedTuple):
    """How long a call may take, how often one that failed is made again, and after which pauses; in seconds."""

    retries: int = 10
    backoff: float = 1.0
    longest_pause: float = 300.0
    connect_timeout: float = 10.0
    #: For the next bytes, and for the whole answer (checked every 64 KiB).
    read_timeout: float = 600.0

    def pause(self, tries: int, retry_after: float) -> float:
        """The pause after so many tries: half to all of ``backoff * 2 ** (tries - 1)``, or what was asked for."""
        backoff = self.backoff * 2.0 ** (tries - 1) * random.uniform(0.5, 1.0)
        return min(max(backoff, retry_after), self.longest_pause)


class TryAgain(NamedTuple):
    """A call failed, and may work later."""

    error: str
    retry_after: float = 0.0
    duration: int = 0


class _TooLarge(requests.RequestException):
    """More than is taken."""


class Provider:
    """Calls providers, from one thread; `interrupt` is for another."""

    def __init__(self, policy: CallPolicy) -> None:
        self._policy = policy
        self._sockets = _Sockets()
        self._session = requests.Session()
        self._session.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, _Adapter(self._sockets))

    def call(self, url: str, api_key: Optional[str], body: str) -> Union[Result, TryAgain]:
        """Post a JSON body; a `Result` is final."""
        started = time.monotonic()
        try:
            with self._post(url, api_key, body) as response:
                content = _read(response, started + self._policy.read_timeout)
        except requests.RequestException as exc:
            outcome: Union[str, Result, TryAgain] = _no_answer(exc, api_key)
        else:
            outcome = _answer(response, content, api_key)
        duration = round((time.monotonic() - started) * 1000)
        if isinstance(outcome, str):
            return Result(False, json.dumps({"error": outcome}), duration)
        return outcome._replace(duration=duration)

    def interrupt(self) -> None:
        """End a call that is going on in another thread, and every later one."""
        self._sockets.shut()

    def close(self) -> None:
        """Let go of the connections."""
        self._session.close()

    def _post(self, url: str, api_key: Optional[str], body: str) -> requests.Response:
        host = urlsplit(url).hostname or ""
        return self._session.post(
            url,
            data=io.BytesIO(body.encode("ascii")),  # sent piece by piece, not all within the connect time-out
            headers={"Content-Type": "application/json"},
            auth=partial(_authorize, api_key),
            proxies={"no_proxy": host} if _is_loopback(host) else None,
            timeout=(self._policy.connect_timeout, self._policy.read_timeout),
            allow_redirects=False,
            stream=True,
        )


def _authorize(api_key: Optional[str], request: requests.PreparedRequest) -> requests.PreparedRequest:
    """Send the key, or none; being there, it keeps `~/.netrc` out."""
    if api_key:
        request.headers["Authorization"] = f"Bearer {api_key}"
    return request


class _Sockets:
    """The sockets of one thread's connections: shutting one is the only way to end a read from another thread."""

    def __init__(self) -> None:
        self._sockets: weakref.WeakSet[socket.socket] = weakref.WeakSet()
        self._lock = threading.Lock()
        self._is_open = True

    def add(self, opened: Any) -> None:
        while not isinstance(opened, socket.socket):  # urllib3's TLS within TLS, to a proxy
            opened = opened.socket
        with self._lock:
            self._sockets.add(opened)
        if not self._is_open:
            self.shut()

    def shut(self) -> None:
        with self._lock:
            self._is_open = False
            for opened in self._sockets:
                with contextlib.suppress(OSError):  # gone already
                    socket.socket.shutdown(opened, socket.SHUT_RDWR)  # not TLS's own, which is for its one thread


class _Watched:
    """Mixed into a connection class of urllib3: notes each socket that is opened."""

    sockets: _Sockets
    sock: socket.socket

    def connect(self) -> None:
        super().connect()  # type: ignore[misc]
        self.sockets.add(self.sock)


class _Adapter(HTTPAdapter):
    """Makes connections that note their sockets."""

    def __init__(self, sockets: _Sockets) -> None:
        self._pools = {
            "http": _watched(HTTPConnectionPool, sockets),
            "https": _watched(HTTPSConnectionPool, sockets),
        }
        super().__init__()

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, **kwargs)
        self.poolmanager.pool_classes_by_scheme = self._pools

    def proxy_manager_for(self, *args: Any, **kwargs: Any) -> Any:
        manager = super().proxy_manager_for(*args, **kwargs)
        manager.pool_classes_by_scheme = self._pools
        return manager


def _watched(pool: Any, sockets: _Sockets) -> Any:
    connection = type("Connection", (_Watched, pool.ConnectionCls), {"sockets": sockets})
    return type("Pool", (pool,), {"ConnectionCls": connection})


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def _read(response: requests.Response, deadline: float) -> bytes:
    """The whole body, or an error: a body cut short must not pass for one."""
    response.raw.enforce_content_length = True
    parts, size = [], 0
    for part in response.iter_content(1 << 16):
        parts.append(part)
        size += len(part)
        if size > _MAX_ANSWER_BYTES:
            raise _TooLarge(f"the answer is larger than {_MAX_ANSWER_BYTES >> 20} MiB")
        if time.monotonic() > deadline:
            raise requests.exceptions.ReadTimeout
    return b"".join(parts)


def _no_answer(exc: requests.RequestException, api_key: Optional[str]) -> Union[str, TryAgain]:
    """What it means that no whole answer came."""
    cause = innermost(exc)
    if isinstance(cause, ssl.SSLCertVerificationError):
        return f"Certificate error: {cause}"
    if isinstance(exc, requests.ConnectTimeout):
        return TryAgain("Connection error: no connection in time")
    if isinstance(exc, requests.Timeout) or isinstance(cause, socket.timeout):
        return TryAgain("Time-out: no whole answer in time")
    if isinstance(exc, _PASSING):
        return TryAgain(f"Connection error: {cause}")
    return f"Request error: {_shortened(str(exc), api_key)}"  # a bad URL, say


def _answer(response: requests.Response, content: bytes, api_key: Optional[str]) -> Union[str, Result, TryAgain]:
    """What a whole answer means; text is an error that no other try would mend."""
    status, text = response.status_code, _shortened(content.decode("utf-8", "replace"), api_key)
    reason = f"{status} {responses.get(status, 'Unknown')}"
    retry_after = parse_retry_after(response.headers.get("Retry-After", "0"))
    if status == 429:
        return TryAgain(f"Client error ({reason}): {text}", retry_after)
    if status >= 500:
        return TryAgain(f"Server error ({reason}): {text}", retry_after)
    if status >= 400:
        return f"Client error ({reason}): {text}"
    if status >= 300:
        location = _shortened(response.headers.get("Location", "nowhere"), api_key)
        return f"Redirect ({reason}) to {location}: not followed, since the key would go along"
    try:
        answer = json.loads(content.decode("utf-8"))
        completions = json.dumps(answer, allow_nan=False)
    except (ValueError, RecursionError):
        return TryAgain(f"Invalid answer ({reason}): not JSON: {text}")
    if not isinstance(answer, dict):
        return TryAgain(f"Invalid answer ({reason}): not a JSON object: {text}")
    if answer.get("error"):
        return f"Provider error: {text}"
    counts = usage(answer) or {}
    tokens = (counts.get(name, 0) for name in ("prompt_tokens", "completion_tokens", "total_tokens"))
    return Result(True, completions, 0, *tokens)


def _shortened(text: str, api_key: Optional[str]) -> str:
    """A provider's words, for an error: not all of many, and never the key."""
    if api_key:
        text = text.replace(api_key, "[api_key]").replace(json.dumps(api_key)[1:-1], "[api_key]")
    return text if len(text) <= _MAX_ERROR_CHARACTERS else f"{text[:_MAX_ERROR_CHARACTERS]}..."
