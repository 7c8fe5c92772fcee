"""The REST API: from a request to what the store says, in the framework's words."""

import hashlib
import hmac
import json
import re
import sqlite3
from itertools import chain, islice
from typing import Any, Callable, Dict, Iterable, Iterator, List, Optional, Tuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..models import CalendarInterval, TaskStatus
from .store import Store, batch_number, now, task_ids
from .uploads import problem, read_file, read_rows
from .usage import MINUTE, format_time, parse_time_range, summary, time_series
from .webserver import HTTPError, Request, Response, json_response
from .worker import Workers

_OPEN_PATHS = ("/", "/health")
_WELCOME = {"message": "Welcome to Synthetic Data Generator API", "docs_url": "/docs", "redoc_url": "/redoc"}
#: No page goes beyond the task of this number, as in the framework.
_MAX_PAGED_TASKS = 10_000


class _Parameters(BaseModel):
    """What the query of a request may say."""

    model_config = ConfigDict(use_enum_values=True, validate_default=True)

    task_status: Optional[TaskStatus] = None
    page: int = Field(default=1, ge=1)
    page_size: int = Field(default=100, ge=1, le=_MAX_PAGED_TASKS)
    time_range: str = "24h"
    interval: CalendarInterval = CalendarInterval.HOUR_SHORT


