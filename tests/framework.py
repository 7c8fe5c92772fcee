"""A server that plays the Synthgen framework, as read and recorded in ``tests/wire``, with its tricks at hand.

    with Framework() as server:                    # takes, ingests, runs and shows tasks at once
        server.ingests = False                     # uploads stay in the batch queue ...
        server.ingest(3)                           # ... until told; likewise runs and run, refreshes and refresh
        server.loses = lambda task: task["custom_id"] == "7"
        server.answer("GET", "/health", DROP, server.play)

What a test answers itself (`CannedServer.answer`) comes first; `play` is the answer of the framework.
"""

import json
import random
import re
import threading
from collections import Counter
from typing import Any, Callable, Dict, List, Optional, Set, Tuple
from urllib.parse import unquote, urlsplit

from servers import NOT_FOUND, Answer, CannedServer, Request

_REQUIRED = {"custom_id", "method", "url", "body"}
_COUNTED_TO = 10_000
_TIME = "2026-11-22T11:39:52.{:06}+00:00"
_NO_INDEX = "Failed to fetch bulk task status: NotFoundError(404, 'index_not_found_exception', 'no such index')"


def prompt_of(task: Dict[str, Any]) -> str:
    """What a task asks."""
    prompt: str = task["body"]["messages"][0]["content"]
    return prompt


def echo(task: Dict[str, Any]) -> Dict[str, Any]:
    """A model that repeats the prompt."""
    message = {"role": "assistant", "content": "echo: " + prompt_of(task)}
    usage = {"prompt_tokens": 4, "completion_tokens": 5, "total_tokens": 9}
    return {"object": "chat.completion", "choices": [{"index": 0, "message": message}], "usage": usage}


