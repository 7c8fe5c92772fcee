"""Every error that this package raises, as one tree.

    SynthgenError
    ├── ConfigurationError (also ValueError)
    │   └── CheckpointError
    ├── MissingDependencyError (also ImportError)
    ├── ContentError (also ValueError)
    ├── APIError
    │   ├── AuthenticationError      401, 403
    │   ├── NotFoundError            404, or the server's null
    │   ├── InvalidRequestError      any other 4xx
    │   ├── RateLimitError           429
    │   ├── ServerError              5xx
    │   ├── ConnectionFailedError    no whole answer came
    │   ├── InvalidResponseError     a whole answer, but not one of this API
    │   └── BatchUploadError         an upload ended early; says how to go on
    ├── BatchTimeoutError (also TimeoutError)
    ├── BatchStalledError
    ├── BudgetExceededError
    └── BatchIncompleteError

All of them pickle. The tasks that an error holds are pickled without their provider keys.
"""

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Iterable, List, Mapping, Optional, Tuple

from requests.structures import CaseInsensitiveDict

if TYPE_CHECKING:
    from .models import Batch, HealthResponse, Task, TaskResponse

__all__ = [
    "APIError",
    "AuthenticationError",
    "BatchIncompleteError",
    "BatchStalledError",
    "BatchTimeoutError",
    "BatchUploadError",
    "BudgetExceededError",
    "CheckpointError",
    "ConfigurationError",
    "ConnectionFailedError",
    "ContentError",
    "ErrorResponse",
    "InvalidRequestError",
    "InvalidResponseError",
    "MissingDependencyError",
    "NotFoundError",
    "RateLimitError",
    "ServerError",
    "SynthgenError",
]


class ErrorResponse:
    """The answer behind an error, without the request that it answered.

    Unlike a ``requests.Response`` it is always true, so that ``if error.response:`` means what it
    says, and it holds no request, hence no key, when it is pickled.

    Attributes:
        status_code: The HTTP status, e.g. 404.
        headers: The headers of the answer; names are case-insensitive.
        text: The body, cut at 64 KiB.
        url: What was asked.
    """

    def __init__(self, status_code: int, headers: Mapping[str, str], text: str, url: str) -> None:
        self.status_code = status_code
        self.headers: Mapping[str, str] = CaseInsensitiveDict(headers)
        self.text = text
        self.url = url

    def __repr__(self) -> str:
        return f"<ErrorResponse [{self.status_code}]>"

    def json(self) -> Any:
        """The body as JSON.

        Raises:
            ValueError: The body is something else, such as a proxy's HTML page.
        """
        try:
            return json.loads(self.text)
        except RecursionError:
            raise ValueError("nested too deeply") from None


@dataclass(eq=False, repr=False)
class SynthgenError(Exception):
    """Base of every error here.

    Attributes:
        message: What went wrong, and what to try.
    """

    message: str

    def __post_init__(self) -> None:
        super().__init__(self.message)


class ConfigurationError(SynthgenError, ValueError):
    """A setting is missing, malformed, or in a file that can't be read."""


class CheckpointError(ConfigurationError):
    """A checkpoint is of other tasks, of another server, in use, or no checkpoint; nothing was sent."""


class MissingDependencyError(SynthgenError, ImportError):
    """An optional package is needed for this and is not installed."""


class ContentError(SynthgenError, ValueError):
    """A task has no content, or not one that `TaskResponse.parse` was asked for."""


@dataclass(eq=False, repr=False)
class APIError(SynthgenError):
    """A request to the server did not give what it should.

    Attributes:
        message: What was asked, what came, and what to try.
        status_code: The HTTP status, e.g. 404; None where no whole answer came.
        response: The answer, where there was one.
    """

    status_code: Optional[int] = None
    response: Optional[ErrorResponse] = None
    #: Whether an earlier try of the request may have been carried out.
    _in_doubt = False


class AuthenticationError(APIError):
    """401 or 403: the API key is missing, wrong, or not allowed to do this."""