class API:
    """Answers requests that bring the key."""

    def __init__(self, store: Store, workers: Workers, api_key: str) -> None:
        self._store = store
        self._workers = workers
        self._api_key = api_key.encode("latin-1")
        batch, task = "/api/v1/batches/([^/]+)", "/api/v1/tasks/([^/]+)"
        self._routes: Dict[str, Dict[str, Callable[..., Response]]] = {
            "/": {"GET": lambda request: json_response(_WELCOME)},
            "/health": {"GET": self._health},
            "/token": {"GET": lambda request: json_response({"isValid": True})},
            "/api/v1/batches": {"POST": self._post_batch, "GET": self._get_batches},
            batch: {"GET": self._get_batch, "DELETE": self._delete_batch},
            batch + "/tasks": {"GET": self._get_page},
            batch + "/tasks/export": {"GET": self._export},
            batch + "/stats": {"GET": self._get_stats},
            "/api/v1/tasks/stats": {"GET": self._get_task_stats},
            task: {"GET": self._get_task, "DELETE": self._delete_task},
        }

    def __call__(self, request: Request) -> Response:
        answers, arguments = self._find(request.path)
        if request.method in answers:
            if request.path not in _OPEN_PATHS:
                self._authenticate(request)
            try:
                return answers[request.method](request, *arguments)
            except sqlite3.OperationalError as exc:
                raise HTTPError(507 if "full" in str(exc) else 500, f"the database can't be used: {exc}") from exc
        if answers:
            raise HTTPError(405, "Method Not Allowed", {"Allow": ", ".join(answers)})
        path, mark, query = request.target.partition("?")
        if path.endswith("/") and self._find(request.path[:-1])[0]:
            return Response(307, headers={"Location": path[:-1] + mark + query})
        raise HTTPError(404, "Not Found")

    def _find(self, path: str) -> Tuple[Dict[str, Callable[..., Response]], Tuple[str, ...]]:
        """What answers to each method at a path, and what the path tells it."""
        for pattern, answers in self._routes.items():
            match = re.fullmatch(pattern, path)
            if match:
                return answers, match.groups()
        return {}, ()

    def _authenticate(self, request: Request) -> None:
        scheme, _, key = request.headers.get("Authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(key.strip().encode("latin-1"), self._api_key):
            message = "Invalid authentication credentials" if scheme else "Not authenticated"
            raise HTTPError(401, message, {"WWW-Authenticate": "Bearer"})

    def _health(self, request: Request) -> Response:
        counters = self._counters(self._store.totals(), sum(map(len, self._workers.processing().values())))
        unfinished = counters["pending_tasks"] + counters["processing_tasks"]
        unstored, trouble, budget = self._workers.health(unfinished)
        health = {
            "status": "unhealthy" if unstored else "healthy",
            "services": {
                "api": "healthy",
                "rabbitmq": "healthy",
                "elasticsearch": "unhealthy" if unstored else "healthy",  # where the framework keeps tasks
                "task_queue_consumers": self._workers.count,
                "task_queue_messages": counters["pending_tasks"],
                "batch_queue_consumers": 1,
                "batch_queue_messages": 0,
            },
            "budget": budget,
            "error": f"{unstored} results can't be stored: is the disk full?" if unstored else trouble,
        }
        return json_response({"detail": health}, 503) if unstored else json_response(health)

    # Batches.

    def _post_batch(self, request: Request) -> Response:
        batch_id = request.query.get("batch_id", "")
        if "/" in batch_id or batch_id in (".", ".."):
            message = "a batch with a slash in its id, or one called . or .., could not be asked for"
            raise HTTPError(422, [problem(message, "query", "batch_id", given=batch_id)])
        content = read_file(request.headers.get("Content-Type", ""), request.body())
        digest = hashlib.sha256(batch_id.encode("utf-8") + b"\n" + content).digest()
        stored = self._store.add(batch_id, read_rows(content), request.headers.get("Idempotency-Key"), digest).result()
        if stored is None:
            message = "this Idempotency-Key was used for another upload"
            raise HTTPError(422, [problem(message, "header", "Idempotency-Key")])
        if stored.first_task is not None:
            self._workers.added(stored.first_task)
        return json_response({"batch_id": stored.batch_id, "total_tasks": stored.tasks})

    def _get_batches(self, request: Request) -> Response:
        processing = self._workers.processing()
        batches = [self._batch(row, processing[row["number"]]) for row in self._store.batches()]
        return json_response({"total": len(batches), "batches": batches})

    def _get_batch(self, request: Request, batch_id: str) -> Response:
        row = self._store.batch(batch_id)
        return json_response(self._batch(row, self._workers.processing()[row["number"]]) if row else None)

    def _delete_batch(self, request: Request, batch_id: str) -> Response:
        row = self._store.batch(batch_id)
        if row:
            self._delete(*task_ids(row["number"]))
        return Response(204)

    # Tasks.

    def _export(self, request: Request, batch_id: str) -> Response:
        total, pages = self._tasks(batch_id, _parameters(request, "task_status").task_status)
        pages = chain([next(pages, [])], pages)  # at least one line
        return Response(200, (_listing(page, total=total) + b"\n" for page in pages), "application/x-ndjson")

    def _get_page(self, request: Request, batch_id: str) -> Response:
        asked = _parameters(request, "task_status", "page", "page_size")
        total, pages = self._tasks(batch_id, asked.task_status or "COMPLETED")
        end = min(asked.page * asked.page_size, _MAX_PAGED_TASKS)
        tasks = islice(chain.from_iterable(pages), min(end, (asked.page - 1) * asked.page_size), end)
        return Response(200, _listing(tasks, total=total, page=asked.page, page_size=asked.page_size))

    def _get_task(self, request: Request, message_id: str) -> Response:
        row = self._store.task(message_id)
        if row is None:
            return json_response(None)
        processing = self._workers.processing()[batch_number(row["id"])]
        return Response(200, self._task(row, processing, "null").encode("ascii"))

    def _delete_task(self, request: Request, message_id: str) -> Response:
        task_id = self._store.task_id(message_id)
        if task_id is None or not self._delete(task_id, task_id + 1):
            raise HTTPError(404, f"Task with message_id {message_id} not found")
        return Response(204)

    def _delete(self, first: int, end: int) -> int:
        deleted = self._store.delete(first, end).result()
        if deleted:
            self._workers.forget(first, end)
        return deleted

    # Statistics.

    def _get_task_stats(self, request: Request) -> Response:
        totals = self._store.totals()
        counters = self._counters(totals, sum(map(len, self._workers.processing().values())))
        tokens = {name: counters[name] + totals[f"cached_{name}"] for name in counters if name.endswith("_tokens")}
        return json_response({**counters, **tokens})

    def _get_stats(self, request: Request, batch_id: str) -> Response:
        asked = _parameters(request, "time_range", "interval")
        try:
            since = now() - parse_time_range(asked.time_range)
        except ValueError as exc:
            raise HTTPError(400, f"Invalid time_range parameter: {exc}") from None
        row = self._store.batch(batch_id)
        minutes = [dict(minute) for minute in self._store.usage_by_minute(row["number"], since)] if row else []
        processing = self._workers.processing()[row["number"]] if row else {}
        running = {"processing_tasks": 1, "total_tasks": 1}
        minutes += [{"minute": started // MINUTE, **running} for started in processing.values()]
        statistics = {
            "time_range": asked.time_range,
            "interval": asked.interval,
            "current_time": format_time(now()),
            "time_series": time_series(minutes, asked.interval),
            "summary": summary(minutes),
        }
        return json_response(statistics)

    # From rows to what the API calls them.

    def _counters(self, row: sqlite3.Row, processing: int) -> Dict[str, int]:
        """The counters of a batch, or of all; they add up, though the tasks that run are counted a moment later."""
        waiting = row["total"] - row["completed"] - row["failed"] - row["cached"]
        processing = min(processing, waiting)
        counters = {f"{name}_tasks": row[name] for name in ("total", "completed", "failed", "cached")}
        counters.update(pending_tasks=waiting - processing, processing_tasks=processing)
        return {**counters, **{name: row[name] for name in ("total_tokens", "prompt_tokens", "completion_tokens")}}

    def _batch(self, row: sqlite3.Row, processing: Dict[int, int]) -> Dict[str, Any]:
        counters = self._counters(row, len(processing))
        started = row["started_at"] or min(processing.values(), default=None)
        completed = row["completed_at"]
        status = next((name for name in ("processing", "pending", "failed") if counters[f"{name}_tasks"]), "completed")
        return {
            "batch_id": row["batch_id"],
            "batch_status": status.upper(),
            **counters,
            "created_at": format_time(row["created_at"]),
            "started_at": format_time(started),
            "completed_at": format_time(completed),
            "duration": (completed - row["created_at"]) // 1_000_000 if completed else None,
        }

    def _tasks(self, batch_id: str, status: Optional[str]) -> Tuple[int, Iterator[List[str]]]:
        """How many tasks of a batch have a status, or any, and these as JSON, a few at a time."""
        row = self._store.batch(batch_id)
        if row is None:
            return 0, iter(())
        processing = self._workers.processing()[row["number"]]
        counters = self._counters(row, len(processing))
        total = counters[f"{status.lower() if status else 'total'}_tasks"]
        if status == "COMPLETED":
            total += counters["cached_tasks"]
        pages = self._store.pages(row["number"], "PENDING" if status == "PROCESSING" else status)
        if status in ("PENDING", "PROCESSING"):
            is_running = status == "PROCESSING"
            pages = ([task for task in page if (task["id"] in processing) == is_running] for page in pages)
        return total, ([self._task(task, processing, "{}") for task in page] for page in pages if page)

    def _task(self, row: sqlite3.Row, processing: Dict[int, int], no_completions: str) -> str:
        """A task as JSON; what is stored as JSON is put in as it is."""
        is_pending = row["status"] == "PENDING"
        running_since = processing.get(row["id"]) if is_pending else None
        task = {
            "message_id": self._store.message_id(row["id"]),
            "batch_id": row["batch_id"],
            "custom_id": row["custom_id"],
            "status": "PROCESSING" if running_since else row["status"],
            "cached": bool(row["cached"]),
            "created_at": format_time(row["created_at"]),
            "started_at": format_time(running_since or row["started_at"]),
            "completed_at": format_time(running_since or row["completed_at"]),
            "duration": 0 if running_since else row["duration"],
            "dataset": row["dataset"],
            "method": row["method"],
            "url": row["url"],
            "result": {},
        }
        completions = no_completions if is_pending and not running_since else row["completions"]
        stored = f'"source": {row["source"]}, "body": {row["body"]}, "completions": {completions}'
        return f"{json.dumps(task)[:-1]}, {stored}}}"


def _listing(tasks: Iterable[str], **numbers: int) -> bytes:
    """Tasks that are JSON already, and numbers, as one object."""
    return f'{{"tasks": [{", ".join(tasks)}], {json.dumps(numbers)[1:]}'.encode("ascii")


def _parameters(request: Request, *names: str) -> _Parameters:
    """What a query says of these."""
    try:
        return _Parameters.model_validate({name: request.query[name] for name in names if name in request.query})
    except ValidationError as exc:
        problems = [problem(e["msg"], "query", *e["loc"], kind=e["type"], given=e["input"]) for e in exc.errors()]
        raise HTTPError(422, problems) from None