class Framework(CannedServer):
    """The server. Its methods are for tests, at any time and from any thread.

    Args:
        seed: For the order of exports.

    Attributes:
        ingests: Uploads leave the batch queue by themselves.
        runs: Tasks leave the task queue by themselves.
        refreshes: Reads see what is there, not what was there at the last `refresh`.
        redelivers: Every upload is ingested twice, with new message ids.
        deduplicates: An upload with an Idempotency-Key that was seen is not taken again; the framework does not.
        has_index: False as in a new installation, until the first task is ingested.
        down: Which of "rabbitmq" and "elasticsearch" are not there.
        away: Answers everything, if set: a proxy whose server is gone.
        batch_consumers, task_consumers: As /health tells.
        loses: Tells which tasks, though well-formed, are dropped without a trace.
        provider: Gives the completions of a task; with an "error" in them it has failed.
        calls: How often the provider was asked each prompt.
        page_size: Tasks in a line of an export.
        broken_exports: The next exports end after so many tasks: (count, True) cut off in the middle of the
            next task, (count, False) as if that were all.
    """

    def __init__(self, seed: int = 0) -> None:
        self.ingests = self.runs = self.refreshes = self.has_index = True
        self.redelivers = self.deduplicates = False
        self.down: Set[str] = set()
        self.away: Optional[Answer] = None
        self.batch_consumers = self.task_consumers = 1
        self.loses: Callable[[Dict[str, Any]], bool] = lambda task: False
        self.provider: Callable[[Dict[str, Any]], Dict[str, Any]] = echo
        self.calls: Counter[str] = Counter()
        self.page_size = 10_000
        self.broken_exports: List[Tuple[int, bool]] = []
        self._random = random.Random(seed)
        self._lock = threading.RLock()
        self._batch_queue: List[Tuple[str, bytes]] = []  # batch id, line
        self._task_queue: List[Tuple[Dict[str, Any], Dict[str, Any]]] = []  # line, document
        self._documents: List[Dict[str, Any]] = []
        self._visible: List[Dict[str, Any]] = []
        self._answers: Dict[str, Any] = {}  # by Idempotency-Key
        self._cache: Dict[str, Dict[str, Any]] = {}
        batch = "/api/v1/batches/([^/]+)"
        self._routes: List[Tuple[str, Callable[..., Any]]] = [
            ("GET /health", self._health),
            ("POST /api/v1/batches", self._post),
            ("GET " + batch, self._get_batch),
            ("DELETE " + batch, self._delete_batch),
            ("GET " + batch + "/tasks/export", self._export),
            ("GET /api/v1/tasks/([^/]+)", self._get_task),
        ]
        super().__init__()

    # What a test can make happen.

    def ingest(self, count: Optional[int] = None) -> None:
        """Take so many lines out of the batch queue, or all of them."""
        with self._lock:
            taken, self._batch_queue = _cut(self._batch_queue, count)
            for _ in range(2 if self.redelivers else 1):
                for batch_id, line in taken:
                    self._ingest_line(batch_id, line)
            self._changed_something()

    def start(self, count: Optional[int] = None) -> None:
        """Let so many waiting tasks, or all of them, be PROCESSING."""
        with self._lock:
            for _, document in _cut(self._task_queue, count)[0]:
                document.update(status="PROCESSING", completions=None)
            self._changed_something()

    def run(self, count: Optional[int] = None) -> None:
        """Run so many of the waiting tasks, or all of them."""
        with self._lock:
            taken, self._task_queue = _cut(self._task_queue, count)
            for task, document in taken:
                self._run_task(task, document)
            self._changed_something()

    def run_last(self, count: int) -> None:
        """Run so many of the newest waiting tasks; the others were never published, and wait for ever."""
        with self._lock:
            self._task_queue = self._task_queue[-count:]
            self.run()

    def refresh(self) -> None:
        """Let reads see what is there."""
        with self._lock:
            self._visible = [dict(document) for document in self._documents]

    # What a client sees.

    def play(self, request: Request) -> Answer:
        """The framework's answer."""
        if self.away is not None:
            return self.away
        route = f"{request.method} {urlsplit(request.path).path}"
        for pattern, play in self._routes:
            match = re.fullmatch(pattern, route)
            if match:
                with self._lock:
                    answer = play(request, *map(unquote, match.groups()))
                return answer if isinstance(answer, Answer) else Answer(answer)
        return NOT_FOUND

    def _answer_to(self, request: Request) -> Answer:
        answer = super()._answer_to(request)
        return self.play(request) if answer is NOT_FOUND else answer

    def _health(self, request: Request) -> Answer:
        health = {
            "status": "unhealthy" if self.down else "healthy",
            "services": {
                "api": "healthy",
                **{name: "unhealthy" if name in self.down else "healthy" for name in ("rabbitmq", "elasticsearch")},
                "task_queue_consumers": self.task_consumers,
                "task_queue_messages": len(self._task_queue),
                "batch_queue_consumers": self.batch_consumers,
                "batch_queue_messages": len({batch_id for batch_id, _ in self._batch_queue}),
            },
            "error": f"{', '.join(sorted(self.down))}: unreachable" if self.down else None,
        }
        if "rabbitmq" in self.down:  # as recorded: what can't be asked is 0
            health["services"].update((name, 0) for name in health["services"] if "queue" in name)
        return Answer({"detail": health}, 503) if self.down else Answer(health)

    def _post(self, request: Request) -> Any:
        key = request.headers["Idempotency-Key"]
        if self.deduplicates and key in self._answers:
            return self._answers[key]
        lines = request.file.split(b"\n")
        batch_id = request.query["batch_id"]
        self._batch_queue += [(batch_id, line) for line in lines]
        self._answers[key] = {"batch_id": batch_id, "total_tasks": len(lines)}
        if self.ingests:
            self.ingest()
        return self._answers[key]

    def _get_batch(self, request: Request, batch_id: str) -> Any:
        if not self.has_index:
            return Answer({"detail": _NO_INDEX}, 500)
        tasks = self._tasks_of(batch_id)
        if not tasks:
            return None
        counts = Counter(task["status"] for task in tasks)
        cached = sum(task["cached"] for task in tasks)
        paid = [task["completions"]["usage"] for task in tasks if task["status"] == "COMPLETED" and not task["cached"]]
        order = ("PROCESSING", "PENDING", "FAILED", "COMPLETED")
        return {
            "batch_id": batch_id,
            "batch_status": next(status for status in order if counts[status]),
            "total_tasks": len(tasks),
            "completed_tasks": counts["COMPLETED"] - cached,
            "failed_tasks": counts["FAILED"],
            "pending_tasks": counts["PENDING"],
            "processing_tasks": counts["PROCESSING"],
            "cached_tasks": cached,
            "created_at": tasks[0]["created_at"],
            "started_at": None,
            "completed_at": None,
            "duration": 0,
            **{name: sum(use[name] for use in paid) for name in ("total_tokens", "prompt_tokens", "completion_tokens")},
        }

    def _delete_batch(self, request: Request, batch_id: str) -> Any:
        self._documents = [document for document in self._documents if document["batch_id"] != batch_id]
        self._changed_something()
        return Answer(status=204)

    def _get_task(self, request: Request, message_id: str) -> Any:
        document = next((task for task in self._documents if task["message_id"] == message_id), None)
        return document and {name: value for name, value in document.items() if name != "result"}

    def _export(self, request: Request, batch_id: str) -> Answer:
        headers = {"content-type": "application/x-ndjson"}
        if not self.has_index:
            return Answer(chunks=[], headers=headers, cut_off=True)
        status = request.query.get("task_status")
        tasks = [task for task in self._tasks_of(batch_id) if status in (None, task["status"])]
        self._random.shuffle(tasks)
        texts = [
            json.dumps({name: value for name, value in task.items() if name != "custom_id"}, ensure_ascii=False)
            for task in tasks
        ]
        end, is_cut = self.broken_exports.pop(0) if self.broken_exports else (len(texts), False)
        pages = [texts[i : min(i + self.page_size, end)] for i in range(0, end, self.page_size)] or [[]]
        tail = f'], "total": {min(len(tasks), _COUNTED_TO)}}}\n'
        lines = ['{"tasks": [' + ", ".join(page) + tail for page in pages]
        if is_cut:
            lines[-1] = lines[-1][: -len(tail)] + ', {"message_id": "'
        return Answer(chunks=[line.encode("utf-8") for line in lines], headers=headers, cut_off=is_cut)

    # Inside.

    def _ingest_line(self, batch_id: str, line: bytes) -> None:
        try:
            task = json.loads(line)
        except ValueError:
            return
        if not isinstance(task, dict) or not _REQUIRED <= set(task) or self.loses(task):
            return
        number = self._random.getrandbits(64)
        document = {
            "message_id": f"{number:016x}",
            "batch_id": batch_id,
            "custom_id": task["custom_id"],
            "status": "PENDING",
            "cached": False,
            "body": task["body"],
            "result": {},
            "created_at": _TIME.format(1),
            "started_at": None,
            "completed_at": None,
            "duration": None,
            "completions": {},
            "dataset": task.get("dataset"),
            "source": task.get("source"),
        }
        self.has_index = True
        self._documents.append(document)
        self._task_queue.append((task, document))

    def _run_task(self, task: Dict[str, Any], document: Dict[str, Any]) -> None:
        key = json.dumps(task["body"], sort_keys=True)
        document["cached"] = bool(task.get("use_cache")) and key in self._cache
        if document["cached"]:
            completions = self._cache[key]
        else:
            self.calls[prompt_of(task)] += 1
            completions = self.provider(task)
        failed = "error" in completions
        if not failed:
            self._cache[key] = completions
        document.update(
            status="FAILED" if failed else "COMPLETED",
            completions=completions,
            started_at=_TIME.format(2),
            completed_at=_TIME.format(60_002),
            duration=60,
        )

    def _changed_something(self) -> None:
        if self.runs and self._task_queue:
            self.run()
        if self.refreshes:
            self.refresh()

    def _tasks_of(self, batch_id: str) -> List[Dict[str, Any]]:
        return [task for task in self._visible if task["batch_id"] == batch_id]


def _cut(queue: List[Any], count: Optional[int]) -> Tuple[List[Any], List[Any]]:
    count = len(queue) if count is None else count
    return queue[:count], queue[count:]
