"""Exports: every task once, whatever becomes of the streams, and a file that is complete or not there."""

import json
import os
import threading

import pytest
from builders import batch, export_line, framework_task, task
from servers import DEADLINE, DROP, Answer

from synthgen import Monitor, SynthgenClient, TaskStatus
from synthgen._files import replacing
from synthgen.exceptions import APIError, ConnectionFailedError, InvalidResponseError, NotFoundError, ServerError

PATH = "/api/v1/batches/b"
EXPORT = f"{PATH}/tasks/export"
RETRIES = 2


@pytest.fixture
def client(server):
    with SynthgenClient(server.url, retries=RETRIES, backoff_factor=0) as opened:
        yield opened


def stream(*message_ids, cut_off=False, tail=b""):
    """An export of these tasks, in one line, perhaps cut off somewhere after them."""
    line = export_line(framework_task(message_id) for message_id in message_ids)
    if cut_off:
        line = line[: line.rindex(b"]")] + tail
    return Answer(chunks=[line], cut_off=cut_off)


def ids(received):
    """The message ids of tasks."""
    return [one.message_id for one in received]


def exports(server):
    """How often the export was asked for."""
    return len([request for request in server.requests if "/tasks/export" in request.path])


# --------------------------------------------------------------------------------------- whole streams


def test_an_export_gives_each_task_of_each_line(server, client):
    """In the order of the stream."""
    server.answer("GET", PATH, batch(3))
    lines = [export_line([framework_task(1), framework_task(2)]), export_line([]), export_line([framework_task(3)])]
    server.answer("GET", EXPORT, Answer(chunks=lines))

    assert ids(client.iter_batch_tasks("b")) == ["1", "2", "3"]
    assert exports(server) == 1


def test_a_task_that_is_there_twice_is_given_once(server, client):
    """Pages of the server's storage may overlap."""
    server.answer("GET", PATH, batch(2))
    server.answer("GET", EXPORT, stream(1, 2, 1))

    assert ids(client.iter_batch_tasks("b")) == ["1", "2"]


def test_the_first_task_is_given_before_the_rest_has_arrived(server, client):
    """Though it is in one line with it."""
    rest = threading.Event()
    line = export_line([framework_task(1), framework_task(2)])
    cut = line.index(b'"message_id": "2"')
    server.answer("GET", PATH, batch(2))
    server.answer("GET", EXPORT, Answer(chunks=[line[:cut], rest, line[cut:]]))

    received = client.iter_batch_tasks("b")
    first = next(received)
    rest.set()

    assert ids([first, *received]) == ["1", "2"]


def test_a_character_cut_in_two_comes_out_whole(server, client):
    """Between two reads of the network."""
    line = json.dumps({"tasks": [framework_task(1, task("🙂\u2028"))]}, ensure_ascii=False).encode("utf-8")
    server.answer("GET", PATH, batch(1))
    server.answer("GET", EXPORT, Answer(chunks=[line[i : i + 1] for i in range(len(line))]))

    (received,) = client.iter_batch_tasks("b")

    assert received.body["messages"][0]["content"] == "🙂\u2028"


def test_compression_is_not_asked_for(server, client):
    """A compressed stream that is cut short ends without an error."""
    server.answer("GET", PATH, batch(1))
    server.answer("GET", EXPORT, stream(1))

    list(client.iter_batch_tasks("b"))

    (request,) = [request for request in server.requests if request.path == EXPORT]
    assert request.headers["Accept-Encoding"] == "identity"


def test_an_unknown_batch_is_not_found(server, client):
    """The server itself would send an empty export."""
    server.answer("GET", PATH, None)
    server.answer("GET", EXPORT, {"tasks": [], "total": 0})

    with pytest.raises(NotFoundError, match="no such batch"):
        next(client.iter_batch_tasks("b"))


def test_a_list_of_the_tasks_is_told_to_the_monitor(server, client):
    """The first, each hundredth, and all."""
    server.answer("GET", PATH, batch(150))
    server.answer("GET", EXPORT, stream(*range(150)))
    told = []

    class Recorder(Monitor):
        def download(self, received, total):
            told.append(received)

    assert len(client.get_batch_tasks("b", monitor=Recorder())) == 150
    assert told == [1, 101, 150]


