"""The command line: ``synthgen``, or ``python -m synthgen``.

Results go to stdout or into a file, everything else to stderr, so that ``synthgen export ID | jq`` works.
"""

import argparse
import codecs
import csv
import json
import math
import os
import shlex
import shutil
import signal
import sys
import tempfile
import time
import uuid
from contextlib import closing, contextmanager, nullcontext, suppress
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Callable, Dict, Iterable, Iterator, List, Optional, Sequence, Union

from pydantic import BaseModel

from ._checkpoint import Checkpoint
from ._estimates import plan
from ._files import replacing
from ._progress import health_rows, money, printable
from ._task_file import FailedTasks, TaskFile
from ._version import __version__
from .client import SynthgenClient
from .exceptions import (
    APIError,
    AuthenticationError,
    BatchIncompleteError,
    BatchStalledError,
    BatchTimeoutError,
    BatchUploadError,
    BudgetExceededError,
    ConfigurationError,
    InvalidRequestError,
    SynthgenError,
)
from .models import BatchCost, HealthStatus, Task, TaskResponse, TaskStatus, is_header_value
from .monitor import PlainMonitor, choose_monitor, load_rich

_OK, _SOME_FAILED, _REFUSED, _UNREACHABLE, _UNFINISHED, _INTERRUPTED = 0, 1, 2, 3, 4, 130

_CHUNK_SIZE = 1000
#: How long a command may take to end, in seconds, before a signal more ends it at once.
_PATIENCE = 1.0
_CACHED = "the rest comes from the cache, but for tasks with use_cache false"
_DEMO_PRICES = BatchCost(input=0.15, output=0.60)
_DEMO = [f"solve {a}x + 4 = {4 + a * x}" for a, x in zip(range(2, 12), (3, 5, 2, 7, 4, 9, 6, 8, 1, 10))]


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run a command; return its exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    args = _parser().parse_args(argv, argparse.Namespace(argv=argv))
    with _signals():
        return _exit_code(args)


def _exit_code(args: argparse.Namespace) -> int:
    """Run the command, and say on stderr what ended it early."""
    try:
        code: int = args.command(args)
        print(end="", flush=True)  # which does nothing where stdout is closed
        return code
    except KeyboardInterrupt:
        _say("interrupted")
        return _INTERRUPTED
    except BrokenPipeError:
        _give_up_stdout()
        return _OK
    except (SynthgenError, OSError, ValueError) as exc:  # the last two: a file, a port, an id
        _give_up_stdout()
        # What an upload's error says of going on is for scripts.
        error: Any = exc.__cause__ or exc if isinstance(exc, BatchUploadError) else exc
        is_of_file = isinstance(error, OSError) and error.filename
        _say(f"error: {error.filename}: {error.strerror}" if is_of_file else f"error: {error}")
        if isinstance(error, (BatchIncompleteError, BatchStalledError, BatchTimeoutError, BudgetExceededError)):
            return _UNFINISHED
        is_refused = isinstance(error, (AuthenticationError, InvalidRequestError))
        return _UNREACHABLE if isinstance(error, APIError) and not is_refused else _REFUSED


# ------------------------------------------------------------------------------------------ commands


def _demo(args: argparse.Namespace) -> int:
    from .local import DemoProvider, LocalServer

    monitor = choose_monitor()
    with DemoProvider() as provider, LocalServer() as server, server.client() as client:
        bodies = [{"model": "demo", "messages": [{"role": "user", "content": text}]} for text in args.equations]
        tasks = [Task(custom_id=str(i), url=provider.url, body=body) for i, body in enumerate(bodies, 1)]
        results = client.monitor_batch(tasks, None, _DEMO_PRICES.input, _DEMO_PRICES.output, monitor=monitor)
    width = max(map(len, args.equations))
    for text, result in zip(args.equations, results):
        _print(f"{text.ljust(width)}  ->  {result.content or result.error}")
    print(", ".join([*monitor.progress.tokens()[:2], f"cost {money(monitor.progress.cost.total)}"]), end=" ")
    print(f"(at {_DEMO_PRICES.input:g} and {_DEMO_PRICES.output:g} per million)")
    return _outcome(results)


