"""Tasks out of a JSONL file: lines of our own, or of an OpenAI batch input file; all, or those that failed."""

import json
from itertools import zip_longest
from typing import BinaryIO, Iterator, Optional

from pydantic import ValidationError

from ._chunks import TaskSource
from .exceptions import ConfigurationError
from .models import Task, TaskStatus, reasons


class TaskFile(TaskSource):
    """The tasks of a file, as often as they are asked for; one is in memory at a time.

    Args:
        file: The file, which stays open.
        name: What errors call it.
        provider: What a relative ``url`` is appended to.
        api_key: The provider's key, for the tasks that have none.

    Raises:
        ConfigurationError: A line is no task, or there are none; the error names the line. Every line is looked at now.
    """

    def __init__(self, file: BinaryIO, name: str, provider: Optional[str], api_key: Optional[str]) -> None:
        self._file, self._name, self._provider, self._api_key = file, name, provider, api_key
        self._count = sum(1 for _ in self)
        if not self._count:
            raise ConfigurationError(f"{name}: there are no tasks in it")

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Task]:
        for number, line in enumerate(_lines(self._file), 1):
            try:
                text = line.decode("utf-8-sig").strip()
                if text:
                    yield self._task(text)
            except (ValueError, RecursionError) as exc:
                raise ConfigurationError(f"{self._name}, line {number}: {_reason(exc)}") from None

    def _task(self, text: str) -> Task:
        fields = json.loads(text)
        if not isinstance(fields, dict):
            raise ValueError("not a JSON object")
        url = fields.get("url")
        if isinstance(url, str) and not set(url.split("/")[0]) & set(":."):  # a path, as in an OpenAI batch input file
            if self._provider is None:
                raise ValueError(f"url {url!r} is relative: --provider says to what")
            fields["url"] = _join(self._provider, url)
        if fields.get("api_key") is None:
            fields["api_key"] = self._api_key
        task = Task.model_validate(fields)
        if task.method not in ("POST", "PUT", "PATCH"):
            raise ValueError(f"method must be POST, PUT or PATCH, not {task.method!r}")
        return task


class FailedTasks(TaskSource):
    """Those tasks of a file that have FAILED, by a file with the results of all of them.

    Args:
        tasks: All tasks.
        path: The results: a line for each task, in their order.

    Raises:
        ConfigurationError: A line is not the result of its task; the error names it. Every line is looked at now.
    """

    def __init__(self, tasks: TaskFile, path: str) -> None:
        self._tasks, self._path = tasks, path
        self._count = sum(1 for _ in self)

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Task]:
        with open(self._path, "rb") as file:
            for number, (task, line) in enumerate(zip_longest(self._tasks, file), 1):
                try:
                    result = json.loads(line or b"")
                    has_failed = result["status"] == TaskStatus.FAILED
                    if task is None or (result["custom_id"], result["body"]) != (task.custom_id, task.body):
                        raise ValueError
                except (ValueError, KeyError, TypeError, RecursionError):
                    raise ConfigurationError(
                        f"{self._path}, line {number}: not the result of that task: "
                        "--retry-failed needs the tasks that the file was made from"
                    ) from None
                if has_failed:
                    yield task

    def merge(self, results: BinaryIO, file: BinaryIO) -> None:
        """Write the results of all tasks: the lines of the file, but for these tasks the ones given."""
        with open(self._path, "rb") as lines:
            for line in lines:
                has_failed = json.loads(line)["status"] == TaskStatus.FAILED
                file.write(results.readline() if has_failed else line)


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """The lines of a file, from its start, whoever else reads it meanwhile."""
    file.seek(0)
    while line := file.readline():
        position = file.tell()
        yield line
        file.seek(position)


def _join(provider: str, url: str) -> str:
    """The URL of a path at a provider, which may have been given with a part of the path, or all of it."""
    base, mark, query = provider.partition("?")
    base, path = base.rstrip("/"), "/" + url.lstrip("/")
    if base.endswith(path):
        path = ""
    elif base.endswith("/v1") and path.startswith("/v1/"):
        base = base[: -len("/v1")]
    return base + path + ("&" if mark and "?" in path else mark) + query


def _reason(exc: Exception) -> str:
    if isinstance(exc, ValidationError):
        return reasons(exc)
    if isinstance(exc, UnicodeDecodeError):
        return "not UTF-8: is it compressed, or in another encoding?"
    if isinstance(exc, json.JSONDecodeError):
        return f"not JSON: {exc.msg} (column {exc.colno})"
    return str(exc)
