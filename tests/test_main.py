"""The command line: what goes to stdout, what to stderr, and how it ends."""

import csv
import errno
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

import pytest
from servers import DEADLINE, DROP, Answer, CannedServer

from synthgen import Task, __version__
from synthgen.__main__ import main
from synthgen.local import LocalServer

pytestmark = pytest.mark.slow

COMMANDS = ["demo", "run", "serve", "watch", "export", "stats", "batches", "health", "delete"]
CHAT = "/v1/chat/completions"
#: A body that no line of ours refuses, but the server does.
TOO_DEEP = json.loads('{"a":' * 300 + "1" + "}" * 300)

#: What ends a command: Ctrl-C, whoever started it, and its terminal.
ENDS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


@pytest.fixture
def provider():
    """A provider that echoes the prompt, and refuses those that ask for it."""

    def respond(request):
        prompt = json.loads(request.body)["messages"][0]["content"]
        if "fail" in prompt:
            return Answer({"error": {"message": "as you wish"}}, 400)
        usage = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}
        return {"choices": [{"message": {"role": "assistant", "content": f"echo {prompt}"}}], "usage": usage}

    with CannedServer() as running:
        running.answer("POST", CHAT, respond)
        yield running


@pytest.fixture
def stalled(provider):
    """The same provider, which answers nothing before the event is set."""
    event = threading.Event()
    provider.answer("POST", CHAT, Answer({"choices": []}, hold=event))
    yield event
    event.set()


@pytest.fixture
def local(monkeypatch):
    """An embedded server, which the environment points to."""
    with LocalServer() as running:
        monkeypatch.setenv("SYNTHGEN_BASE_URL", running.url)
        monkeypatch.setenv("SYNTHGEN_API_KEY", running.api_key)
        yield running


@pytest.fixture(autouse=True)
def _in_a_directory_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def chat_line(provider, prompt, **fields):
    """A line of TASKS.jsonl."""
    body = {"messages": [{"role": "user", "content": prompt}]}
    return json.dumps({"custom_id": prompt, "url": provider.url + CHAT, "body": body, **fields})


def write_tasks(provider, *prompts, **fields):
    """Write tasks.jsonl, a task for each prompt, and return its name."""
    lines = "".join(chat_line(provider, prompt, **fields) + "\n" for prompt in prompts)
    Path("tasks.jsonl").write_text(lines, encoding="utf-8")
    return "tasks.jsonl"


def submit(server, provider, *prompts):
    """Have the server run a task for each prompt, to its end, and return the batch's id."""
    with server.client() as client:
        tasks = [Task.model_validate_json(chat_line(provider, prompt)) for prompt in prompts]
        return client.monitor_batch(tasks, show_progress=False)[0].batch_id


def start(*argv, **options):
    """Start the command in a process of its own."""
    command = [sys.executable, "-m", "synthgen", *argv]
    return subprocess.Popen(command, env=process_environment(), stderr=subprocess.PIPE, text=True, **options)


def process_environment():
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    environment.pop("PYTHONUNBUFFERED", None)  # usual in containers, but not where most people are
    return environment


def read_lines(text):
    return [json.loads(line) for line in text.splitlines()]


# demo


def test_the_demo_solves_ten_equations():
    """The whole job in one command, dead proxy or not: ten right solutions, tokens and cost on stdout."""
    process = subprocess.run(
        [sys.executable, "-m", "synthgen", "demo"],
        env={**process_environment(), "HTTP_PROXY": "http://127.0.0.1:9"},
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )

    *solved, cost = process.stdout.splitlines()
    assert process.returncode == 0, process.stderr
    assert [line.split("x = ")[1] for line in solved] == ["3", "5", "2", "7", "4", "9", "6", "8", "1", "10"]
    assert solved[0].split("  ")[0] == "solve 2x + 4 = 10"
    assert "tokens in" in cost and "cost 0.0000" in cost
    assert "10 completed" in process.stderr


def test_the_demo_solves_what_it_is_asked(capsys):
    """An equation of the user's own."""
    assert main(["demo", "solve 7x - 3 = 25"]) == 0

    assert capsys.readouterr().out.startswith("solve 7x - 3 = 25  ->  x = 4\n")


# run: results


def test_results_are_lines_of_json_in_the_order_of_the_tasks(local, provider, capsys):
    """Nothing but results is on stdout, each with its custom_id."""
    prompts = [f"prompt {number}" for number in range(20)]

    assert main(["run", write_tasks(provider, *prompts)]) == 0

    results = read_lines(capsys.readouterr().out)
    assert [result["custom_id"] for result in results] == prompts
    assert [result["completions"]["choices"][0]["message"]["content"] for result in results] == [
        f"echo {prompt}" for prompt in prompts
    ]


def test_results_are_written_even_when_some_failed(local, provider, capsys):
    """The exit code is 1, the file has all, and stdout nothing."""
    assert main(["run", write_tasks(provider, "one", "fail", "three"), "-o", "out.jsonl"]) == 1

    results = read_lines(Path("out.jsonl").read_text(encoding="ascii"))
    assert [result["status"] for result in results] == ["COMPLETED", "FAILED", "COMPLETED"]
    assert capsys.readouterr().out == ""


def test_a_file_is_replaced_only_by_force(local, provider, capsys):
    """Without --force nothing is sent; with it the file is the new one."""
    Path("out.jsonl").write_text("dear to me", encoding="ascii")
    argv = ["run", write_tasks(provider, "one"), "-o", "out.jsonl"]

    assert main(argv) == 2
    assert "--force" in capsys.readouterr().err
    assert Path("out.jsonl").read_text(encoding="ascii") == "dear to me"
    assert provider.requests == []

    assert main([*argv, "--force"]) == 0
    assert len(read_lines(Path("out.jsonl").read_text(encoding="ascii"))) == 1


def test_an_output_that_cant_be_written_is_found_out_before_anything_is_sent(local, provider, capsys):
    """A directory that is not there is an error, which names it, before the first call."""
    assert main(["run", write_tasks(provider, "one"), "-o", "nowhere/out.jsonl"]) == 2

    assert capsys.readouterr().err == f"error: {os.path.realpath('nowhere')}: no such folder\n"
    assert provider.requests == []


@pytest.mark.parametrize("output", ["tasks.jsonl", "link.jsonl"])
def test_the_file_with_the_tasks_is_not_replaced_by_their_results(output, local, provider, capsys):
    """By no name, and not by force."""
    os.symlink(write_tasks(provider, "one"), "link.jsonl")
    before = Path("tasks.jsonl").read_bytes()

    assert main(["run", "tasks.jsonl", "-o", output, "--force"]) == 2

    assert f"{output} is the file with the tasks" in capsys.readouterr().err
    assert Path("tasks.jsonl").read_bytes() == before and provider.requests == []


@pytest.mark.parametrize("output", ["kept.db", "./kept.db"])
def test_the_database_is_not_replaced_by_results(output, provider, capsys):
    """It holds batches, and may hold others than this."""
    assert main(["run", write_tasks(provider, "one"), "-o", output, "--local", "--db", "kept.db"]) == 2

    assert f"{output} is the database" in capsys.readouterr().err
    assert not os.path.exists("kept.db") and provider.requests == []


