"""What a user is told while waiting, in lines, and what holds for a monitor of one's own."""

import io
import subprocess
import sys
import warnings

import pytest
from story import BATCH_ID, FRAMES, PRICES, Clock, batch, failure, health, plain_frames, poll

from synthgen import MissingDependencyError, Monitor, Task
from synthgen._progress import duration, money, printable
from synthgen.local import DemoProvider, LocalServer
from synthgen.models import Batch, BatchCost, HealthResponse
from synthgen.monitor import GuardedMonitor, PlainMonitor, choose_monitor


class Written:
    """A `PlainMonitor`, its clock, and the lines that it has written."""

    def __init__(self):
        self.stream, self.clock = io.StringIO(), Clock()
        self.monitor = PlainMonitor(self.stream, clock=self.clock)

    @property
    def lines(self):
        return self.stream.getvalue().splitlines()


@pytest.fixture
def written():
    return Written()


class Recorder(Monitor):
    """Keeps every event."""

    def __init__(self):
        self.events = []

    def health(self, health):
        self.events.append(("health", health))

    def upload(self, batch_id, uploaded, total):
        self.events.append(("upload", batch_id, uploaded, total))

    def batch(self, batch, submitted, cost):
        self.events.append(("batch", batch, submitted, cost))

    def download(self, received, total):
        self.events.append(("download", received, total))

    def note(self, text):
        self.events.append(("note", text))

    def results(self, results):
        self.events.append(("results", results))

    def finish(self, batch, cost):
        self.events.append(("finish", batch, cost))

    def close(self):
        self.events.append(("close",))


class Broken(Recorder):
    """Fails at every event, after having kept it."""

    def __getattribute__(self, name):
        value = super().__getattribute__(name)
        if name.startswith("_") or not callable(value):
            return value

        def fail(*args):
            value(*args)
            raise RuntimeError("no paper")

        return fail


class WriteOnly:
    """The least that print() asks of a stream."""

    def __init__(self):
        self.written = ""

    def write(self, text):
        self.written += text

    def flush(self):
        pass


@pytest.fixture(scope="module")
def demo():
    """A server with a provider that solves equations: its client, and three tasks."""
    with DemoProvider() as provider, LocalServer() as server, server.client() as client:
        bodies = [{"messages": [{"role": "user", "content": f"solve {i}x = {2 * i}"}]} for i in (1, 2, 3)]
        yield client, [Task(url=provider.url, body=body, use_cache=False) for body in bodies]


# PlainMonitor


def test_a_batch_reads_as_in_the_golden_lines():
    """The whole story, as a log keeps it."""
    assert plain_frames() == (FRAMES / "plain.txt").read_text(encoding="utf-8")


def test_a_change_is_written_at_most_every_ten_seconds(written):
    """Of what changes within ten seconds, the first and then the newest state are written."""
    for completed in range(31):
        poll(written.monitor, batch(completed=completed))
        written.clock.now += 1

    assert [line.split()[2] for line in written.lines] == ["0", "10", "20", "30"]


def test_what_does_not_change_is_written_once(written):
    """Time that passes is no news."""
    for _ in range(100):
        poll(written.monitor, batch(completed=7))
        written.clock.now += 60

    assert len(written.lines) == 1


def test_the_last_state_of_a_phase_is_always_written(written):
    """A line held back for its ten seconds comes out when something else begins."""
    for uploaded in (0, 1000, 2000, 2500):
        written.monitor.upload(BATCH_ID, uploaded, 2500)
    poll(written.monitor, batch())

    assert [line.split(": ")[1] for line in written.lines[:2]] == [
        "0 of 2,500 tasks uploaded",
        "2,500 of 2,500 tasks uploaded in 3 chunks",
    ]


def test_the_last_state_is_written_when_the_watching_ends_early(written):
    """An error or Ctrl-C leaves the newest counts in the log."""
    poll(written.monitor, batch(completed=1))
    poll(written.monitor, batch(completed=2))
    written.monitor.close()

    assert "2 of 2,500 done" in written.lines[-1]


def test_notes_are_always_written(written):
    """A note waits for no interval."""
    for number in range(5):
        written.monitor.note(f"note {number}")

    assert written.lines == [f"note {number}" for number in range(5)]