# -------------------------------------------------------------------------------------- broken streams


BREAKS = {
    "cut": stream(1, 2, cut_off=True),
    "cut in a task": stream(1, 2, cut_off=True, tail=b', {"message_id": "3", "status": "COMP'),
    "cut in a character": stream(1, 2, cut_off=True, tail=', {"message_id": "é'.encode()[:-1]),
    "ended in a task": Answer(chunks=[stream(1, 2).chunks[0][:-20]]),
    "ended short": stream(1, 2),
    "garbage": Answer(chunks=[stream(1, 2).chunks[0], b"<html>502 Bad Gateway</html>"]),
    "no task": Answer(chunks=[stream(1, 2).chunks[0], b'{"tasks": [null]}']),
    "closed": Answer(stream(1, 2).chunks[0], headers={"Connection": "close"}, cut_off=True),
}


@pytest.mark.parametrize("broken", BREAKS.values(), ids=list(BREAKS))
def test_a_stream_that_breaks_is_read_again_and_each_task_given_once(server, client, broken):
    """In whatever way it breaks, and in whatever order the tasks come the next time."""
    server.answer("GET", PATH, batch(4))
    server.answer("GET", EXPORT, broken, stream(4, 3, 2, 1))

    received = ids(client.iter_batch_tasks("b"))

    assert sorted(received) == ["1", "2", "3", "4"] and exports(server) == 2


@pytest.mark.parametrize("broken", [*BREAKS.values(), stream(), Answer(b""), Answer("<html>")])
def test_streams_that_bring_nothing_new_end_in_an_error(server, client, broken):
    """After as many repeats as were said; what was given is not lost."""
    server.answer("GET", PATH, batch(4))
    server.answer("GET", EXPORT, broken)
    received = []

    with pytest.raises((ConnectionFailedError, InvalidResponseError), match="GET .*/batches/b/tasks/export: "):
        for one in client.iter_batch_tasks("b"):
            received.append(one)

    assert len(set(ids(received))) == len(received) < 4
    assert exports(server) == 1 + RETRIES


@pytest.mark.parametrize("wrong", [{"status": None}, {"created_at": "yesterday"}, {"body": []}])
def test_a_task_of_another_shape_is_an_error_that_says_where(server, client, wrong):
    """Wherever it is in the stream; all before it were given."""
    tasks = [framework_task(number) for number in range(50)]
    tasks[30].update(wrong)
    server.answer("GET", PATH, batch(50))
    server.answer("GET", EXPORT, Answer(chunks=[export_line(tasks)]))
    received = []

    (place,) = wrong
    with pytest.raises(InvalidResponseError, match=f"/tasks/export: the answer is no TaskResponse: {place}.*: "):
        for one in client.iter_batch_tasks("b"):
            received.append(one)

    assert ids(received) == [str(number) for number in range(30)]


@pytest.mark.parametrize("text", ["\ud83d", "\udc00 \u2028", float("nan"), 10**400], ids=repr)
def test_what_json_takes_and_few_others_do_is_taken(server, client, tmp_path, text):
    """As a provider, or a server's JSON, may have it; the tasks beside it are not affected."""
    tasks = [framework_task(number) for number in range(50)]
    tasks[30]["completions"] = {"text": text}
    line = json.dumps({"tasks": tasks}).encode("ascii")
    server.answer("GET", PATH, batch(50))
    server.answer("GET", EXPORT, Answer(chunks=[line]))

    received = client.get_batch_tasks("b")
    assert client.export_batch("b", tmp_path / "out.jsonl") == 50

    assert ids(received) == [str(number) for number in range(50)]
    assert repr(received[30].completions["text"]) == repr(text)
    assert len((tmp_path / "out.jsonl").read_bytes().splitlines()) == 50


