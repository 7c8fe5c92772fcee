"""Checkpoints: the same call, made again after whatever ended it, sends only what the server does not have."""

import json
import os
import stat
import subprocess
import sys

import pytest
import requests
from builders import task
from clock import Clock
from faults import FaultyProxy
from framework import Framework
from requests.adapters import HTTPAdapter
from servers import DROP, Answer
from urllib3.util import Retry

from synthgen import SynthgenClient
from synthgen.exceptions import BatchUploadError, CheckpointError, ConfigurationError, NotFoundError
from synthgen.local import DemoProvider, LocalServer

UPLOADS = "/api/v1/batches"


def tasks(count):
    """Tasks 0, 1, 2, ...; no cache hides a second call."""
    return [task(str(number), use_cache=False) for number in range(count)]


@pytest.fixture(params=[False, True], ids=["framework", "deduplicating"])
def server(request):
    with Framework() as running:
        running.deduplicates = request.param
        yield running


@pytest.fixture
def clock(monkeypatch):
    return Clock.of_client(monkeypatch)


@pytest.fixture
def client(clock, server):
    options = {"retries": 0, "idempotent_uploads": server.deduplicates}
    with SynthgenClient(server.url, "k", **options) as opened:
        yield opened


@pytest.fixture
def path(tmp_path):
    return tmp_path / "answers.checkpoint"


def sent(server):
    """The custom ids in each upload."""
    uploads = [request for request in server.requests if request.method == "POST"]
    return [[line["custom_id"] for line in request.lines] for request in uploads]


def batch_ids(server):
    return {request.query["batch_id"] for request in server.requests if request.method == "POST"}


def break_off(server, client, path, answer, given=tasks(6)):
    """Send the first chunk, and end at the second, which is answered like this."""
    server.answer("POST", UPLOADS, server.play, answer, server.play)
    with pytest.raises(BatchUploadError):
        client.create_batch(given, 2, checkpoint=path)


def lines(path):
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def test_the_same_call_goes_on_where_it_was_refused(server, client, path):
    """What was taken is not sent, all else is, into the same batch."""
    break_off(server, client, path, Answer({"detail": "no"}, 401))

    assert client.create_batch(tasks(6), 2, checkpoint=path).total_tasks == 6

    assert sent(server) == [["0", "1"], ["2", "3"], ["2", "3"], ["4", "5"]]
    assert len(batch_ids(server)) == 1
    assert server.calls == dict.fromkeys(map(str, range(6)), 1)


def test_a_chunk_that_was_refused_is_not_waited_for(server, client, path, clock):
    """It surely was not taken: it is sent at once, but looked for when the answer to that was lost, too."""
    break_off(server, client, path, Answer({"detail": "no"}, 401))
    before = clock.now
    server.answer("POST", UPLOADS, lambda request: (server.play(request), DROP)[1], server.play)
    with pytest.raises(BatchUploadError):
        client.create_batch(tasks(6), 2, checkpoint=path)
    assert clock.now == before

    client.create_batch(tasks(6), 2, checkpoint=path)

    assert server.calls == dict.fromkeys(map(str, range(6)), 1)


def test_a_chunk_that_a_session_sent_twice_is_looked_for(server, clock, path):
    """Of the two the first may have been taken, whatever is said of the second."""
    lost = Answer("", 502)
    server.answer("POST", UPLOADS, lambda request: (server.play(request), lost)[1], Answer({}, 403), server.play)
    with requests.Session() as session:
        session.mount("http://", HTTPAdapter(max_retries=Retry(1, status_forcelist=[502], allowed_methods=["POST"])))
        options = {"session": session, "idempotent_uploads": server.deduplicates}
        with SynthgenClient(server.url, "k", **options) as client:
            if server.deduplicates:  # which is left to the next call, under the same key
                with pytest.raises(BatchUploadError):
                    client.create_batch(tasks(2), checkpoint=path)
            client.create_batch(tasks(2), checkpoint=path)

    assert server.calls == {"0": 1, "1": 1}


def test_a_proxys_404_does_not_say_that_the_batch_is_gone(server, client, path):
    """Who removed the checkpoint, as is advised for a batch that is, would pay for all of it twice."""
    break_off(server, client, path, Answer({"detail": "no"}, 401))
    (batch_id,) = batch_ids(server)
    server.answer("GET", f"{UPLOADS}/{batch_id}", Answer("<html>not here</html>", 404), server.play)

    with pytest.raises(NotFoundError, match="with a web page") as caught:
        client.create_batch(tasks(6), 2, checkpoint=path)
    assert "remove" not in str(caught.value)
    client.create_batch(tasks(6), 2, checkpoint=path)

    assert server.calls == dict.fromkeys(map(str, range(6)), 1)


