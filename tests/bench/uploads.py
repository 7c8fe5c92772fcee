"""Tasks on their way to the server, made on the way or listed before."""

from typing import Any, Iterator

from canned import body
from measuring import PUBLISHED, Row, in_turn, job, main, measure, print_table, ratio, serving

URL = "http://provider.test/v1/chat/completions"

# ------------------------------------------------------------------------------------------------- measured


def generated(url: str, count: str) -> None:
    from synthgen import SynthgenClient

    client = SynthgenClient(url)
    client.create_batch(make_tasks(1000))
    with measure():
        client.create_batch(make_tasks(int(count)))


def published_listed(url: str, count: str) -> None:
    from synthgen import SynthgenClient

    client = SynthgenClient(*url.rsplit(":", 1), "key")
    client.create_batch(list(make_tasks(1000)))
    with measure():
        client.create_batch(list(make_tasks(int(count))))


def make_tasks(count: int, provider: str = URL) -> Iterator[Any]:
    """Tasks of whichever client is installed."""
    from synthgen.models import Task

    return (Task(custom_id=str(number), url=provider, body=body(number)) for number in range(count))


# ---------------------------------------------------------------------------------------------- side by side


def rows(quick: bool = False) -> Iterator[Row]:
    count = 1_000 if quick else 1_000_000
    with serving("framework") as url:
        ours, theirs = in_turn(
            1,
            job(__file__, "generated", url, count),
            job(__file__, "published_listed", url, count, python=PUBLISHED),
        )
    assert ours
    what = f"`create_batch`, {count:,} tasks from a generator"
    yield Row(what, "0.0.7, a list", ours, theirs, ratio(ours, theirs), at_most=1)
    yield Row(f"{what}: memory", "", ours, None, ours.megabytes, at_most=40, unit=" MB")


if __name__ == "__main__":
    main(globals(), lambda quick: print_table(rows(quick)))
