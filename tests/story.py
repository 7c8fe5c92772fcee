"""A batch as a monitor is told of it, always the same, for frames that can be compared.

``python tests/story.py`` draws the golden frames in tests/frames anew; look at them before you keep them.
"""

import io
import re
from pathlib import Path
from typing import Iterator, List

from synthgen.models import Batch, HealthResponse, TaskResponse, TaskStatus
from synthgen.monitor import Monitor, PlainMonitor

FRAMES = Path(__file__).parent / "frames"
WIDTHS = (40, 80, 120)
BATCH_ID = "0c1fa7d2-6a43-4ef2-8f3b-0b0b7cf8e5a1"
PRICES = (0.15, 0.6)


class Clock:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def health(**services) -> HealthResponse:
    """A healthy server, but for what is said."""
    usual = {
        "api": "healthy",
        "rabbitmq": "healthy",
        "elasticsearch": "healthy",
        "task_queue_consumers": 1,
        "task_queue_messages": 1234,
        "batch_queue_consumers": 2,
        "batch_queue_messages": 0,
    }
    return HealthResponse.model_validate({"status": "healthy", "services": {**usual, **services}})


def batch(completed=0, cached=0, failed=0, processing=0, total=2500, **more) -> Batch:
    """A batch with these counts; each completed task took 40 tokens in and 60 out."""
    return Batch(
        batch_id=BATCH_ID,
        batch_status=TaskStatus.PROCESSING,
        total_tasks=total,
        completed_tasks=completed,
        cached_tasks=cached,
        failed_tasks=failed,
        processing_tasks=processing,
        pending_tasks=total - completed - cached - failed - processing,
        prompt_tokens=40 * completed,
        completion_tokens=60 * completed,
        total_tokens=100 * completed,
        **more,
    )


def failure(error: str) -> TaskResponse:
    """A task that failed for this reason."""
    return TaskResponse(message_id="m", status=TaskStatus.FAILED, completions={"error": error})


def ended(finish_reason: str) -> TaskResponse:
    """A task whose answer ends like this."""
    completions = {"choices": [{"finish_reason": finish_reason}]}
    return TaskResponse(message_id="m", status=TaskStatus.COMPLETED, completions=completions)


def poll(monitor: Monitor, polled: Batch, submitted: int = 2500) -> None:
    """Tell a monitor of a batch, with what it cost."""
    monitor.batch(polled, submitted, polled.cost(*PRICES))


def tell(monitor: Monitor, clock: Clock) -> Iterator[str]:
    """Tell a monitor the whole story; stop at each moment worth a look, and name it."""
    monitor.health(health(elasticsearch="unhealthy"))
    for uploaded in (0, 1000, 2000):
        monitor.upload(BATCH_ID, uploaded, 2500)
        clock.now += 1
    yield "upload"
    monitor.upload(BATCH_ID, 2500, 2500)
    monitor.batch(None, 2500, batch().cost())
    clock.now += 1
    yield "not ingested yet"
    poll(monitor, batch(completed=100, cached=400, processing=16))
    clock.now += 60
    poll(monitor, batch(completed=700, cached=400, failed=20, processing=16))
    monitor.note("server away since 12:00:00: \x1b[31mconnection\x07 [bold]refused[/nothing]\n")
    yield "running"
    clock.now += 4000
    end = batch(completed=2080, cached=400, failed=20, duration=4060)
    poll(monitor, end)
    monitor.download(1000, 2500)
    yield "download"
    monitor.download(2500, 2500)
    errors = ["HTTP 400: [bold]bad\nrequest", "HTTP 401: \x1b[5mwrong key", "HTTP 418: " + "teapot " * 99, "HTTP 422"]
    results = [failure(errors[i * i % 4 + i % 3]) for i in range(20)]
    monitor.results([*results, *map(ended, ["length"] * 12), ended("content_filter"), ended("stop")])
    monitor.finish(end, end.cost(*PRICES))
    yield "finished"
    monitor.close()


def plain_frames() -> str:
    """All that `PlainMonitor` writes."""
    stream, clock = io.StringIO(), Clock()
    for _ in tell(PlainMonitor(stream, clock=clock), clock):
        pass
    return stream.getvalue()


def rich_frames(width: int) -> str:
    """The health table, then the frame at each moment, as `RichMonitor` draws them in this width."""
    from synthgen._rich import RichMonitor

    screen, clock = terminal(width), Clock()
    monitor = RichMonitor(screen, clock=clock)
    frames: List[str] = []
    for moment in tell(monitor, clock):
        if not frames:
            before_live = screen.file.getvalue().split("\x1b")[0]
            frames.append(f"---- health\n{before_live}")
        frames.append(f"---- {moment}\n{frame(monitor, width)}")
    return re.sub(r" +\n", "\n", "".join(frames))


def terminal(width=80, **options):
    """A terminal of this width, kept in memory, for rich to draw on."""
    from rich.console import Console

    usual = {"color_system": None, "force_terminal": True, "force_interactive": True, "legacy_windows": False}
    return Console(file=io.StringIO(), width=width, height=30, _environ={}, **{**usual, **options})


def frame(monitor, width=80, **options) -> str:
    """What a `RichMonitor` draws now."""
    paper = terminal(width, **options)
    paper.print(monitor)
    return paper.file.getvalue()


if __name__ == "__main__":
    FRAMES.mkdir(exist_ok=True)
    (FRAMES / "plain.txt").write_text(plain_frames(), encoding="utf-8")
    for columns in WIDTHS:
        (FRAMES / f"rich-{columns}.txt").write_text(rich_frames(columns), encoding="utf-8")
