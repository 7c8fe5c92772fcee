"""What a task costs when there are more of them: time and memory, of the client and of the embedded server."""

import subprocess
import sys
from contextlib import contextmanager
from typing import Any, Callable, Iterator, Tuple

import embedded
import exports
import monitoring
import uploads
from measuring import Measured, Row, environment_of, job, main, measure, peak_megabytes, print_table, ratio, serving
from uploads import make_tasks

ASKED = 500

# ------------------------------------------------------------------------------------------------- measured


def serve() -> None:
    """An embedded server; tells its address, then its peak for each line that it gets."""
    from synthgen.local import LocalServer

    with LocalServer(api_key="bench", workers=1) as server:
        print(server.url, flush=True)
        for _ in sys.stdin:
            print(peak_megabytes(), flush=True)


def store(url: str, provider: str, count: str) -> None:
    client = _connect(url)
    with measure():
        client.create_batch(make_tasks(int(count), provider), batch_id=count)


def ask(url: str, count: str) -> None:
    client = _connect(url)
    with measure():
        for _ in range(ASKED):
            client.get_batch(count)


def read(url: str, count: str) -> None:
    client = _connect(url)
    with measure():
        read = sum(1 for _ in client.iter_batch_tasks(count))
    assert read == int(count)


def _connect(url: str) -> Any:
    from synthgen import SynthgenClient

    client = SynthgenClient(url, "bench")
    client.check_health()
    return client


# --------------------------------------------------------------------------------------------------- tables


def tables(quick: bool = False) -> None:
    counts = (10, 100) if quick else (1_000, 10_000, 100_000, 1_000_000)
    names = ("`iter_batch_tasks`", "`create_batch`", "`run_batch`")
    print("| tasks |", " | ".join(f"{name}, a task | memory, MB" for name in names), "|")
    print("|--:|--:|--:|--:|--:|--:|--:|")
    with serving("framework") as url:
        for count in counts:
            jobs = ((exports, "iterate"), (uploads, "generated"), (monitoring, "to_file"))
            sides = [job(str(module.__file__), name, url, count) for module, name in jobs]
            print(f"| {count:,} |", " | ".join(_per_task(run(), count) for run in sides), "|", flush=True)
    print()
    print("| tasks | server: upload, a task | memory, MB | export, a task | memory, MB | run, a task | memory, MB |")
    print("|--:|--:|--:|--:|--:|--:|--:|")
    asked = {}
    for count in counts:
        stored, asked[count], was_read = _of_the_server(count)
        ran = "- | -"  # a million calls take a quarter of an hour, with us or by hand
        if count <= 10_000:
            with serving("provider", 0) as provider:
                ran = _per_task(job(embedded.__file__, "run", provider, count, 16)(), count)
        cells = [_per_task(stored, count), _per_task(was_read, count), ran]
        print(f"| {count:,} |", " | ".join(cells), "|", flush=True)
    print()
    few, many = asked[counts[0]], asked[counts[-1]]
    what = f"`GET /batches/ID`, {ASKED} times, {counts[-1]:,} tasks"
    print_table([Row(what, f"{counts[0]:,} tasks", many, few, ratio(many, few), at_most=1.1)])


def _of_the_server(count: int) -> Tuple[Measured, Measured, Measured]:
    """A batch stored, asked for and read; the memory is the server's. Nothing runs: the provider does not answer."""
    with serving("provider", 3600) as provider, _server() as (url, peak):

        def measured(name: str, *arguments: Any) -> Measured:
            before, took = peak(), job(__file__, name, url, *arguments)()
            assert took
            return took._replace(megabytes=peak() - before)

        job(__file__, "store", url, provider, 1)()
        return measured("store", provider, count), measured("ask", count), measured("read", count)


@contextmanager
def _server() -> Iterator[Tuple[str, Callable[[], float]]]:
    """The address of an embedded server in a process of its own, and what asks for its peak."""
    command = [sys.executable, __file__, "serve"]
    environment = environment_of(sys.executable)
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment) as server:
        assert server.stdin and server.stdout
        url = server.stdout.readline().strip()

        def peak() -> float:
            print(file=server.stdin, flush=True)
            return float(server.stdout.readline())

        try:
            yield url, peak
        finally:
            server.stdin.close()


def _per_task(side: Any, count: int) -> str:
    return f"{side.seconds / count * 1e6:.0f} µs | {side.megabytes:.0f}"


if __name__ == "__main__":
    main(globals(), tables)
