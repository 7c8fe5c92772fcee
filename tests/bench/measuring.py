"""Measures, and prints tables.

What is measured is a function of a script, a job. Each time it runs in a process of its own, between what it is
compared with: A B A B, since machines are noisy. Medians are printed. Memory is by how much the process's peak
grew while it was measured, after the imports and a first request.
"""

import json
import os
import resource
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any, Callable, Dict, Iterable, Iterator, List, NamedTuple, Optional

_HERE = Path(__file__).parent
_PEAK_UNIT = 1 if sys.platform == "darwin" else 1024

#: The Python of an environment with the published client, 0.0.7; without it, rows beside it have one side.
PUBLISHED = os.environ.get("PUBLISHED_PYTHON")


class Measured(NamedTuple):
    """What a job took."""

    seconds: float
    #: Growth of the process's peak.
    megabytes: float


#: Runs something once; None where it can't be run here.
Job = Callable[[], Optional[Measured]]


class Row(NamedTuple):
    """A line of the table."""

    what: str
    beside: str
    ours: Optional[Measured]
    theirs: Optional[Measured]
    #: The number to look at, and the bound on it.
    value: Optional[float]
    at_least: Optional[float] = None
    at_most: Optional[float] = None
    unit: str = ""


# ------------------------------------------------------------------------------------- in the job's process


@contextmanager
def measure() -> Iterator[None]:
    """Measure the block, once; the last thing that a job does."""
    peak, started = peak_megabytes(), time.perf_counter()
    yield
    seconds = time.perf_counter() - started
    print("\n" + json.dumps([seconds, peak_megabytes() - peak]), flush=True)  # after whatever a display left there


def peak_megabytes() -> float:
    """The most memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _PEAK_UNIT / 1e6


# ------------------------------------------------------------------------------------------ in the parent's


def job(script: str, name: str, *arguments: Any, python: Optional[str] = sys.executable) -> Job:
    """A function of a script, to be run by a Python; None: that is not there."""

    def run() -> Optional[Measured]:
        if python is None:
            return None
        command = [python, script, name, *map(str, arguments)]
        ran = subprocess.run(
            command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, env=environment_of(python), check=True
        )
        return Measured(*json.loads(ran.stdout.splitlines()[-1]))

    return run


def environment_of(python: str) -> Dict[str, str]:
    """What a Python is started with: ours may be found by PYTHONPATH, which the published client must not see."""
    return {name: value for name, value in os.environ.items() if python != PUBLISHED or name != "PYTHONPATH"}


def in_turn(rounds: int, *jobs: Job) -> List[Optional[Measured]]:
    """The medians of each job."""
    runs = [[run() for run in jobs] for _ in range(rounds)]
    return [None if None in column else Measured(*map(median, zip(*column))) for column in zip(*runs)]


def ratio(dividend: Optional[Measured], divisor: Optional[Measured]) -> Optional[float]:
    """Of the times; None where one of them is not there."""
    return dividend.seconds / divisor.seconds if dividend and divisor else None


@contextmanager
def serving(*arguments: Any) -> Iterator[str]:
    """The address of one of the servers of canned.py."""
    command = [sys.executable, str(_HERE / "canned.py"), *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True) as server:
        assert server.stdout
        try:
            yield server.stdout.readline().strip()
        finally:
            server.kill()


def print_table(rows: Iterable[Row]) -> None:
    """Print rows as they come, as Markdown."""
    print("| what | side by side with | ours | theirs | ratio | memory, MB | to reach | |")
    print("|---|---|--:|--:|--:|--:|---|---|")
    for row in rows:
        memory = " / ".join(f"{side.megabytes:.0f}" for side in (row.ours, row.theirs) if side and side.megabytes)
        value = "-" if row.value is None else f"{row.value:.2f}{row.unit}"
        cells = [row.what, row.beside, _seconds(row.ours), _seconds(row.theirs), value, memory, _bound(row)]
        print("|", " | ".join([*cells, _verdict(row)]), "|", flush=True)


def _seconds(side: Optional[Measured]) -> str:
    if side is None:
        return "-"
    return f"{side.seconds:.2f} s" if side.seconds >= 1 else f"{side.seconds * 1000:.1f} ms"


def _bound(row: Row) -> str:
    if row.at_least is not None:
        return f"at least {row.at_least:g}{row.unit}"
    return "" if row.at_most is None else f"at most {row.at_most:g}{row.unit}"


def _verdict(row: Row) -> str:
    if row.value is None:
        return "not measured: PUBLISHED_PYTHON is not set"
    if row.at_least is not None and row.value < row.at_least:
        return f"not reached ({row.value:.2f} of {row.at_least:g})"
    if row.at_most is not None and row.value > row.at_most:
        return f"not reached ({row.value:.2f} of {row.at_most:g})"
    return "" if row.at_least is row.at_most is None else "reached"


def main(jobs: Dict[str, Any], run: Callable[[bool], None]) -> None:
    """What a script does when it is started: a job, when one is named, else its tables; small ones with --quick."""
    if sys.argv[1:] and sys.argv[1] != "--quick":
        jobs[sys.argv[1]](*sys.argv[2:])
    else:
        run("--quick" in sys.argv)
