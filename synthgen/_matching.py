"""Which result belongs to which task.

A task is identified by the JSON of its body, dataset and source. Tasks alike in these are told apart by
custom_id, URL and method where the server gives them; alike in those too, they are interchangeable.
"""

import hashlib
import json
from collections import defaultdict
from typing import Any, Callable, Dict, Iterable, List, Optional, Sequence, Tuple

from .models import Task, TaskResponse, TaskStatus

__all__ = ["match"]

#: custom_id, URL, method.
_Name = Tuple[Optional[str], Optional[str], Optional[str]]

_to_sorted_json = json.JSONEncoder(sort_keys=True).encode


def match(
    tasks: Sequence[Task],
    results: Iterable[TaskResponse],
    look_up: Callable[[TaskResponse], TaskResponse],
) -> Tuple[List[Optional[TaskResponse]], int]:
    """Give each task its own result, with the task's custom_id in it.

    Args:
        tasks: What was submitted.
        results: What came back, in any order; unfinished tasks among them are passed over.
        look_up: Asks the server for a result with its custom_id, and gives back the same result where it
            has none; called only where tasks are alike.

    Returns:
        For each task its result or None, and how many results belong to no task.
    """
    alike: Dict[bytes, Tuple[List[int], List[TaskResponse]]] = {}
    for index, task in enumerate(tasks):
        as_sent = _with_text_keys([task.body, task.dataset, task.source])
        alike.setdefault(_digest(as_sent), ([], []))[0].append(index)

    surplus = 0
    for result in results:
        if result.status in (TaskStatus.PENDING, TaskStatus.PROCESSING):
            continue
        surplus += 1
        digest = _digest([result.body, result.dataset, result.source])
        if digest in alike:
            alike[digest][1].append(result)

    matched: List[Optional[TaskResponse]] = [None] * len(tasks)
    for indices, candidates in alike.values():
        names = [(tasks[i].custom_id, tasks[i].url, tasks[i].method) for i in indices]
        for index, found in zip(indices, _share_out(names, candidates, look_up)):
            if found is not None:
                found.custom_id = tasks[index].custom_id
                matched[index] = found
                surplus -= 1
    return matched, surplus


def _share_out(
    names: Sequence[_Name], results: Sequence[TaskResponse], look_up: Callable[[TaskResponse], TaskResponse]
) -> List[Optional[TaskResponse]]:
    """One result for each name of tasks that are alike in all else; of several, one that completed."""
    one_name = len(set(names)) == 1
    by_name: Dict[Optional[_Name], List[TaskResponse]] = defaultdict(list)
    for result in sorted(results, key=lambda result: result.ok):  # pop() takes from the end
        if "custom_id" not in result.model_fields_set and not one_name:
            result = look_up(result)
        is_named = "custom_id" in result.model_fields_set
        by_name[(result.custom_id, result.url, result.method) if is_named else None].append(result)
    shared: List[Optional[TaskResponse]] = []
    for name in names:
        keys = (name, (name[0], None, None), None)  # the framework gives a custom_id alone, or none of them
        shared.append(next((by_name[key].pop() for key in keys if by_name[key]), None))
    return shared


def _with_text_keys(value: Any) -> Any:
    """The value with every key as JSON has it, so that keys are sorted as those of a result are."""
    if isinstance(value, dict):
        return {k if isinstance(k, str) else json.dumps(k): _with_text_keys(item) for k, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_with_text_keys(item) for item in value]
    return value


def _digest(identity: Any) -> bytes:
    return hashlib.blake2b(_to_sorted_json(identity).encode("ascii"), digest_size=16).digest()