def _run(args: argparse.Namespace) -> int:
    is_stdin = args.tasks == "-"
    beside = args.output or (args.tasks if os.path.isfile(args.tasks) else "synthgen-stdin")
    args.checkpoint, args.database = f"{beside}.checkpoint", args.db or f"{beside}.db"
    if args.local and (args.base_url or args.config):
        raise ConfigurationError("--local starts a server of its own: leave out --base-url and --config")
    if args.db and not args.local:
        raise ConfigurationError("--db is the database of --local: give both")
    if args.output and os.path.exists(args.output) and not is_stdin and os.path.samefile(args.output, args.tasks):
        raise ConfigurationError(f"{args.output} is the file with the tasks: results need another")
    if args.output and os.path.realpath(args.output) == os.path.realpath(args.database):
        raise ConfigurationError(f"{args.output} is the database: results need another file")
    if not (args.local or args.dry_run) and (args.workers is not None or args.rpm or args.tpm or args.max_cost):
        raise ConfigurationError("--workers, --rpm, --tpm and --max-cost are what --local keeps to: give both")
    if args.max_cost and not (args.input_cost or args.output_cost):
        raise ConfigurationError("--max-cost is nothing without prices: give --input-cost and --output-cost, too")
    for kind, price in (("input", args.input_cost), ("output", args.output_cost)):
        if args.max_cost and price is None:
            _say(f"--{kind}-cost was not given: {kind} tokens count nothing for --max-cost")
    if args.retry_failed and (args.batch or not args.output):
        raise ConfigurationError("--retry-failed runs what failed in OUT.jsonl: give -o OUT.jsonl, and no --batch")
    key = None if args.key_env is None else os.environ.get(args.key_env)
    if args.key_env is not None and not key:
        raise ConfigurationError(f"--key-env {args.key_env}: this environment variable is not set, or empty")
    if key and not is_header_value(key):
        what = "it has a line break, spaces around it, or is not Latin-1"
        raise ConfigurationError(f"--key-env {args.key_env}: this key can't be sent in a header: {what}")
    with _seekable(args.tasks) as file:
        all_tasks = TaskFile(file, "stdin" if is_stdin else args.tasks, args.provider, key)
        tasks = FailedTasks(all_tasks, args.output) if args.retry_failed else all_tasks
        if not len(tasks):
            _say(f"{args.output}: nothing in it has failed")
            return _OK
        if args.dry_run:
            for label, text in plan(tasks, args.input_cost or 0.0, args.output_cost or 0.0, args.rpm, args.tpm):
                _print(f"{label:<10}{text}")
            return _OK
        try:
            has_failed = _write_results(args, tasks)
        except BatchIncompleteError as exc:  # what was sent and lost, a checkpoint takes for sent
            if exc.results or not args.batch:  # else the batch is that of other tasks
                without = "--batch" if args.batch else args.checkpoint
                _say(f"to run what never arrived: the same again, with --force, without {without}: {_CACHED}")
            raise
    if not args.batch:
        _remove(args.checkpoint)
    if has_failed:
        how = "--retry-failed (no --force, no --batch)" if args.output else f"no --batch: {_CACHED}"
        _say(f"to repeat only what failed: the same again, with {how}")
        return _SOME_FAILED
    if args.local and not args.db:
        _remove(*(args.database + suffix for suffix in ("", "-wal", "-shm")))
    return _OK


@contextmanager
def _seekable(path: str) -> Iterator[BinaryIO]:
    """A file to read as often as is wanted; a copy of what can be read only once, as stdin and pipes."""
    if path == "-" and sys.stdin is None:
        raise ConfigurationError("stdin is closed: there are no tasks to be read")
    with nullcontext(sys.stdin.buffer) if path == "-" else open(path, "rb") as file:
        if path != "-" and file.seekable():
            yield file
            return
        with tempfile.TemporaryFile() as copy:
            shutil.copyfileobj(file, copy)
            yield copy


def _write_results(args: argparse.Namespace, tasks: Union[TaskFile, FailedTasks]) -> bool:
    """Run the tasks, and write their results; whether any has failed."""
    with _output(args, is_watched=True) as file:
        if isinstance(tasks, FailedTasks):
            with tempfile.TemporaryFile() as results:
                has_failed = _run_batch(args, tasks, results)
                results.seek(0)
                tasks.merge(results, file)
            return has_failed
        try:
            return _run_batch(args, tasks, file)
        except BatchIncompleteError as exc:
            if not exc.results:  # leave the file that is there
                raise
            incomplete = exc
            file.writelines(result.to_line() for result in exc.results)
    raise incomplete