def test_force_without_a_result_leaves_the_file_as_it_was(server, provider, capsys):
    """The server lost every task: exit 4, and the results of an earlier run are still there."""
    services = {"task_queue_consumers": 1, "task_queue_messages": 0, "batch_queue_messages": 0}

    def take(request):
        server.answer("GET", f"/api/v1/batches/{request.query['batch_id']}", None)
        return {"batch_id": request.query["batch_id"], "total_tasks": 1}

    server.answer("GET", "/health", {"status": "healthy", "services": services})
    server.answer("POST", "/api/v1/batches", take)
    Path("out.jsonl").write_text("dear to me", encoding="ascii")
    argv = ["run", write_tasks(provider, "one"), "-o", "out.jsonl", "--force", "--base-url", server.url]

    assert main([*argv, "--stall-timeout", "0.1"]) == 4

    assert "1 of 1 tasks never arrived" in capsys.readouterr().err
    assert Path("out.jsonl").read_text(encoding="ascii") == "dear to me"
    assert sorted(os.listdir()) == ["out.jsonl", "out.jsonl.checkpoint", "tasks.jsonl"]


def test_what_came_of_an_incomplete_batch_is_written(server, provider, capsys):
    """The server lost a task: exit 4, and the other's result is in the file."""
    services = {"task_queue_consumers": 1, "task_queue_messages": 0, "batch_queue_messages": 0}
    body = {"messages": [{"role": "user", "content": "one"}]}
    task = {"message_id": "m", "status": "COMPLETED", "body": body, "completions": {}}

    def take(request):
        batch_id = request.query["batch_id"]
        batch = {"batch_id": batch_id, "batch_status": "COMPLETED", "total_tasks": 1, "completed_tasks": 1}
        server.answer("GET", f"/api/v1/batches/{batch_id}", batch)
        server.answer("GET", f"/api/v1/batches/{batch_id}/tasks/export", {"tasks": [task], "total": 1})
        return {"batch_id": batch_id, "total_tasks": 2}

    server.answer("GET", "/health", {"status": "healthy", "services": services})
    server.answer("POST", "/api/v1/batches", take)
    tasks = write_tasks(provider, "one", "two")

    assert main(["run", tasks, "-o", "out.jsonl", "--base-url", server.url, "--stall-timeout", "0.1"]) == 4

    assert [result["message_id"] for result in read_lines(Path("out.jsonl").read_text(encoding="ascii"))] == ["m"]
    assert "1 of 2 tasks never arrived" in capsys.readouterr().err


@pytest.fixture
def losing(server):
    """A server that loses all but the first of the tasks that it is sent, until its attribute `loses` is false."""

    def take(request):
        batch_id = request.query["batch_id"]
        lines = [json.loads(line) for line in request.body.splitlines() if line.startswith(b"{")]
        kept = lines[: 1 if server.loses else None]
        tasks = [
            {"message_id": f"m{i}", "status": "COMPLETED", "body": line["body"], "completions": {}}
            for i, line in enumerate(kept)
        ]
        batch = {"batch_id": batch_id, "batch_status": "COMPLETED"}
        batch["total_tasks"] = batch["completed_tasks"] = len(tasks)
        server.answer("GET", f"/api/v1/batches/{batch_id}", batch)
        server.answer("GET", f"/api/v1/batches/{batch_id}/tasks/export", {"tasks": tasks, "total": len(tasks)})
        return {"batch_id": batch_id, "total_tasks": len(lines)}

    services = {"task_queue_consumers": 1, "task_queue_messages": 0, "batch_queue_messages": 0}
    server.answer("GET", "/health", {"status": "healthy", "services": services})
    server.answer("POST", "/api/v1/batches", take)
    server.loses = True
    return server


@pytest.mark.parametrize("options", [[], ["--retry-failed"]])
def test_a_run_that_lacks_results_says_how_to_get_them(options, losing, provider, capsys):
    """By its checkpoint the same words would wait for the same batch: that has to go, and then they are sent anew."""
    argv = ["run", write_tasks(provider, "one", "two"), "-o", "out.jsonl", "--base-url", losing.url]
    argv += ["--stall-timeout", "0.1", *options]
    if options:
        failed = [{**json.loads(chat_line(provider, prompt)), "status": "FAILED"} for prompt in ("one", "two")]
        Path("out.jsonl").write_text("".join(json.dumps(line) + "\n" for line in failed), encoding="ascii")
    assert main(argv) == 4
    hint = "to run what never arrived: the same again, with --force, without out.jsonl.checkpoint: "
    assert hint + "the rest comes from the cache, but for tasks with use_cache false\n" in capsys.readouterr().err

    losing.loses = False
    assert main([*argv, "--force"]) == 4
    os.remove("out.jsonl.checkpoint")
    assert main([*argv, "--force"]) == 0

    results = read_lines(Path("out.jsonl").read_text(encoding="ascii"))
    assert [result["custom_id"] for result in results] == ["one", "two"]


def test_a_batch_that_lacks_results_is_not_come_back_to_for_them(losing, provider, capsys):
    """Under no id are they to be had; the same words without it send the tasks."""
    argv = ["run", write_tasks(provider, "one", "two"), "-o", "out.jsonl", "--base-url", losing.url]
    argv += ["--stall-timeout", "0.1"]
    assert main(argv) == 4
    batch_id = re.search("^batch ([0-9a-f-]{36}):", capsys.readouterr().err, re.MULTILINE)[1]

    assert main([*argv, "--force", "--batch", batch_id]) == 4

    assert "the same again, with --force, without --batch: " in capsys.readouterr().err


# run: tasks


@pytest.mark.parametrize(
    "line, reason",
    [
        (b"{nope}", "not JSON"),
        (b'["a list"]', "not a JSON object"),
        (b'{"url": "http://x", "body": {"a": "\xff"}}', "not UTF-8"),
        (b'{"url": "http://x", "body": {}, "temperature": 1}', "temperature"),
        (b'{"body": {}}', "url"),
        (b'{"url": "http://x"}', "body"),
        (b'{"url": "http://x", "body": {}, "method": "GET"}', "method must be POST, PUT or PATCH, not 'GET'"),
        (b'{"url": "http://x", "body": {"a": NaN}}', "body"),
        (b'{"url": "/v1/chat/completions", "body": {}}', "--provider"),
        (b'{"url": "localhost:11434/v1", "body": {}}', "http://"),
        (b'{"url": "api.provider.test/v1", "body": {}}', "http://"),
        (b"[" * 100000, "recursion"),
    ],
)
def test_a_broken_line_is_named_and_nothing_is_sent(line, reason, provider, capsys):
    """The error says the file, the line and what is wrong with it."""
    good = (chat_line(provider, "one") + "\n").encode("ascii")
    Path("tasks.jsonl").write_bytes(good * 16 + line + b"\n" + good)

    with CannedServer() as server:
        assert main(["run", "tasks.jsonl", "--base-url", server.url]) == 2
        assert server.requests == []

    error = capsys.readouterr().err
    assert error.startswith("error: tasks.jsonl, line 17: ")
    assert reason in error


