"""One call to a model provider, and what its answer means."""

import contextlib
import io
import ipaddress
import itertools
import json
import random
import re
import socket
import ssl
import threading
import time
import weakref
from calendar import timegm
from enum import Enum
from functools import lru_cache
from http.client import responses
from http.cookiejar import DefaultCookiePolicy
from typing import Any, Iterator, Mapping, NamedTuple, Optional, Tuple
from urllib.parse import urlsplit

import requests
from requests.adapters import HTTPAdapter
from requests.exceptions import ChunkedEncodingError, ContentDecodingError
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

from .._completions import at, is_usable, usage
from .._retry import innermost, never_sent, parse_date, parse_retry_after
from .store import Result

_MAX_ANSWER_BYTES = 64 << 20
_MAX_ERROR_CHARACTERS = 8 << 10
_NO_ACCOUNT = re.compile(
    "insufficient[_ ](quota|balance|credits?|funds)|billing_(hard_limit_reached|not_active)|credit balance is too low|"
    "quota exceeded for metric: [^,]*, limit: 0(?![.\\d])",  # as Gemini says that a model is not in the plan
    re.IGNORECASE,
)
#: As OpenAI says that a call is larger than what it allows in a minute.
_TOO_LARGE = re.compile("request too large for|tokens must be reduced", re.IGNORECASE)
_TOLD = ("x-ratelimit-{1}-{0}", "anthropic-ratelimit-{0}-{1}")
#: A duration as OpenAI writes it, such as 6m0s or 20ms; a bare number is seconds.
_DURATION = re.compile(r"([\d.]+)(ms|[dhms]|$)")
_DURATIONS = re.compile(f"(?:{_DURATION.pattern})*")
_UNITS = {"d": 86400.0, "h": 3600.0, "m": 60.0, "s": 1.0, "": 1.0, "ms": 0.001}
#: Limits are reset within a day or so: a larger number is no duration, and a later time no time of reset.
_LONGEST_RESET = 7 * 86400


class CallPolicy(NamedTuple):
    """How long a call may take, how often one that failed is made again, and after which pauses; in seconds."""

    retries: int = 10
    backoff: float = 1.0
    longest_pause: float = 300.0
    connect_timeout: float = 10.0
    #: For the next bytes, and for the whole answer (checked every 64 KiB).
    read_timeout: float = 600.0
    #: How long a provider that had answered may be away.
    given_up_after: float = 3600.0
    #: What "a minute" of a limit is: somewhat longer, since the provider's clock starts when a call arrives.
    window: float = 61.0

    def pause(self, tries: int, retry_after: float) -> float:
        """The pause after so many tries: half to all of ``backoff * 2 ** (tries - 1)``, or longer if asked for."""
        backoff = self.backoff * 2.0 ** min(tries - 1, 64) * random.uniform(0.5, 1.0)
        return max(min(backoff, self.longest_pause), retry_after)


class Kind(Enum):
    """What a call says of its account."""

    ANSWERED = "the task has ended, one way or the other"
    DENIED = "there is no such account, or no money on it; the task has ended"
    REFUSED = "these were too many calls: no fault of the task"
    FAILED = "no answer, or none that can be one; it may work later"


class Told(NamedTuple):
    """What a provider says of a limit."""

    #: "requests" or "tokens".
    of: str
    limit: float
    remaining: float
    #: Seconds until all of it is there again.
    full_in: float


class Outcome(NamedTuple):
    """What became of a call."""

    kind: Kind
    error: str = ""
    #: The answer; None where there is an error.
    result: Optional[Result] = None
    #: Whether an identical task may have the answer.
    is_usable: bool = False
    #: Whether anybody was there.
    is_reached: bool = True
    retry_after: float = 0.0
    told: Tuple[Told, ...] = ()
    #: In milliseconds.
    duration: int = 0