def test_a_proxys_404_does_not_make_it_another_server(server, client, path):
    """Under a new address it is asked for its batch, and nobody is told to remove the file."""
    client.create_batch(tasks(2), checkpoint=path)
    (batch_id,) = batch_ids(server)
    server.answer("GET", f"{UPLOADS}/{batch_id}", Answer("<html>not here</html>", 404), server.play)
    with SynthgenClient(server.url.replace("127.0.0.1", "localhost"), "k") as moved:
        with pytest.raises(NotFoundError, match="with a web page"):
            moved.create_batch(tasks(2), checkpoint=path)
        assert moved.create_batch(tasks(2), checkpoint=path).batch_id == batch_id

    assert len(sent(server)) == 1


@pytest.mark.parametrize("was_taken", [True, False], ids=["taken", "lost"])
def test_the_chunk_in_doubt_is_run_once(server, client, path, was_taken):
    """It is looked for, or sent again under its key: each prompt is paid for once."""
    break_off(server, client, path, lambda request: (server.play(request) if was_taken else None, DROP)[1])

    client.create_batch(tasks(6), 2, checkpoint=path)

    assert server.calls == dict.fromkeys(map(str, range(6)), 1)
    keys = [request.headers["Idempotency-Key"] for request in server.requests if request.method == "POST"]
    if server.deduplicates:
        assert keys[1] == keys[2]


def test_a_finished_one_sends_nothing_and_gives_the_results(server, client, path):
    """From the batch, as often as they are wanted, though the chunk size is another now."""
    first = client.monitor_batch(tasks(5), chunk_size=2, show_progress=False, checkpoint=path)
    uploads = len(sent(server))

    again = client.monitor_batch(tasks(5), chunk_size=3, show_progress=False, checkpoint=path)

    assert [one.content for one in again] == [one.content for one in first]
    assert len(sent(server)) == uploads == 3


def test_it_holds_no_task_and_no_key(server, client, path):
    """Only digests; and nobody else can read it."""
    client.create_batch([task("my prompt", api_key="sk-secret", custom_id="my id")], checkpoint=path)

    text = path.read_text(encoding="ascii")
    assert not any(secret in text for secret in ("my prompt", "sk-secret", "my id"))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_another_provider_key_is_no_other_task(server, client, path):
    """Keys are changed from time to time."""
    break_off(
        server, client, path, Answer(None, 401), [task(str(i), api_key="sk-1", use_cache=False) for i in range(6)]
    )

    client.create_batch([task(str(i), api_key="sk-2-longer", use_cache=False) for i in range(6)], 2, checkpoint=path)

    assert server.calls == dict.fromkeys(map(str, range(6)), 1)


def test_a_chunk_in_doubt_may_have_another_provider_key_now(path):
    """The embedded server refuses it under the key of its first try: it is looked for, and is there."""
    options = {"idempotent_uploads": True, "backoff_factor": 0}
    with DemoProvider() as provider, LocalServer() as server, FaultyProxy(server.url, 0, rate=0.0) as proxy:
        first, now = (task("solve x = 1", url=provider.url, api_key=key) for key in ("sk-1", "sk-2"))
        proxy.answer("POST", UPLOADS, lambda request: (proxy.forward(request), DROP)[1])
        with SynthgenClient(proxy.url, server.api_key, retries=0, **options) as client:
            with pytest.raises(BatchUploadError):
                client.create_batch([first], checkpoint=path)
        proxy.answer("POST", UPLOADS, proxy.forward)

        with SynthgenClient(proxy.url, server.api_key, **options) as client:
            (result,) = client.monitor_batch([now], show_progress=False, checkpoint=path)

            assert result.content == "x = 1" and client.get_batch(result.batch_id).total_tasks == 1


@pytest.mark.parametrize(
    "change, chunk",
    [
        (lambda given: [task("other"), *given[1:]], 1),
        (lambda given: [*given[:2], task("other"), *given[3:]], 2),
        (lambda given: given[:2], 2),
        (lambda given: given[:1], 1),
    ],
    ids=["first", "second", "fewer", "one"],
)
def test_other_tasks_are_refused(server, client, path, change, chunk):
    """The error names the first chunk that differs, and what to do; nothing is sent."""
    break_off(server, client, path, Answer(None, 401))
    before = len(sent(server))

    with pytest.raises(CheckpointError, match=f"from chunk {chunk} on .* remove this one") as caught:
        client.create_batch(change(tasks(6)), 2, checkpoint=path)

    assert str(path) in str(caught.value) and isinstance(caught.value, ConfigurationError)
    assert len(sent(server)) == before


