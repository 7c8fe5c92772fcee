"""The README is true: its examples run as they stand, and what it names is there.

Of the shell blocks, those that begin with ``synthgen`` are run. The others, which make virtual environments,
are only compared with the package's settings here: CI runs tox, which installs the wheel and runs the demo.
"""

import configparser
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from readme_frame import FRAME, README, draw
from servers import DEADLINE

import synthgen
from synthgen import SynthgenClient, TaskResponse, exceptions
from synthgen.__main__ import main
from synthgen.local import DemoProvider, LocalServer

TEXT = README.read_text(encoding="utf-8")
ROOT = README.parent
OPENROUTER = "https://openrouter.ai/api"


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)


def commands(program):
    """The command lines that begin with a program, without comments."""
    lines = [line.partition("  #")[0].strip() for block in blocks("bash") for line in block.splitlines()]
    return [line for line in lines if line.split()[0] == program]


def named():
    """All that is set as code: words of text, and of the examples."""
    return set(re.findall(r"\w+", " ".join([*re.findall(r"`([^`\n]+)`", TEXT), *blocks("python")])))


def table(header):
    """The cells of the table with this header, a list for each row."""
    rows = re.search(rf"^\| {re.escape(header)} \|.*?(?=\n\n)", TEXT, re.DOTALL | re.MULTILINE).group().split("\n")
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[2:]]


@pytest.fixture
def running(tmp_path, monkeypatch):
    """An empty folder, a provider, and a server, to which the environment points."""
    with DemoProvider() as provider, LocalServer() as server:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("SYNTHGEN_BASE_URL", server.url)
        monkeypatch.setenv("SYNTHGEN_API_KEY", server.api_key)
        monkeypatch.setenv("PROVIDER_URL", provider.url)
        monkeypatch.setattr("synthgen._waiting.SETTLED_AFTER", 0.2)  # no index here that counts could wait for
        yield provider


# ------------------------------------------------------------------------------------------- examples


def test_the_python_examples_run(running, capsys):
    """Word for word, one after the other, in one namespace; what their comments and names promise is printed."""
    namespace = {}
    for number, block in enumerate(blocks("python"), 1):
        exec(compile(block, f"<example {number} of the README>", "exec"), namespace)
    namespace["client"].close()

    printed = capsys.readouterr().out
    for text in [
        "equation-1 x = 3\nequation-2 x = 3\n",
        "SynthgenClient('https://synthgen.example.com') 600.0\n",
        "a 17 x = 3 ",
        "task 'b': the content does not fit Solution: Invalid JSON",
        "404 GET http://",
        "None x = 10\n",
        "healthy\n",
        "0% from the cache, ",
        "x = 3 x = 2\n",
        "100%, 0.0000 so far\n",
    ]:
        assert text in printed
    assert all(result.ok for result in namespace["results"])
    assert len(Path("results.jsonl").read_text(encoding="utf-8").splitlines()) == 100


def test_a_data_frame_is_one_line():
    """And has a row for each result, with the columns that it may be made to have."""
    pandas = pytest.importorskip("pandas")
    result = TaskResponse(message_id="m", custom_id="a", status="COMPLETED", source={"row": 17})
    line, row = (re.search(f"`({start}[^`]*)`", TEXT).group(1) for start in (r"pandas\.DataFrame", r"{\*\*"))

    frame = eval(line, {"pandas": pandas, "results": [result, result]})
    assert list(frame["custom_id"]) == ["a", "a"] and list(frame["source"]) == ['{"row": 17}'] * 2
    assert eval(row, {"result": result}) == {**result.to_row(), "row": 17}


def test_the_commands_run(running, monkeypatch, capsys):
    """In their order; only the batch and a provider on this machine are put in, and jq's part is looked at here."""
    write_tasks("tasks.jsonl", running.url)
    write_tasks("openai.jsonl", "/v1/chat/completions")
    monkeypatch.setenv("OPENROUTER_API_KEY", "sk-or")
    assert main(["run", "tasks.jsonl"]) == 0
    batch_id = json.loads(capsys.readouterr().out.splitlines()[0])["batch_id"]

    run = [line for line in commands("synthgen") if " serve" not in line]
    for line in run:
        line, _, jq = line.replace(OPENROUTER, running.url.partition("/v1/")[0]).partition(" | jq .")
        assert main(shlex.split(line.replace("BATCH_ID", batch_id))[1:]) == 0, line
        written = capsys.readouterr().out
        assert not jq or all(jq in json.loads(result) for result in written.splitlines())

    assert {line.split()[1] for line in run} == {"run", "batches", "watch", "export", "stats", "delete", "health"}
    assert len(Path("table.csv").read_text(encoding="utf-8").splitlines()) == 3
    for name in ("results.jsonl", "answers.jsonl"):
        results = [json.loads(line) for line in Path(name).read_text(encoding="utf-8").splitlines()]
        assert [result["custom_id"] for result in results] == ["a", "b"]