def test_no_key_is_shown_with_a_broken_line(capsys):
    """A task's api_key stays out of the error about its line."""
    Path("tasks.jsonl").write_text('{"url": "ftp://x", "body": 1, "api_key": "sk-secret\\n", "x": 1}', encoding="ascii")

    assert main(["run", "tasks.jsonl"]) == 2

    assert "sk-secret" not in capsys.readouterr().err


@pytest.mark.parametrize("content", ["", "\n \r\n"])
def test_a_file_without_tasks_is_an_error(content, capsys):
    """An empty file is no batch."""
    Path("tasks.jsonl").write_text(content, encoding="ascii")

    assert main(["run", "tasks.jsonl"]) == 2
    assert "tasks.jsonl: there are no tasks in it" in capsys.readouterr().err


def test_a_missing_file_is_an_error(capsys):
    """It is named."""
    assert main(["run", "nowhere.jsonl"]) == 2
    assert "nowhere.jsonl" in capsys.readouterr().err


def test_files_from_other_systems_are_read(local, provider, capsys):
    """A byte order mark, CRLF and blank lines are no part of a task."""
    lines = "\ufeff" + chat_line(provider, "one") + "\r\n\r\n" + chat_line(provider, "two") + "\r\n"
    Path("tasks.jsonl").write_bytes(lines.encode("utf-8"))

    assert main(["run", "tasks.jsonl"]) == 0
    assert [result["custom_id"] for result in read_lines(capsys.readouterr().out)] == ["one", "two"]


def test_a_dash_reads_tasks_from_stdin(local, provider, capsys, monkeypatch):
    """Tasks can be piped in."""
    lines = io.BytesIO(chat_line(provider, "piped").encode("ascii"))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(lines))

    assert main(["run", "-"]) == 0
    assert read_lines(capsys.readouterr().out)[0]["custom_id"] == "piped"


def test_stdin_that_is_closed_is_told(capsys, monkeypatch):
    """As by a shell's <&-."""
    monkeypatch.setattr(sys, "stdin", None)

    assert main(["run", "-"]) == 2
    assert "stdin is closed" in capsys.readouterr().err


def test_uploads_are_as_small_as_is_said(server, provider):
    """For a proxy that takes no larger ones."""
    server.answer("GET", "/health", {"status": "healthy"})
    server.answer("POST", "/api/v1/batches", Answer("<html>413 Request Entity Too Large</html>", 413))

    assert main(["run", write_tasks(provider, "one", "two"), "--chunk-size", "1", "--base-url", server.url]) == 2
    assert len(server.requests[-1].lines) == 1


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes here")
def test_tasks_are_read_from_a_pipe(provider, capsys):
    """As a shell makes one of <(zcat tasks.jsonl.gz): it can be read only once, and nothing can be put beside it."""
    os.mkfifo("pipe")
    line = chat_line(provider, "piped")
    writer = threading.Thread(target=lambda: Path("pipe").write_text(line, encoding="ascii"))
    writer.start()

    assert main(["run", "pipe", "--local"]) == 0
    writer.join()
    assert read_lines(capsys.readouterr().out)[0]["custom_id"] == "piped"
    assert os.listdir() == ["pipe"]


@pytest.mark.parametrize(
    "prefix, url, path",
    [
        ("", "/v1/chat/completions", "/v1/chat/completions"),
        ("/", "v1/chat/completions", "/v1/chat/completions"),
        ("/v1", "/v1/chat/completions", "/v1/chat/completions"),
        ("/api/v1/", "/v1/chat/completions", "/api/v1/chat/completions"),
        ("/api", "/v1/chat/completions", "/api/v1/chat/completions"),
        ("/v1", "/chat/completions", "/v1/chat/completions"),
        ("/v1/chat/completions", "/v1/chat/completions", "/v1/chat/completions"),
        ("/api/v1/chat/completions/", "/v1/chat/completions", "/api/v1/chat/completions"),
        ("/api?version=1", "/v1/chat/completions", "/api/v1/chat/completions?version=1"),
    ],
)
def test_an_openai_batch_file_is_run_at_the_provider(prefix, url, path, local, provider, monkeypatch):
    """Its relative url follows the provider's, and the key comes from the environment."""
    monkeypatch.setenv("PROVIDER_KEY", "sk-secret")
    provider.answer("POST", path.partition("?")[0], {"choices": []})
    tasks = write_tasks(provider, "one", method="POST", url=url)

    assert main(["run", tasks, "-o", "o", "--provider", provider.url + prefix, "--key-env", "PROVIDER_KEY"]) == 0

    assert [request.path for request in provider.requests] == [path]
    assert provider.requests[0].headers["Authorization"] == "Bearer sk-secret"


def test_a_task_with_a_key_of_its_own_keeps_it(local, provider, monkeypatch):
    """--key-env is for those without."""
    monkeypatch.setenv("PROVIDER_KEY", "sk-secret")

    assert main(["run", write_tasks(provider, "one", api_key="sk-own"), "-o", "o", "--key-env", "PROVIDER_KEY"]) == 0

    assert provider.requests[0].headers["Authorization"] == "Bearer sk-own"


def test_a_key_variable_that_is_not_set_is_an_error(provider, capsys):
    """It is found out before anything is sent."""
    assert main(["run", write_tasks(provider, "one"), "--key-env", "NO_SUCH_KEY"]) == 2
    assert "NO_SUCH_KEY" in capsys.readouterr().err


def test_a_key_that_fits_no_header_is_blamed_on_its_variable(provider, monkeypatch, capsys):
    """Not on the first line that gets it; and it is not shown."""
    monkeypatch.setenv("PROVIDER_KEY", "sk-secret\n")

    assert main(["run", write_tasks(provider, "one"), "--key-env", "PROVIDER_KEY"]) == 2
    error = capsys.readouterr().err
    assert "--key-env PROVIDER_KEY: " in error and "secret" not in error


# run: on this machine


def test_a_local_run_needs_no_server_and_leaves_only_its_results(provider, capsys):
    """Its database is beside the output while it runs, and gone afterwards."""
    assert main(["run", write_tasks(provider, "one"), "-o", "out.jsonl", "--local"]) == 0

    assert sorted(os.listdir()) == ["out.jsonl", "tasks.jsonl"]
    assert "out.jsonl.db" in capsys.readouterr().err


def test_a_database_that_was_named_is_kept(provider):
    """It may hold more than this run."""
    assert main(["run", write_tasks(provider, "one"), "-o", "out.jsonl", "--local", "--db", "mine.db"]) == 0

    assert "mine.db" in os.listdir()


def test_after_failures_only_they_are_run_again(provider, capsys):
    """The database stays, so that the answers of the others come from the cache."""
    argv = ["run", write_tasks(provider, "one", "fail"), "-o", "out.jsonl", "--local"]
    assert main(argv) == 1
    assert "the same again, with --retry-failed" in capsys.readouterr().err

    provider.answer("POST", CHAT, {"choices": []})
    assert main([*argv, "--force"]) == 0

    assert len(provider.requests) == 3
    assert sorted(os.listdir()) == ["out.jsonl", "tasks.jsonl"]