def test_more_tasks_than_a_finished_one_are_refused(server, client, path):
    """They are no part of its batch."""
    client.create_batch(tasks(4), 2, checkpoint=path)

    with pytest.raises(CheckpointError, match="chunk 3"):
        client.create_batch(tasks(6), 2, checkpoint=path)

    assert len(sent(server)) == 2


def test_an_empty_file_is_a_new_one_for_its_owner_alone(server, client, path):
    """Made by ``touch``, or by ``mktemp``."""
    path.touch(0o644)

    client.create_batch(tasks(2), checkpoint=path)

    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize("has_index", [True, False], ids=["used", "new"])
def test_another_server_is_refused(server, client, path, has_index):
    """The error names both; nothing is sent, and asked only whether it has the batch."""
    batch_id = client.create_batch(tasks(2), checkpoint=path).batch_id

    with Framework() as other, SynthgenClient(other.url, retries=0) as stranger:
        other.has_index = has_index
        with pytest.raises(CheckpointError, match=f"{server.url}, which is not at {other.url}"):
            stranger.create_batch(tasks(2), checkpoint=path)
        assert [(request.method, request.path) for request in other.requests] == [("GET", f"{UPLOADS}/{batch_id}")]


def test_a_server_that_has_the_batch_is_the_same_by_whatever_name(server, client, path):
    """It moved, or is reached by another way: what was taken is not sent again."""
    break_off(server, client, path, Answer({"detail": "no"}, 401))

    with SynthgenClient(server.url.replace("127.0.0.1", "localhost"), "k") as other:
        assert other.create_batch(tasks(6), 2, checkpoint=path).total_tasks == 6

    assert sent(server) == [["0", "1"], ["2", "3"], ["2", "3"], ["4", "5"]]


@pytest.mark.parametrize(
    "content", [b"my notes", b"{}\n", b'{"format": "synthgen checkpoint 2"}\n', b"\xff\n", b"[]\n"]
)
def test_another_programs_file_is_refused(server, client, path, content):
    """And left as it is."""
    path.write_bytes(content)

    with pytest.raises(CheckpointError, match="no checkpoint"):
        client.create_batch(tasks(2), checkpoint=path)

    assert path.read_bytes() == content and server.requests == []


def test_a_checkpoint_with_a_line_of_something_else_is_refused(server, client, path):
    """Whatever JSON that is."""
    client.create_batch(tasks(2), checkpoint=path)

    for line in "[]", "5", '"text"', "null":
        begun = path.read_bytes()
        path.write_bytes(begun + line.encode() + b"\n")
        with pytest.raises(CheckpointError, match="no checkpoint"):
            client.create_batch(tasks(2), checkpoint=path)
        path.write_bytes(begun)


def test_a_file_that_is_in_use_is_refused(server, client, path):
    """Two runs would send the same tasks; nothing is sent by the second."""

    def generate():
        yield from tasks(2)
        with pytest.raises(CheckpointError, match="another run has it open"):
            client.create_batch(tasks(4), checkpoint=path)
        yield from tasks(4)[2:]

    assert client.create_batch(generate(), 2, checkpoint=path).total_tasks == 4
    assert len(sent(server)) == 2


def test_a_file_that_another_process_has_open_is_refused(server, client, path):
    """Until that has ended."""
    client.create_batch(tasks(2), checkpoint=path)
    script = (
        "import sys; from synthgen._files import hold; file = open(sys.argv[1], 'ab'); hold(file);"
        "print(flush=True); sys.stdin.read()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", script, str(path)], **pipes) as process:
        process.stdout.readline()
        with pytest.raises(CheckpointError, match="another run has it open"):
            client.create_batch(tasks(2), checkpoint=path)
        process.communicate()

    assert client.create_batch(tasks(2), checkpoint=path).total_tasks == 2


@pytest.mark.parametrize("torn", [0, 5])
def test_a_torn_last_line_is_as_if_it_was_not_there(server, client, path, torn):
    """The power went after the chunk was taken, before that was noted: it is in doubt."""
    client.create_batch(tasks(2), checkpoint=path)
    header, chunk, taken = path.read_bytes().splitlines(keepends=True)[:3]
    path.write_bytes(header + chunk + taken[:torn])

    assert client.create_batch(tasks(2), checkpoint=path).total_tasks == 2

    assert server.calls == {"0": 1, "1": 1} and len(batch_ids(server)) == 1
    assert lines(path)[2:] == [{"taken": 0}, {"end": 2}]