def test_texts_from_outside_stay_on_their_line_and_obey_nothing(written):
    """Escape sequences, bells and newlines in a note or an error are taken out."""
    written.monitor.note("a\x1b[31mred\x07\nline\x9b2J\u202etxt")
    written.monitor.results([failure("\x1b]0;title\x07\nsecond line")])
    written.monitor.finish(batch(failed=1, total=1), BatchCost())

    assert all(line.isprintable() for line in written.lines)
    assert len([line for line in written.lines if "second line" in line]) == 1


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_stream_with_a_small_alphabet_is_no_error(encoding):
    """What the stream's encoding lacks is written as an escape."""
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding)

    PlainMonitor(stream).note("Größe 漢")

    assert raw.getvalue().decode(encoding).rstrip().endswith("\\u6f22")


def test_lines_go_to_what_stderr_is_at_that_moment(capsys, monkeypatch):
    """A stderr that was replaced after the monitor was made gets the lines."""
    monitor, replaced = PlainMonitor(), io.StringIO()
    monkeypatch.setattr(sys, "stderr", replaced)

    monitor.note("here")

    assert replaced.getvalue() == "here\n"
    assert capsys.readouterr() == ("", "")


def test_no_stderr_at_all_is_no_error(monkeypatch):
    """Under pythonw there is none."""
    monkeypatch.setattr(sys, "stderr", None)

    PlainMonitor().note("nowhere")


def test_a_stderr_that_only_writes_gets_the_lines(demo, monkeypatch):
    """As those that hand on to a logger or a window: without isatty and encoding."""
    client, tasks = demo
    monkeypatch.setattr(sys, "stderr", WriteOnly())

    results = client.monitor_batch(tasks)

    assert [result.content for result in results] == ["x = 2"] * 3
    assert "3 completed" in sys.stderr.written


def test_a_stderr_that_is_closed_does_not_end_the_batch(demo, monkeypatch):
    """Nobody is told, and the results come all the same."""
    client, tasks = demo
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    sys.stderr.close()

    results = client.monitor_batch(tasks)

    assert [result.content for result in results] == ["x = 2"] * 3


def test_a_monitor_can_watch_one_batch_after_another(written):
    """The second batch starts with counts of its own."""
    for _ in range(2):
        written.monitor.health(health())
        written.monitor.upload(BATCH_ID, 0, 5)
        written.monitor.upload(BATCH_ID, 5, 5)
        written.monitor.close()

    assert written.lines[:3] == written.lines[3:]


# What is said


def test_the_projected_cost_takes_the_rest_to_be_paid_for(written):
    """Cached tasks cost nothing, and say nothing of what the others will cost."""
    poll(written.monitor, batch(completed=100, cached=900, total=2000), submitted=2000)

    cost = batch(completed=1).cost(*PRICES).total
    assert f"cost {money(100 * cost)} so far, about {money(1100 * cost)} at the end" in written.lines[0]


def test_without_prices_no_cost_is_shown(written):
    """A cost of zero is none."""
    written.monitor.batch(batch(completed=1), 2500, BatchCost())

    assert "cost" not in written.lines[0]


def test_tasks_not_ingested_yet_are_pending(written):
    """The counts add up to what was submitted, whatever part of it the server has seen."""
    poll(written.monitor, batch(completed=1, processing=2, total=10), submitted=2500)

    assert "1 completed, 0 cached, 0 failed, 2 processing, 2,497 pending" in written.lines[0]


def test_a_batch_that_was_come_back_to_is_timed_by_the_server(written):
    """Its duration is that of the batch, not that of the watching."""
    written.clock.now += 7
    written.monitor.finish(batch(completed=2500, duration=7200), BatchCost())

    assert "  duration  2 h 00 min" in written.lines


@pytest.mark.parametrize(
    "seconds, text",
    [(0, "0.0 s"), (9.94, "9.9 s"), (10, "10 s"), (59.9, "59 s"), (61, "1 min 01 s"), (3599, "59 min 59 s"),
     (3600, "1 h 00 min"), (90061, "25 h 01 min")],
)  # fmt: skip
def test_durations_are_read_at_a_glance(seconds, text):
    """The longer, the coarser."""
    assert duration(seconds) == text


@pytest.mark.parametrize(
    "amount, text", [(0.0000271, "0.000027"), (0.01234, "0.0123"), (0.5, "0.5000"), (1234.567, "1,234.57")]
)
def test_amounts_keep_the_digits_that_matter(amount, text):
    """The smaller, the more decimals."""
    assert money(amount) == text


def test_printable_keeps_what_is_harmless():
    """Accents, brackets and runs of spaces stay."""
    assert printable("é  [b]漢[/b]") == "é  [b]漢[/b]"


# The choice


def test_no_progress_means_silence(demo, capsys):
    """``show_progress=False`` writes nothing."""
    client, tasks = demo

    client.monitor_batch(tasks, show_progress=False)

    assert capsys.readouterr().err == ""