def test_streams_that_never_begin_are_asked_for_as_often_as_anything_else(server, client):
    """There is no adapter that repeats them, too."""
    server.answer("GET", PATH, batch(4))
    server.answer("GET", EXPORT, DROP)

    with pytest.raises(ConnectionFailedError, match="GET .*/batches/b/tasks/export: "):
        list(client.iter_batch_tasks("b"))

    assert exports(server) == 1 + RETRIES


def test_streams_that_bring_something_new_are_read_again_for_as_long_as_they_do(server, client):
    """Repeats are counted from the last that did."""
    server.answer("GET", PATH, batch(6))
    server.answer("GET", EXPORT, *[stream(*range(count + 1), cut_off=True) for count in range(5)], stream(*range(6)))

    assert ids(client.iter_batch_tasks("b")) == [str(number) for number in range(6)]


@pytest.mark.parametrize("status", [429, 503])
def test_asked_to_wait_for_long_a_broken_stream_is_given_up(server, client, status):
    """As any other request is: at once, and not after so many repeats."""
    server.answer("GET", PATH, batch(2))
    server.answer("GET", EXPORT, stream(1, cut_off=True), Answer(None, status, {"Retry-After": "61"}))

    with pytest.raises(APIError) as caught:
        list(client.iter_batch_tasks("b"))

    assert caught.value.status_code == status
    assert exports(server) == 2


def test_a_broken_stream_is_read_again_when_the_server_says(server, monkeypatch):
    """After Retry-After, in place of the client's own pause."""
    pauses = []
    monkeypatch.setattr("time.sleep", pauses.append)
    server.answer("GET", PATH, batch(2))
    busy = Answer(None, 429, {"Retry-After": "4"})
    server.answer("GET", EXPORT, stream(1, cut_off=True), busy, stream(1, 2))

    with SynthgenClient(server.url) as client:
        assert ids(client.iter_batch_tasks("b")) == ["1", "2"]

    assert pauses == [0.0, 4.0]


def test_with_retries_0_a_stream_is_read_once(server):
    """None means none."""
    server.answer("GET", PATH, batch(2))
    server.answer("GET", EXPORT, stream(1, cut_off=True), stream(1, 2))

    with SynthgenClient(server.url, retries=0) as client, pytest.raises(ConnectionFailedError):
        list(client.iter_batch_tasks("b"))

    assert exports(server) == 1


def test_an_error_of_the_server_is_that_error(server, client):
    """It was repeated already, as any request."""
    server.answer("GET", PATH, batch(1))
    server.answer("GET", EXPORT, Answer({"detail": "no storage"}, 500))

    with pytest.raises(ServerError, match="500, no storage"):
        list(client.iter_batch_tasks("b"))

    assert exports(server) == 1 + RETRIES


# --------------------------------------------------------------------- how many are all: by the counts


def test_the_total_in_the_stream_says_nothing(server, client):
    """The framework's stops at 10,000."""
    line = json.dumps({"tasks": [framework_task(1)], "total": 10_000}).encode("ascii")
    server.answer("GET", PATH, batch(1))
    server.answer("GET", EXPORT, Answer(chunks=[line]))

    assert ids(client.iter_batch_tasks("b")) == ["1"]


@pytest.mark.parametrize(
    "status, counts, enough",
    [
        (None, {"completed": 1, "cached_tasks": 1, "failed_tasks": 1}, 3),
        ("COMPLETED", {"completed": 1, "cached_tasks": 1, "failed_tasks": 1}, 2),
        (TaskStatus.COMPLETED, {"completed": 1, "cached_tasks": 1, "failed_tasks": 1}, 2),
        ("FAILED", {"completed": 1, "cached_tasks": 1, "failed_tasks": 2}, 2),
    ],
)
def test_a_filtered_export_is_whole_with_as_many_as_the_batch_counts(server, client, status, counts, enough):
    """Of a finished batch; those that came from the cache are completed, too."""
    server.answer("GET", PATH, batch(**counts))
    server.answer("GET", EXPORT, stream(*range(enough - 1)), stream(*range(enough)))

    assert len(client.get_batch_tasks("b", status)) == enough
    assert exports(server) == 2
    assert server.requests[1].query == ({} if status is None else {"task_status": str(status)})