def _run_batch(args: argparse.Namespace, tasks: Union[TaskFile, FailedTasks], file: BinaryIO) -> bool:
    checkpoint = None if args.batch else args.checkpoint
    made = [path for path in (args.database, args.checkpoint) if path != args.db and not os.path.exists(path)]
    options = {"chunk_size": args.chunk_size, "checkpoint": checkpoint}
    try:
        with _local_client(args, tasks) if args.local else _client(args) as client, _following(args, client) as follow:
            batch = client.run_batch(tasks, file, args.batch, **options, **follow)
    except BatchUploadError as exc:
        if not (exc.uploaded or exc.unconfirmed):  # there is nothing to go on with, and what is mended begins anew
            _remove(*made)
        raise
    return batch.failed_tasks > 0


def _serve(args: argparse.Namespace) -> int:
    from .local import LocalServer

    key = os.environ.get("SYNTHGEN_API_KEY") or None
    try:
        with LocalServer(args.db or ":memory:", args.host, args.port, key, **_limits(args)) as server:
            _say(f"listening; batches are kept in {args.db or 'memory only: --db FILE keeps them'}. Ctrl-C stops it")
            _say(f"export SYNTHGEN_BASE_URL={shlex.quote(server.url)}")
            _say(f"export SYNTHGEN_API_KEY={shlex.quote(server.api_key)}")
            while True:
                time.sleep(3600)
    except KeyboardInterrupt:
        _say("stopped")
        return _OK


def _watch(args: argparse.Namespace) -> int:
    with _client(args) as client, _following(args, client) as options:
        return _outcome(client.monitor_batch(batch_id=args.batch, **options))


