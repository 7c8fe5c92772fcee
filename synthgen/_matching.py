"""Which result belongs to which task.

A task is identified by the JSON of its body, dataset and source. Tasks alike in these are told apart by
custom_id, URL and method where the server gives them; alike in those too, they are interchangeable.
"""

import hashlib
import json
from collections import defaultdict
from typing import Any, Callable, Dict, Iterable, List, Optional, Sequence, Tuple, Union

from pydantic_core import to_json

from .models import Task, TaskResponse, TaskStatus, as_json

__all__ = ["match", "result_digest", "task_digest"]

#: custom_id, URL, method.
_Name = Tuple[Optional[str], Optional[str], Optional[str]]


def match(
    tasks: Sequence[Task],
    results: Iterable[TaskResponse],
    look_up: Callable[[List[TaskResponse]], Iterable[TaskResponse]],
) -> Tuple[List[Optional[TaskResponse]], int]:
    """Give each task its own result, with the task's custom_id in it.

    Args:
        tasks: What was submitted.
        results: What came back, in any order; unfinished tasks among them are passed over.
        look_up: Asks the server for results with their custom_id, and gives back the same one where it
            has none; called once at most, with those whose tasks are alike.

    Returns:
        For each task its result or None, and how many results belong to no task.
    """
    results = [result for result in results if result.status not in (TaskStatus.PENDING, TaskStatus.PROCESSING)]
    matched = _match_one_to_one(tasks, results) or _match_any(tasks, results, look_up)
    for task, found in zip(tasks, matched):
        if found is not None:
            found.custom_id = task.custom_id
    return matched, len(results) - len(matched) + matched.count(None)


def _match_any(
    tasks: Sequence[Task],
    results: Sequence[TaskResponse],
    look_up: Callable[[List[TaskResponse]], Iterable[TaskResponse]],
) -> List[Optional[TaskResponse]]:
    """The result of each task, whichever tasks are alike and in whatever order keys come back."""
    alike: Dict[bytes, List[int]] = {}
    for index, task in enumerate(tasks):
        alike.setdefault(task_digest(task), []).append(index)
    candidates: Dict[bytes, List[TaskResponse]] = {}
    for result in results:
        digest = result_digest(result)
        if digest in alike:
            candidates.setdefault(digest, []).append(result)

    names = list(map(_name, tasks))
    unnamed = [
        result
        for digest, found in candidates.items()
        if len({names[index] for index in alike[digest]}) > 1
        for result in found
        if "custom_id" not in result.model_fields_set
    ]
    looked_up = {result.message_id: result for result in look_up(unnamed)} if unnamed else {}

    matched: List[Optional[TaskResponse]] = [None] * len(tasks)
    for digest, found in candidates.items():
        found = [looked_up.get(result.message_id, result) for result in found]
        for index, one in zip(alike[digest], _share_out([names[index] for index in alike[digest]], found)):
            matched[index] = one
    return matched


def _match_one_to_one(
    tasks: Sequence[Task], results: Sequence[TaskResponse]
) -> Optional[List[Optional[TaskResponse]]]:
    """What `match` gives where no two tasks are alike and each has one result, as it was sent: mostly, and quicker.

    None where it is otherwise, keys in another order included: then some task is left without a result.
    """
    places = {_hash(task): index for index, task in enumerate(tasks)}
    if None in places or not len(places) == len(tasks) == len(results):
        return None
    matched: List[Optional[TaskResponse]] = [None] * len(tasks)
    for result in results:
        index = places.pop(_hash(result), None)
        if index is None or ("custom_id" in result.model_fields_set and _name(result) != _name(tasks[index])):
            return None
        matched[index] = result
    return matched


def _name(one: Union[Task, TaskResponse]) -> _Name:
    return one.custom_id, one.url, one.method


def _hash(one: Union[Task, TaskResponse]) -> Optional[int]:
    try:
        return hash(to_json([one.body, one.dataset, one.source]))
    except ValueError:  # not for pydantic-core to write
        return None


def task_digest(task: Task) -> bytes:
    """16 bytes that tasks alike in body, dataset and source have in common, with each other and with their results."""
    return _digest(as_json([task.body, task.dataset, task.source]))


def result_digest(result: TaskResponse) -> bytes:
    """The same of a result."""
    return _digest([result.body, result.dataset, result.source])


def _digest(identity: Any) -> bytes:
    try:
        text = to_json(_sorted(identity))
    except (ValueError, RecursionError):  # lone surrogates, or nested deeper than pydantic-core goes
        text = json.dumps(identity, sort_keys=True).encode("ascii")
    return hashlib.blake2b(text, digest_size=16).digest()


def _sorted(value: Any) -> Any:
    """The value with all keys in order: a server may change that."""
    if isinstance(value, dict):
        return {key: _sorted(value[key]) for key in sorted(value)}
    return list(map(_sorted, value)) if isinstance(value, list) else value


def _share_out(names: Sequence[_Name], results: Sequence[TaskResponse]) -> List[Optional[TaskResponse]]:
    """One result for each name of tasks that are alike in all else; of several, one that completed."""
    by_name: Dict[Optional[_Name], List[TaskResponse]] = defaultdict(list)
    for result in sorted(results, key=lambda result: result.ok):  # pop() takes from the end
        is_named = "custom_id" in result.model_fields_set
        by_name[_name(result) if is_named else None].append(result)
    shared: List[Optional[TaskResponse]] = []
    for name in names:
        keys = (name, (name[0], None, None), None)  # the framework gives a custom_id alone, or none of them
        shared.append(next((by_name[key].pop() for key in keys if by_name[key]), None))
    return shared
