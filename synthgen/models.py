"""What goes over the wire, as pydantic models, and what can be asked of it.

What is sent (`Task`) is strict: unknown fields and what JSON can't say are refused when the object
is made. What is received is easy: unknown fields are kept, missing counters are 0, and a status that
this version does not know stays text, so that a newer server does not break an older client.
"""

import json
import re
from datetime import datetime, timezone
from enum import Enum
from typing import Any, ClassVar, Dict, List, Optional, Type, TypeVar, Union

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError, SchemaValidator, core_schema, to_json

from . import _completions
from .exceptions import ContentError

__all__ = [
    "Batch",
    "BatchCost",
    "BatchList",
    "BudgetStatus",
    "BulkTaskResponse",
    "CalendarInterval",
    "HealthResponse",
    "HealthStatus",
    "ServiceStatus",
    "StatsSummary",
    "Task",
    "TaskResponse",
    "TaskStatsResponse",
    "TaskStatus",
    "TimeSeriesDataPoint",
    "Usage",
    "UsageStatsResponse",
]


class _TextEnum(str, Enum):
    """Prints as its value on every Python; left alone, ``str()`` and ``format()`` differ from 3.8 to 3.12."""

    __str__ = str.__str__


class TaskStatus(_TextEnum):
    """Where a task is; for a batch, see `Batch.batch_status`."""

    PENDING = "PENDING"
    PROCESSING = "PROCESSING"
    COMPLETED = "COMPLETED"
    FAILED = "FAILED"


class HealthStatus(_TextEnum):
    """The state of the server, or of one of the services under it."""

    HEALTHY = "healthy"
    UNHEALTHY = "unhealthy"


class CalendarInterval(_TextEnum):
    """The size of a time bucket in `SynthgenClient.get_batch_stats`."""

    MINUTE = "minute"
    MINUTE_SHORT = "1m"
    HOUR = "hour"
    HOUR_SHORT = "1h"
    DAY = "day"
    DAY_SHORT = "1d"
    WEEK = "week"
    WEEK_SHORT = "1w"
    MONTH = "month"
    MONTH_SHORT = "1M"
    QUARTER = "quarter"
    QUARTER_SHORT = "1q"
    YEAR = "year"
    YEAR_SHORT = "1y"


_Model = TypeVar("_Model", bound=BaseModel)
#: A Markdown fence, with nothing around it.
_FENCED = re.compile(r"\A\s*```(?:json)?\s(.*)```\s*\Z", re.DOTALL | re.IGNORECASE)

# Left to right: pydantic's smart mode would give plain text for the known statuses too.
_Status = Field(union_mode="left_to_right")


# ---------------------------------------------------------------------------------------------- sent

# Made once: json.dumps would make an encoder for each text.
_to_ascii = json.JSONEncoder(allow_nan=False, separators=(",", ":")).encode
_to_text = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode

_json = core_schema.definition_reference_schema("json")
_json_text = core_schema.str_schema(strict=True, min_length=0)  # a length is counted in UTF-8: no lone surrogates
_json_kinds: List[Any] = [
    _json_text,
    core_schema.bool_schema(strict=True),
    core_schema.dict_schema(_json_text, _json, strict=True),
    core_schema.list_schema(_json, strict=True),
    # What is out of this range is no float either; below, a float would be taken for a whole number that is too large.
    core_schema.int_schema(strict=True, ge=-(10**309), le=10**309),
    # pydantic takes a Decimal for a float, too.
    core_schema.chain_schema(
        [core_schema.is_instance_schema(float), core_schema.float_schema(strict=True, allow_inf_nan=False)]
    ),
]
#: A copy in plain types of what pydantic-core is sure to write as json would.
_plain_copy = SchemaValidator(
    core_schema.definitions_schema(
        _json, [core_schema.nullable_schema(core_schema.union_schema(_json_kinds, mode="left_to_right"), ref="json")]
    )
).validate_python