def _export(args: argparse.Namespace) -> int:
    with _output(args) as file, _client(args) as client:
        results = client.iter_batch_tasks(args.batch, args.status)
        if args.format == "csv":
            columns = list(TaskResponse(message_id="", status="").to_row())
            writer = codecs.getwriter("utf-8")(file, "backslashreplace")
            # Texts in quotes: csv puts none around one with a carriage return, at which it would be read as two rows.
            rows = csv.DictWriter(writer, columns, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
            rows.writeheader()
            rows.writerows(result.to_row() for result in results)
        else:
            file.writelines(result.to_line() for result in results)
    return _OK


def _stats(args: argparse.Namespace) -> int:
    with _client(args, retries=1) as client:
        client.get_batch(args.batch)  # of an unknown batch the statistics are all 0
        stats = client.get_batch_stats(args.batch, args.range, args.interval)
    if args.json:
        return _print_json(stats)
    rich, points = load_rich(sys.stdout), stats.time_series
    if rich:
        rich.print_stats(points, sys.stdout)
    else:
        rows = ((p.timestamp, p.total_tasks, p.failed_tasks, p.cached_tasks, p.total_tokens) for p in points)
        _print_table(("UTC", "tasks", "failed", "cached", "tokens"), rows)
    summary = stats.summary
    print(
        f"{summary.total_tasks:,} tasks in {stats.time_range}: {summary.total_tokens:,} tokens, "
        f"{summary.cache_hit_rate:.1%} from the cache, {summary.average_response_time:,.0f} ms on average"
    )
    return _OK


def _batches(args: argparse.Namespace) -> int:
    with _client(args, retries=1) as client:
        batches = client.get_batches()
    if args.json:
        return _print_json(batches)
    rows = (
        (b.batch_id, b.batch_status, b.total_tasks, b.finished_tasks, b.failed_tasks, b.total_tokens, b.created_at)
        for b in batches.batches
    )
    _print_table(("batch", "status", "tasks", "done", "failed", "tokens", "created (UTC)"), rows)
    return _OK


def _health(args: argparse.Namespace) -> int:
    with _client(args) as client:
        health = client.check_health()
    if args.json:
        _print_json(health)
    else:
        _print_table(("service", "state"), [("server", health.status), *health_rows(health)])
    return _OK if health.status == HealthStatus.HEALTHY else _UNREACHABLE


def _delete(args: argparse.Namespace) -> int:
    with _client(args, retries=1) as client:
        batch = client.get_batch(args.batch)
        if not batch.done and not args.force:
            raise ConfigurationError(
                f"batch {args.batch!r} is running, with {batch.finished_tasks:,} of {batch.total_tasks:,} tasks "
                "done, and deleting does not stop it: the framework may call the provider for it again and again. "
                "Wait for it (synthgen watch), or delete it all the same with --force"
            )
        client.delete_batch(args.batch)
    _say(f"deleted batch {args.batch!r}")
    return _OK


# ------------------------------------------------------------------------------------------- helpers


def _client(args: argparse.Namespace, retries: int = 5) -> SynthgenClient:
    """A client of the server that was named; with few retries, someone at a terminal soon knows that it is away."""
    return SynthgenClient(args.base_url, config_file=args.config, retries=retries)


@contextmanager
def _local_client(args: argparse.Namespace, tasks: Iterable[Task]) -> Iterator[SynthgenClient]:
    from .local import LocalServer

    database, has_database = args.database, os.path.exists(args.database)
    if args.batch:
        if not has_database:
            raise ConfigurationError(f"{database}: there is no such file, and batch {args.batch!r} would be in it")
    elif os.path.exists(args.checkpoint):
        # The server goes on with what it was told before: not if the tasks are others now.
        new = os.path.realpath(database), str(uuid.uuid4()), args.chunk_size
        with closing(Checkpoint(args.checkpoint, *new, partial(_has_batch, database))) as checkpoint:
            checkpoint.check(tasks)
    elif has_database and not args.db:
        _refuse_unfinished(database)
    _say(f"database: {database}" + ("" if args.db else ", removed when all have completed"))
    with LocalServer(database, **_limits(args)) as server, server.client() as client:
        yield client


def _limits(args: argparse.Namespace) -> Dict[str, Any]:
    """What the server is told to keep to; the rest is its own default."""
    names = ("workers", "rpm", "tpm", "max_cost", "input_cost", "output_cost")
    return {name: value for name, value in vars(args).items() if name in names and value is not None}


def _has_batch(database: str, batch_id: str) -> bool:
    from .local.store import Store

    if not os.path.exists(database):
        return False
    with closing(Store(database)) as store:
        return store.batch(batch_id) is not None


def _refuse_unfinished(database: str) -> None:
    """What an earlier run left would be run, and paid for, beside the new tasks."""
    from .local.store import Store

    with closing(Store(database)) as store:
        for row in store.batches():
            left = row["total"] - row["completed"] - row["failed"] - row["cached"]
            if left:
                raise ConfigurationError(
                    f"{database} has a batch of an earlier run, with {left:,} tasks to do: "
                    f"--batch {row['batch_id']} goes on with it, or remove the file"
                )


def _remove(*paths: str) -> None:
    for path in paths:
        Path(path).unlink(missing_ok=True)


@contextmanager
def _following(args: argparse.Namespace, client: SynthgenClient) -> Iterator[Dict[str, Any]]:
    """How to follow a batch. The same words go on, whatever ended them early; where money did, with a higher cap."""
    endings = (BatchStalledError, BatchTimeoutError, BatchUploadError, BudgetExceededError)
    try:
        if args.batch:
            client.get_batch(args.batch)  # a name that is wrong is found out now
        yield {
            "cost_by_1m_input_token": args.input_cost or 0.0,
            "cost_by_1m_output_token": args.output_cost or 0.0,
            "timeout": args.timeout,
            "stall_timeout": args.stall_timeout,
            "monitor": choose_monitor(),
        }
    except (KeyboardInterrupt, OSError, *endings) as exc:  # a full disk, or nobody who reads the results
        if isinstance(exc, BudgetExceededError) and vars(args).get("max_cost"):  # else it is the cap of a script
            _say("what --max-cost allows is used up: it has to be higher")
        if not isinstance(exc.__cause__, InvalidRequestError):  # tasks that would be refused again
            _say(f"to go on: {shlex.join(['synthgen', *args.argv])}")
        raise


def _outcome(results: List[TaskResponse]) -> int:
    return _OK if all(result.ok for result in results) else _SOME_FAILED


def _give_up_stdout() -> None:
    """Let what it can't take go nowhere: the flush at exit would fail again, and have another exit code."""
    try:
        print(end="", flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def _signals() -> Iterator[None]:
    """SIGTERM and SIGHUP end a command as Ctrl-C does; one more of them, some time later, ends the process at once."""
    received: List[float] = []

    def interrupt(signum: int, frame: Any) -> None:
        received.append(time.monotonic())
        if len(received) == 1:
            raise KeyboardInterrupt
        if received[-1] - received[0] > _PATIENCE:  # else it came with the first, for the same end
            os._exit(_INTERRUPTED)

    numbers = {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGINT)}  # Windows has no SIGHUP
    handled = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]
    before: Dict[int, Any] = {number: signal.signal(number, interrupt) for number in handled}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _output(args: argparse.Namespace, is_watched: bool = False) -> Iterator[BinaryIO]:
    """Where results go. A file that can't be written is found out now, and is there only when all is in it."""
    if args.output is None:
        if sys.stdout is None:
            raise ConfigurationError("stdout is closed: -o says where the results go")
        if is_watched and sys.stdout.isatty():  # where the progress is drawn, perhaps, and would wipe them out
            with tempfile.TemporaryFile() as file:
                yield file
                file.seek(0)
                shutil.copyfileobj(file, sys.stdout.buffer)
        else:
            yield sys.stdout.buffer
        sys.stdout.buffer.flush()  # it may fail, and what could give the results again is removed after this
        return
    if os.path.exists(args.output) and not (args.force or vars(args).get("retry_failed")):
        raise ConfigurationError(f"{args.output} is there already; --force replaces a file")
    with replacing(args.output) as file:
        yield file