class Provider:
    """Calls providers, from one thread; `interrupt` is for another."""

    def __init__(self, policy: CallPolicy) -> None:
        self._policy = policy
        self._session = _Session()
        self._session.headers["Content-Type"] = "application/json"
        self._environment = lru_cache(maxsize=64)(self._read_environment)
        self._session.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))
        self._adapter = _Adapter()
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, self._adapter)

    def call(self, method: str, url: str, api_key: Optional[str], body: str) -> Outcome:
        """Send a JSON body."""
        started = time.monotonic()
        try:
            with self._send(method, url, api_key, body) as response:
                outcome = _answer(response, started + self._policy.read_timeout, api_key)
                outcome = outcome._replace(told=tuple(_told(response.headers)))
        except Exception as exc:  # requests lets others than its own through, for odd URLs
            outcome = _no_answer(exc, api_key)
        return outcome._replace(duration=round((time.monotonic() - started) * 1000))

    def interrupt(self) -> None:
        """End a call that is going on in another thread, and every later one."""
        self._adapter.shut()

    def close(self) -> None:
        """Let go of the connections."""
        self._session.close()

    def _send(self, method: str, url: str, api_key: Optional[str], body: str) -> requests.Response:
        headers = dict(self._session.headers)
        if api_key:
            headers["Authorization"] = f"Bearer {api_key}"
        data = io.BytesIO(body.encode("ascii"))  # sent piece by piece, not all within the connect time-out
        # With an `auth` of ours, neither the URL nor `~/.netrc` puts another in.
        request = requests.Request(method, url, headers=headers, data=data, auth=lambda request: request).prepare()
        timeout = (self._policy.connect_timeout, self._policy.read_timeout)
        return self._session.send(request, timeout=timeout, allow_redirects=False, **self._environment(url))

    def _read_environment(self, url: str) -> Mapping[str, Any]:
        """The proxies and certificates that the environment has for a URL."""
        host = urlsplit(url).hostname or ""
        proxies = {"no_proxy": host} if _is_loopback(host) else {}
        return self._session.merge_environment_settings(url, proxies, stream=True, verify=None, cert=None)


class _Session(requests.Session):
    """Knows of no redirects: else requests reads the whole body of one, without a limit, to prepare the next call."""

    def get_redirect_target(self, resp: requests.Response) -> Optional[str]:
        return None


class _Adapter(HTTPAdapter):
    """Notes the sockets of its connections: shutting one is the only way to end a read from another thread."""

    def __init__(self) -> None:
        super().__init__()
        self._sockets: weakref.WeakSet[socket.socket] = weakref.WeakSet()
        self._lock = threading.Lock()
        self._is_open = True
        self._pools = {"http": self._noting(HTTPConnectionPool), "https": self._noting(HTTPSConnectionPool)}
        self.poolmanager.pool_classes_by_scheme = self._pools

    def proxy_manager_for(self, *args: Any, **kwargs: Any) -> Any:
        manager = super().proxy_manager_for(*args, **kwargs)
        manager.pool_classes_by_scheme = self._pools
        return manager

    def shut(self) -> None:
        """Shut every socket, those of later connections too."""
        with self._lock:
            self._is_open = False
            for opened in self._sockets:
                with contextlib.suppress(OSError):  # gone already
                    socket.socket.shutdown(opened, socket.SHUT_RDWR)  # not TLS's own, which is for its one thread

    def _noting(self, pool: Any) -> Any:
        """A class of urllib3's pools, with connections that note their sockets."""

        def connect(connection: Any) -> None:
            pool.ConnectionCls.connect(connection)
            self._note(connection.sock)

        noting = type("Connection", (pool.ConnectionCls,), {"connect": connect})
        return type("Pool", (pool,), {"ConnectionCls": noting})

    def _note(self, opened: Any) -> None:
        while not isinstance(opened, socket.socket):  # urllib3's TLS within TLS, to a proxy
            opened = opened.socket
        with self._lock:
            self._sockets.add(opened)
        if not self._is_open:
            self.shut()


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
            raise requests.RequestException(f"the answer is larger than {_MAX_ANSWER_BYTES >> 20} MiB")
        if time.monotonic() > deadline:
            raise requests.ReadTimeout
    return b"".join(parts)


def _no_answer(exc: Exception, api_key: Optional[str]) -> Outcome:
    """What it means that no whole answer came."""
    cause = innermost(exc)
    if isinstance(cause, ssl.SSLCertVerificationError):
        return Outcome(Kind.ANSWERED, f"Certificate error: {cause}")
    is_reached = not never_sent(exc)
    if is_reached and (isinstance(exc, requests.Timeout) or isinstance(cause, socket.timeout)):
        return Outcome(Kind.FAILED, "Time-out: no whole answer in time")
    if isinstance(exc, (requests.ConnectionError, ChunkedEncodingError, ContentDecodingError)):  # may not come again
        return Outcome(Kind.FAILED, f"Connection error: {cause}", is_reached=is_reached)
    # A bad URL, say. The text of an error that is not requests' own may hold the key in some other form.
    text = _shortened(str(exc), api_key) if isinstance(exc, requests.RequestException) else type(exc).__name__
    return Outcome(Kind.ANSWERED, f"Request error: {text}")