def as_json(value: Any) -> Any:
    """The value as JSON would give it back: nothing but plain types, with text for keys.

    Raises:
        TypeError, ValueError: JSON can't say it.
    """
    try:
        return _plain_copy(value)
    except ValidationError:
        pass  # tuples, keys that are numbers, or no JSON: rare, and for json to say
    try:
        text = _to_text(value)
        text.encode("utf-8")
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


class Task(BaseModel):
    """One LLM call to make.

    A field that can't be sent as JSON (NaN, a set, a lone surrogate) is refused by its name, as a
    ``pydantic.ValidationError``. Neither such an error nor the ``repr`` shows the ``api_key``.
    """

    # The length is there for lone surrogates; see _json_text.
    model_config: ClassVar[ConfigDict] = ConfigDict(extra="forbid", hide_input_in_errors=True, str_min_length=0)

    #: Your name for the task; its result carries it too. It need not be unique.
    custom_id: Optional[str] = None
    #: The HTTP method of the call.
    method: str = "POST"
    #: The provider's endpoint, e.g. ``https://api.openai.com/v1/chat/completions``, as the server reaches it.
    url: str
    #: The provider's key; sent to it as ``Authorization: Bearer``.
    api_key: Optional[str] = Field(default=None, repr=False)
    #: The JSON object that the provider is sent.
    body: Dict[str, Any]
    #: A label to file the task under.
    dataset: Optional[str] = None
    #: Anything that you want to find again beside the result.
    source: Optional[Dict[str, Any]] = None
    #: Take the answer to an identical earlier call, at no cost, where the server has one.
    use_cache: bool = True
    #: Let the server say PROCESSING while the call is running; without it the status goes from PENDING to the end.
    track_progress: bool = True

    @model_validator(mode="wrap")
    @classmethod
    def _hide_inputs(cls, data: Any, handler: Any) -> Any:
        try:
            return handler(data)
        except ValidationError as exc:
            hidden = _without_inputs(exc)
        raise hidden  # here, so that the first error is not its context

    @classmethod
    def model_validate_json(cls, json_data: Union[str, bytes, bytearray], **kwargs: Any) -> "Task":
        """A task from its JSON text; what is not JSON is not shown in the error."""
        try:
            return super().model_validate_json(json_data, **kwargs)
        except ValidationError as exc:
            hidden = _without_inputs(exc)
        raise hidden

    @field_validator("body", "source")
    @classmethod
    def _copied(cls, value: Any) -> Any:
        """A copy: what the caller does with a template afterwards is for the next task."""
        try:
            return as_json(value)
        except (TypeError, ValueError) as exc:
            raise ValueError(f"can't be sent as JSON: {exc}") from None

    @field_validator("url")
    @classmethod
    def _is_http(cls, url: str) -> str:
        if not url.lower().startswith(("http://", "https://")):
            raise ValueError("must be a whole URL that starts with http:// or https://")
        return url

    @field_validator("api_key")
    @classmethod
    def _fits_header(cls, api_key: Optional[str]) -> Optional[str]:
        if api_key is not None and not is_header_value(api_key):
            raise ValueError("can't be sent in a header: it has a line break, spaces around it, or is not Latin-1")
        return api_key

    def to_line(self) -> bytes:
        """The task as one line of the JSONL that is uploaded: ASCII, every field, no newline.

        Raises:
            TypeError, ValueError: A field was changed to something that JSON can't say.
        """
        fields = as_json(self.__dict__)
        try:
            line = to_json(fields)
            if line.isascii():
                return line
        except ValueError:
            pass  # nested deeper than pydantic-core goes
        return _to_ascii(fields).encode("ascii")


def _without_inputs(error: ValidationError) -> ValidationError:
    """The same places and texts, without the inputs, which hold keys."""
    details = [
        InitErrorDetails(type=PydanticCustomError(e["type"], "{msg}", {"msg": e["msg"]}), loc=e["loc"], input=None)
        for e in error.errors(include_url=False)
    ]
    return ValidationError.from_exception_data(error.title, details, hide_input=True)


def reasons(error: ValidationError) -> str:
    """What does not fit, with its place: the first few, without the inputs."""
    places = [".".join(map(str, e["loc"])) + ": " * bool(e["loc"]) + e["msg"] for e in error.errors()]
    return "; ".join(places[:5] + ["..."] * (len(places) > 5))