@pytest.mark.parametrize("length", [0, 1, 30, 60])
def test_a_torn_first_line_is_a_new_file(server, client, path, length):
    """Nothing was sent before it was whole."""
    client.create_batch(tasks(2), checkpoint=path)
    path.write_bytes(path.read_bytes()[:length])

    client.create_batch(tasks(2), checkpoint=path)

    assert len(batch_ids(server)) == 2 and lines(path)[-1] == {"end": 2}


def test_every_line_is_on_the_disk_before_what_it_announces(server, client, path, monkeypatch):
    """The chunk before it is sent, its end after it was taken."""
    seen = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda number: (fsync(number), seen.append(path.read_bytes()))[0])

    def take(request):
        assert seen[-1] == path.read_bytes() and "key" in lines(path)[-1]
        return server.play(request)

    server.answer("POST", UPLOADS, take)
    client.create_batch(tasks(3), 2, checkpoint=path)

    assert seen[-1] == path.read_bytes()
    assert [set(line) for line in lines(path)[1:]] == [{"tasks", "digest", "key"}, {"taken"}] * 2 + [{"end"}]


def test_a_batch_that_is_gone_is_not_found(server, client, path):
    """The error says which file remembers it; nothing is sent."""
    batch_id = client.create_batch(tasks(2), checkpoint=path).batch_id
    client.delete_batch(batch_id)

    with pytest.raises(NotFoundError, match="has nothing of its batch") as caught:
        client.monitor_batch(tasks(2), show_progress=False, checkpoint=path)

    assert str(path) in str(caught.value) and batch_id in str(caught.value)
    assert len(sent(server)) == 1


def test_a_batch_that_is_not_ingested_yet_is_not_gone(clock, server, client, path):
    """It was uploaded a moment ago."""
    client.create_batch(tasks(2), checkpoint=path)
    if not server.deduplicates:
        server._documents.clear()
        server.refresh()
        server.ingests = False
        server._batch_queue += [(batch_ids(server).pop(), line) for line in server.requests[0].file.split(b"\n")]
        clock.at(20, server.ingest)

    assert client.create_batch(tasks(2), checkpoint=path).total_tasks == 2


def test_no_tasks_leave_nothing_to_contradict(server, client, path):
    """An iterator that was read already, say: with the right tasks the same file is as good as new."""
    with pytest.raises(ValueError, match="no tasks"):
        client.create_batch(iter(()), checkpoint=path)

    assert client.create_batch(tasks(2), checkpoint=path).total_tasks == 2


@pytest.mark.parametrize("options", [{"batch_id": "b"}, {"idempotency_key": "k"}])
def test_a_checkpoint_names_the_batch_itself(server, client, path, options):
    """Nothing is sent, and no file made."""
    with pytest.raises(ValueError, match="a checkpoint names"):
        client.create_batch(tasks(2), checkpoint=path, **options)

    assert not path.exists() and server.requests == []


def test_a_full_disk_ends_the_upload_before_the_chunk_is_sent(server, client, path, monkeypatch):
    """The chunk remains, since it surely was not taken."""

    def full(number):
        raise OSError(28, "No space left on device")

    def generate():
        yield from tasks(2)
        monkeypatch.setattr(os, "fsync", full)
        yield from tasks(4)[2:]

    with pytest.raises(BatchUploadError) as caught:
        client.create_batch(generate(), 2, checkpoint=path)

    error = caught.value
    assert isinstance(error.__cause__, OSError)
    assert (error.uploaded, error.unconfirmed, [one.custom_id for one in error.remaining]) == (2, [], ["2", "3"])


def test_without_a_checkpoint_nothing_is_written(server, client, tmp_path, monkeypatch):
    """No hidden state."""
    monkeypatch.chdir(tmp_path)

    client.create_batch(tasks(2))

    assert os.listdir() == []


def test_an_embedded_server_is_named_by_its_file(tmp_path, path):
    """Its port is another at each start."""
    with DemoProvider() as provider:
        given = [task(prompt, url=provider.url) for prompt in ("solve x = 1", "solve x = 2")]
        for _ in range(2):
            with LocalServer(tmp_path / "db") as server, server.client() as client:
                results = client.monitor_batch(given, show_progress=False, checkpoint=path)
                assert [one.content for one in results] == ["x = 1", "x = 2"]
                assert client.get_batches().total == 1
