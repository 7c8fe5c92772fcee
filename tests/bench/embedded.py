"""The embedded server, beside what a script would do by hand."""

import json
import os
import sqlite3
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Iterator, List

from canned import body
from measuring import Measured, Row, in_turn, job, main, measure, print_table, ratio, serving

LATENCY = 0.2

# ------------------------------------------------------------------------------------------------- measured


def run(provider: str, count: str, workers: str) -> None:
    """From the first upload to the last result."""
    from synthgen.local import LocalServer

    tasks = _tasks(provider, int(count))
    with LocalServer(workers=int(workers)) as server, server.client() as client:
        client.check_health()
        with measure():
            results = client.monitor_batch(tasks, poll_interval=0.1, show_progress=False)
        assert all(result.ok for result in results)


def bare_pool(provider: str, count: str, workers: str) -> None:
    """Threads, a session each, and the answers in a list."""
    import requests

    local = threading.local()

    def call(number: int) -> Any:
        if not hasattr(local, "session"):
            local.session = requests.Session()
        return local.session.post(provider, json=body(number), headers={"Authorization": "Bearer k"}, timeout=60).json()

    with ThreadPoolExecutor(int(workers)) as pool, measure():
        answers = list(pool.map(call, range(int(count))))
    assert len(answers) == int(count)


def upload(folder: str, count: str) -> None:
    """To a database on disk, durable."""
    import requests

    from synthgen.local import LocalServer

    database = os.path.join(folder, f"{os.getpid()}.db")
    chunks = [b"\n".join(lines) for lines in _chunks(int(count))]
    with LocalServer(database, workers=1) as server, requests.Session() as session:
        session.trust_env = False
        session.headers["Authorization"] = f"Bearer {server.api_key}"
        with measure():
            for chunk in chunks:
                file = ("batch.jsonl", chunk)
                session.post(f"{server.url}/api/v1/batches?batch_id=b", files={"file": file}).raise_for_status()


def bare_inserts(folder: str, count: str) -> None:
    """The same lines, each chunk in a transaction as durable."""
    chunks = _chunks(int(count))
    connection = sqlite3.connect(os.path.join(folder, f"{os.getpid()}.db"), isolation_level=None)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    fields = "custom_id, method, url, api_key, body, dataset, source, use_cache, track_progress"
    connection.execute(f"CREATE TABLE tasks (id INTEGER PRIMARY KEY, {fields})")
    with measure():
        for lines in chunks:
            connection.execute("BEGIN")
            connection.executemany(
                f"INSERT INTO tasks ({fields}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", map(_row, map(json.loads, lines))
            )
            connection.execute("COMMIT")


def _tasks(provider: str, count: int) -> List[Any]:
    from synthgen import Task

    return [Task(custom_id=str(number), url=provider, api_key="k", body=body(number)) for number in range(count)]


def _chunks(count: int) -> List[List[bytes]]:
    lines = [task.to_line() for task in _tasks("http://127.0.0.1:1/", count)]
    return [lines[start : start + 1000] for start in range(0, count, 1000)]


def _row(task: Any) -> List[Any]:
    return [json.dumps(value) if isinstance(value, dict) else value for value in task.values()]


# ---------------------------------------------------------------------------------------------- side by side


def rows(quick: bool = False) -> Iterator[Row]:
    rounds = 1 if quick else 3
    count = 100 if quick else 10_000
    with serving("provider", 0) as provider:
        ours, bare = in_turn(
            rounds, job(__file__, "run", provider, count, 16), job(__file__, "bare_pool", provider, count, 16)
        )
    what = f"`LocalServer`, instant provider, 16 workers, {count:,} tasks"
    yield Row(what, "bare `ThreadPoolExecutor(16)`", ours, bare, ratio(bare, ours), at_least=0.7)

    count = 64 if quick else 64 * 50
    with serving("provider", LATENCY) as provider:
        (ours,) = in_turn(rounds, job(__file__, "run", provider, count, 64))
    ideal = Measured(count / 64 * LATENCY, 0)
    what = f"`LocalServer`, provider with 200 ms latency, 64 workers, {count:,} tasks"
    yield Row(what, "64 / 0.2 s", ours, ideal, ratio(ideal, ours), at_least=0.9)

    count = 1_000 if quick else 100_000
    with tempfile.TemporaryDirectory() as folder:
        ours, bare = in_turn(
            rounds, job(__file__, "upload", folder, count), job(__file__, "bare_inserts", folder, count)
        )
    what = f"`LocalServer`, upload of {count:,} tasks, on disk"
    yield Row(what, "the same lines parsed and inserted by one script", ours, bare, ratio(bare, ours), at_least=0.5)


if __name__ == "__main__":
    main(globals(), lambda quick: print_table(rows(quick)))
