"""Tasks, cut into uploads."""

import math
from itertools import chain, repeat
from typing import Any, Iterable, Iterator, List, Sized, Tuple

from .models import Task, TaskResponse

_MAX_BYTES = 8 * 1024 * 1024


class TaskSource(Sized, Iterable[Task]):
    """Tasks that can be read as often as is wanted; of other iterables not even a length says that they can."""


TaskSource.register(list)
TaskSource.register(tuple)


class Chunks:
    """Cuts tasks into uploads, bounded by number and by bytes, and knows what it has not given out.

    Args:
        tasks: The tasks; read once.
        size: The most tasks in an upload.
        counts: How many tasks the first uploads have, however they were cut.

    Attributes:
        unsent: The tasks read from the iterable, and not given out.
    """

    def __init__(self, tasks: Iterable[Task], size: int, counts: Iterable[int] = ()) -> None:
        self._tasks = iter(tasks)
        self._limits = chain(((count, math.inf) for count in counts), repeat((size, _MAX_BYTES)))
        self._most, self._most_bytes = next(self._limits)
        self._lines: List[bytes] = []
        self._length = 0
        self._is_list = isinstance(tasks, (list, tuple))
        self.unsent: List[Task] = []

    def __iter__(self) -> Iterator[Tuple[List[Task], bytes]]:
        for index, item in enumerate(self._tasks):
            self.unsent.append(item)
            self.unsent[-1] = task = as_task(item, index)
            try:
                line = task.to_line()
            except (TypeError, ValueError) as exc:
                raise ValueError(f"the task at {index} was changed to what can't be sent as JSON: {exc}") from exc
            if self._lines and self._length + len(line) >= self._most_bytes:
                yield self._cut()
            self._lines.append(line)
            self._length += len(line) + 1
            if len(self._lines) >= self._most:
                yield self._cut()
        if self._lines:
            yield self._cut()

    def _cut(self) -> Tuple[List[Task], bytes]:
        lines, self._lines, self._length = self._lines, [], 0
        self._most, self._most_bytes = next(self._limits)
        chunk, self.unsent = self.unsent[: len(lines)], self.unsent[len(lines) :]
        return chunk, b"\n".join(lines)

    def rest_after(self, unsent: List[Task]) -> Iterable[Task]:
        """These, and what is still in the iterable; a list where that was one, so that it pickles."""
        rest = chain(unsent, self._tasks)
        return list(rest) if self._is_list else rest


def as_task(item: Any, index: int) -> Task:
    """The task; of a result, the task to run once more.

    Raises:
        TypeError: It is something else, or a result whose URL the server did not say (the framework does not).
    """
    if isinstance(item, Task):
        return item
    if isinstance(item, TaskResponse) and item.url and item.body is not None:
        fields = {name: getattr(item, name) for name in ("custom_id", "url", "body", "dataset", "source")}
        return Task(method=item.method or "POST", **fields)
    raise TypeError(f"tasks must be Task objects, not {type(item).__name__} (at {index})")
