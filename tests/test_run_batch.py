"""`run_batch`: one result per task in a file, in order, whatever their number and weight."""

import errno
import io
import json
import os
import random
import subprocess
import sys

import pytest
from builders import framework_task, task, tasks
from clock import Clock
from framework import Framework, echo
from servers import Answer

from synthgen import Monitor, SynthgenClient, _results
from synthgen.exceptions import BatchIncompleteError, BatchUploadError
from synthgen.local import DemoProvider, LocalServer


@pytest.fixture
def clock(monkeypatch):
    return Clock.of_client(monkeypatch)


@pytest.fixture
def server():
    with Framework() as running:
        yield running


@pytest.fixture
def client(clock, server):
    with SynthgenClient(server.url, "k", retries=2, backoff_factor=0.01) as opened:
        yield opened


@pytest.fixture
def path(tmp_path):
    return tmp_path / "answers.jsonl"


def once(values):
    """An iterator that is read once."""
    return (value for value in values)


def read(path):
    """The results in a file."""
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def uploads(server):
    return [request for request in server.requests if request.method == "POST"]


@pytest.mark.parametrize("kind", [list, tuple, once])
def test_each_task_has_its_result_in_order_with_its_custom_id(server, client, path, kind):
    """The framework gives them in no order and without; the file is the same as the list that monitor_batch returns."""
    given = [task(str(number), custom_id=f"id-{number}") for number in range(50)]

    batch = client.run_batch(kind(given), path, chunk_size=7, show_progress=False)

    assert (batch.total_tasks, batch.finished_tasks) == (50, 50)
    results = client.monitor_batch(given, batch.batch_id, show_progress=False)
    assert path.read_bytes() == b"".join(result.to_line() for result in results)
    assert [result["custom_id"] for result in read(path)] == [one.custom_id for one in given]


def test_tasks_alike_get_the_results_that_are_theirs(server, client, path):
    """Told apart by their custom_id, which is asked for; alike in that too, they share the results out."""
    server.provider = lambda one: dict(echo(one), choices=[{"message": {"content": f"for {one['custom_id']}"}}])
    names = [str(number % 40) for number in range(60)]
    random.Random(1).shuffle(names)

    client.run_batch([task("same", custom_id=name, use_cache=False) for name in names], path, show_progress=False)

    contents = [one["completions"]["choices"][0]["message"]["content"] for one in read(path)]
    assert contents == [f"for {name}" for name in names]


def test_failures_are_results(server, client, path):
    """The batch tells their number."""
    server.provider = lambda one: {"error": "no"}

    assert client.run_batch(tasks(3), path, show_progress=False).failed_tasks == 3
    assert [result["status"] for result in read(path)] == ["FAILED"] * 3


def test_text_that_is_no_utf8_and_numbers_of_any_size_come_through(server, client, path):
    """As they do in monitor_batch."""
    completions = {"choices": [{"message": {"content": "\ud800 \u2028"}}], "n": 10**40}
    batch_id = client.create_batch(tasks(1), batch_id="b").batch_id
    exported = framework_task(1, tasks(1)[0], completions=completions)
    server.answer("GET", "/api/v1/batches/b/tasks/export", {"tasks": [exported], "total": 1})

    client.run_batch(tasks(1), path, batch_id, show_progress=False)

    assert read(path)[0]["completions"] == completions


def test_results_are_written_however_deeply_they_are_nested(server, client, path):
    """As deep as they can be received."""
    deep = []
    for _ in range(500):
        deep = [deep]
    server.provider = lambda task: dict(echo(task), more=deep)

    client.run_batch([task(body=dict(task().body, deep=deep))], path, show_progress=False)

    (result,) = read(path)
    assert result["completions"]["more"] == deep and result["body"]["deep"] == deep


def test_ctrl_c_while_results_are_written_says_how_to_come_back(client, path):
    """They are all in the batch."""

    class Interrupted(io.BytesIO):
        def writelines(self, lines):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match=r"goes on; come back to it with run_batch\(.*batch_id='"):
        client.run_batch(tasks(2), Interrupted(), show_progress=False)
    with pytest.raises(KeyboardInterrupt, match="come back to it with the same call, by its checkpoint"):
        client.run_batch(tasks(2), Interrupted(), show_progress=False, checkpoint=path.with_suffix(".checkpoint"))


def test_an_open_file_is_written_to(client):
    """Such as stdout."""
    file = io.BytesIO()

    client.run_batch(tasks(3), file, show_progress=False)

    assert [json.loads(line)["custom_id"] for line in file.getvalue().splitlines()] == ["0", "1", "2"]


