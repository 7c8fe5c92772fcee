"""monitor_batch: what matching costs beside the download, and what all of it costs beside its requests."""

from tempfile import TemporaryDirectory
from typing import Any, Iterator

from measuring import Row, in_turn, job, main, measure, print_table, ratio, serving
from uploads import make_tasks

# ------------------------------------------------------------------------------------------------- measured


def download(url: str, count: str) -> None:
    client = _connect(url, count)
    kept = list(make_tasks(int(count)))
    with measure():
        client.get_batch_tasks(count)
    del kept


def matched(url: str, count: str) -> None:
    """As if a script came back to its batch."""
    client = _connect(url, count)
    tasks = list(make_tasks(int(count)))
    with measure():
        client.monitor_batch(tasks, batch_id=count, show_progress=False)


def whole(url: str, count: str) -> None:
    client = _connect(url, count)
    tasks = list(make_tasks(int(count)))
    with measure():
        client.monitor_batch(tasks, show_progress=False)


def one_by_one(url: str, count: str) -> None:
    """The same requests, each by its own method."""
    client = _connect(url, count)
    tasks = list(make_tasks(int(count)))
    with measure():
        client.check_health()
        batch_id = client.create_batch(tasks).batch_id
        client.get_batch(batch_id)
        client.get_batch_tasks(batch_id)


def to_file(url: str, count: str) -> None:
    """Tasks from a generator, results into a file; a small batch first, so that the growth is that of many."""
    client = _connect(url, count)
    with TemporaryDirectory() as folder:
        client.run_batch(make_tasks(1000), f"{folder}/few", show_progress=False)
        with measure():
            client.run_batch(make_tasks(int(count)), f"{folder}/many", show_progress=False)


def _connect(url: str, batch_id: str) -> Any:
    from synthgen import SynthgenClient

    client = SynthgenClient(url)
    client.get_batch(batch_id)
    return client


# ---------------------------------------------------------------------------------------------- side by side


def rows(quick: bool = False) -> Iterator[Row]:
    count, rounds = (1_000, 1) if quick else (100_000, 3)
    with serving("framework") as url:
        ours, alone = in_turn(rounds, job(__file__, "matched", url, count), job(__file__, "download", url, count))
        what = f"`monitor_batch`, {count:,} results matched to their tasks"
        yield Row(what, "`get_batch_tasks` alone", ours, alone, ratio(ours, alone), at_most=1.25)
        count, rounds = count // 10, rounds + 2
        ours, alone = in_turn(rounds, job(__file__, "whole", url, count), job(__file__, "one_by_one", url, count))
        what = f"`monitor_batch`, {count:,} tasks answered at once"
        yield Row(what, "its requests, each by its own method", ours, alone, ratio(ours, alone), at_most=1.1)


if __name__ == "__main__":
    main(globals(), lambda quick: print_table(rows(quick)))