@pytest.mark.parametrize("number", ENDS)
def test_an_interrupted_local_run_goes_on_where_it_was(number, provider, stalled, capsys):
    """It exits with 130 and the command that goes on, which gets all the results."""
    process = start("run", write_tasks(provider, "one", "two"), "-o", "out.jsonl", "--local", stdout=subprocess.PIPE)
    assert any("2 of 2 tasks uploaded" in line for line in iter(process.stderr.readline, ""))
    provider.wait_for_requests(2)
    process.send_signal(number)
    out, err = process.communicate(timeout=DEADLINE)

    assert process.returncode == 130
    assert "Traceback" not in err
    assert out == ""
    command = shlex.split(next(line for line in err.splitlines() if line.startswith("to go on: ")))[3:]
    assert command[:2] == ["synthgen", "run"]

    stalled.set()
    assert main(command[1:]) == 0
    results = read_lines(Path("out.jsonl").read_text(encoding="ascii"))
    assert [result["custom_id"] for result in results] == ["one", "two"]
    assert sorted(os.listdir()) == ["out.jsonl", "tasks.jsonl"]


def test_an_interrupted_local_run_goes_on_in_a_folder_that_was_renamed(provider, stalled, capsys):
    """The database is the same by whatever name; a checkpoint without it is refused."""
    os.mkdir("before")
    os.chdir("before")
    argv = ["run", write_tasks(provider, "one", "two"), "-o", "out.jsonl", "--local"]
    assert main([*argv, "--timeout", "0.2"]) == 4
    stalled.set()
    os.chdir("..")
    os.rename("before", "after")
    os.chdir("after")

    os.rename("out.jsonl.db", "elsewhere")
    assert main(argv) == 2
    assert "which is not at" in capsys.readouterr().err
    assert sorted(os.listdir()) == ["elsewhere", "out.jsonl.checkpoint", "tasks.jsonl"]

    os.rename("elsewhere", "out.jsonl.db")
    assert main(argv) == 0
    assert sorted(os.listdir()) == ["out.jsonl", "tasks.jsonl"]


def test_what_an_interrupted_local_run_left_is_not_mixed_into_a_new_one(provider, stalled, capsys):
    """It would be run, and paid for, beside the new tasks: the refusal names the batch, and nothing is called."""
    argv = ["run", write_tasks(provider, "one"), "-o", "out.jsonl", "--local"]
    assert main([*argv, "--timeout", "0.2"]) == 4
    batch_id = re.search("^batch ([0-9a-f-]{36}):", capsys.readouterr().err, re.MULTILINE)[1]
    calls = len(provider.requests)
    stalled.set()
    os.remove("out.jsonl.checkpoint")

    assert main(argv) == 2

    error = capsys.readouterr().err
    assert "out.jsonl.db has a batch of an earlier run" in error and f"--batch {batch_id}" in error
    assert len(provider.requests) == calls


def test_a_local_run_that_is_refused_leaves_nothing_behind(provider, capsys):
    """Nothing of it was taken, so that there is nothing to go on with; mended tasks are run."""
    argv = ["run", write_tasks(provider, "one", method="GET"), "-o", "out.jsonl", "--local"]

    assert main(argv) == 2

    assert "method" in capsys.readouterr().err
    assert os.listdir() == ["tasks.jsonl"]
    write_tasks(provider, "one")
    assert main(argv) == 0


def test_a_local_run_that_is_refused_leaves_what_was_there_before(provider):
    """The database of an earlier run has answers that were paid for; only the checkpoint is new."""
    argv = ["run", write_tasks(provider, "one", "fail"), "-o", "out.jsonl", "--local"]
    assert main(argv) == 1

    write_tasks(provider, "one", method="GET")
    assert main([*argv, "--force"]) == 2

    assert sorted(os.listdir()) == ["out.jsonl", "out.jsonl.db", "tasks.jsonl"]
    write_tasks(provider, "one")
    assert main([*argv, "--force"]) == 0
    assert len(provider.requests) == 2


def test_a_local_run_that_is_refused_leaves_a_database_that_was_named(provider):
    """It is the user's, though this run has made it."""
    tasks = write_tasks(provider, "one", body=TOO_DEEP)

    assert main(["run", tasks, "-o", "out.jsonl", "--local", "--db", "mine.db"]) == 2

    assert sorted(os.listdir()) == ["mine.db", "tasks.jsonl"]


def test_a_local_run_that_is_refused_in_the_middle_keeps_what_was_taken(provider, stalled, monkeypatch, capsys):
    """The first upload may have been paid for."""
    monkeypatch.setattr("synthgen.__main__._CHUNK_SIZE", 1)
    lines = [chat_line(provider, "one"), chat_line(provider, "two", body=TOO_DEEP)]
    Path("tasks.jsonl").write_text("\n".join(lines), encoding="utf-8")

    assert main(["run", "tasks.jsonl", "-o", "out.jsonl", "--local"]) == 2

    assert sorted(os.listdir()) == ["out.jsonl.checkpoint", "out.jsonl.db", "tasks.jsonl"]
    assert "to go on" not in capsys.readouterr().err  # with the same tasks it would be refused again


def test_a_run_of_which_nothing_was_taken_leaves_no_checkpoint(local, provider):
    """Tasks that were mended are no others then."""
    assert main(["run", write_tasks(provider, "one", body=TOO_DEEP), "-o", "out.jsonl"]) == 2

    assert os.listdir() == ["tasks.jsonl"]


def test_a_batch_can_only_be_in_a_database_that_is_there(provider, capsys):
    """Coming back with the wrong file is an error that names it, and makes none."""
    assert main(["run", write_tasks(provider, "one"), "--local", "--batch", "b-1"]) == 2

    assert "tasks.jsonl.db" in capsys.readouterr().err
    assert os.listdir() == ["tasks.jsonl"]


@pytest.mark.parametrize(
    "options", [["--db", "x.db"], ["--local", "--base-url", "http://127.0.0.1:1"], ["--local", "--config", "x.json"]]
)
def test_options_that_contradict_each_other_are_refused(options, provider, capsys):
    """None of them is silently left out."""
    assert main(["run", write_tasks(provider, "one"), *options]) == 2
    assert options[-2] in capsys.readouterr().err


def test_a_run_out_of_time_says_how_to_go_on(local, provider, stalled, capsys):
    """Exit 4; the batch goes on, and coming back to it sends nothing."""
    argv = ["run", write_tasks(provider, "one")]
    assert main([*argv, "--timeout", "0.2"]) == 4
    command = shlex.split(capsys.readouterr().err.split("to go on: ")[1].splitlines()[0])
    assert command == ["synthgen", *argv, "--timeout", "0.2"]

    stalled.set()
    assert main(argv) == 0
    assert read_lines(capsys.readouterr().out)[0]["custom_id"] == "one"
    assert len(provider.requests) == 1
    assert os.listdir() == ["tasks.jsonl"]


def test_an_upload_whose_answer_is_lost_may_be_running(server, provider, monkeypatch, capsys):
    """It was looked for, and was not there, time and again; the same words go on with it."""
    monkeypatch.setattr("synthgen._read_back._UNSEEN_AFTER", 0.05)
    monkeypatch.setattr("synthgen._read_back.SETTLED_AFTER", 0.05)
    monkeypatch.setenv("SYNTHGEN_BASE_URL", server.url)
    server.answer("GET", "/health", {"status": "healthy"})
    server.answer("POST", "/api/v1/batches", DROP)

    assert main(["run", write_tasks(provider, "one", "two")]) == 3

    said = capsys.readouterr().err
    assert "0 of 2 tasks uploaded" in said and "looking whether the upload was taken" in said
    assert "to go on: synthgen run tasks.jsonl\n" in said
    assert sorted(os.listdir()) == ["tasks.jsonl", "tasks.jsonl.checkpoint"]


