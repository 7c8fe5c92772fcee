"""Tasks out of the bytes of an export, each as soon as it is whole.

An export is lines of ``{"tasks": [...], "total": N}``, and one line may hold 10,000 tasks. Nothing here
waits for the end of a line: memory stays at one read, or at the largest single task.
"""

import codecs
import json
import re
from typing import Any, Iterable, Iterator, List, Tuple

__all__ = ["iter_tasks"]

_raw_decode = json.JSONDecoder().raw_decode
_GAP = " \t\r\n,"
_skip_gap = re.compile(f"[{_GAP}]*").match
#: An error this close to the end may be a literal, number or escape that the end of the text cuts in two.
_LONGEST_TOKEN = 16
#: How many characters are decoded together, and how many at the start of a task tell where another one may start.
_TOGETHER = 64 * 1024
_START = 16


def iter_tasks(chunks: Iterable[bytes], with_text: bool = True) -> Iterator[Tuple[Any, str]]:
    """Decode an export.

    Args:
        chunks: The body, cut anywhere, inside a character too.
        with_text: Whether the texts are wanted; without them it is faster.

    Yields:
        Each task, and the JSON text that it was decoded from (without a newline), or an empty one.

    Raises:
        EOFError: The bytes end before the JSON does.
        ValueError: They are no export.
    """
    text = _Text(chunks)
    while text.peek():
        text.skip("{")
        while text.peek() != "}":
            key, _ = text.value()
            text.skip(":")
            if key == "tasks" and text.peek() == "[":
                text.skip("[")
                while text.peek() != "]":
                    task, source = text.value()
                    yield task, source if with_text else ""
                    if not with_text:
                        yield from ((task, "") for task in text.values_like(source))
                text.skip("]")
            else:
                text.value()
        text.skip("}")


class _Text:
    """A window over the text that arrives, and a place in it."""

    def __init__(self, chunks: Iterable[bytes]) -> None:
        self._chunks = iter(chunks)
        self._decode = codecs.getincrementaldecoder("utf-8")().decode
        self._text = ""
        self._at = 0
        self._may_guess = True

    def peek(self) -> str:
        """The next character that is neither space nor comma; empty at the end."""
        while True:
            gap = _skip_gap(self._text, self._at)
            self._at = gap.end() if gap else self._at
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._read(1):
                return ""

    def skip(self, char: str) -> None:
        """Step over a character that has to come next."""
        found = self.peek()
        if not found:
            raise EOFError("cut short")
        if found != char:
            raise ValueError(f"expected {char!r}, found {found!r}")
        self._at += 1

    def value(self) -> Tuple[Any, str]:
        """The JSON value that comes next, and its text."""
        self.peek()
        while True:
            start, available = self._at, len(self._text)
            try:
                value, end = _raw_decode(self._text, start)
                whole = end < available or self._text[end - 1] in '}]"'  # 12 may become 123
            except json.JSONDecodeError as exc:
                whole = False
                if exc.pos < available - _LONGEST_TOKEN and not exc.msg.startswith("Unterminated string"):
                    raise
            except RecursionError:
                raise ValueError("nested too deeply") from None
            if whole:
                self._at = end
                return value, self._text[start:end]
            # As much again, so that a huge task is scanned a few times and not once per read.
            if not self._read(available - start):
                raise EOFError("cut short")

    def values_like(self, source: str) -> List[Any]:
        """The objects that come next and are here already, up to the last one that starts as this text does.

        Decoded together they share their keys, and take three quarters of the time. Where the last one starts is a
        guess, but a safe one: only when it is right, what is before it is JSON between brackets.
        """
        end = self._text.rfind(source[:_START], self._at, self._at + _TOGETHER)
        if end <= self._at or source[0] != "{" or not self._may_guess:
            return []
        try:
            values: List[Any] = json.loads(f"[{self._text[self._at : end].strip(_GAP)}]")
        except (ValueError, RecursionError):
            self._may_guess = False  # of this text: it might be wrong for each value in it
            return []
        self._at = end
        return values

    def _read(self, at_least: int) -> bool:
        """Add so many characters, if there are; whether any came."""
        parts = [self._text[self._at :]]
        added = 0
        for chunk in self._chunks:
            parts.append(self._decode(chunk))
            added += len(parts[-1])
            if added >= at_least:
                break
        self._text = "".join(parts)
        self._at = 0
        self._may_guess = True
        return added > 0
