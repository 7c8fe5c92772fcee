"""Tasks out of the bytes of an export, each as soon as it is whole.

An export is lines of ``{"tasks": [...], "total": N}``, and one line may hold 10,000 tasks. Nothing here
waits for the end of a line: memory stays at one read, or at the largest single task.
"""

import json
import re
from typing import Any, Iterable, Iterator, Optional, Tuple

import pydantic_core

__all__ = ["decoded", "iter_tasks"]

#: Takes half of the time, and makes a key that comes often once; the oldest pydantic that we take has none.
_from_json = getattr(pydantic_core, "from_json", json.loads)
_skip_gap = re.compile(rb"[ \t\r\n,]*").match
#: A text or a bracket, which show where they end; or a text that has not ended, a number or a word.
_tokens = re.compile(rb'("[^"]*"|[\[\]{}])|"[^"]*|[^\s,:"\[\]{}]+').finditer
#: How many bytes are looked through at first for where a value ends, and at most for what starts like it.
_FIRST_LOOK, _LOOK_AHEAD = 4 * 1024, 64 * 1024
_DEEPER = {b"[": 1, b"{": 1, b"]": -1, b"}": -1}


def iter_tasks(chunks: Iterable[bytes], with_source: bool = True) -> Iterator[Tuple[Any, bytes]]:
    """Decode an export.

    Args:
        chunks: The body, cut anywhere, inside a character too.
        with_source: Whether the bytes are wanted; without them it is faster.

    Yields:
        Each task, and the JSON that it was decoded from, or nothing.

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
                while window.peek() != b"]":
                    source = window.value()
                    yield decoded(source), source
                    yield from window.values_like(source, one_by_one=with_source)
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
        self._data = b""
        self._at = self._ahead = 0

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
        self.peek()
        size = _FIRST_LOOK
        while True:
            length = _length_of_value(self._data[self._at : self._at + size])
            if length is not None:
                self._at += length
                return self._data[self._at - length : self._at]
            if self._at + size >= len(self._data) and not self._read(size):
                raise EOFError("cut short")
            size *= 2  # so that a huge value is scanned a few times and not once per read

    def values_like(self, source: bytes, one_by_one: bool) -> Iterator[Tuple[Any, bytes]]:
        """The values that come next, and the bytes that each was decoded from, or in which it was with others.

        They are cut where something starts as this one did. That is a guess, since there may be such a place within
        a value too, but a safe one: what is before it is JSON between brackets only when it is right.
        """
        gap = self._gap()
        after = b"}" + gap + source[: source.find(b":")]
        self._at += len(gap)
        find = self._data.find if one_by_one else self._data.rfind
        while True:
            end = find(after, self._at, self._at + self._ahead) + 1
            source = self._data[self._at : end]
            try:
                values = decoded(b"[%b]" % source) if end else []
            except ValueError:
                self._ahead = 0  # in this window, where it might be wrong for each value
                return
            if not values or (one_by_one and len(values) > 1):
                return
            self._at = end + len(gap)
            for value in values:
                yield value, source

    def _gap(self) -> bytes:
        gap = _skip_gap(self._data, self._at)
        return gap[0] if gap else b""

    def _read(self, at_least: int) -> bool:
        """Add so many bytes, if there are; whether any came."""
        parts = [self._data[self._at :]]
        added = 0
        for chunk in self._chunks:
            parts.append(chunk)
            added += len(chunk)
            if added >= at_least:
                break
        self._data = b"".join(parts)
        self._at = 0
        self._ahead = _LOOK_AHEAD
        return added > 0


def _length_of_value(data: bytes) -> Optional[int]:
    """Where the value that starts here ends; None if that has not come yet."""
    depth = 0
    for token in _tokens(data.replace(rb"\\", b"__").replace(rb"\"", b"__")):  # of as many bytes
        depth += _DEEPER.get(token[1], 0)
        if depth <= 0:
            return token.end() if token[1] or token.end() < len(data) else None
    return None
