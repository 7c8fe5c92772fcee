"""What is drawn with rich: `RichMonitor`, and the tables of the command line. No other module imports rich.

Whatever comes from outside becomes a `Text`: rich reads a plain string as markup.
"""

import sys
import threading
import time
from contextlib import suppress
from importlib.util import find_spec
from typing import Callable, Iterable, List, Optional, Sequence, TextIO

from ._progress import health_rows, printable
from .exceptions import MissingDependencyError
from .models import HealthResponse, TimeSeriesDataPoint
from .plain import PlainMonitor

try:
    from rich import box
    from rich.columns import Columns
    from rich.console import Console, Group, RenderableType
    from rich.errors import LiveError
    from rich.file_proxy import FileProxy
    from rich.live import Live
    from rich.panel import Panel
    from rich.progress_bar import ProgressBar
    from rich.table import Column, Table
    from rich.text import Text
except ImportError as exc:
    raise MissingDependencyError(
        "drawing needs 'rich': pip install 'synthgen-client[rich]' (PlainMonitor says the same in plain lines)"
    ) from exc

_WIDTH = 100
_NOTES_SHOWN = 3
# Colours that can be read on a light and on a dark background.
_COLOURS = {
    "completed": "green",
    "cached": "cyan",
    "failed": "red",
    "processing": "magenta",
    "healthy": "green",
    "unhealthy": "bold red",
}
#: Two displays on one terminal overwrite each other: one starts at a time, and sees the one that started before.
_starting = threading.Lock()


class RichMonitor(PlainMonitor):
    """Draws the batch on a terminal or in Jupyter; writes plain lines where it can't, or where another display is live.

    It is itself what is drawn: ``console.print(monitor)`` shows the present state.

    Args:
        console: Where to draw; by default stderr.
        clock: What tells the time, in seconds.
    """

    def __init__(self, console: Optional[Console] = None, *, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(clock=clock)
        self._console = console or Console(stderr=True)
        self._live: Optional[Live] = None

    def health(self, health: HealthResponse) -> None:
        if self._live is None and not self._can_draw():
            return super().health(health)
        self._restart()
        table = Table(title=self._text(f"server {health.status}"), box=box.ROUNDED, show_header=False)
        table.title_style, table.title_justify = "", "left"
        for name, state in health_rows(health):
            table.add_row(Text(name), self._text(state, _COLOURS.get(state, "")))
        self._console.print(table)

    def note(self, text: str) -> None:
        if self._start():
            self.progress.notes.append(text)
        else:
            super().note(text)

    def close(self) -> None:
        if self._live:
            self._live.refresh()  # in Jupyter, stopping alone leaves the frame before the last
            self._live.stop()
            self._live = None
        super().close()

    def _restart(self) -> None:
        super()._restart()
        self._in_lines = False

    def _say(self, phase: str, news: str, *more: str, detail: str = "") -> None:
        if self._start():
            self._news, self._phase = news, phase  # the display draws itself four times a second
        else:
            super()._say(phase, news, *more, detail=detail)

    def _can_draw(self) -> bool:
        console = self._console
        drawable = find_spec("ipywidgets") is not None if console.is_jupyter else console.is_interactive
        # A live display puts a proxy in place of these, and shows above itself what is written to them.
        return drawable and not isinstance(sys.stdout, FileProxy) and not isinstance(sys.stderr, FileProxy)

    def _start(self) -> bool:
        """Begin to draw; false where that can't be: this batch is then told of in lines, to its end."""
        with _starting:
            if self._live is None and not self._in_lines:
                self._in_lines = True
                if self._can_draw():
                    # A script's prints go through the display, or they would break it; not into it, when redirected.
                    redirect = sys.stdout is not None and sys.stdout.isatty()
                    live = Live(self, console=self._console, redirect_stdout=redirect)
                    with suppress(LiveError):  # there is another, on the console that was given
                        live.start(refresh=True)
                        self._live, self._in_lines = live, False
        return self._live is not None

    def __rich__(self) -> RenderableType:
        progress = self.progress
        parts: List[RenderableType] = []
        if self._phase == "finish":
            grid = Table.grid(Column(no_wrap=True), Column(overflow="fold"), padding=(0, 2))
            for label, text in progress.summary():
                grid.add_row(Text(label), self._text(text))
            parts.append(self._panel(grid, style="red" if progress.batch.failed_tasks else "green"))
        elif self._phase == "upload":
            parts.append(self._panel(*_bar(*progress.moved), self._text(self._news)))
        elif progress.total:
            lines = ([progress.done_text(), *progress.times()], progress.counts(), progress.tokens(), progress.costs())
            parts.append(self._panel(*_bar(progress.finished, progress.total), *map(self._pieces, lines)))
        parts.extend(self._text(note, "magenta") for note in progress.notes[-_NOTES_SHOWN:])
        if self._phase == "download":
            parts += [*_bar(*progress.moved), self._text(self._news)]
        return Group(*parts)

    def _panel(self, *parts: RenderableType, style: str = "") -> Panel:
        title = self._text(f"batch {self.progress.batch_id}")
        width = min(self._console.width, _WIDTH)
        return Panel(Group(*parts), title=title, title_align="left", border_style=style, width=width)

    def _pieces(self, texts: List[str]) -> Columns:
        """Texts side by side, in as many rows as the width asks for, none of them torn."""
        return Columns([self._text(text, _COLOURS.get(text.split()[-1], "")) for text in texts], padding=(0, 3))

    def _text(self, text: str, style: str = "") -> Text:
        return Text(printable(text, self._console.encoding), style, overflow="fold")


def _bar(done: int, total: Optional[int]) -> List[RenderableType]:
    """A bar with its percentage; none where the total is not known."""
    if not total:
        return []
    grid = Table.grid(Column(ratio=1), Column(no_wrap=True, justify="right"), padding=(0, 1), expand=True)
    bar = ProgressBar(total, done, style="bright_black", complete_style="green", finished_style="green")
    grid.add_row(bar, Text(f"{100 * min(done, total) // total}%"))
    return [grid]


def print_table(headers: Sequence[str], rows: Iterable[Sequence[str]], stream: TextIO) -> None:
    """Draw a table of texts, as wide as they are: on a narrow terminal too, an id can be copied."""
    table = Table(*(Column(Text(header)) for header in headers), box=box.SIMPLE_HEAD, padding=(0, 2, 0, 0))
    for row in rows:
        table.add_row(*(Text(printable(cell, stream.encoding)) for cell in row))
    console = Console(file=stream)
    console.width = max(console.width, console.measure(table, options=console.options.update(width=1000)).maximum)
    console.print(table)


def print_stats(points: Sequence[TimeSeriesDataPoint], stream: TextIO) -> None:
    """Draw the tasks and tokens of each time bucket as bars, side by side."""
    table = Table("UTC", box=box.SIMPLE_HEAD, expand=True)
    columns: List[List[RenderableType]] = [[Text(f"{point.timestamp:%Y-%m-%d %H:%M}") for point in points]]
    for name, color in (("tasks", "cyan"), ("tokens", "green")):
        table.add_column(name, justify="right")
        table.add_column(ratio=1)
        counts = [getattr(point, f"total_{name}") for point in points]
        most = max(counts, default=0) or 1
        bars: List[RenderableType] = [
            ProgressBar(most, count, complete_style=color, finished_style=color) for count in counts
        ]
        columns += [Text(f"{count:,}") for count in counts], bars
    for row in zip(*columns):
        table.add_row(*row)
    Console(file=stream).print(table)
