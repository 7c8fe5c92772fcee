"""What a user sees while waiting.

`Monitor` is the interface, and silent; `PlainMonitor` writes lines, for logs; ``_rich.RichMonitor`` draws.
All of it goes to stderr: stdout belongs to the script. What both say, and how they write a number, is here.
Times are in seconds.
"""

import os
import sys
import time
import warnings
from collections import Counter, deque
from contextlib import suppress
from typing import Any, Callable, Deque, List, Optional, TextIO, Tuple

from .models import Batch, BatchCost, HealthResponse, TaskResponse

__all__ = ["Monitor", "PlainMonitor", "choose_monitor", "guard"]

#: `PlainMonitor` writes at most one line in this time, except at the start and the end of something.
_LINE_INTERVAL = 10.0
#: Speed is measured over this many polls: four minutes at the client's usual interval.
_SAMPLES = 120
_FAILURES_SHOWN = 3
_FAILURE_LENGTH = 120


class Monitor:
    """Told what happens to a batch. Every method does nothing: override those you need."""

    def health(self, health: HealthResponse) -> None:
        """The server's state, before anything else."""

    def upload(self, batch_id: str, uploaded: int, total: Optional[int]) -> None:
        """``uploaded`` tasks were confirmed, of ``total`` (None where the tasks have no length); 0 at the start."""

    def batch(self, batch: Optional[Batch], submitted: int, cost: BatchCost) -> None:
        """The batch, as polled; None while the server has not ingested any of it."""

    def download(self, received: int, total: Optional[int]) -> None:
        """``received`` results came in, of ``total`` (None where that is not known)."""

    def note(self, text: str) -> None:
        """Something worth knowing that is no error, such as a server that is away. Plain text, not markup."""

    def results(self, results: List[TaskResponse]) -> None:
        """All results, in order, just before `finish`."""

    def finish(self, batch: Batch, cost: BatchCost) -> None:
        """All results are there."""

    def close(self) -> None:
        """Nothing more will come, whether the batch was finished or not."""