@pytest.mark.parametrize("status", ["PENDING", "PROCESSING", "SOMETHING_NEW"])
def test_an_export_of_what_no_count_tells_is_whole_when_it_ends(server, client, status):
    """In a finished batch there are none."""
    server.answer("GET", PATH, batch(4))
    server.answer("GET", EXPORT, stream())

    assert client.get_batch_tasks("b", status) == []
    assert exports(server) == 1


@pytest.mark.parametrize("running", [{"pending_tasks": 2}, {"processing_tasks": 1, "pending_tasks": 1}])
def test_an_export_of_a_running_batch_is_whole_when_it_ends(server, client, running):
    """Its counts are already other ones."""
    server.answer("GET", PATH, batch(2, **running))
    server.answer("GET", EXPORT, stream(1))

    assert ids(client.iter_batch_tasks("b")) == ["1"]
    assert exports(server) == 1


def test_a_broken_export_of_a_running_batch_is_read_again(server, client):
    """It did not end properly."""
    server.answer("GET", PATH, batch(2, pending_tasks=2))
    server.answer("GET", EXPORT, stream(1, cut_off=True), stream(1, 2))

    assert ids(client.iter_batch_tasks("b")) == ["1", "2"]


def test_tasks_deleted_meanwhile_are_not_waited_for(server, client):
    """The smaller count holds, before or after."""
    server.answer("GET", PATH, batch(3), batch(2))
    server.answer("GET", EXPORT, stream(1, 2))

    assert ids(client.iter_batch_tasks("b")) == ["1", "2"]
    assert exports(server) == 1


def test_a_batch_that_grows_meanwhile_is_whole_as_it_was(server, client):
    """Tasks that came later are not promised."""
    server.answer("GET", PATH, batch(1), batch(3))
    server.answer("GET", EXPORT, stream(1))

    assert ids(client.iter_batch_tasks("b")) == ["1"]


# ---------------------------------------------------------------------------------------------- closing


def test_closing_the_iterator_closes_the_connection(server, client):
    """The server notices, and need not send the rest."""
    gone = threading.Event()

    class Endless:
        def __iter__(self):
            try:
                yield stream(1, cut_off=True).chunks[0]
                while True:
                    yield b" " * 65536
            finally:  # the server could not send on, and let go of this
                gone.set()

    server.answer("GET", PATH, batch(2))
    server.answer("GET", EXPORT, Answer(chunks=Endless()))

    received = client.iter_batch_tasks("b")
    next(received)
    received.close()

    assert gone.wait(DEADLINE)


def test_nothing_is_asked_before_the_first_task_is(server, client):
    """An iterator that nobody reads costs nothing."""
    client.iter_batch_tasks("b").close()

    assert server.requests == []


# ------------------------------------------------------------------------------------------------ files


def test_a_file_has_one_task_a_line_as_the_server_sent_it(server, client, tmp_path):
    """Every field, known or not; and no other file is left."""
    sent = [framework_task(1, task("\u2028🙂")), framework_task(2, unknown={"a": [1, 2.50]})]
    server.answer("GET", PATH, batch(2))
    server.answer("GET", EXPORT, Answer(chunks=[json.dumps({"tasks": sent}, ensure_ascii=False).encode("utf-8")]))

    assert client.export_batch("b", tmp_path / "out.jsonl") == 2

    lines = (tmp_path / "out.jsonl").read_bytes().splitlines()
    assert lines == [json.dumps(one, ensure_ascii=False).encode("utf-8") for one in sent]
    assert os.listdir(str(tmp_path)) == ["out.jsonl"]


