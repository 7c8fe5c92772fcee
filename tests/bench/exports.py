"""Results: streamed, listed, written to a file."""

import json
import os
import tempfile
from http.client import HTTPConnection, HTTPResponse
from typing import Any, Iterator
from urllib.parse import urlsplit

from measuring import PUBLISHED, Measured, Row, in_turn, job, main, measure, print_table, ratio, serving

# ------------------------------------------------------------------------------------------------- measured


def iterate(url: str, batch_id: str) -> None:
    client = _connect(url, batch_id)
    with measure():
        for _ in client.iter_batch_tasks(batch_id):
            pass


def first(url: str, batch_id: str) -> None:
    client = _connect(url, batch_id)
    with measure():
        next(client.iter_batch_tasks(batch_id))


def listed(url: str, batch_id: str) -> None:
    client = _connect(url, batch_id)
    with measure():
        client.get_batch_tasks(batch_id)


def to_file(url: str, batch_id: str) -> None:
    client = _connect(url, batch_id)
    with tempfile.TemporaryDirectory() as folder:
        with measure():
            client.export_batch(batch_id, os.path.join(folder, "results.jsonl"))


def published_listed(url: str, batch_id: str) -> None:
    from synthgen import SynthgenClient

    client = SynthgenClient(*url.rsplit(":", 1), "key")
    client.get_batch(batch_id)
    with measure():
        client.get_batch_tasks(batch_id)


def bare_lines(url: str, batch_id: str) -> None:
    """What a script without a client would do at best: json.loads of each line."""
    connection = HTTPConnection(urlsplit(url).netloc)
    with measure():
        for line in _lines(_get_export(connection, batch_id)):
            json.loads(line)


def bare_first_byte(url: str, batch_id: str) -> None:
    connection = HTTPConnection(urlsplit(url).netloc)
    with measure():
        _get_export(connection, batch_id).read(1)


def _connect(url: str, batch_id: str) -> Any:
    from synthgen import SynthgenClient

    client = SynthgenClient(url)
    client.get_batch(batch_id)
    return client


def _get_export(connection: HTTPConnection, batch_id: str) -> HTTPResponse:
    connection.request("GET", f"/api/v1/batches/{batch_id}")
    connection.getresponse().read()
    connection.request("GET", f"/api/v1/batches/{batch_id}/tasks/export")
    return connection.getresponse()


def _lines(response: HTTPResponse) -> Iterator[bytes]:
    parts = []
    for part in iter(lambda: response.read(1 << 18), b""):
        head, newline, tail = part.partition(b"\n")
        parts.append(head)
        if newline:
            yield b"".join(parts)
            parts = [tail]


# ---------------------------------------------------------------------------------------------- side by side


def rows(quick: bool = False) -> Iterator[Row]:
    count, huge, rounds = (1_000, 4, 1) if quick else (100_000, 50, 3)
    with serving("framework") as url:
        ours, listing, file, theirs, bare = in_turn(
            rounds,
            job(__file__, "iterate", url, count),
            job(__file__, "listed", url, count),
            job(__file__, "to_file", url, count),
            job(__file__, "published_listed", url, count, python=PUBLISHED),
            job(__file__, "bare_lines", url, count),
        )
        assert ours and listing and file
        what = f"`iter_batch_tasks`, {count:,} tasks"
        yield Row(what, "0.0.7, `get_batch_tasks`", ours, theirs, ratio(theirs, ours), at_least=3)
        allowed = 25 + 150 * count / 1e6
        yield Row(
            f"{what}: memory", "25 MB and 150 bytes a task", ours, None, ours.megabytes, at_most=allowed, unit=" MB"
        )
        yield Row(what, "bare script, `json.loads` of each line", ours, bare, ratio(ours, bare), at_most=1)
        yield from _row_of_first(url, count, rounds)
        one, half = in_turn(
            rounds, job(__file__, "iterate", url, f"huge-{huge}"), job(__file__, "iterate", url, f"huge-{huge // 2}")
        )
        yield Row(
            f"one task of {huge} MB in the stream", f"one of {huge // 2} MB", one, half, ratio(one, half), at_most=2.5
        )
        what = f"`get_batch_tasks`, {count:,} tasks"
        yield Row(what, "0.0.7", listing, theirs, ratio(theirs, listing), at_least=1)
        grown = listing.megabytes / theirs.megabytes if theirs else None
        yield Row(f"{what}: memory", "0.0.7", listing, theirs, grown, at_most=1)
        what = f"`export_batch`, {count:,} tasks"
        yield Row(what, "`iter_batch_tasks`", file, ours, ratio(file, ours), at_most=1.3)
        yield Row(
            f"{what}: memory", "25 MB and 150 bytes a task", file, None, file.megabytes, at_most=allowed, unit=" MB"
        )


def _row_of_first(url: str, count: int, rounds: int) -> Iterator[Row]:
    ours, bare = in_turn(rounds, job(__file__, "first", url, count), job(__file__, "bare_first_byte", url, count))
    assert ours and bare
    later = Measured(ours.seconds - bare.seconds, 0)
    yield Row("its first task", "first byte", ours, bare, later.seconds * 1000, at_most=50, unit=" ms")


if __name__ == "__main__":
    main(globals(), lambda quick: print_table(rows(quick)))