class NotFoundError(APIError):
    """404, or the server's way of saying it: 200 and null. ``status_code`` is 404 in both cases."""


class InvalidRequestError(APIError):
    """Any other 4xx: the server understood the request and refuses it."""


@dataclass(eq=False, repr=False)
class RateLimitError(APIError):
    """429: too many requests.

    Attributes:
        retry_after: How long the server asks to wait, in seconds; None where it did not say.
    """

    retry_after: Optional[float] = None


class ServerError(APIError):
    """5xx: the server, or what it stands on, failed."""


class ConnectionFailedError(APIError):
    """No whole answer: refused, dropped, cut short, TLS, proxy, time-out."""


class InvalidResponseError(APIError):
    """A whole answer that is not what the API promises: HTML, another shape, a redirect."""


@dataclass(eq=False, repr=False)
class BatchUploadError(APIError):
    """An upload ended early. ``create_batch(error.remaining, batch_id=error.batch_id)`` goes on.

    Attributes:
        batch_id: The batch that the tasks belong to.
        uploaded: How many tasks this call saw confirmed.
        unconfirmed: The chunk that may or may not have been taken: sent, and no clear answer.
        remaining: The tasks that were surely not taken: a refused chunk, then what was not read yet.
            One pass only; None after unpickling, unless it was a list.
        idempotency_key: The key that ``unconfirmed`` was sent under. A server that deduplicates
            (the embedded one does) takes the same list under the same key only once.
    """

    batch_id: str = ""
    uploaded: int = 0
    unconfirmed: List["Task"] = field(default_factory=list)
    remaining: Optional[Iterable["Task"]] = None
    idempotency_key: Optional[str] = None

    def __reduce__(self) -> Tuple[Any, ...]:
        remaining = _without_keys(self.remaining) if isinstance(self.remaining, list) else None
        state = dict(self.__dict__, unconfirmed=_without_keys(self.unconfirmed), remaining=remaining)
        return type(self), self.args, state


@dataclass(eq=False, repr=False)
class BatchTimeoutError(SynthgenError, TimeoutError):
    """The time given to ``monitor_batch`` ran out; the batch goes on.

    Attributes:
        batch_id: The batch, to come back to.
        batch: Its state when last seen; None if it never was.
    """

    batch_id: str = ""
    batch: Optional["Batch"] = None


@dataclass(eq=False, repr=False)
class BatchStalledError(SynthgenError):
    """Tasks are waiting, and nothing on the server consumes their queue.

    Attributes:
        batch_id: The batch, to come back to.
        batch: Its state when last seen; None if it never was.
        health: What the server said of its queues.
    """

    batch_id: str = ""
    batch: Optional["Batch"] = None
    health: Optional["HealthResponse"] = None


@dataclass(eq=False, repr=False)
class BudgetExceededError(SynthgenError):
    """What the server may spend is used up, and tasks wait; started again with a higher cap it goes on.

    Attributes:
        batch_id: The batch, to come back to.
        spent: What all batches of the server have cost.
        cap: What they may cost.
        waiting: How many tasks of the batch wait.
    """

    batch_id: str = ""
    spent: float = 0.0
    cap: float = 0.0
    waiting: int = 0


@dataclass(eq=False, repr=False)
class BatchIncompleteError(SynthgenError):
    """Some tasks have no result and none is coming.

    Attributes:
        batch_id: The batch.
        results: Every result that came back, in the order of the tasks.
        missing: The tasks without a result, ready to be submitted again.
        health: What the server said of its queues; None if it did not answer.
    """

    batch_id: str = ""
    results: List["TaskResponse"] = field(default_factory=list)
    missing: List["Task"] = field(default_factory=list)
    health: Optional["HealthResponse"] = None

    def __reduce__(self) -> Tuple[Any, ...]:
        return type(self), self.args, dict(self.__dict__, missing=_without_keys(self.missing))


def _without_keys(tasks: Iterable["Task"]) -> List["Task"]:
    return [task.model_copy(update={"api_key": None}) for task in tasks]