def test_the_monitor_is_told_all_that_it_is_of_monitor_batch(client, path):
    """Its results in pieces, in order."""
    told = []

    class Recorder(Monitor):
        def upload(self, batch_id, uploaded, total):
            told.append(("upload", uploaded, total))

        def results(self, results):
            told.append(("results", [result.custom_id for result in results]))

        def finish(self, batch, cost):
            told.append(("finish", cost.input))

    client.run_batch(tasks(3), path, None, 1e6, chunk_size=2, monitor=Recorder())

    assert told == [
        *[("upload", uploaded, 3) for uploaded in (0, 2, 3)],
        ("results", ["0", "1", "2"]),
        ("finish", 12.0),
    ]


def test_coming_back_sends_nothing(server, client, path):
    """The tasks serve for order and matching."""
    batch_id = client.create_batch(tasks(5)).batch_id

    client.run_batch(once(tasks(5)[::-1]), path, batch_id, show_progress=False)

    assert [result["custom_id"] for result in read(path)] == ["4", "3", "2", "1", "0"]
    assert len(uploads(server)) == 1


def test_with_a_checkpoint_the_same_call_goes_on(server, client, path):
    """And when all was uploaded, it sends nothing and writes the file again."""
    checkpoint = path.with_suffix(".checkpoint")
    server.answer("POST", "/api/v1/batches", server.play, Answer(None, 401), server.play)
    with pytest.raises(BatchUploadError, match="The same call again goes on"):
        client.run_batch(tasks(6), path, chunk_size=2, checkpoint=checkpoint, show_progress=False)
    assert not path.exists()

    for _ in range(2):
        client.run_batch(once(tasks(6)), path, chunk_size=2, checkpoint=checkpoint, show_progress=False)
        assert [result["custom_id"] for result in read(path)] == [str(number) for number in range(6)]

    assert len(uploads(server)) == 4
    assert set(server.calls.values()) == {1}


def test_what_remains_of_an_iterator_can_still_be_sent(server, client, path):
    """Though the file that the tasks were noted in is gone."""
    server.answer("POST", "/api/v1/batches", server.play, Answer(None, 401), server.play)
    with pytest.raises(BatchUploadError) as caught:
        client.run_batch(once(tasks(6)), path, chunk_size=2, show_progress=False)

    client.create_batch(caught.value.remaining, batch_id=caught.value.batch_id)

    assert server.calls == dict.fromkeys(map(str, range(6)), 1)


class Source:
    """Tasks that fail to come once, and go on to."""

    def __init__(self, before, after):
        self._tasks = [*before, None, *after]

    def __iter__(self):
        return self

    def __next__(self):
        if not self._tasks:
            raise StopIteration
        item = self._tasks.pop(0)
        if item is None:
            raise LookupError("the database went away")
        return item


def test_what_remains_of_an_iterator_that_failed_can_still_be_sent(server, client, path):
    """A cursor may go on where it was; none of its tasks is lost."""
    given = tasks(6)

    with pytest.raises(BatchUploadError, match="the database went away") as caught:
        client.run_batch(Source(given[:3], given[3:]), path, chunk_size=2, show_progress=False)

    assert caught.value.uploaded == 2
    assert list(caught.value.remaining) == given[2:]


def test_what_remains_beside_what_is_no_task_can_still_be_sent(server, client, path):
    """That, too, is given back."""
    given = [*tasks(3), "no task", *tasks(2)]

    with pytest.raises(BatchUploadError, match="must be Task objects") as caught:
        client.run_batch(once(given), path, chunk_size=2, show_progress=False)

    assert list(caught.value.remaining) == given[2:]


@pytest.mark.parametrize("given", [[], once([])], ids=["list", "iterator"])
def test_no_tasks_are_no_batch(server, client, path, given):
    """No file is made."""
    with pytest.raises(ValueError, match="no tasks"):
        client.run_batch(given, path, show_progress=False)

    assert uploads(server) == [] and not path.exists()


@pytest.mark.parametrize("kind, is_known", [(list, True), (once, False)])
def test_an_incomplete_batch_leaves_no_file(server, client, path, kind, is_known):
    """The error has the results that came, and the tasks that are missing, where they can be read again."""
    server.loses = lambda one: one["custom_id"] == "1"

    with pytest.raises(BatchIncompleteError, match="1 of 3 tasks never arrived") as caught:
        client.run_batch(kind(tasks(3)), path, show_progress=False)

    assert [result.custom_id for result in caught.value.results] == ["0", "2"]
    assert caught.value.missing == ([tasks(3)[1]] if is_known else [])
    assert os.listdir(path.parent) == []


def test_surplus_results_are_dropped_with_a_note(server, client, path):
    """A redelivered upload was run twice."""
    notes = []

    class Notes(Monitor):
        def note(self, text):
            notes.append(text)

    server.redelivers = True

    client.run_batch(tasks(3), path, monitor=Notes())

    assert len(read(path)) == 3 and "3 more results than tasks" in notes[0]