def is_header_value(text: str) -> bool:
    """Whether a key can go into an HTTP header as it is: it is Latin-1, in one line and without spaces around it."""
    return text.isprintable() and text == text.strip() and max(text, default="") <= "\xff"


# ------------------------------------------------------------------------------------------ received


class _Received(BaseModel):
    model_config: ClassVar[ConfigDict] = ConfigDict(extra="allow", hide_input_in_errors=True)


class BulkTaskResponse(_Received):
    """What was submitted."""

    batch_id: str
    #: How many tasks were sent.
    total_tasks: int = 0


class Usage(_Received):
    """What one call used, in tokens, as its provider counted them."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    total_tokens: int = 0


class TaskResponse(_Received):
    """A task as the server knows it, with its result once there is one."""

    #: The server's name for the task.
    message_id: str
    batch_id: Optional[str] = None
    #: Your name for the task. The framework's export leaves it out; `SynthgenClient.monitor_batch` puts it back.
    custom_id: Optional[str] = None
    status: Union[TaskStatus, str] = _Status
    #: Where the call went; the embedded server says so, the framework does not.
    url: Optional[str] = None
    method: Optional[str] = None
    #: What the provider was sent.
    body: Optional[Dict[str, Any]] = None
    #: What the provider answered; ``{"error": ...}`` for a failed task; empty or None before the end.
    completions: Any = None
    #: Whether the answer was that to an identical earlier call.
    cached: bool = False
    created_at: Optional[datetime] = None
    started_at: Optional[datetime] = None
    #: Set while the task is PROCESSING, too: look at ``status``.
    completed_at: Optional[datetime] = None
    #: How long the call took, in milliseconds; of a cached task, how long the original took.
    duration: Union[int, float, None] = None
    dataset: Optional[str] = None
    source: Any = None

    @property
    def ok(self) -> bool:
        """Whether the task was completed."""
        return self.status == TaskStatus.COMPLETED

    @property
    def content(self) -> Optional[str]:
        """The text of the first choice, of any provider's; None where there is none, as in a failed task."""
        return _completions.text(self.completions)

    @property
    def finish_reason(self) -> Optional[str]:
        """Why the text ends where it does, in the provider's own word, such as ``stop``; None where it does not say."""
        return _completions.finish_reason(self.completions)

    @property
    def cut_off(self) -> bool:
        """Whether the token limit ended the text; the task is `ok` all the same."""
        return _completions.is_cut_off(self.completions)

    @property
    def filtered(self) -> bool:
        """Whether the provider held back some of the text, or the model refused; the task is `ok` all the same."""
        return _completions.is_filtered(self.completions)

    @property
    def usage(self) -> Optional[Usage]:
        """The tokens used; None where the provider did not say."""
        usage = _completions.usage(self.completions)
        return None if usage is None else Usage.model_validate(usage)

    @property
    def error(self) -> Optional[str]:
        """Why the task failed; None for one that did not."""
        if self.status != TaskStatus.FAILED:
            return None
        error = _completions.at(self.completions, "error")
        message = _completions.at(error, "message") or error
        return str(message) if message else "no reason given"

    def parse(self, model: Type[_Model]) -> _Model:
        """The `content` as a pydantic model of yours: all of it a JSON text, alone or in one Markdown fence.

        Raises:
            ContentError: The task failed, or its content was cut off or filtered, is missing or does not fit the model.
        """
        content = self.content
        if not self.ok:
            wrong = f"it is {self.status}" + (f": {self.error}" if self.error else "")
        elif self.filtered:
            wrong = f"the provider filtered the answer, or the model refused (finish_reason: {self.finish_reason})"
        elif self.cut_off:
            wrong = f"the token limit cut the content off (finish_reason: {self.finish_reason}): allow more tokens"
        elif content is None:
            wrong = f"there is no content (finish_reason: {self.finish_reason})"
        else:
            json_text = _FENCED.sub(r"\1", content).encode("utf-8", "surrogatepass")
            try:
                return model.model_validate_json(json_text)
            except ValidationError as exc:
                wrong = f"the content does not fit {model.__name__}: {reasons(exc)}"
        raise ContentError(f"task {self.custom_id or self.message_id!r}: {wrong}")

    def to_line(self) -> bytes:
        """The result as a line of JSON in ASCII, with the line break; NaN, which JSON can't say, as null."""
        # Not by pydantic: its limit of nesting is lower than that of what can be received.
        given = {name: getattr(self, name) for name in ("body", "completions", "source")}
        fields = {**self.model_dump(mode="json", exclude=set(given)), **given}
        try:
            text = json.dumps(fields, allow_nan=False)
        except ValueError:
            text = json.dumps(json.loads(json.dumps(fields), parse_constant=lambda name: None))
        return text.encode("ascii") + b"\n"

    def to_row(self) -> Dict[str, Any]:
        """The result as a row of a table: texts, numbers, booleans and None; the ``source`` as a JSON text."""
        usage = self.usage
        return {
            "custom_id": self.custom_id,
            "message_id": self.message_id,
            "ok": self.ok,
            "content": self.content,
            "error": self.error,
            "finish_reason": self.finish_reason,
            "prompt_tokens": usage and usage.prompt_tokens,
            "completion_tokens": usage and usage.completion_tokens,
            "total_tokens": usage and usage.total_tokens,
            "cached": self.cached,
            "duration_ms": self.duration,
            "dataset": self.dataset,
            "source": None if self.source is None else json.dumps(self.source, ensure_ascii=False),
        }