def test_a_disk_that_fills_up_during_an_upload_is_no_matter_of_the_server(local, provider, monkeypatch, capsys):
    """Exit 2, as for any other file that can't be written; nothing was sent, and the same words go on."""
    syncs = iter([None])  # the checkpoint's first line; what comes after that finds no room

    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fsync(file):
        if next(syncs, full):
            raise full

    argv = ["run", write_tasks(provider, "one")]
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        assert main(argv) == 2

    said = capsys.readouterr().err
    assert said.endswith(f"to go on: synthgen run tasks.jsonl\nerror: {full}\n")
    assert provider.requests == []
    assert main(argv) == 0


def test_an_upload_that_is_refused_can_be_started_again(server, provider, monkeypatch, capsys):
    """Nothing of it runs."""
    monkeypatch.setenv("SYNTHGEN_BASE_URL", server.url)
    server.answer("GET", "/health", {"status": "healthy"})
    server.answer("POST", "/api/v1/batches", Answer({"detail": "no"}, 401))

    assert main(["run", write_tasks(provider, "one", "two")]) == 2

    said = capsys.readouterr().err
    assert "0 of 2 tasks uploaded\n" in said and "to go on: synthgen run tasks.jsonl" in said


@pytest.mark.parametrize("option", ["--timeout", "--stall-timeout"])
@pytest.mark.parametrize("seconds", ["-1", "nan", "soon"])
def test_a_timeout_that_makes_no_sense_is_refused_before_anything_is_made(provider, capsys, option, seconds):
    """No database is left of a run that never began."""
    with pytest.raises(SystemExit) as caught:
        main(["run", write_tasks(provider, "one"), "--local", option, seconds])

    assert caught.value.code == 2 and "is no number from 0 on" in capsys.readouterr().err
    assert os.listdir() == ["tasks.jsonl"]


