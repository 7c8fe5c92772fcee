"""Tasks out of the bytes of an export, each as soon as it is whole.

An export is lines of ``{"tasks": [...], "total": N}``, and one line may hold 10,000 tasks. Nothing here
waits for the end of a line: memory stays at one read, or at the largest single task.
"""

import json
import re
from typing import Any, Iterable, Iterator, List, Optional, Tuple

import pydantic_core

#: Takes half of the time, and makes a key that comes often once; the oldest pydantic that we take has none.
_from_json = getattr(pydantic_core, "from_json", json.loads)
_find_no_gap = re.compile(rb"[^ \t\r\n,]|\Z").search
#: A text or a bracket, which show where they end; or a text that has not ended, a number or a word.
_tokens = re.compile(rb'("[^"]*"|[\[\]{}])|"[^"]*|[^\s,:"\[\]{}]+').finditer
_DEEPER = {b"[": 1, b"{": 1, b"]": -1, b"}": -1}
#: How many bytes are looked through at first for where a value ends, and are decoded at once.
_FIRST_LOOK, _AT_ONCE = 4 * 1024, 16 * 1024


def iter_tasks(chunks: Iterable[bytes], one_by_one: bool) -> Iterator[Tuple[List[Any], bytes]]:
    """Decode an export.

    Args:
        chunks: The body, cut anywhere, inside a character too.
        one_by_one: Whether each task is to have its own bytes; several at a time are faster.

    Yields:
        Tasks, as JSON values, and the bytes that they were decoded from.

    Raises:
        EOFError: The bytes end before the JSON does.
        ValueError: They are no export.
    """
    window = _Window(chunks)
    while window.peek():
        window.skip(b"{")
        while window.peek() != b"}":
            key = decoded(window.value())
            window.skip(b":")
            if key == "tasks" and window.peek() == b"[":
                window.skip(b"[")
                yield from window.values(one_by_one)
                window.skip(b"]")
            else:
                decoded(window.value())
        window.skip(b"}")


def decoded(source: bytes) -> Any:
    """The JSON value; a ValueError for what is none, or is nested too deeply."""
    try:
        return _from_json(source)
    except (ValueError, RecursionError):
        pass  # json takes more, such as half a surrogate pair
    try:
        return json.loads(source.decode("utf-8"))
    except RecursionError:
        raise ValueError("nested too deeply") from None


class _Window:
    """What is there of the bytes that arrive, and a place in it."""

    def __init__(self, chunks: Iterable[bytes]) -> None:
        self._chunks = iter(chunks)
        self._data, self._at, self._look, self._guessing = b"", 0, _FIRST_LOOK, False

    def peek(self) -> bytes:
        """The next byte that is neither space nor comma; empty at the end."""
        while True:
            self._at += len(self._gap())
            if self._at < len(self._data) or not self._read(1):
                return self._data[self._at : self._at + 1]

    def skip(self, byte: bytes) -> None:
        """Step over a byte that has to come next."""
        found = self.peek()
        if not found:
            raise EOFError("cut short")
        if found != byte:
            raise ValueError(f"expected {byte!r}, found {found!r}")
        self._at += 1

    def value(self) -> bytes:
        """The JSON value that comes next: to where its brackets and quotes end, whatever is between them."""
        return next(filter(None, iter(self._whole_value, None)))

    def values(self, one_by_one: bool) -> Iterator[Tuple[List[Any], bytes]]:
        """The values that are left of a list.

        Most are cut where something starts as one before did. That is a guess, since there may be such a place within
        a value too, but a safe one: what is before it is JSON between brackets only when it is right.
        """
        after, self._guessing = b"", True
        while self.peek() != b"]":
            source = self._whole_value()
            if source:
                yield [decoded(source)], source
                gap = self._gap()
                self._at += len(gap)
                after = gap and b"}" + gap + source[: source.find(b":")]
            while after and self._guessing:
                end = -1 if one_by_one else self._data.rfind(after, self._at, self._at + _AT_ONCE)
                end = (self._data.find(after, self._at) if end < 0 else end) + 1
                source = self._data[self._at : end]
                try:  # where no such place is, that is no JSON either
                    values = decoded(b"[%b]" % source) if source and not one_by_one else [decoded(source)]
                except ValueError:
                    self._guessing = False  # until more is read: it might be wrong for each value of the list
                    break
                self._at = end + len(gap)
                self._look = _FIRST_LOOK
                yield values, source

    def _whole_value(self) -> bytes:
        """The value that comes next; nothing if its end was not found, but the next time there is more to look at."""
        end = self._at + self._look
        length = _length_of_value(self._data[self._at : end])
        if length is not None:
            self._look = _FIRST_LOOK
            self._at += length
            return self._data[self._at - length : self._at]
        if end >= len(self._data) and not self._read(self._look):
            raise EOFError("cut short")
        self._look *= 2  # so that a huge value is scanned a few times and not once per read
        return b""

    def _gap(self) -> bytes:
        no_gap = _find_no_gap(self._data, self._at)
        return self._data[self._at : no_gap.start()] if no_gap else b""

    def _read(self, at_least: int) -> bool:
        """Add so many bytes, if there are; whether any came."""
        parts = [self._data[self._at :]]
        for chunk in self._chunks:
            parts.append(chunk)
            at_least -= len(chunk)
            if at_least <= 0:
                break
        self._data, self._at, self._guessing = b"".join(parts), 0, True
        return len(parts) > 1


def _length_of_value(data: bytes) -> Optional[int]:
    """Where the value that starts here ends; None if that has not come yet."""
    depth = 0
    for token in _tokens(data.replace(rb"\\", b"__").replace(rb"\"", b"__")):  # of as many bytes
        depth += _DEEPER.get(token[1], 0)
        if depth <= 0:
            return token.end() if token[1] or token.end() < len(data) else None
    return None