class BatchCost(BaseModel):
    """What a batch cost, for its input and its output tokens, in the currency of the prices given."""

    model_config: ClassVar[ConfigDict] = ConfigDict(frozen=True)

    input: float = 0.0
    output: float = 0.0

    @property
    def total(self) -> float:
        """Input and output together."""
        return self.input + self.output


class Batch(_Received):
    """A batch, as the server last described it."""

    batch_id: str
    #: PROCESSING if any task is; else PENDING if any is; else FAILED if any failed; else COMPLETED.
    #: While an upload is still being ingested the framework says COMPLETED too early: see `done`.
    batch_status: Union[TaskStatus, str] = _Status
    #: Grows while the server ingests the upload.
    total_tasks: int = 0
    #: Without the cached ones.
    completed_tasks: int = 0
    failed_tasks: int = 0
    pending_tasks: int = 0
    processing_tasks: int = 0
    cached_tasks: int = 0
    created_at: Optional[datetime] = None
    started_at: Optional[datetime] = None
    completed_at: Optional[datetime] = None
    #: From the first creation to the last completion, in whole seconds; None while nothing has completed.
    duration: Union[int, float, None] = None
    #: Tokens are those paid for: cached tasks count none.
    total_tokens: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    @property
    def finished_tasks(self) -> int:
        """How many tasks have an outcome: completed, cached or failed."""
        return self.completed_tasks + self.cached_tasks + self.failed_tasks

    @property
    def done(self) -> bool:
        """Whether every task that the server knows of has an outcome.

        More tasks may still be on their way into the batch; `SynthgenClient.monitor_batch` counts for itself.
        """
        waiting = self.pending_tasks + self.processing_tasks
        return self.total_tasks > 0 and waiting == 0 and self.finished_tasks >= self.total_tasks

    def cost(self, cost_by_1m_input_token: float = 0.0, cost_by_1m_output_token: float = 0.0) -> BatchCost:
        """What the tokens so far cost, at these prices per million."""
        return BatchCost(
            input=self.prompt_tokens * cost_by_1m_input_token / 1e6,
            output=self.completion_tokens * cost_by_1m_output_token / 1e6,
        )


class BatchList(_Received):
    """All batches, newest first."""

    #: How many batches there are.
    total: int = 0
    batches: List[Batch] = []