def _print_json(model: BaseModel) -> int:
    print(json.dumps(model.model_dump(mode="json"), indent=2))
    return _OK


def _print_table(headers: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    cells = [list(map(_cell, row)) for row in rows]
    rich = load_rich(sys.stdout)
    if rich:
        rich.print_table(headers, cells, sys.stdout)
        return
    widths = [max(map(len, column)) for column in zip(headers, *cells)]
    for row in (headers, *cells):
        _print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


def _cell(value: Any) -> str:
    if isinstance(value, datetime):
        return f"{value:%Y-%m-%d %H:%M}"
    return f"{value:,}" if isinstance(value, int) else str(value or "")


def _print(text: str) -> None:
    print(printable(text, getattr(sys.stdout, "encoding", None)))  # which does nothing where stdout is closed


def _say(text: str) -> None:
    with suppress(OSError):  # nobody reads it
        PlainMonitor().note(text)  # on stderr, whole, and at once


# --------------------------------------------------------------------------------------------- parser


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="synthgen",
        description="Run large batches of LLM calls through a Synthgen server, or on this machine alone.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"synthgen-client {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(
        run: Callable[[argparse.Namespace], int], help: str, example: str, *options: argparse.ArgumentParser
    ) -> Callable[..., Any]:
        """Add the command that a function runs, under the function's name; return what adds an option to it."""
        added = commands.add_parser(
            run.__name__.lstrip("_"),
            help=help,
            description=help[0].upper() + help[1:] + ".",
            epilog=f"example:\n  synthgen {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            parents=options,
        )
        added.set_defaults(command=run)
        return added.add_argument

    # What several commands have.
    server, batch, follow, output, limits, as_json = (argparse.ArgumentParser(add_help=False) for _ in range(6))
    server.add_argument("--base-url", metavar="URL", help="the server; before SYNTHGEN_BASE_URL")
    server.add_argument("--config", metavar="FILE", help="JSON file with base_url, api_key, timeout")
    batch.add_argument("batch", type=_batch_id, metavar="BATCH_ID")
    add = follow.add_argument
    add("--input-cost", type=_number, metavar="X", help="price of a million input tokens")
    add("--output-cost", type=_number, metavar="Y", help="price of a million output tokens")
    add("--timeout", type=_seconds, metavar="S", help="longest wait, in seconds; what is done by then is not lost")
    add("--stall-timeout", type=_seconds, default=300.0, metavar="S", help="longest standstill, in s (default: 300)")
    add = output.add_argument
    add("-o", "--output", type=_output_name, metavar="OUT.jsonl", help="file for the results; - or by default stdout")
    add("--force", action="store_true", help="replace that file if it is there")
    limits.add_argument("--workers", type=int, metavar="N", help="calls at a time (default: 16)")
    limits.add_argument("--rpm", type=_limit, metavar="N", help="calls a minute that a provider allows for a key")
    limits.add_argument("--tpm", type=_limit, metavar="N", help="tokens a minute that it allows")
    as_json.add_argument("--json", action="store_true", help="JSON in place of a table")

    add = command(_demo, "run the whole job on this machine: no server, model or key", "demo 'solve 7x - 3 = 25'")
    add("equations", nargs="*", default=_DEMO, metavar="EQUATION", help="to be solved; by default ten")
    about = "run the tasks of a file, and write one result per task, in their order"
    example = "tasks.jsonl -o results.jsonl --local --provider https://openrouter.ai/api --key-env OPENROUTER_API_KEY"
    add = command(_run, about, f"run {example}", server, output, follow, limits)
    add("tasks", metavar="TASKS.jsonl", help=_TASKS_HELP)
    add("--local", action="store_true", help="start a server on this machine for this run, with these limits")
    add("--db", metavar="FILE", help="its database; by default a file beside OUT, removed when all have completed")
    add("--batch", type=_batch_id, metavar="ID", help="send nothing: come back to this batch of the same tasks")
    add("--provider", metavar="URL", type=_url, help="what a relative url is appended to")
    add("--key-env", metavar="NAME", help="environment variable with the key for tasks that have none")
    add("--max-cost", type=_limit, metavar="X", help="with --local: what its database's batches may cost")
    help = "the most tasks in one upload (default: %(default)s); fewer for a proxy that takes only small ones"
    add("--chunk-size", type=_count, default=_CHUNK_SIZE, metavar="N", help=help)
    add("--retry-failed", action="store_true", help="run only what is FAILED in OUT.jsonl, in its place")
    add("--dry-run", action="store_true", help="send nothing: say what would be sent")
    about = "start a server on this machine; its key is SYNTHGEN_API_KEY, or made up"
    add = command(_serve, about, "serve --db batches.db", limits)
    add("--db", metavar="FILE", help="where batches are kept; by default they are gone at the end")
    add("--host", default="127.0.0.1", metavar="H", help="address to listen at (default: %(default)s)")
    add("--port", default=8002, type=int, metavar="P", help="0 takes a free one (default: %(default)s)")  # the client's
    command(_watch, "watch a batch until it ends", "watch BATCH_ID --timeout 3600", server, batch, follow)
    about = "write the tasks of a batch, with their results"
    add = command(_export, about, "export BATCH_ID | jq .status", server, batch, output)
    add("--format", choices=["jsonl", "csv"], default="jsonl", help="default: %(default)s")
    add("--status", type=TaskStatus, choices=list(TaskStatus), help="only the tasks with this status")
    about = "show tasks and tokens over time"
    add = command(_stats, about, "stats BATCH_ID --range 2h --interval 1m", server, batch, as_json)
    add("--range", default="24h", help="how far back, such as 30m, 24h, 7d (default: %(default)s)")
    add("--interval", default="1h", help="of a bar: 1m 1h 1d 1w 1M 1q 1y (default: %(default)s)")
    command(_batches, "list all batches, newest first", "batches --json | jq '.batches[0].batch_id'", server, as_json)
    command(_health, "show the state of the server", "health", server, as_json)
    add = command(_delete, "delete a batch with its tasks and results", "delete BATCH_ID", server, batch)
    add("--force", action="store_true", help="even if it is running, though its calls may go on")
    return parser


def _url(text: str) -> str:
    if not text.startswith(("http://", "https://")):
        raise argparse.ArgumentTypeError(f"{text!r} does not start with http:// or https://")
    return text


def _batch_id(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("an id can't be empty")
    return text


def _output_name(text: str) -> Optional[str]:
    return None if text == "-" else text


def _number(text: str) -> float:
    with suppress(ValueError):
        if 0 <= float(text) < float("inf"):
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} is no number from 0 on")


def _count(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 on")
    return int(text)


def _seconds(text: str) -> float:
    return math.inf if text == "inf" else _number(text)


def _limit(text: str) -> float:
    if _number(text) < 1e-9:
        raise argparse.ArgumentTypeError(f"{text} allows nothing")
    return float(text)


_TASKS_HELP = "a task a line: custom_id, url, body, ... or the lines of an OpenAI batch input file; - reads stdin"
_EPILOG = """\
The server is given by SYNTHGEN_BASE_URL and SYNTHGEN_API_KEY. Each command has a --help with an example.

exit codes:
  0  all completed                          3    server unreachable or unhealthy, or unknown batch
  1  some tasks failed                      4    incomplete, stalled, timed out, or no money left
  2  usage, configuration, or refused       130  Ctrl-C; the command that goes on is printed

example:
  synthgen demo"""


if __name__ == "__main__":
    sys.exit(main())
