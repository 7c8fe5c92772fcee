"""The benchmarks still run: of few tasks, with nothing said about time."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import synthgen

BENCH = Path(__file__).with_name("bench")
ROWS = [
    "`iter_batch_tasks`, 1,000 tasks | 0.0.7",
    "`iter_batch_tasks`, 1,000 tasks: memory",
    "`iter_batch_tasks`, 1,000 tasks | bare script",
    "its first task",
    "one task of 4 MB in the stream",
    "`get_batch_tasks`, 1,000 tasks | 0.0.7",
    "`export_batch`, 1,000 tasks | `iter_batch_tasks`",
    "`create_batch`, 1,000 tasks from a generator | 0.0.7",
    "`monitor_batch`, 1,000 results matched",
    "`monitor_batch`, 100 tasks answered at once",
    "`import synthgen` | requests",
    "`import synthgen` | 0.0.7",
    "`LocalServer`, instant provider",
    "`LocalServer`, provider with 200 ms latency",
    "`LocalServer`, upload of 1,000 tasks",
    "10 |",
    "100 |",
    "`GET /batches/ID`",
]


@pytest.mark.slow
def test_every_benchmark_runs_and_prints_its_row():
    """Without the published client, too."""
    environment = {**os.environ, "PYTHONPATH": str(Path(synthgen.__file__).parents[1])}
    environment.pop("PUBLISHED_PYTHON", None)

    ran = subprocess.run(
        [sys.executable, str(BENCH), "--quick"], env=environment, stdout=subprocess.PIPE, text=True, check=True
    )

    assert [row for row in ROWS if f"\n| {row}" not in ran.stdout] == [], ran.stdout