def test_off_a_terminal_lines_are_written(capsys):
    """With stderr in a file, the plain monitor is chosen."""
    assert type(choose_monitor()) is PlainMonitor


def test_without_rich_lines_are_written_on_a_terminal_too(terminal_stderr, monkeypatch):
    """rich is optional."""
    _hide_rich(monkeypatch)

    assert type(choose_monitor()) is PlainMonitor


def test_a_dumb_terminal_gets_lines(terminal_stderr, monkeypatch):
    """TERM=dumb can't move its cursor."""
    monkeypatch.setenv("TERM", "dumb")

    assert type(choose_monitor()) is PlainMonitor


def test_a_stderr_that_cant_say_what_it_is_gets_lines(monkeypatch):
    """One that only writes, and one that is closed, are no terminals."""
    closed = io.StringIO()
    closed.close()
    for stream in (WriteOnly(), closed):
        monkeypatch.setattr(sys, "stderr", stream)
        assert type(choose_monitor()) is PlainMonitor


def test_without_rich_the_error_says_the_way_out(monkeypatch):
    """Asking for the drawing module itself names the extra to install."""
    _hide_rich(monkeypatch)

    with pytest.raises(MissingDependencyError, match=r"pip install 'synthgen-client\[rich\]'"):
        from synthgen._rich import RichMonitor  # noqa: F401


def _hide_rich(monkeypatch):
    for name in [name for name in sys.modules if name == "synthgen._rich" or name.split(".")[0] == "rich"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "rich", None)  # what the import system takes for 'not to be found'


@pytest.fixture
def terminal_stderr(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr(sys, "stderr", Terminal())


# A user's own monitor


def test_a_subclass_gets_every_event_in_its_order(demo):
    """From health to close, with typed arguments."""
    client, tasks = demo
    recorder = Recorder()

    results = client.monitor_batch(tasks, None, *PRICES, monitor=recorder)

    names = [event[0] for event in recorder.events]
    assert list(dict.fromkeys(names)) == ["health", "upload", "batch", "download", "results", "finish", "close"]
    events = {event[0]: event[1:] for event in recorder.events}
    assert isinstance(events["health"][0], HealthResponse)
    assert events["upload"][1:] == (3, 3)
    assert isinstance(events["batch"][0], Batch) and events["batch"][1] == 3
    assert events["download"] == (3, 3)
    assert events["results"] == (results,)
    assert events["finish"][1].total > 0
    assert names.count("close") == 1


def test_a_monitor_that_fails_does_not_end_the_batch(demo):
    """There is one warning, then silence, and the results come all the same."""
    client, tasks = demo
    broken = Broken()

    with pytest.warns(RuntimeWarning, match=r"Broken\.health raised RuntimeError: no paper") as caught:
        results = client.monitor_batch(tasks, monitor=broken)

    assert [result.content for result in results] == ["x = 2"] * 3
    assert len(caught) == 1
    assert [event[0] for event in broken.events] == ["health", "close"]


def test_a_monitor_that_fails_does_not_end_the_batch_where_warnings_are_errors(demo):
    """Nor does the warning."""
    client, tasks = demo

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        results = client.monitor_batch(tasks, monitor=Broken())

    assert [result.content for result in results] == ["x = 2"] * 3


def test_a_monitor_that_fails_does_no_harm_where_the_warning_cant_be_shown():
    """In a process of its own, since pytest keeps the warnings of this one: its stderr is closed."""
    script = (
        "import sys; from synthgen.monitor import GuardedMonitor; "
        "sys.stderr.close(); GuardedMonitor(object()).note('a'); print('goes on')"
    )

    assert subprocess.check_output([sys.executable, "-c", script]).strip() == b"goes on"


def test_an_interrupt_in_a_monitor_goes_through():
    """Ctrl-C is no failure of the monitor."""

    class Interrupted(Monitor):
        def note(self, text):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        GuardedMonitor(Interrupted()).note("")


def test_a_monitor_written_for_an_older_version_misses_nothing_it_has():
    """An object without one of the events costs a warning, not the batch."""

    class Older:
        def close(self):
            pass

    monitor = GuardedMonitor(Older())
    with pytest.warns(RuntimeWarning, match="results"):
        monitor.results([])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        monitor.close()


def test_failures_that_differ_in_numbers_alone_are_of_one_kind(written):
    """In tries, ids and times: the summary has room for other kinds, and shows the first of each."""
    errors = ["busy (tried 3 times), id req-1a", "busy (tried 4 times), id req-2b", "wrong key"]
    failed = [failure(error) for error in errors]
    written.monitor.results(failed)

    assert dict(written.monitor.progress.failures) == {errors[0]: 2, errors[2]: 1}