def write_tasks(name, url):
    """A file as the README says it."""
    template = re.search(r'`(\{"custom_id".*\})`', TEXT).group(1)
    body = json.dumps({"model": "m", "messages": [{"role": "user", "content": "solve 2x + 4 = 10"}]})
    line = template.replace("https://...", url).replace("{...}", body)
    Path(name).write_text("\n".join([line, line.replace('"a"', '"b"')]), encoding="utf-8")


def test_the_server_starts_as_told(tmp_path):
    """It says at once what to export, and keeps its batches in that file; only the port is put in, a free one."""
    (line,) = [line for line in commands("synthgen") if " serve" in line]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    command = [sys.executable, "-m", *shlex.split(line), "--port", "0"]
    with subprocess.Popen(command, cwd=str(tmp_path), env=environment, stderr=subprocess.PIPE) as server:
        said = [server.stderr.readline().decode() for _ in range(3)]
        server.send_signal(signal.SIGINT)
        assert server.wait(DEADLINE) == 0

    assert [line.partition("=")[0] for line in said[1:]] == ["export SYNTHGEN_BASE_URL", "export SYNTHGEN_API_KEY"]
    assert (tmp_path / "batches.db").exists()


def test_what_is_installed_is_there():
    """The extra, the command, and tox's settings."""
    settings = configparser.ConfigParser()
    settings.read(str(ROOT / "setup.cfg"))
    extra, command = re.search(r"pip install '\.\[(\w+)\]' && \.venv/bin/(\w+) demo", TEXT).groups()

    assert extra in settings["options.extras_require"]
    assert settings["options.entry_points"]["console_scripts"].strip() == f"{command} = synthgen.__main__:main"
    assert ".venv/bin/tox\n" in TEXT and (ROOT / "tox.ini").exists()


def test_the_progress_looks_as_shown():
    """The frames in the README are what a real run draws."""
    pytest.importorskip("rich")

    assert FRAME.search(TEXT).group() == draw()


# ----------------------------------------------------------------------------------------------- names


def test_every_method_is_named():
    """So that a reader of the README knows what there is."""
    methods = {name for name in vars(SynthgenClient) if not name.startswith("_")}

    assert methods - named() == set()


def test_every_error_is_named():
    """With what to do about it, in a table; but for the base classes, which are named beside it."""
    told = {name for row in table("exception | what happened | what to do") for name in re.findall(r"`(\w+)`", row[0])}
    errors = {name for name in exceptions.__all__ if issubclass(getattr(exceptions, name), Exception)}

    assert told == errors - {"SynthgenError", "APIError"}
    assert {"SynthgenError", "APIError"} <= named()


def test_the_api_errors_are_those_said_to_be():
    """All but the first four and the last four of the table."""
    assert "All but the first four and the last four are `APIError`s" in TEXT
    rows = [re.findall(r"`(\w+)`", row[0]) for row in table("exception | what happened | what to do")]

    for number, names in enumerate(rows):
        for name in names:
            is_api_error = issubclass(getattr(exceptions, name), exceptions.APIError)
            assert is_api_error == (4 <= number < len(rows) - 4), name


@pytest.mark.parametrize("fault, seen", table("fault | what you see"))
def test_what_a_fault_ends_in_exists(fault, seen):
    """The errors, arguments and attributes in the table of faults are ones that there are."""
    known = {*dir(synthgen), *dir(SynthgenClient), "KeyboardInterrupt", "remaining", "unconfirmed", "client"}
    known |= {"retries", "idempotent_uploads", "stall_timeout", "True"}

    assert set(re.findall(r"\w+", " ".join(re.findall(r"`([^`]+)`", fault + seen)))) <= known


@pytest.mark.parametrize("row", table("setting | argument | environment | file | default"))
def test_the_settings_are_those_that_are_read(row, monkeypatch, tmp_path):
    """By these names, and with these defaults."""
    _, argument, environment, file, default = (cell.strip("`") for cell in row)
    values = {"base_url": "http://other.test", "api_key": "k", "timeout": 7}
    config = tmp_path / "config.json"
    config.write_text(json.dumps({file: values[argument]}), encoding="utf-8")

    def value(**settings):
        client = SynthgenClient(**settings)
        return getattr(client, argument, None) or client._api_key

    assert str(value()) == {"none": "None", "3600": "3600.0"}.get(default, default)
    given = value(**{argument: values[argument]})
    assert value(config_file=config) == given
    monkeypatch.setenv(environment, str(values[argument]))
    assert value() == given


def test_every_section_that_is_linked_is_there():
    """And every file."""
    titles = {re.sub(r"\W+", "-", title.lower()) for title in re.findall(r"^#+ (.*)$", TEXT, re.MULTILINE)}

    for target in re.findall(r"\]\((?!http)([^)]+)\)", TEXT):
        assert target[1:] in titles if target.startswith("#") else (ROOT / target).exists()
