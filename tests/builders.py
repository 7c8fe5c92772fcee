"""What tests send and servers answer, in few words."""

import json
from typing import Any, Dict, Iterable, List

from synthgen import Task

URL = "http://provider.test/v1/chat/completions"


def task(prompt: Any = "hi", **fields: Any) -> Task:
    """A task with this prompt, and an id that tells it from others."""
    body = {"model": "m", "messages": [{"role": "user", "content": prompt}]}
    return Task(**{"custom_id": str(prompt), "url": URL, "body": body, **fields})


def tasks(count: int) -> List[Task]:
    """Tasks 0, 1, 2, ..."""
    return [task(str(number)) for number in range(count)]


def framework_task(message_id: Any, of: Task = task(), **fields: Any) -> Dict[str, Any]:
    """A finished task, as the framework exports it: without `custom_id`, URL and method."""
    result = {
        "message_id": str(message_id),
        "batch_id": "b",
        "status": "COMPLETED",
        "cached": False,
        "body": json.loads(json.dumps(of.body)),
        "result": {},
        "completions": {"choices": [{"message": {"role": "assistant", "content": f"answer {message_id}"}}]},
        "created_at": "2026-11-22T11:39:52.517865+00:00",
        "started_at": "2026-11-22T11:39:52.530296218Z",
        "completed_at": "2026-11-22T11:39:52.586954101Z",
        "duration": 56,
        "dataset": of.dataset,
        "source": of.source,
    }
    return {**result, **fields}


def local_task(message_id: Any, of: Task = task(), **fields: Any) -> Dict[str, Any]:
    """A finished task, as the embedded server exports it: with what the framework leaves out."""
    names = {"custom_id": of.custom_id, "url": of.url, "method": of.method}
    return {**framework_task(message_id, of), **names, **fields}


def batch(completed: int = 0, **counts: Any) -> Dict[str, Any]:
    """A batch "b"; finished, unless `counts` say otherwise."""
    counts = {"completed_tasks": completed, **counts}
    total = sum(value for name, value in counts.items() if name.endswith("_tasks"))
    return {"batch_id": "b", "batch_status": "COMPLETED", "total_tasks": total, **counts}


def export_line(exported: Iterable[Dict[str, Any]]) -> bytes:
    """One line of an export."""
    listed = list(exported)
    return json.dumps({"tasks": listed, "total": len(listed)}).encode("ascii") + b"\n"