def _answer(response: requests.Response, deadline: float, api_key: Optional[str]) -> Outcome:
    """What an answer means."""
    status, headers = response.status_code, response.headers
    reason = f"{status} {responses.get(status, 'Unknown')}"
    if status < 300 and headers.get("Content-Type", "").startswith("text/event-stream"):
        what = 'the answer is a stream of events: remove "stream" from the body'
        return Outcome(Kind.ANSWERED, f"Invalid answer ({reason}): {what}")
    content = _read(response, deadline)
    text = _shortened(content.decode("utf-8", "replace"), api_key)
    if not 200 <= status < 300:
        if status < 400:
            location = _shortened(headers.get("Location", "nowhere"), api_key)
            error = f"Redirect ({reason}) to {location}: not followed, since the key would go along"
        else:
            error = f"{'Server' if status >= 500 else 'Client'} error ({reason}): {text}"
        return _error(status, error, headers)
    try:
        answer = json.loads(content.decode("utf-8"), parse_constant=lambda name: None)  # NaN, from Python's json
        completions = json.dumps(answer, allow_nan=False)
    except (ValueError, RecursionError):
        return Outcome(Kind.FAILED, f"Invalid answer ({reason}): not JSON: {text}")
    if not isinstance(answer, dict):
        return Outcome(Kind.FAILED, f"Invalid answer ({reason}): not a JSON object: {text}")
    if answer.get("error"):
        code = at(answer, "error", "code")
        return _error(code if isinstance(code, int) else 200, f"Provider error: {text}", headers)
    counts = usage(answer) or {}
    tokens = (counts.get(name, 0) for name in ("prompt_tokens", "completion_tokens", "total_tokens"))
    return Outcome(Kind.ANSWERED, result=Result(True, completions, 0, *tokens), is_usable=is_usable(answer))


def _error(status: int, error: str, headers: Mapping[str, str]) -> Outcome:
    """What an error of this status means."""
    milliseconds = parse_retry_after(headers.get("retry-after-ms", "0"))
    asked, now = headers.get("Retry-After", "0"), parse_date(headers.get("Date", ""))
    retry_after = milliseconds / 1000 or parse_retry_after(asked, now)
    if status in (401, 402, 403) or (status in (400, 429) and _NO_ACCOUNT.search(error)):
        kind = Kind.DENIED
    elif status == 429 and _TOO_LARGE.search(error):
        kind = Kind.ANSWERED
    elif status == 429 or (status in (503, 529) and retry_after):
        kind = Kind.REFUSED
    else:
        may_work_later = status >= 500 or status in (408, 409, 425)
        kind = Kind.FAILED if may_work_later else Kind.ANSWERED
    return Outcome(kind, error, retry_after=retry_after)


def _told(headers: Mapping[str, str]) -> Iterator[Told]:
    """What the headers of an answer say of limits."""
    if not any("ratelimit" in name.lower() for name in headers):
        return
    for of, names in itertools.product(("requests", "tokens"), _TOLD):
        limit, remaining, reset = (headers.get(names.format(of, what), "") for what in ("limit", "remaining", "reset"))
        with contextlib.suppress(ValueError, OverflowError):  # there is none, or no number, or too large a one
            full_in = _seconds(reset, headers.get("Date"))
            if full_in > 0:
                yield Told(of, float(limit), float(remaining), full_in)


def _seconds(text: str, date: Optional[str]) -> float:
    """How long until a limit is reset: a duration, or a time, by the provider's own clock."""
    is_epoch = text.isdigit() and int(text) > _LONGEST_RESET
    if not is_epoch and "T" not in text:
        if not _DURATIONS.fullmatch(text):
            raise ValueError(text)
        return sum(float(count) * _UNITS[unit] for count, unit in _DURATION.findall(text))
    now = parse_date(date) if date else time.time()
    if now is None:
        raise ValueError(date)
    if is_epoch:
        reset_at = int(text) / (1000 if int(text) > 1e12 else 1)
    else:
        reset_at = timegm(time.strptime(text[:19], "%Y-%m-%dT%H:%M:%S"))
    full_in = reset_at - now
    if full_in > _LONGEST_RESET:
        raise ValueError(text)
    return full_in


def _shortened(text: str, api_key: Optional[str]) -> str:
    """A provider's words, for an error: not all of many, and never the key."""
    if api_key:
        text = text.replace(api_key, "[api_key]").replace(json.dumps(api_key)[1:-1], "[api_key]")
    return text if len(text) <= _MAX_ERROR_CHARACTERS else f"{text[:_MAX_ERROR_CHARACTERS]}..."