def test_a_timeout_may_be_for_ever(local, provider, capsys):
    """Said as Python says it, as that of the standstill may be."""
    assert main(["run", write_tasks(provider, "one"), "--timeout", "inf", "--stall-timeout", "inf"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_other_tasks_than_those_of_the_run_that_was_interrupted_are_an_error(local, provider, stalled, capsys):
    """It says so, and nothing is sent."""
    assert main(["run", write_tasks(provider, "one"), "--timeout", "0.2"]) == 4
    calls = len(provider.requests)
    capsys.readouterr()

    assert main(["run", write_tasks(provider, "two")]) == 2

    error = capsys.readouterr().err
    assert "tasks.jsonl.checkpoint: these are other tasks than before" in error and "remove this one" in error
    assert len(provider.requests) == calls


def test_a_local_run_of_other_tasks_is_refused_before_its_server_calls_anything(provider, stalled, capsys):
    """The server would go on with the batch of before."""
    assert main(["run", write_tasks(provider, "one"), "-o", "out.jsonl", "--local", "--timeout", "0.2"]) == 4
    calls = len(provider.requests)
    stalled.set()

    for prompts in (("two",), ("one", "two")):
        assert main(["run", write_tasks(provider, *prompts), "-o", "out.jsonl", "--local"]) == 2
        assert "these are other tasks than before" in capsys.readouterr().err

    assert len(provider.requests) == calls
    assert main(["run", write_tasks(provider, "one"), "-o", "out.jsonl", "--local"]) == 0


# run: only what failed


def test_only_what_failed_is_run_again(local, provider, capsys):
    """Its new results take the places of the old ones; the others are as they were, to the letter."""
    argv = ["run", write_tasks(provider, "one", "fail 1", "three", "fail 2"), "-o", "out.jsonl"]
    assert main(argv) == 1
    before = Path("out.jsonl").read_bytes().splitlines()
    provider.answer("POST", CHAT, {"choices": [{"message": {"content": "now"}}]})

    assert main([*argv, "--retry-failed"]) == 0

    after = Path("out.jsonl").read_bytes().splitlines()
    assert [new == old for new, old in zip(after, before)] == [True, False, True, False]
    assert [json.loads(line)["custom_id"] for line in after] == ["one", "fail 1", "three", "fail 2"]
    assert {json.loads(line)["status"] for line in after} == {"COMPLETED"}
    assert len(provider.requests) == 6
    assert sorted(os.listdir()) == ["out.jsonl", "tasks.jsonl"]

    assert main([*argv, "--retry-failed"]) == 0
    assert "nothing in it has failed" in capsys.readouterr().err
    assert len(provider.requests) == 6


def test_what_fails_again_can_be_run_again(local, provider, capsys):
    """Exit 1, as the first time."""
    argv = ["run", write_tasks(provider, "one", "fail"), "-o", "out.jsonl"]

    assert main(argv) == main([*argv, "--retry-failed"]) == main([*argv, "--retry-failed"]) == 1
    assert len(provider.requests) == 4


def test_a_repeat_of_what_failed_goes_on_where_it_was(local, provider, stalled):
    """Interrupted, it has left the results as they were; started again, it calls nothing twice."""
    stalled.set()
    provider.answer("POST", CHAT, Answer({"error": "no"}, 400))
    argv = ["run", write_tasks(provider, "one", "two"), "-o", "out.jsonl", "--retry-failed"]
    assert main(argv[:-1]) == 1
    before = Path("out.jsonl").read_bytes()
    stalled.clear()
    provider.answer("POST", CHAT, Answer({"choices": []}, hold=stalled))

    assert main([*argv, "--timeout", "0.2"]) == 4
    assert Path("out.jsonl").read_bytes() == before
    stalled.set()
    assert main(argv) == 0

    assert len(provider.requests) == 4
    assert sorted(os.listdir()) == ["out.jsonl", "tasks.jsonl"]


@pytest.mark.parametrize(
    "lines", ["", '{"custom_id": "one", "status": "FAILED"}\n' * 2, "nothing\n" * 2, "7\n7\n", '{"custom_id": "one"}\n']
)
def test_results_of_other_tasks_are_not_mended(lines, local, provider, capsys):
    """Too few, of other tasks, or no results: the error names the line, and nothing is sent."""
    Path("out.jsonl").write_text(lines, encoding="ascii")

    assert main(["run", write_tasks(provider, "one", "two"), "-o", "out.jsonl", "--retry-failed"]) == 2

    assert "out.jsonl, line " in capsys.readouterr().err
    assert provider.requests == [] and Path("out.jsonl").read_text(encoding="ascii") == lines


@pytest.mark.parametrize("options", [[], ["-o", "out.jsonl", "--batch", "b"]])
def test_a_repeat_of_what_failed_needs_the_results(options, provider, capsys):
    """In a file, to be replaced."""
    assert main(["run", write_tasks(provider, "one"), "--retry-failed", *options]) == 2
    assert "-o OUT.jsonl" in capsys.readouterr().err


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_results_that_stdout_cant_take_are_kept(provider):
    """They were paid for: the database stays."""
    with open("/dev/full", "w") as full:
        process = start("run", write_tasks(provider, "one"), "--local", stdout=full)
        _, err = process.communicate(timeout=DEADLINE)

    assert process.returncode == 2, err
    assert "No space left" in err and "Traceback" not in err
    assert os.path.exists("tasks.jsonl.db")


def test_a_run_needs_no_stdout_where_there_is_a_file(provider):
    """``synthgen run ... -o OUT >&-``; stderr may be closed, too."""
    command = [sys.executable, "-m", "synthgen", "run", write_tasks(provider, "one"), "--local"]
    environment = process_environment()

    assert subprocess.call([*command, "-o", "out.jsonl"], env=environment, preexec_fn=close_output) == 0
    assert os.path.exists("out.jsonl")
    assert subprocess.call(command, env=environment, preexec_fn=close_output) == 2


@pytest.mark.parametrize("argv", [["run", "tasks.jsonl", "--dry-run"], ["demo", "solve 2x = 4"], ["batches"]])
def test_what_nobody_can_read_is_no_error(argv, local, provider):
    """Where stdout is closed, tables and solutions go nowhere."""
    write_tasks(provider, "one")

    process = start(*argv, preexec_fn=lambda: os.close(1))

    assert "Traceback" not in process.communicate(timeout=DEADLINE)[1]
    assert process.returncode == 0


def close_output():
    os.close(1)
    os.close(2)


# serve


@pytest.mark.parametrize("number", ENDS)
def test_a_server_says_how_to_reach_it_and_stops_cleanly(number):
    """Both export lines are on stderr; Ctrl-C, SIGTERM and SIGHUP end it with 0."""
    process = start("serve", "--port", "0", stdout=subprocess.PIPE)
    said = [process.stderr.readline() for _ in range(3)]
    exports = dict(line.split()[1].split("=", 1) for line in said[1:])
    process.send_signal(number)
    out, err = process.communicate(timeout=DEADLINE)

    assert process.returncode == 0
    assert set(exports) == {"SYNTHGEN_BASE_URL", "SYNTHGEN_API_KEY"}
    assert (out, err) == ("", "stopped\n")


def test_a_server_that_cant_listen_is_one_line(local, capsys):
    """A port in use is an error that names it."""
    port = local.url.rpartition(":")[2]

    assert main(["serve", "--port", port]) == 2

    error = capsys.readouterr().err
    assert port in error
    assert len(error.splitlines()) == 1


# watch, export, stats, batches, health, delete


def test_watching_says_how_it_ended(local, provider, capsys):
    """The summary on stderr, the outcome in the exit code."""
    assert main(["watch", submit(local, provider, "one", "fail")]) == 1

    out, err = capsys.readouterr()
    assert out == ""
    assert "finished" in err


def test_an_export_is_lines_of_json(local, provider, capsys):
    """All tasks of a batch, or those with one status."""
    batch_id = submit(local, provider, "one", "two", "fail")

    assert main(["export", batch_id]) == 0
    assert {line["custom_id"] for line in read_lines(capsys.readouterr().out)} == {"one", "two", "fail"}
    assert main(["export", batch_id, "--status", "FAILED"]) == 0
    assert [line["custom_id"] for line in read_lines(capsys.readouterr().out)] == ["fail"]


def test_an_export_is_a_table(local, provider, capsysbinary):
    """Of UTF-8, a row for each task, under the names of the columns; what has no UTF-8 is escaped."""
    content = '1, "2"\n\u20ac\ud800\r3'
    provider.answer("POST", CHAT, {"choices": [{"message": {"content": content}, "finish_reason": "length"}]})
    batch_id = submit(local, provider, "one", "two")

    assert main(["export", batch_id, "--format", "csv"]) == 0

    rows = list(csv.DictReader(io.StringIO(capsysbinary.readouterr().out.decode("utf-8"), newline="")))
    assert sorted(row["custom_id"] for row in rows) == ["one", "two"]
    assert {row["content"] for row in rows} == {'1, "2"\n\u20ac\\ud800\r3'}
    assert {(row["ok"], row["finish_reason"], row["error"]) for row in rows} == {("True", "length", "")}


def test_an_export_of_nothing_is_a_table_without_rows(local, provider):
    """Into a file, too: whoever reads it finds the columns."""
    batch_id = submit(local, provider, "one")

    assert main(["export", batch_id, "--format", "csv", "--status", "FAILED", "-o", "out.csv"]) == 0
    (line,) = Path("out.csv").read_bytes().split(b"\n")[:-1]
    assert line.startswith(b'"custom_id","message_id","ok","content",')


@pytest.mark.parametrize("form", ["jsonl", "csv"])
def test_a_closed_pipe_is_no_error(local, provider, form):
    """``synthgen export ID | head`` ends with 0, silently."""
    process = start("export", submit(local, provider, "x" * 200000), "--format", form, stdout=subprocess.PIPE)
    process.stdout.close()

    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait(DEADLINE) == 0


def test_a_run_whose_results_nobody_reads_says_how_to_get_them(provider):
    """``synthgen run TASKS | head -1``: they were paid for, and the checkpoint has them."""
    write_tasks(provider, "one")
    process = start("run", "tasks.jsonl", "--local", stdout=subprocess.PIPE)
    process.stdout.close()

    assert "to go on: synthgen run tasks.jsonl --local\n" in process.stderr.read()
    process.stderr.close()
    assert process.wait(DEADLINE) == 0
    assert main(["run", "tasks.jsonl", "--local"]) == 0
    assert len(provider.requests) == 1


@pytest.mark.skipif(sys.platform == "win32", reason="there are no pseudo-terminals")
def test_the_progress_wipes_out_no_result_on_the_same_terminal(provider, stalled):
    """It goes back over its own lines to draw them anew, as long as it is there."""
    pytest.importorskip("rich")
    write_tasks(provider, "one")
    ours, theirs = os.openpty()
    environment = {**process_environment(), "TERM": "xterm", "COLUMNS": "200"}
    command = [sys.executable, "-m", "synthgen", "run", "tasks.jsonl", "--local"]
    with subprocess.Popen(command, env=environment, stdin=theirs, stdout=theirs, stderr=theirs):
        os.close(theirs)
        shown = b""
        with suppress(OSError):  # when the other side is closed
            for part in iter(lambda: os.read(ours, 1 << 16), b""):
                shown += part
                if b"0 of 1 done" in shown:
                    stalled.set()
    os.close(ours)

    progress, brace, results = shown.partition(b'{"message_id"')
    assert b"\x1b[1A" in progress and brace
    assert b"\x1b" not in results


def test_statistics_are_a_table(local, provider, capsys):
    """Off a terminal: plain lines, and a summary with a sane percentage."""
    batch_id = submit(local, provider, "one", "two")
    submit(local, provider, "one")

    assert main(["stats", batch_id]) == 0

    header, row, summary = capsys.readouterr().out.splitlines()
    assert header.split() == ["UTC", "tasks", "failed", "cached", "tokens"]
    assert row.split()[2:] == ["2", "0", "0", "30"]
    assert "2 tasks in 24h: 30 tokens, 0.0% from the cache" in summary


def test_batches_are_a_table(local, provider, capsys):
    """One line each, with what a user asks for."""
    batch_id = submit(local, provider, "one", "fail")

    assert main(["batches"]) == 0

    header, row = capsys.readouterr().out.splitlines()
    assert row.split()[:6] == [batch_id, "FAILED", "2", "2", "1", "15"]


def test_tables_can_be_had_as_json(local, provider, capsys):
    """For scripts, with the fields of the API."""
    batch_id = submit(local, provider, "one")
    asked = {}
    for argv in (["batches"], ["health"], ["stats", batch_id, "--range", "2h", "--interval", "1m"]):
        assert main([*argv, "--json"]) == 0
        asked[argv[0]] = json.loads(capsys.readouterr().out)

    assert asked["batches"]["batches"][0]["batch_id"] == batch_id
    assert asked["health"]["status"] == "healthy"
    assert asked["stats"]["summary"]["total_tasks"] == 1


def test_an_unhealthy_server_is_told_of(server, capsys):
    """The table says what is down; the exit code is 3."""
    server.recording("health_unhealthy_rabbitmq")

    assert main(["health", "--base-url", server.url]) == 3
    assert ["rabbitmq", "unhealthy"] in [line.split() for line in capsys.readouterr().out.splitlines()]


def test_a_running_batch_is_deleted_only_by_force(local, provider, stalled, capsys):
    """Deleting does not stop the calls, and the refusal says so."""
    with local.client() as client:
        batch_id = client.create_batch([Task.model_validate_json(chat_line(provider, "one"))]).batch_id
    provider.wait_for_requests(1)

    assert main(["delete", batch_id]) == 2
    assert "--force" in capsys.readouterr().err
    assert main(["delete", batch_id, "--force"]) == 0
    assert main(["delete", batch_id]) == 3


def test_a_finished_batch_is_deleted(local, provider, capsys):
    """Afterwards it is gone."""
    batch_id = submit(local, provider, "one")

    assert main(["delete", batch_id]) == 0
    assert main(["export", batch_id]) == 3


# all of them


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_each_command_has_an_example(command, capsys):
    """A stranger can start from it."""
    with pytest.raises(SystemExit) as exit:
        main([command, "--help"])

    assert exit.value.code == 0
    assert f"example:\n  synthgen {command}" in capsys.readouterr().out


def test_the_help_names_the_commands_and_the_exit_codes(capsys):
    """Without a command's name, that is what there is to know."""
    with pytest.raises(SystemExit):
        main(["--help"])

    text = capsys.readouterr().out
    assert all(command in text for command in COMMANDS)
    assert "exit codes" in text


def test_the_version_is_that_of_the_package(capsys):
    """With the name it is installed by."""
    with pytest.raises(SystemExit):
        main(["--version"])

    assert capsys.readouterr().out == f"synthgen-client {__version__}\n"


@pytest.mark.parametrize(
    "argv", [[], ["nonsense"], ["run"], ["run", "t", "--input-cost", "-1"], ["run", "t", "--provider", "ftp://x"]]
)
def test_wrong_usage_is_exit_2(argv, capsys):
    """With argparse's own words."""
    with pytest.raises(SystemExit) as exit:
        main(argv)

    assert exit.value.code == 2


@pytest.mark.parametrize("argv", [["health"], ["batches"], ["watch", "b"], ["stats", "b"], ["delete", "b"]])
def test_an_unreachable_server_is_one_clear_line(argv, server, capsys, monkeypatch):
    """Exit 3, no traceback, nothing on stdout."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    server.close()

    config = Path("config.json")
    config.write_text(json.dumps({"base_url": server.url}), encoding="ascii")
    assert main([*argv, "--config", str(config)]) == 3

    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ") and server.url in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("argv", [["run", "tasks.jsonl", "--batch", "typo"], ["watch", "typo"], ["stats", "typo"]])
def test_a_batch_that_is_not_there_is_found_out_at_once(argv, server, provider, capsys):
    """Exit 3, after one question."""
    write_tasks(provider, "one")
    server.answer("GET", "/api/v1/batches/typo", None)

    assert main([*argv, "--base-url", server.url]) == 3

    assert "typo: no such batch" in capsys.readouterr().err
    assert len(server.requests) == 1


def test_a_wrong_key_is_a_matter_of_configuration(local, monkeypatch, capsys):
    """Exit 2; neither key is shown."""
    monkeypatch.setenv("SYNTHGEN_API_KEY", "sk-wrong")

    assert main(["batches"]) == 2

    err = capsys.readouterr().err
    assert "sk-wrong" not in err and local.api_key not in err


@pytest.mark.parametrize("argv", [["export", ".."], ["health", "--config", "nowhere"], ["health", "--base-url", "x"]])
def test_settings_that_make_no_sense_are_one_clear_line(argv, local, capsys):
    """Exit 2."""
    assert main(argv) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("patience, code", [("0", 130), ("600", 0)], ids=["later", "at once"])
def test_a_second_interrupt_ends_the_process_but_for_one_that_comes_with_the_first(patience, code):
    """Whatever the first one is waiting for; a key that bounces cuts no cleaning up short."""
    script = (
        "import sys, time\n"
        "from synthgen import __main__ as command\n"
        f"command._PATIENCE = {patience}\n"
        "with command._signals():\n"
        "    try:\n"
        "        print('ready', flush=True)\n"
        "        time.sleep(600)\n"
        "    except KeyboardInterrupt:\n"
        "        print('stopping', flush=True)\n"
        "        sys.stdin.readline()\n"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", script], env=process_environment(), text=True, **pipes) as process:
        for said in ("ready\n", "stopping\n"):
            assert process.stdout.readline() == said
            process.send_signal(signal.SIGINT)
        process.communicate("\n", DEADLINE)

    assert process.returncode == code


# What a run costs, and how fast it may be


def test_a_dry_run_says_what_would_be_sent_and_sends_nothing(provider, capsys):
    """Per provider and model, with tokens, cost and time; and nothing is written."""
    host = provider.url[len("http://") :]
    limited = [chat_line(provider, prompt, use_cache=True) for prompt in ("abcd" * 10, "abcd" * 10, "x" * 36)]
    lines = [line.replace('"body": {', '"body": {"model": "small", "max_tokens": 100, ') for line in limited]
    Path("tasks.jsonl").write_text("\n".join([*lines, chat_line(provider, "y" * 36)]), encoding="utf-8")
    options = ["--input-cost", "1000", "--output-cost", "1000", "--rpm", "1", "-o", "out.jsonl", "--local"]

    assert main(["run", "tasks.jsonl", "--dry-run", *options]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "tasks     4: 3 to be called, 1 identical to one of those",
        f"          2 x {host} small",
        f"          1 x {host}",
        "prompts   124 characters, about 31 tokens",
        "answers   at most 200 tokens, and what 1 without a limit may answer",
        "cost      from 0.0310 to 0.2310, and what 1 without a limit may answer",
        "time      at least 2 min 00 s",
    ]
    assert not provider.requests
    assert os.listdir() == ["tasks.jsonl"]


def test_a_dry_run_says_the_shortest_time_that_tokens_allow(provider, capsys):
    """Answers may be as short as they like."""
    body = {"messages": [{"role": "user", "content": "x" * 4 * 1001}], "max_tokens": 100_000}

    assert main(["run", write_tasks(provider, "one", body=body), "--dry-run", "--tpm", "1000"]) == 0
    assert "time      at least 1 min 00 s\n" in capsys.readouterr().out


def test_a_dry_run_counts_what_will_be_called(provider, capsys):
    """Accounts share no calls, and what is not to come from the cache is no answer for others."""
    of_tasks = [{"api_key": "a"}, {"api_key": "b"}, {"use_cache": False}, {}]
    lines = [chat_line(provider, "hi", **fields) for fields in of_tasks]
    Path("tasks.jsonl").write_text("\n".join(lines), encoding="utf-8")

    assert main(["run", "tasks.jsonl", "--dry-run"]) == 0
    assert capsys.readouterr().out.startswith("tasks     4: 4 to be called, 0 identical")


def test_a_dry_run_without_any_limit_promises_no_most(provider, capsys):
    """What the prompts cost is all that is known."""
    tasks = write_tasks(provider, "abcd" * 10, "x" * 36)

    assert main(["run", tasks, "--dry-run", "--input-cost", "1000", "--output-cost", "1000"]) == 0

    assert capsys.readouterr().out.splitlines()[-2:] == [
        "answers   of any length: none of 2 has a limit",
        "cost      0.0210 for the prompts, and what 2 without a limit may answer",
    ]


def test_a_dry_run_of_what_failed_says_that_nothing_has(local, provider, capsys):
    """There is no call to tell of, and no time that it takes."""
    argv = ["run", write_tasks(provider, "one"), "-o", "out.jsonl"]
    assert main(argv) == 0

    assert main([*argv, "--retry-failed", "--dry-run", "--rpm", "1"]) == 0

    out, err = capsys.readouterr()
    assert out == "" and "nothing in it has failed" in err


def test_a_dry_run_names_a_broken_line(provider, capsys):
    """As the run itself would."""
    Path("tasks.jsonl").write_text(chat_line(provider, "one") + "\nnothing\n", encoding="utf-8")

    assert main(["run", "tasks.jsonl", "--dry-run"]) == 2
    assert "tasks.jsonl, line 2: not JSON" in capsys.readouterr().err


def test_a_run_without_money_says_how_to_go_on_and_a_higher_cap_does(provider, monkeypatch, capsys):
    """Its exit code is that of an unfinished run; nothing is called twice."""
    monkeypatch.setattr("synthgen._waiting._ASK_AFTER", 0.05)
    provider.answer("POST", CHAT, {"choices": [{"message": {"content": "a"}}], "usage": {"completion_tokens": 1000}})
    prompts = [str(number) for number in range(6)]
    prices = ["--output-cost", "1000"]
    argv = ["run", write_tasks(provider, *prompts), "-o", "out.jsonl", "--local", "--workers", "2", *prices]

    assert main([*argv, "--max-cost", "3"]) == 4
    told = capsys.readouterr().err
    command = next(line for line in told.splitlines() if line.startswith("to go on: synthgen "))
    assert "higher max_cost" in told
    assert main([*shlex.split(command)[4:], "--max-cost", "9"]) == 0
    assert len(provider.requests) == 6


def test_a_run_without_money_says_which_option_to_change(provider, monkeypatch, capsys):
    """The command that goes on would end as this one did."""
    monkeypatch.setattr("synthgen._waiting._ASK_AFTER", 0.05)
    options = ["--local", "--output-cost", "1000", "--max-cost", "0.5"]

    assert main(["run", write_tasks(provider, "one"), *options]) == 4

    said = capsys.readouterr().err.splitlines()
    command = said.index(f"to go on: synthgen run tasks.jsonl {' '.join(options)}")
    assert said[command - 1] == "what --max-cost allows is used up: it has to be higher"


def test_a_server_without_money_has_its_cap_from_elsewhere(provider, monkeypatch, capsys):
    """No option of these commands changes that of a script's server."""
    monkeypatch.setattr("synthgen._waiting._ASK_AFTER", 0.05)
    with LocalServer(max_cost=0.5, output_cost=1000) as server:
        monkeypatch.setenv("SYNTHGEN_BASE_URL", server.url)
        monkeypatch.setenv("SYNTHGEN_API_KEY", server.api_key)
        with server.client() as client:
            batch_id = client.create_batch([Task.model_validate_json(chat_line(provider, "one"))]).batch_id

        assert main(["watch", batch_id]) == main(["run", write_tasks(provider, "one")]) == 4

    said = capsys.readouterr().err
    assert said.count("to go on: ") == said.count("with a higher max_cost") == 2
    assert "--max-cost" not in said


@pytest.mark.parametrize(
    "options, reason",
    [
        (["--local", "--max-cost", "3"], "prices"),
        (["--rpm", "20"], "--local"),
    ],
)
def test_limits_that_would_not_be_kept_are_refused(options, reason, provider, capsys):
    """A cap without prices, and limits for a server that is not started here."""
    assert main(["run", write_tasks(provider, "one"), *options]) == 2
    assert reason in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, reason",
    [
        (["--rpm", "1e-300"], "1e-300 allows nothing"),
        (["--batch", ""], "an id can't be empty"),
        (["--chunk-size", "0"], "'0' is no whole number"),
    ],
)
def test_an_option_that_makes_no_sense_is_named(options, reason, provider, capsys):
    """An empty id is what a variable that is not set gives."""
    with pytest.raises(SystemExit, match="2"):
        main(["run", write_tasks(provider, "one"), "--local", *options])
    assert f"argument {options[0]}: {reason}" in capsys.readouterr().err


def test_a_price_that_was_left_out_of_a_cap_is_told(provider, capsys):
    """Tokens without a price cost nothing, which may be meant; one of 0 is."""
    argv = ["run", write_tasks(provider, "one"), "--local", "--max-cost", "3", "--input-cost", "1"]

    assert main([*argv, "--output-cost", "0"]) == 0
    assert "was not given" not in capsys.readouterr().err
    assert main(argv) == 0
    assert "--output-cost was not given: output tokens count nothing for --max-cost" in capsys.readouterr().err


@pytest.mark.parametrize("workers", ["0", "16"])
def test_workers_of_a_server_that_is_not_started_here_are_refused(workers, local, provider, capsys):
    """Whatever their number, that of the default included."""
    assert main(["run", write_tasks(provider, "one"), "--workers", workers]) == 2
    assert "--workers, --rpm, --tpm and --max-cost are what --local keeps to" in capsys.readouterr().err
    assert not provider.requests


def test_a_dash_writes_to_stdout(local, provider, capsys):
    """As it reads from stdin."""
    assert main(["run", write_tasks(provider, "one"), "-o", "-"]) == 0
    assert read_lines(capsys.readouterr().out)[0]["custom_id"] == "one"
    assert not os.path.exists("-")


@pytest.mark.parametrize("argv", [["run", "tasks.jsonl", "--local"], ["serve"]])
@pytest.mark.parametrize("workers, bound", [("0", "least 1"), ("100000", "most 4096")])
def test_a_number_of_workers_that_cant_be_is_refused(argv, workers, bound, provider, capsys):
    """It is not taken for one that was left out, and not begun with."""
    write_tasks(provider, "one")

    assert main([*argv, "--workers", workers]) == 2
    assert f"workers must be at {bound}, not {workers}" in capsys.readouterr().err
