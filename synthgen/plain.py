"""The monitors that need nothing but a stream: `Monitor`, which is silent, and `PlainMonitor`, which writes lines.

`synthgen.monitor` offers them too. They stand below it, since it chooses between `PlainMonitor` and the
``_rich.RichMonitor`` that is made of it: imports go one way.
"""

import sys
import time
from typing import Callable, List, Optional, Sequence, TextIO

from ._progress import Progress, health_rows, plural, printable, share
from .models import Batch, BatchCost, HealthResponse, TaskResponse

#: `PlainMonitor` writes at most one line in this time, except at the start and the end of something.
_LINE_INTERVAL = 10.0


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
        """Results, in order, just before `finish`: all of them, or from `run_batch` in pieces."""

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
        progress = self.progress
        progress.batch_id, progress.moved = batch_id, (uploaded, total)
        progress.chunks = progress.chunks + 1 if uploaded else 0
        chunks = f" in {plural(progress.chunks, 'chunk')}" if uploaded else ""
        self._say("upload", f"{share(uploaded, total)} tasks uploaded{chunks}")

    def batch(self, batch: Optional[Batch], submitted: int, cost: BatchCost) -> None:
        progress = self.progress
        progress.poll(batch, submitted, cost)
        news = "; ".join(", ".join(part) for part in (progress.counts(), progress.tokens(), progress.costs()) if part)
        if progress.total:
            self._say("batch", f"{progress.done_text()}: {news}", detail=", ".join(progress.times()))

    def download(self, received: int, total: Optional[int]) -> None:
        self.progress.moved = received, total
        self._say("download", f"{share(received, total)} results received")

    def note(self, text: str) -> None:
        self._write(text)

    def results(self, results: List[TaskResponse]) -> None:
        for result in results:
            self.progress.result(result)

    def finish(self, batch: Batch, cost: BatchCost) -> None:
        self.progress.poll(batch, self.progress.submitted, cost)
        self._say("finish", "finished", *(f"  {label:<10}{text}" for label, text in self.progress.summary()))

    def close(self) -> None:
        self._flush()

    def _restart(self) -> None:
        self.progress: Progress = Progress(self._clock)
        self._phase = self._news = ""
        self._held: Sequence[str] = ()
        self._due = 0.0

    def _say(self, phase: str, news: str, *more: str, detail: str = "") -> None:
        """Write a line, if it is news: at once where a phase begins, else when the next line is due.

        What comes too early is held, and written when the phase ends if nothing newer was: the last state always is.

        Args:
            phase: What is going on: ``upload``, ``batch``, ``download`` or ``finish``.
            news: The line.
            more: Lines that follow it.
            detail: The end of the line; no reason to write one when it alone has changed.
        """
        if phase != self._phase:
            self._flush()
            self._phase, self._due = phase, self._clock()
        if news != self._news:
            self._news, self._held = news, (f"{news}; {detail}" if detail else news, *more)
        if self._clock() >= self._due:
            self._flush()

    def _flush(self) -> None:
        if self._held:
            self._write(*self._held)
            self._held, self._due = (), self._clock() + _LINE_INTERVAL

    def _write(self, line: str, *more: str) -> None:
        """Write lines in one go, the first with the batch that they are about: others may be watched beside it."""
        stream = self._stream or sys.stderr
        if stream is not None:  # None under pythonw
            batch_id = self.progress.batch_id
            lines = (f"batch {batch_id}: {line}" if batch_id else line, *more)
            encoding = getattr(stream, "encoding", None)
            stream.write("".join(printable(line, encoding) + "\n" for line in lines))
            stream.flush()