def test_a_task_that_was_sent_in_many_lines_is_one_line_of_the_file(server, client, tmp_path):
    """A server, or a proxy, may print its JSON for humans."""
    sent = [framework_task(1), framework_task(2)]
    server.answer("GET", PATH, batch(2))
    server.answer("GET", EXPORT, Answer(chunks=[json.dumps({"tasks": sent, "total": 2}, indent=2).encode("ascii")]))

    client.export_batch("b", tmp_path / "out.jsonl")

    lines = (tmp_path / "out.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == sent


def test_a_file_of_a_broken_stream_has_each_task_once(server, client, tmp_path):
    """It is read again as any export."""
    server.answer("GET", PATH, batch(3))
    server.answer("GET", EXPORT, stream(1, 2, cut_off=True), stream(3, 2, 1))

    assert client.export_batch("b", str(tmp_path / "out.jsonl"), "COMPLETED") == 3

    lines = (tmp_path / "out.jsonl").read_text().splitlines()
    assert sorted(json.loads(line)["message_id"] for line in lines) == ["1", "2", "3"]


@pytest.mark.parametrize("before", [[], ["out.jsonl"]], ids=["new", "old"])
def test_a_file_is_complete_or_as_it_was(server, client, tmp_path, before):
    """An old one stays untouched by a break, and nothing else is left there."""
    for name in before:
        (tmp_path / name).write_text("old")
    server.answer("GET", PATH, batch(3))
    server.answer("GET", EXPORT, stream(1, 2, cut_off=True))

    with pytest.raises(APIError):
        client.export_batch("b", tmp_path / "out.jsonl")

    assert os.listdir(str(tmp_path)) == before
    assert all((tmp_path / name).read_text() == "old" for name in before)


def test_a_file_takes_the_place_of_an_old_one_also_through_a_link(server, client, tmp_path):
    """The link stays one."""
    (tmp_path / "old.jsonl").write_text("old")
    os.symlink("old.jsonl", str(tmp_path / "link.jsonl"))
    server.answer("GET", PATH, batch(1))
    server.answer("GET", EXPORT, stream(1))

    client.export_batch("b", tmp_path / "link.jsonl")

    assert (tmp_path / "link.jsonl").is_symlink()
    assert json.loads((tmp_path / "old.jsonl").read_text())["message_id"] == "1"


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such modes")
def test_a_file_that_takes_the_place_of_an_old_one_may_be_read_by_the_same_people(server, client, tmp_path):
    """Its mode is the old one's, whatever new files get."""
    (tmp_path / "out.jsonl").write_text("old")
    (tmp_path / "out.jsonl").chmod(0o640)
    server.answer("GET", PATH, batch(1))
    server.answer("GET", EXPORT, stream(1))

    client.export_batch("b", tmp_path / "out.jsonl")

    assert (tmp_path / "out.jsonl").stat().st_mode & 0o777 == 0o640


def test_what_a_killed_process_left_is_removed_and_what_another_one_writes_is_not(server, client, tmp_path):
    """Beside the file there is no part of it for longer than its writer lives."""
    path = tmp_path / "out.jsonl"
    (tmp_path / "out.jsonl.0a1b2c3d.part").write_bytes(b"half a line")
    others = tmp_path / "out.jsonl.backup.part"
    others.write_bytes(b"of somebody else")
    with replacing(path) as other:
        with replacing(path) as file:
            file.write(b"second\n")
        other.write(b"first\n")

    assert set(tmp_path.iterdir()) == {path, others}
    assert path.read_bytes() == b"first\n"


def test_a_file_is_written_where_the_file_system_knows_no_locks(server, client, tmp_path, monkeypatch):
    """As on some network drives."""
    fcntl = pytest.importorskip("fcntl")

    def no_locks(*args):
        raise OSError("no locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with replacing(tmp_path / "out.jsonl") as file:
        file.write(b"whole\n")

    assert (tmp_path / "out.jsonl").read_bytes() == b"whole\n"


@pytest.mark.parametrize("path", ["missing/out.jsonl", ".", "file/out.jsonl", os.devnull])
def test_a_path_that_can_not_be_written_is_found_out_before_anything_is_asked(server, client, tmp_path, path):
    """A directory that is not there, a directory itself, something below a file, a device."""
    (tmp_path / "file").write_text("old")

    with pytest.raises(OSError):
        client.export_batch("b", os.path.join(str(tmp_path), path))

    assert server.requests == [] and os.listdir(str(tmp_path)) == ["file"]
