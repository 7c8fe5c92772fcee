"""When a request is sent again, and what is known of one that failed."""

import math
import random
import ssl
import time
from contextvars import ContextVar
from email.utils import mktime_tz, parsedate_tz
from typing import Any, Callable, Iterator, Optional

from urllib3.exceptions import (
    ConnectTimeoutError,
    MaxRetryError,
    ProxyError,
    ReadTimeoutError,
    ResponseError,
    SSLError,
)
from urllib3.util.retry import Retry

from .exceptions import ConfigurationError

#: What the server may ask us to wait before a repeat, in seconds.
LONGEST_RETRY_AFTER = 60.0
_LONGEST_BACKOFF = 120.0

#: Pauses the current request before a repeat; `aio` ends that early, and urllib3 takes no such function itself.
pausing: "ContextVar[Callable[[float], None]]" = ContextVar("pausing", default=time.sleep)


class RetryPolicy(Retry):
    """urllib3's retries, with a rule for uploads, and with what 1.26 and 2 lack or do differently."""

    def is_retry(self, method: str, status_code: int, has_retry_after: bool = False) -> bool:
        """Also an upload that was answered 429: it was surely not taken."""
        return status_code == 429 or super().is_retry(method, status_code, has_retry_after)

    def increment(self, method: Any = None, url: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Give up when the server asks to wait for longer than a minute, and where urllib3 would go too far."""
        response, error = kwargs.get("response"), kwargs.get("error")
        if response is not None and (self.get_retry_after(response) or 0.0) > LONGEST_RETRY_AFTER:
            raise MaxRetryError(kwargs["_pool"], url, ResponseError("asked to wait too long"))
        if isinstance(error, (ProxyError, SSLError)):  # after these urllib3 repeats any method
            is_allowed = method in (self.allowed_methods or ()) or never_sent(error)
            if _is_certificate_error(error) or not is_allowed:
                raise error
        return super().increment(method, url, *args, **kwargs)

    def sleep(self, response: Any = None) -> None:
        """As long as the server asks for, else the backoff; `pausing` says how."""
        asked = 0.0 if response is None else self.get_retry_after(response) or 0.0
        seconds = asked or self.get_backoff_time()
        if seconds:
            pausing.get()(seconds)

    def parse_retry_after(self, retry_after: str) -> float:
        """0 for what is none, on which urllib3 raises."""
        return parse_retry_after(retry_after)

    def get_backoff_time(self) -> float:
        """With jitter; urllib3 1.26 has none."""
        return backoff_time(self.backoff_factor, len(self.history))


def retry_policy(retries: int, backoff_factor: float, *, idempotent_uploads: bool = False) -> RetryPolicy:
    """The policy for an adapter; a ``ConfigurationError`` if a number is out of range."""
    if not isinstance(retries, int) or retries < 0:
        raise ConfigurationError(f"retries must be a whole number from 0 on, not {retries!r}")
    if not isinstance(backoff_factor, (int, float)) or not 0 <= backoff_factor < math.inf:
        raise ConfigurationError(f"backoff_factor must be a number of seconds from 0 on, not {backoff_factor!r}")
    return RetryPolicy(
        total=retries,
        backoff_factor=backoff_factor,
        status_forcelist=(429, 500, 502, 503, 504),
        allowed_methods=frozenset(["GET", "DELETE", "POST"] if idempotent_uploads else ["GET", "DELETE"]),
        raise_on_status=False,  # keep the last answer: it says why
    )


def backoff_time(factor: float, repeats: int) -> float:
    """The pause before a repeat, in seconds: none before the first, then ``factor * 2 ** (repeats - 1)``.

    That is urllib3's formula, with its limit of 120 s; up to half is taken off at random, so that clients that
    failed together do not come back together.
    """
    if repeats <= 1:
        return 0.0
    doublings = min(repeats - 1, 64)  # more overflow
    return min(factor * 2.0**doublings, _LONGEST_BACKOFF) * random.uniform(0.5, 1.0)


def parse_retry_after(text: str, now: Optional[float] = None) -> float:
    """What a Retry-After header asks for, in seconds: a number, or a date (RFC 9110, 10.2.3); 0 for anything else.

    ``now`` is the time by the clock of whoever sent it, if that is known.
    """
    try:
        seconds = float(text)
    except ValueError:
        date = parse_date(text)
        seconds = 0.0 if date is None else date - (time.time() if now is None else now)
    return 0.0 if math.isnan(seconds) else max(seconds, 0.0)


def parse_date(text: str) -> Optional[float]:
    """An HTTP date, in seconds since 1970; None for anything else."""
    try:
        date = parsedate_tz(text)
        return None if date is None else mktime_tz(date)
    except (ValueError, OverflowError, LookupError, UnboundLocalError):  # the last two on Python 3.8
        return None


def never_sent(error: Optional[BaseException]) -> bool:
    """Whether a request surely did not reach the server, by the error that requests raised for it.

    True for a connection that was refused or timed out, a name that was not found, and a certificate that was
    refused. All else, a dropped connection or a read time-out say, leaves it open.
    """
    return any(isinstance(layer, ConnectTimeoutError) for layer in _layers(error)) or _is_certificate_error(error)


def timed_out(error: BaseException) -> bool:
    """Whether the connection was there, and no bytes came for too long."""
    return any(isinstance(layer, ReadTimeoutError) for layer in _layers(error))


def innermost(error: BaseException) -> BaseException:
    """What went wrong, without the layers that requests and urllib3 put around it."""
    return list(_layers(error))[-1]


def _is_certificate_error(error: Optional[BaseException]) -> bool:
    # OpenSSL refuses with the first; urllib3 1.26 compares the host's name by itself, with an error of its own.
    return any(
        isinstance(layer, ssl.SSLCertVerificationError) or type(layer).__name__ == "CertificateError"
        for layer in _layers(error)
    )


def _layers(error: Optional[BaseException]) -> Iterator[BaseException]:
    """An error, and what it wraps: MaxRetryError has a reason, ProxyError an original_error, others arguments."""
    while error is not None:
        yield error
        wrapped = (getattr(error, "reason", None), getattr(error, "original_error", None), *error.args)
        inner = next((item for item in wrapped if isinstance(item, BaseException)), error.__cause__)
        if inner is None and isinstance(error, ConnectTimeoutError):
            inner = error.__context__  # urllib3 1.26 does not say `from`; of others it may be an error of the caller's
        error = inner