@pytest.mark.parametrize("given", [None, 7, task(), "tasks.jsonl"])
def test_what_is_no_list_of_tasks_is_refused(server, client, path, given):
    """At once."""
    with pytest.raises(TypeError, match="iterable of Task"):
        client.run_batch(given, path, show_progress=False)

    assert server.requests == []


@pytest.mark.parametrize("output", [None, 7, b"answers.jsonl"])
def test_what_is_no_file_is_refused(server, client, output):
    """Before anything is sent."""
    with pytest.raises(TypeError, match="path must be"):
        client.run_batch(tasks(1), output, show_progress=False)

    assert server.requests == []


@pytest.mark.parametrize("mode", ["w", "rb", "closed"])
def test_a_file_that_takes_no_bytes_is_refused(server, client, path, mode):
    """Before anything is sent: after it, the results would be paid for."""
    path.touch()
    with open(path, "wb" if mode == "closed" else mode) as output:
        if mode == "closed":
            output.close()
        with pytest.raises(TypeError, match="open for writing"):
            client.run_batch(tasks(1), output, show_progress=False)

    assert server.requests == []


def test_the_output_is_not_the_checkpoint(server, client, path):
    """The one would replace the other."""
    with pytest.raises(ValueError, match="can't be the output and the checkpoint"):
        client.run_batch(tasks(1), str(path), checkpoint=path, show_progress=False)

    assert server.requests == []


def test_a_folder_that_is_not_there_is_found_out_before_anything_is_sent(server, client, tmp_path):
    """It is named."""
    with pytest.raises(OSError, match="nowhere"):
        client.run_batch(tasks(1), tmp_path / "nowhere" / "answers.jsonl", show_progress=False)

    assert server.requests == []


def test_a_full_disk_is_an_error_of_the_system_that_loses_nothing(server, client, path, monkeypatch):
    """The results are in the batch still; no file is left."""
    monkeypatch.setattr(_results, "_SETUP", ("PRAGMA max_page_count = 20", *_results._SETUP))
    checkpoint = path.with_suffix(".checkpoint")
    server.provider = lambda one: dict(echo(one), text="x" * 100_000)

    with pytest.raises(OSError) as caught:
        client.run_batch(tasks(3), path, checkpoint=checkpoint, show_progress=False)
    assert caught.value.errno == errno.ENOSPC
    assert "is not lost: come back to it with the same call, by its checkpoint" in str(caught.value)
    assert os.listdir(path.parent) == [checkpoint.name]

    monkeypatch.undo()
    Clock.of_client(monkeypatch)
    client.run_batch(tasks(3), path, checkpoint=checkpoint, show_progress=False)
    assert len(read(path)) == 3 and len(uploads(server)) == 1


def test_a_disk_that_is_full_from_the_start_leaves_nothing(server, client, path, monkeypatch):
    """Nothing is sent."""
    monkeypatch.setattr(_results, "_SETUP", ("PRAGMA max_page_count = 1", *_results._SETUP))

    with pytest.raises(OSError):
        client.run_batch(tasks(3), path, show_progress=False)

    assert os.listdir(path.parent) == [] and uploads(server) == []


def test_nothing_but_the_output_is_left_and_seen(server, client, path):
    """The file that results wait in has no name any more, where a system allows that."""
    seen = []

    def look(request):
        seen.extend(os.listdir(path.parent))
        return server.play(request)

    server.answer("POST", "/api/v1/batches", look)

    client.run_batch(tasks(1), path, show_progress=False)

    assert [name.endswith(".part") for name in seen] == [True]
    assert os.listdir(path.parent) == [path.name]


def test_no_sqlite_is_needed_to_import_the_client():
    """Some builds of Python have none; only run_batch asks for it."""
    script = "import sys; sys.modules['sqlite3'] = None; import synthgen"
    assert subprocess.call([sys.executable, "-c", script]) == 0


def test_the_embedded_server_gives_the_same(tmp_path, path):
    """Its results come with their custom_id."""
    with DemoProvider() as provider, LocalServer() as server, server.client() as client:
        given = [task(f"solve x = {number}", url=provider.url, custom_id=f"id-{number}") for number in range(20)]

        client.run_batch(given, path, show_progress=False)

    results = read(path)
    assert [one["custom_id"] for one in results] == [one.custom_id for one in given]
    assert results[7]["completions"]["choices"][0]["message"]["content"] == "x = 7"


def test_a_result_of_an_unknown_status_is_a_result(server, client, path):
    """A newer server may have more of them."""
    batch_id = client.create_batch(tasks(1), batch_id="b").batch_id
    odd = framework_task(1, tasks(1)[0], status="CANCELLED")
    server.answer("GET", "/api/v1/batches/b/tasks/export", {"tasks": [odd], "total": 1})

    client.run_batch(tasks(1), path, batch_id, show_progress=False)

    assert read(path)[0]["status"] == "CANCELLED"
