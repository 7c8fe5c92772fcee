"""What is known of a batch while it runs, in the words that every monitor uses. Times are in seconds."""

import re
from collections import Counter, deque
from typing import Callable, Deque, Dict, List, Optional, Tuple

from .models import Batch, BatchCost, HealthResponse, TaskResponse

#: Speed is measured over this many polls: four minutes at the client's usual interval.
_SAMPLES = 120
#: So many kinds of failures are shown.
_FAILURE_LABELS = ("failures", "", "")
_FAILURE_LENGTH = 120
#: Tries, ids and times: failures that differ in nothing else are of one kind.
_NUMBERS = re.compile(r"\S*\d\S*")
_NOT_SEEN = Batch(batch_id="", batch_status="")


class Progress:
    """What is known of a batch, and the words for it."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._started = clock()
        self._samples: Deque[Tuple[float, int, int]] = deque(maxlen=_SAMPLES)  # time, finished tasks, tokens
        self.batch_id: str = ""
        self.chunks: int = 0
        #: The tasks uploaded or the results received, whichever it is just now; and of how many, if that is known.
        self.moved: Tuple[int, Optional[int]] = (0, None)
        self.batch: Batch = _NOT_SEEN
        self.submitted: int = 0
        self.cost: BatchCost = BatchCost()
        self.failures: Counter[str] = Counter()
        self._kinds: Dict[str, str] = {}
        self.cut_off: int = 0
        self.filtered: int = 0
        self.notes: List[str] = []

    def poll(self, batch: Optional[Batch], submitted: int, cost: BatchCost) -> None:
        self.batch, self.submitted, self.cost = batch or _NOT_SEEN, submitted, cost
        self.batch_id = self.batch.batch_id or self.batch_id
        self._samples.append((self._clock(), self.finished, self.batch.total_tokens))

    def result(self, result: TaskResponse) -> None:
        if result.error:
            kind = _NUMBERS.sub("#", result.error)
            self.failures[self._kinds.setdefault(kind, result.error)] += 1
        self.cut_off += result.cut_off
        self.filtered += result.filtered

    @property
    def elapsed(self) -> float:
        return self._clock() - self._started

    @property
    def finished(self) -> int:
        return self.batch.finished_tasks

    @property
    def total(self) -> int:
        return max(self.submitted, self.batch.total_tasks)

    def done_text(self) -> str:
        return f"{share(self.finished, self.total)} done"

    def counts(self) -> List[str]:
        """Each state with its number of tasks; what the server has yet to ingest is pending."""
        batch = self.batch
        pending = max(0, self.total - self.finished - batch.processing_tasks)
        return [
            f"{batch.completed_tasks:,} completed",
            f"{batch.cached_tasks:,} cached",
            f"{batch.failed_tasks:,} failed",
            f"{batch.processing_tasks:,} processing",
            f"{pending:,} pending",
        ]

    def tokens(self) -> List[str]:
        if self.batch is _NOT_SEEN:
            return []
        parts = [f"{self.batch.prompt_tokens:,} tokens in", f"{self.batch.completion_tokens:,} tokens out"]
        speed = self._per_second(2)
        return parts + [f"{speed:,.0f} tokens/s"] if speed else parts

    def costs(self) -> List[str]:
        """The cost so far, and the one to be expected if no further task is cached; empty without prices."""
        if not self.cost.total:
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
        taken = self.elapsed if self.chunks or batch.duration is None else batch.duration
        cost = f"{money(self.cost.total)} ({money(self.cost.input)} in, {money(self.cost.output)} out)"
        failures = zip(_FAILURE_LABELS, self.failures.most_common())
        more = len(self.failures) - len(_FAILURE_LABELS)
        rows = [
            (True, "tasks", f"{self.total:,}: {', '.join(self.counts()[:3])}"),
            (True, "duration", duration(taken)),
            (True, "tokens", f"{batch.prompt_tokens:,} in, {batch.completion_tokens:,} out"),
            (self.cost.total, "cost", cost),
            (batch.cached_tasks, "cache", f"saved {plural(batch.cached_tasks, 'call')}"),
            (self.cut_off, "cut off", f"{plural(self.cut_off, 'result')} ended at the token limit"),
            (self.filtered, "filtered", f"{plural(self.filtered, 'result')} held back by the provider, or refused"),
            *((True, label, f"{count:,} x {_shorten(error)}") for label, (error, count) in failures),
            (more > 0, "", f"and {plural(more, 'other kind')}"),
        ]
        return [(label, text) for there_is, label, text in rows if there_is]

    def _per_second(self, column: int) -> float:
        """How fast a column of the samples grows; 0 where that can't be told yet."""
        if not self._samples:
            return 0.0
        first, last = self._samples[0], self._samples[-1]
        return (last[column] - first[column]) / (last[0] - first[0]) if last[0] > first[0] else 0.0


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


def _shorten(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _FAILURE_LENGTH else text[: _FAILURE_LENGTH - 3] + "..."


def plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def duration(seconds: float) -> str:
    minutes, whole = divmod(int(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02} min"
    if minutes:
        return f"{minutes} min {whole:02} s"
    return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"


def money(amount: float) -> str:
    """An amount, in no currency: the prices have none; the smaller, the more decimals."""
    decimals = 2 if amount >= 1 else 4 if amount >= 0.01 else 6
    return f"{amount:,.{decimals}f}"


def share(part: int, whole: Optional[int]) -> str:
    return f"{part:,}" if whole is None else f"{part:,} of {whole:,}"