class ServiceStatus(_Received):
    """The services under the server, and the queues between them; None where an older server does not say."""

    api: Union[HealthStatus, str, None] = Field(default=None, union_mode="left_to_right")
    rabbitmq: Union[HealthStatus, str, None] = Field(default=None, union_mode="left_to_right")
    elasticsearch: Union[HealthStatus, str, None] = Field(default=None, union_mode="left_to_right")
    #: Who runs tasks, and how many tasks wait for them.
    task_queue_consumers: Optional[int] = Field(
        default=None, validation_alias=AliasChoices("task_queue_consumers", "queue_consumers")
    )
    task_queue_messages: Optional[int] = Field(
        default=None, validation_alias=AliasChoices("task_queue_messages", "queue_messages")
    )
    #: Who ingests uploads, and how many uploads wait for them.
    batch_queue_consumers: Optional[int] = None
    batch_queue_messages: Optional[int] = None

    @property
    def queue_consumers(self) -> Optional[int]:
        """The task queue's consumers."""
        return self.task_queue_consumers


class BudgetStatus(_Received):
    """What the embedded server has ``spent``, and its ``cap``, in the currency of the prices that it was given."""

    spent: float = 0.0
    cap: float = 0.0
    #: How many tasks wait for a higher cap; 0 while any other may still run.
    waiting: int = 0


class HealthResponse(_Received):
    """The state of the server and what it stands on."""

    status: Union[HealthStatus, str] = _Status
    services: ServiceStatus = Field(default_factory=ServiceStatus)
    #: Of the embedded server, with a cap on what it may spend.
    budget: Optional[BudgetStatus] = None
    error: Optional[str] = None


class TaskStatsResponse(_Received):
    """Counters over all tasks of the server."""

    total_tasks: int = 0
    completed_tasks: int = 0
    failed_tasks: int = 0
    cached_tasks: int = 0
    processing_tasks: int = 0
    pending_tasks: int = 0
    total_tokens: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0


class TimeSeriesDataPoint(_Received):
    """What ended within one time bucket."""

    #: The start of the bucket, in UTC.
    timestamp: datetime
    total_tasks: int = 0
    completed_tasks: int = 0
    failed_tasks: int = 0
    cached_tasks: int = 0
    #: Cached tasks' tokens are counted here, unlike in a `Batch`.
    total_tokens: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    #: Mean time per call, in milliseconds.
    avg_duration_ms: Union[int, float] = 0
    tokens_per_second: float = 0.0

    @field_validator("timestamp")
    @classmethod
    def _in_utc(cls, timestamp: datetime) -> datetime:
        return timestamp if timestamp.tzinfo else timestamp.replace(tzinfo=timezone.utc)  # the wire names no zone


class StatsSummary(_Received):
    """The whole of the time range."""

    total_tasks: int = 0
    completed_tasks: int = 0
    failed_tasks: int = 0
    cached_tasks: int = 0
    processing_tasks: int = 0
    #: Cached tasks' tokens are counted here, unlike in a `Batch`.
    total_tokens: int = 0
    total_prompt_tokens: int = Field(default=0, validation_alias=AliasChoices("total_prompt_tokens", "prompt_tokens"))
    total_completion_tokens: int = Field(
        default=0, validation_alias=AliasChoices("total_completion_tokens", "completion_tokens")
    )
    #: Mean time per call, in milliseconds.
    average_response_time: Union[int, float] = 0
    tokens_per_second: float = 0.0
    #: cached / (completed + cached + failed), from 0 to 1; 0 when nothing has ended.
    cache_hit_rate: float = 0.0

    @model_validator(mode="after")
    def _count_cache_hits(self) -> "StatsSummary":
        # Counted here: the server sends a percentage of a total that stops at 10,000.
        ended = self.completed_tasks + self.cached_tasks + self.failed_tasks
        self.cache_hit_rate = self.cached_tasks / ended if ended else 0.0
        return self


class UsageStatsResponse(_Received):
    """A batch over time."""

    #: How far back it goes, as asked for, e.g. ``24h``.
    time_range: str = ""
    #: The size of a time bucket, as asked for, e.g. ``1h``.
    interval: str = ""
    #: The end of the time range, by the server's clock.
    current_time: Optional[datetime] = None
    time_series: List[TimeSeriesDataPoint] = []
    summary: StatsSummary = Field(default_factory=StatsSummary)
