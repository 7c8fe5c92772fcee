"""Which result belongs to which task.

A task is identified by the JSON of its body, dataset and source. Tasks alike in these are told apart by
custom_id, URL and method where the server gives them; alike in those too, they are interchangeable.
"""

import hashlib
import json
from collections import defaultdict
from typing import Any, Callable, Dict, Iterable, Iterator, List, Optional, Sequence, Set, Tuple, Union

from pydantic_core import to_json

from .models import Task, TaskResponse, TaskStatus, as_json

#: custom_id, URL, method.
Name = Tuple[Optional[str], Optional[str], Optional[str]]
#: Asks the server for tasks by their message ids; None for one that is gone.
LookUp = Callable[[List[str]], Iterable[Optional[TaskResponse]]]
UNFINISHED = (TaskStatus.PENDING, TaskStatus.PROCESSING)


class ResultList:
    """Tasks and their results, in memory.

    Args:
        tasks: The tasks; without them results are taken as they come.

    Attributes:
        tasks: How many there are; None without them.
    """

    needs_source = False

    def __init__(self, tasks: Optional[Sequence[Task]]) -> None:
        self._tasks = tasks
        self.tasks = None if tasks is None else len(tasks)
        self._results: Sequence[Optional[TaskResponse]] = [None] * (self.tasks or 0)

    def note(self, tasks: Iterable[Task]) -> None:
        """Nothing is to be noted: the tasks are known."""

    def match(self, results: Iterable[TaskResponse], look_up: LookUp) -> Tuple[int, int]:
        """Sort results to the tasks, in place of those of an earlier call; see `ResultFile.match`."""
        if self._tasks is None:
            self._results = list(results)
            return len(self._results), 0
        found = [result for result in results if result.status not in UNFINISHED]
        self._results = _match_one_to_one(self._tasks, found) or _match_any(self._tasks, found, look_up)
        for task, result in zip(self._tasks, self._results):
            if result is not None:
                result.custom_id = task.custom_id
        matched = sum(result is not None for result in self._results)
        return matched, len(found) - matched

    def __iter__(self) -> Iterator[TaskResponse]:
        """Each result, in the order of the tasks, with its task's custom_id."""
        return (result for result in self._results if result is not None)

    def missing(self) -> Iterator[int]:
        """The position of each task without a result."""
        return (position for position, result in enumerate(self._results) if result is None)


def _match_any(tasks: Sequence[Task], results: Sequence[TaskResponse], look_up: LookUp) -> List[Optional[TaskResponse]]:
    """The result of each task, whichever tasks are alike and in whatever order keys come back."""
    wanted = [(task_digest(task), task_name(task)) for task in tasks]
    came = [(result_digest(result), result) for result in results]
    names: Dict[bytes, Set[Name]] = defaultdict(set)
    for digest, name in wanted:
        names[digest].add(name)
    unnamed = [one.message_id for digest, one in came if len(names[digest]) > 1 and result_name(one) is None]
    looked_up = {one.message_id: one for one in (look_up(unnamed) if unnamed else ()) if one}

    found = [(digest, looked_up.get(one.message_id, one)) for digest, one in came]
    left: Dict[Tuple[bytes, Optional[Name]], List[TaskResponse]] = defaultdict(list)
    for digest, one in sorted(found, key=lambda item: item[1].ok):  # pop() takes from the end: one that completed
        left[digest, result_name(one)].append(one)
    matched: List[Optional[TaskResponse]] = []
    for digest, name in wanted:
        keys = (name, (name[0], None, None), None)  # the framework gives a custom_id alone, or none of them
        matched.append(next((left[digest, key].pop() for key in keys if left.get((digest, key))), None))
    return matched


def _match_one_to_one(tasks: Sequence[Task], results: Sequence[TaskResponse]) -> Optional[List[Optional[TaskResponse]]]:
    """What `match` gives where no two tasks are alike and each has one result, as it was sent: mostly, and quicker.

    None where it is otherwise, keys in another order included: then some task is left without a result.
    """
    if len(tasks) != len(results):
        return None
    try:
        by_hash = dict(zip(map(_hash, results), results))
        matched = [by_hash.pop(_hash(task)) for task in tasks]
    except (KeyError, ValueError):  # not the same, or not for pydantic-core to write
        return None
    for task, result in zip(tasks, matched):
        if result_name(result) not in (None, task_name(task)):
            return None
    return list(matched)


def task_name(one: Union[Task, TaskResponse]) -> Name:
    """What tells tasks apart that are alike in all else."""
    return one.custom_id, one.url, one.method


def result_name(result: TaskResponse) -> Optional[Name]:
    """The same of a result, as far as the server told it; None where it did not."""
    return task_name(result) if "custom_id" in result.model_fields_set else None


def _hash(one: Union[Task, TaskResponse]) -> int:
    return hash(to_json([one.body, one.dataset, one.source]))


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
