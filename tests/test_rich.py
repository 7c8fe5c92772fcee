"""What is drawn."""

import io
import re
import sys

import pytest

pytest.importorskip("rich")

from rich.live import Live  # noqa: E402
from story import (  # noqa: E402
    BATCH_ID,
    FRAMES,
    WIDTHS,
    Clock,
    batch,
    failure,
    frame,
    health,
    poll,
    rich_frames,
    tell,
    terminal,
)

from synthgen._rich import RichMonitor, print_stats, print_table  # noqa: E402
from synthgen.models import BatchCost, TimeSeriesDataPoint  # noqa: E402
from synthgen.monitor import choose_monitor  # noqa: E402

COLOUR = re.compile(r"\x1b\[[0-9;]*m")


@pytest.fixture
def screen():
    return terminal()


@pytest.fixture
def monitor(screen):
    monitor = RichMonitor(screen, clock=Clock())
    yield monitor
    monitor.close()


@pytest.mark.parametrize("width", WIDTHS)
def test_a_batch_looks_as_in_the_golden_frames(width):
    """Each moment of the story, on narrow and wide terminals."""
    assert rich_frames(width) == (FRAMES / f"rich-{width}.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize("width", WIDTHS)
def test_no_line_is_wider_than_the_terminal(width):
    """Nothing wraps, so nothing moves up when it is drawn again."""
    assert max(map(len, rich_frames(width).splitlines())) <= width


def test_markup_in_texts_is_text(monitor):
    """Notes and errors are shown as they are, brackets and all."""
    monitor.note("[bold]note[/nothing] :smile:")
    monitor.results([failure("[red]error[/x]")])
    monitor.finish(batch(failed=1, total=1), BatchCost())

    drawn = frame(monitor)
    assert "[bold]note[/nothing] :smile:" in drawn
    assert "[red]error[/x]" in drawn


def test_escape_sequences_in_texts_reach_no_terminal(monitor, screen):
    """What a server writes can't ring, colour or clear anything."""
    monitor.note("\x1b]0;title\x07\x1b[5mblink\x9b2J")
    monitor.close()

    assert "\x1b]" not in screen.file.getvalue()
    assert "\x1b[5m" not in screen.file.getvalue()
    assert "\x07" not in screen.file.getvalue()


def test_a_terminal_with_a_small_alphabet_is_drawn_on(monkeypatch):
    """Boxes are made of ASCII there, and a text's characters are escaped."""
    raw = io.BytesIO()
    screen = terminal()
    screen.file = io.TextIOWrapper(raw, encoding="ascii", write_through=True)
    monitor = RichMonitor(screen)

    monitor.note("Größe 漢")
    poll(monitor, batch(completed=1))
    monitor.close()

    assert b"\\u6f22" in raw.getvalue()
    assert b"+-" in raw.getvalue()


def test_colours_are_left_out_on_request():
    """With NO_COLOR the same is drawn, without a colour."""
    plain = terminal(color_system="truecolor", no_color=True)
    monitor = RichMonitor(plain, clock=Clock())
    for _ in tell(monitor, Clock()):
        pass

    assert not re.search(r"\x1b\[(?:[0-9;]*;)?[34][0-9]", plain.file.getvalue())


def test_no_colour_depends_on_the_background(monitor):
    """White, black and their bright kinds are never used for text."""
    poll(monitor, batch(completed=1, cached=1, failed=1, processing=1))
    monitor.note("a note")

    codes = set(COLOUR.findall(frame(monitor, color_system="standard")))
    assert codes
    assert not codes & {f"\x1b[{number}m" for number in (30, 37, 97)}


def test_a_smaller_window_gets_a_smaller_frame(screen, monitor):
    """The width is that of the moment, not that of the start."""
    poll(monitor, batch(completed=1))
    screen.width = 40

    assert max(map(len, frame(monitor, 40).splitlines())) == 40


def test_the_terminal_is_given_back_with_the_last_frame(screen, monitor):
    """After an error or Ctrl-C the cursor is there again, below the state last seen."""
    poll(monitor, batch(completed=7))
    monitor.close()

    drawn = screen.file.getvalue()
    assert drawn.rindex("\x1b[?25h") > drawn.rindex("7 completed") > drawn.index("\x1b[?25l")


def test_the_summary_takes_the_place_of_the_progress(screen, monitor):
    """What stays on the terminal is the summary."""
    poll(monitor, batch(completed=7, total=7), submitted=7)
    monitor.finish(batch(completed=7, total=7), BatchCost())
    monitor.close()

    last_frame = screen.file.getvalue().rpartition("╭")[2]
    assert "tasks     7: 7 completed" in last_frame
    assert "elapsed" not in last_frame


def test_beside_another_display_lines_are_written_on_its_console(monkeypatch):
    """Two displays would overwrite each other; lines go above the one that is there."""
    other = terminal()
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with Live("theirs", console=other, auto_refresh=False):
        monitor = RichMonitor(terminal())
        monitor.health(health())
        poll(monitor, batch(completed=7))
        monitor.note("a note")
        monitor.finish(batch(completed=7), BatchCost())
        monitor.close()

    drawn = other.file.getvalue()
    for text in ("server healthy: api healthy", "7 of 2,500 done: 7 completed", "a note", "tasks     2,500"):
        assert text in drawn


def test_two_monitors_at_once_share_the_terminal(monkeypatch):
    """The first draws, the second writes lines above it."""
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    screen, unused = terminal(), terminal()
    first, second = RichMonitor(screen), RichMonitor(unused)

    poll(first, batch(completed=1))
    poll(second, batch(completed=2))
    second.close()
    first.close()

    assert "2 of 2,500 done: 2 completed" in screen.file.getvalue()
    assert unused.file.getvalue() == ""


def test_off_a_terminal_lines_are_written(monkeypatch):
    """A console that is a file gets no frames; the lines go to stderr."""
    stderr = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    file = terminal(force_terminal=False, force_interactive=False)
    monitor = RichMonitor(file)

    poll(monitor, batch(completed=7))
    monitor.close()

    assert "7 completed" in stderr.getvalue()
    assert file.file.getvalue() == ""


def test_what_a_script_prints_goes_where_it_was_sent(monitor, screen, capsys):
    """With stdout in a file, the display keeps its hands off it."""
    poll(monitor, batch(completed=7))
    print("a result")
    monitor.close()

    assert capsys.readouterr().out == "a result\n"
    assert "a result" not in screen.file.getvalue()


def test_on_a_terminal_the_drawing_monitor_is_chosen(monkeypatch):
    """With rich installed and a terminal that can move its cursor."""

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("TERM", "xterm")

    assert type(choose_monitor()) is RichMonitor


def test_a_table_keeps_its_ids_whole():
    """On a terminal too narrow for it, an id can still be copied; markup in it is text."""
    stream = io.StringIO()

    print_table(["batch", "status"], [[BATCH_ID * 3, "[red]NEW[/x]"]], stream)

    assert BATCH_ID * 3 in stream.getvalue()
    assert "[red]NEW[/x]" in stream.getvalue()


@pytest.mark.parametrize("encoding, mark", [("utf-8", "━"), ("ascii", "-")])
def test_statistics_are_drawn_as_bars(encoding, mark):
    """Each time bucket has a bar for its tasks and one for its tokens, as long as its share of the most."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding)
    points = [
        TimeSeriesDataPoint(timestamp=f"2026-11-22 {hour}:00:00", total_tasks=tasks, total_tokens=10 * tasks)
        for hour, tasks in ((10, 0), (11, 500), (12, 1000))
    ]

    print_stats(points, stream)

    stream.seek(0)
    none, half, most = (line[16:].count(mark) for line in stream if "2026" in line)
    assert none == 0 < half < most
    assert abs(most - 2 * half) <= 2