class PlainMonitor(Monitor):
    """Writes a line when something has changed, at most one in ten seconds, and a summary: for logs and CI.

    Args:
        stream: Where to write; by default what ``sys.stderr`` is at that moment.
        clock: What tells the time, in seconds.

    Attributes:
        progress: What is known so far.
    """

    def __init__(self, stream: Optional[TextIO] = None, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._clock = clock
        self._restart()

    def health(self, health: HealthResponse) -> None:
        self._restart()
        services = ", ".join(f"{name} {state}" for name, state in health_rows(health))
        self._write(f"server {health.status}: {services}")

    def upload(self, batch_id: str, uploaded: int, total: Optional[int]) -> None:
        self.progress.upload(batch_id, uploaded, total)
        self._say("upload", self.progress.uploaded_text())

    def batch(self, batch: Optional[Batch], submitted: int, cost: BatchCost) -> None:
        progress = self.progress
        progress.poll(batch, submitted, cost)
        news = "; ".join(", ".join(part) for part in (progress.counts(), progress.tokens(), progress.costs()) if part)
        if progress.total:
            self._say("batch", f"{progress.done_text()}: {news}", detail=", ".join(progress.times()))

    def download(self, received: int, total: Optional[int]) -> None:
        self.progress.received, self.progress.to_receive = received, total
        self._say("download", self.progress.received_text())

    def note(self, text: str) -> None:
        self._write(text)

    def results(self, results: List[TaskResponse]) -> None:
        self.progress.failures = Counter(result.error for result in results if result.error)

    def finish(self, batch: Batch, cost: BatchCost) -> None:
        self._flush()
        self.progress.poll(batch, self.progress.submitted, cost)
        self._write("finished", *(f"  {label:<10}{text}" for label, text in self.progress.summary()))

    def close(self) -> None:
        self._flush()

    def _restart(self) -> None:
        self.progress = Progress(self._clock)
        self._phase = self._news = self._held = ""
        self._due = 0.0

    def _say(self, phase: str, news: str, detail: str = "") -> None:
        """Write a line, if it is news: at once where a phase begins, else when the next line is due.

        What comes too early is held, and written when the phase ends if nothing newer was: the last state always is.

        Args:
            phase: What is going on: ``upload``, ``batch`` or ``download``.
            news: The line.
            detail: The end of the line; no reason to write one when it alone has changed.
        """
        if phase != self._phase:
            self._flush()
            self._phase, self._due = phase, self._clock()
        if news != self._news:
            self._news, self._held = news, f"{news}; {detail}" if detail else news
        if self._clock() >= self._due:
            self._flush()

    def _flush(self) -> None:
        if self._held:
            self._write(self._held)
            self._held, self._due = "", self._clock() + _LINE_INTERVAL

    def _write(self, line: str, *more: str) -> None:
        """Write lines in one go, the first with the batch that they are about: others may be watched beside it."""
        stream = self._stream or sys.stderr
        if stream is not None:  # None under pythonw
            batch_id = self.progress.batch_id
            lines = (f"batch {batch_id}: {line}" if batch_id else line, *more)
            encoding = getattr(stream, "encoding", None)
            stream.write("".join(printable(line, encoding) + "\n" for line in lines))
            stream.flush()


class Progress:
    """What is known of a batch, and what follows from it, in words that are the same for every monitor."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._started = clock()
        self._samples: Deque[Tuple[float, int, int]] = deque(maxlen=_SAMPLES)  # time, finished tasks, tokens
        self.batch_id = ""
        self.uploaded = 0
        self.chunks = 0
        self.to_upload: Optional[int] = None
        self.batch: Optional[Batch] = None
        self.submitted = 0
        self.cost = BatchCost()
        self.received = 0
        self.to_receive: Optional[int] = None
        self.failures: Counter[str] = Counter()
        self.notes: List[str] = []

    def upload(self, batch_id: str, uploaded: int, total: Optional[int]) -> None:
        self.chunks = self.chunks + 1 if uploaded else 0
        self.batch_id, self.uploaded, self.to_upload = batch_id, uploaded, total

    def poll(self, batch: Optional[Batch], submitted: int, cost: BatchCost) -> None:
        self.batch, self.submitted, self.cost = batch, submitted, cost
        self.batch_id = batch.batch_id if batch else self.batch_id
        self._samples.append((self._clock(), self.finished, batch.total_tokens if batch else 0))

    @property
    def elapsed(self) -> float:
        return self._clock() - self._started

    @property
    def finished(self) -> int:
        return self.batch.finished_tasks if self.batch else 0

    @property
    def total(self) -> int:
        return max(self.submitted, self.batch.total_tasks if self.batch else 0)

    def uploaded_text(self) -> str:
        chunks = f" in {plural(self.chunks, 'chunk')}" if self.chunks else ""
        return f"{_share(self.uploaded, self.to_upload)} tasks uploaded{chunks}"

    def received_text(self) -> str:
        return f"{_share(self.received, self.to_receive)} results received"

    def done_text(self) -> str:
        return f"{_share(self.finished, self.total)} done"

    def counts(self) -> List[str]:
        """Each state with its number of tasks; what the server has yet to ingest is pending."""
        batch = self.batch or Batch(batch_id="", batch_status="")
        pending = max(0, self.total - self.finished - batch.processing_tasks)
        return [
            f"{batch.completed_tasks:,} completed",
            f"{batch.cached_tasks:,} cached",
            f"{batch.failed_tasks:,} failed",
            f"{batch.processing_tasks:,} processing",
            f"{pending:,} pending",
        ]

    def tokens(self) -> List[str]:
        if self.batch is None:
            return []
        parts = [f"{self.batch.prompt_tokens:,} tokens in", f"{self.batch.completion_tokens:,} tokens out"]
        speed = self._per_second(2)
        return parts + [f"{speed:,.0f} tokens/s"] if speed else parts

    def costs(self) -> List[str]:
        """The cost so far, and the one to be expected if no further task is cached; empty without prices."""
        if not self.cost.total or self.batch is None:
            return []
        parts = [f"cost {money(self.cost.total)} so far"]
        paid = self.finished - self.batch.cached_tasks
        remaining = self.total - self.finished
        if paid and remaining > 0:
            parts.append(f"about {money(self.cost.total * (paid + remaining) / paid)} at the end")
        return parts

    def times(self) -> List[str]:
        parts = [f"{duration(self.elapsed)} elapsed"]
        speed = self._per_second(1)
        if speed and self.total > self.finished:
            parts.append(f"about {duration((self.total - self.finished) / speed)} left")
        return parts

    def summary(self) -> List[Tuple[str, str]]:
        """The end of the batch, as labels and texts; a label may be empty: the text then goes with the one above."""
        batch = self.batch
        if batch is None:
            return []
        taken = self.elapsed if self.uploaded or batch.duration is None else batch.duration
        rows = [
            ("tasks", f"{self.total:,}: {', '.join(self.counts()[:3])}"),
            ("duration", duration(taken)),
            ("tokens", f"{batch.prompt_tokens:,} in, {batch.completion_tokens:,} out"),
        ]
        if self.cost.total:
            rows.append(
                ("cost", f"{money(self.cost.total)} ({money(self.cost.input)} in, {money(self.cost.output)} out)")
            )
        if batch.cached_tasks:
            rows.append(("cache", f"saved {plural(batch.cached_tasks, 'call')}"))
        return rows + self._failure_rows()

    def _failure_rows(self) -> List[Tuple[str, str]]:
        texts = [
            f"{count:,} x {shorten(error, _FAILURE_LENGTH)}"
            for error, count in self.failures.most_common(_FAILURES_SHOWN)
        ]
        more = len(self.failures) - len(texts)
        if more:
            texts.append(f"and {plural(more, 'other kind')}")
        return [("" if i else "failures", text) for i, text in enumerate(texts)]

    def _per_second(self, column: int) -> float:
        """How fast a column of the samples grows; 0 where that can't be told yet."""
        if not self._samples:
            return 0.0
        first, last = self._samples[0], self._samples[-1]
        return (last[column] - first[column]) / (last[0] - first[0]) if last[0] > first[0] else 0.0


class _Guarded(Monitor):
    def __init__(self, monitor: Monitor) -> None:
        self._monitor = monitor
        self._broken = False

    def health(self, health: HealthResponse) -> None:
        self._tell("health", health)

    def upload(self, batch_id: str, uploaded: int, total: Optional[int]) -> None:
        self._tell("upload", batch_id, uploaded, total)

    def batch(self, batch: Optional[Batch], submitted: int, cost: BatchCost) -> None:
        self._tell("batch", batch, submitted, cost)

    def download(self, received: int, total: Optional[int]) -> None:
        self._tell("download", received, total)

    def note(self, text: str) -> None:
        self._tell("note", text)

    def results(self, results: List[TaskResponse]) -> None:
        self._tell("results", results)

    def finish(self, batch: Batch, cost: BatchCost) -> None:
        self._tell("finish", batch, cost)

    def close(self) -> None:
        self._tell("close")

    def _tell(self, event: str, *args: Any) -> None:
        if self._broken and event != "close":  # a broken monitor, too, has to give the terminal back
            return
        try:
            getattr(self._monitor, event)(*args)
        except Exception as exc:
            if not self._broken:
                self._broken = True
                name = f"{type(self._monitor).__name__}.{event}"
                text = f"{name} raised {type(exc).__name__}: {exc}; the batch goes on, unwatched"
                # Warnings may be errors, and stderr closed: neither may end the batch.
                with suppress(RuntimeWarning, ValueError):
                    warnings.warn(text, RuntimeWarning)


def guard(monitor: Monitor) -> Monitor:
    """The same monitor, but an exception in it ends the watching, with a warning, and not the batch."""
    return _Guarded(monitor)


def choose_monitor(show_progress: bool) -> Monitor:
    """A monitor for where we are: it draws on a terminal and in Jupyter, if rich is there; it writes lines elsewhere.

    Args:
        show_progress: False gives one that is silent.
    """
    return new_monitor() if show_progress else Monitor()


def new_monitor() -> PlainMonitor:
    """A monitor that shows something, the way that stderr allows."""
    rich = load_rich(sys.stderr)
    monitor: PlainMonitor = rich.RichMonitor() if rich else PlainMonitor()
    return monitor


def load_rich(stream: Optional[TextIO]) -> Any:
    """The module ``_rich``, where it can draw: None if the stream is no terminal or rich is not installed."""
    try:
        terminal = stream is not None and stream.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")
    except (AttributeError, ValueError):  # something that only writes, or that is closed
        terminal = False
    if not terminal and "ipykernel" not in sys.modules:
        return None
    try:
        from . import _rich
    except ImportError:  # of rich, or of a _rich.py that a vendored copy goes without
        return None
    return _rich


# ---------------------------------------------------------------------------------------------- words


def health_rows(health: HealthResponse) -> List[Tuple[str, str]]:
    """Each service with its state, each queue with who serves it and what waits in it."""
    services = health.services
    states = (("api", services.api), ("rabbitmq", services.rabbitmq), ("elasticsearch", services.elasticsearch))
    rows = [(name, str(state)) for name, state in states if state is not None]
    for name, consumers, messages in (
        ("task queue", services.task_queue_consumers, services.task_queue_messages),
        ("batch queue", services.batch_queue_consumers, services.batch_queue_messages),
    ):
        if consumers is not None:
            rows.append((name, f"{plural(consumers, 'consumer')}, {messages or 0:,} waiting"))
    return rows + [("error", health.error)] if health.error else rows


def printable(text: str, encoding: Optional[str] = None) -> str:
    """Text that a terminal shows and does not obey: on one line, without escape sequences, in its encoding."""
    text = "".join(char if char.isprintable() else " " for char in text)
    encoding = encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def shorten(text: str, length: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 3] + "..."


def plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def duration(seconds: float) -> str:
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = int(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"


def money(amount: float) -> str:
    """An amount, in no currency: the prices have none; the smaller, the more decimals."""
    decimals = 2 if amount >= 1 else 4 if amount >= 0.01 else 6
    return f"{amount:,.{decimals}f}"


def _share(part: int, whole: Optional[int]) -> str:
    return f"{part:,}" if whole is None else f"{part:,} of {whole:,}"
