"""Run large batches of LLM calls through a Synthgen server.

>>> from synthgen import SynthgenClient, Task
>>> from synthgen.local import DemoProvider, LocalServer
>>> with DemoProvider() as provider, LocalServer() as server, server.client() as client:
...     task = Task(url=provider.url, body={"messages": [{"role": "user", "content": "solve 2x + 4 = 10"}]})
...     results = client.monitor_batch([task], show_progress=False)
>>> results[0].content
'x = 3'
"""

import logging

from ._version import __version__
from .client import SynthgenClient
from .exceptions import (
    APIError,
    AuthenticationError,
    BatchIncompleteError,
    BatchStalledError,
    BatchTimeoutError,
    BatchUploadError,
    BudgetExceededError,
    CheckpointError,
    ConfigurationError,
    ConnectionFailedError,
    ContentError,
    ErrorResponse,
    InvalidRequestError,
    InvalidResponseError,
    MissingDependencyError,
    NotFoundError,
    RateLimitError,
    ServerError,
    SynthgenError,
)
from .models import (
    Batch,
    BatchCost,
    BatchList,
    BudgetStatus,
    BulkTaskResponse,
    CalendarInterval,
    HealthResponse,
    HealthStatus,
    ServiceStatus,
    StatsSummary,
    Task,
    TaskResponse,
    TaskStatsResponse,
    TaskStatus,
    TimeSeriesDataPoint,
    Usage,
    UsageStatsResponse,
)
from .monitor import Monitor

__all__ = [
    "APIError",
    "AuthenticationError",
    "Batch",
    "BatchCost",
    "BatchIncompleteError",
    "BatchList",
    "BatchStalledError",
    "BatchTimeoutError",
    "BatchUploadError",
    "BudgetExceededError",
    "BudgetStatus",
    "BulkTaskResponse",
    "CalendarInterval",
    "CheckpointError",
    "ConfigurationError",
    "ConnectionFailedError",
    "ContentError",
    "ErrorResponse",
    "HealthResponse",
    "HealthStatus",
    "InvalidRequestError",
    "InvalidResponseError",
    "MissingDependencyError",
    "Monitor",
    "NotFoundError",
    "RateLimitError",
    "ServerError",
    "ServiceStatus",
    "StatsSummary",
    "SynthgenClient",
    "SynthgenError",
    "Task",
    "TaskResponse",
    "TaskStatsResponse",
    "TaskStatus",
    "TimeSeriesDataPoint",
    "Usage",
    "UsageStatsResponse",
    "__version__",
]

logging.getLogger(__name__).addHandler(logging.NullHandler())
