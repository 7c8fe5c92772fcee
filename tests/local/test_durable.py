"""What a database file holds, and what it does not: ends of processes, provider keys, full disks, wrong files."""

import json
import os
import random
import socket
import sqlite3
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent import futures
from contextlib import closing

import pytest
import requests
from servers import DEADLINE, Answer

from synthgen.exceptions import ConfigurationError
from synthgen.local import LocalServer
from synthgen.local import database as database_module
from synthgen.local.database import Database
from synthgen.local.provider import Provider
from synthgen.local.store import Result, Store
from synthgen.local.worker import Workers

pytestmark = pytest.mark.slow

SERVE = """
import sys
from synthgen.local import LocalServer
with LocalServer(sys.argv[1], api_key="the-key", workers=4) as server:
    print(server.url, flush=True)
    sys.stdin.read()
"""


class Process:
    """A server in a process of its own, to be killed."""

    def __init__(self, database):
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVE, str(database)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self.url = self.process.stdout.readline().decode().strip()

    def kill(self):
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


@pytest.fixture
def database(tmp_path):
    return tmp_path / "tasks.db"


def files(database):
    """The bytes of the database's files, by their names' ends."""
    return {path.name[len(database.name) :]: path.read_bytes() for path in database.parent.glob(database.name + "*")}


def upload_until_killed(url, chunks, confirmed):
    """Upload chunk after chunk; what was answered 200 is confirmed."""
    with requests.Session() as session:
        session.trust_env = False
        session.headers["Authorization"] = "Bearer the-key"
        for number, chunk in enumerate(chunks):
            content = "\n".join(map(json.dumps, chunk))
            try:
                response = session.post(
                    url + "/api/v1/batches",
                    params={"batch_id": "b"},
                    files={"file": ("batch.jsonl", content)},
                    headers={"Idempotency-Key": str(number)},
                    timeout=DEADLINE,
                )
            except requests.RequestException:
                return
            if response.status_code == 200:
                confirmed.append(number)


@pytest.mark.parametrize("seed", range(20))
def test_after_kill_9_every_task_ends_once(serve, model, task, database, seed):
    """No task is lost or there twice, none is called more than once after the kill, and the counters are right."""
    chunks = [[task(f"{chunk}-{index}", custom_id=f"{chunk}-{index}") for index in range(10)] for chunk in range(6)]
    confirmed, killed = [], threading.Event()
    calls_until_kill = random.Random(seed).randrange(60)

    def answer(request):
        if len(model.requests) > calls_until_kill:
            killed.set()
        return model.echo(request)

    model.answers(answer)
    process = Process(database)
    uploading = threading.Thread(target=upload_until_killed, args=(process.url, chunks, confirmed))
    uploading.start()
    assert killed.wait(DEADLINE)
    process.kill()
    uploading.join(DEADLINE)

    api = serve(database=database, api_key="the-key", workers=4)
    upload_until_killed(api.server.url, chunks, [])  # the same keys: what was stored is not stored again
    batch = api.wait("b")
    tasks = api.export("b")

    expected = sorted(line["custom_id"] for chunk in chunks for line in chunk)
    calls = Counter(model.prompts())
    assert sorted(result["custom_id"] for result in tasks) == expected
    assert all(result["status"] == "COMPLETED" for result in tasks)
    assert (batch["total_tasks"], batch["completed_tasks"] + batch["cached_tasks"]) == (60, 60)
    assert sorted(calls) == expected
    assert max(calls.values()) <= 2


def test_what_was_confirmed_is_there_after_kill_9(serve, model, task, database):
    """An upload that was answered survives the process."""
    model.answers(Answer(hold=threading.Event()))
    process, confirmed = Process(database), []
    upload_until_killed(process.url, [[task("one")], [task("two")]], confirmed)
    process.kill()

    assert confirmed == [0, 1]
    assert serve(database=database).batch("b")["total_tasks"] == 2


def test_an_unfinished_batch_goes_on_after_a_restart(serve, model, task, database):
    """Closing breaks off a call; the task is PENDING, and runs at the next start."""
    model.answers(Answer(hold=threading.Event()), model.echo)
    first = serve(database=database)
    batch_id = first.submit(task("hello", use_cache=False))
    model.wait_for_requests(1)
    first.close()
    second = serve(database=database)
    batch = second.wait(batch_id)

    assert (batch["completed_tasks"], batch["failed_tasks"]) == (1, 0)
    assert len(model.requests) == 2


def test_the_cache_and_the_message_ids_survive_a_restart(serve, task, database):
    """A task asked for by its id, and one answered from the cache, as if nothing had happened."""
    first = serve(database=database)
    (before,) = first.run(task("same"))
    first.close()
    second = serve(database=database)

    assert second.get(f"/api/v1/tasks/{before['message_id']}")["custom_id"] == before["custom_id"]
    assert second.run(task("same"))[0]["cached"]


def test_may_go_onleaves_no_thread_and_no_file_but_the_database(serve, model, task, database):
    """Even in the middle of a call, and with clients connected."""
    threads = set(threading.enumerate())
    model.answers(Answer(hold=threading.Event()))
    with LocalServer(database) as server, requests.Session() as session:
        session.headers["Authorization"] = f"Bearer {server.api_key}"
        files = {"file": ("batch.jsonl", json.dumps(task()))}
        assert session.post(server.url + "/api/v1/batches", files=files).status_code == 200
        model.wait_for_requests(1)
    left = {thread for thread in threading.enumerate() if thread.name.startswith("synthgen")}

    assert left <= threads
    assert [path.name for path in database.parent.iterdir()] == [database.name]


def test_a_temporary_database_is_removed(serve, monkeypatch, tmp_path):
    """Nothing stays of :memory:."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    api = serve()
    there = list(tmp_path.rglob("tasks.db"))
    api.close()

    assert there
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.name != "posix", reason="permissions are POSIX's")
def test_the_files_are_private(serve, model, task, database):
    """Nobody else reads prompts or keys."""
    model.answers(Answer(hold=threading.Event()))
    serve(database=database).submit(task())
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in database.parent.glob("tasks.db*")}

    assert {"tasks.db", "tasks.db-wal", "tasks.db-shm"} <= set(modes)
    assert set(modes.values()) == {0o600}


def test_a_providers_key_is_gone_when_its_batch_has_ended(serve, model, task, database):
    """In none of the files is any byte of it left."""
    hold = threading.Event()
    model.answers(lambda request: Answer(model.echo(request), hold=hold))
    api = serve(database=database)
    batch_id = api.submit(*[task(f"{number}", api_key="sk-sentinel") for number in range(100)])
    model.wait_for_requests(1)
    before = files(database)
    hold.set()
    api.wait(batch_id)
    after = files(database)

    assert any(b"sk-sentinel" in content for content in before.values())
    assert not any(b"sk-sentinel" in content for content in after.values())


def test_a_providers_key_is_in_no_copy_of_a_row_that_grew(database):
    """A row that gets an answer may have to go to another page, and SQLite leaves bytes of it where it was."""
    chance = random.Random(3)
    bodies = [json.dumps("b" * chance.randint(40, 700)) for _ in range(1000)]
    rows = [("id", "POST", "http://p.test", "sk-sentinel", body, None, "null", True, False) for body in bodies]
    with closing(Store(database)) as store:
        first = store.add("b", rows, None, b"").result().first_task
        running, done = list(range(first, first + 1000)), []
        while running:  # about in order, as workers do it
            task_id = running.pop(chance.randrange(min(16, len(running))))
            result = Result(True, json.dumps("y" * chance.randint(500, 1200)), 1)
            done.append(store.finish(task_id, result, 1, 2, None))
            if len(done) % 16 == 0:
                done[-1].result()
        done[-1].result()
        assert store.batch("b")["completed"] == 1000
        left = files(database)

    assert not any(b"sk-sentinel" in content for content in left.values())


@pytest.mark.parametrize("what", ["batch", "task"])
def test_a_providers_key_is_gone_when_its_task_is_deleted(serve, model, task, database, what):
    """A delete leaves no byte of it in any of the files, while other tasks run."""
    model.answers(Answer(hold=threading.Event()))
    api = serve(database=database)
    api.submit(task("other", api_key="sk-other"))
    batch_id = api.submit(task("deleted", api_key="sk-sentinel"), task("kept", api_key="sk-kept"))
    path = {"batch": f"batches/{batch_id}", "task": f"tasks/{api.export(batch_id)[1]['message_id']}"}[what]
    assert api.ask("DELETE", f"/api/v1/{path}").status_code == 204
    after = files(database)

    assert any(b"sk-other" in content for content in after.values())
    assert not any(b"sk-sentinel" in content for content in after.values())


def test_a_second_server_on_the_same_file_is_refused(serve, database):
    """Each would run the other's tasks."""
    serve(database=database)

    with pytest.raises(ConfigurationError, match="another server"):
        serve(database=database)


def test_a_lock_that_another_server_has_just_let_go_of_locks_nothing(serve, database, monkeypatch):
    """It has removed its file meanwhile, and a third server may have made the next."""

    def connect(path, timeout):
        if path.endswith("-lock"):
            os.rename(path, path + "-old")
            open(path, "w").close()
            path += "-old"
        return connected(path, timeout)

    connected = database_module._connect
    monkeypatch.setattr(database_module, "_connect", connect)
    with pytest.raises(ConfigurationError, match="another server"):
        serve(database=database)


def test_a_second_server_on_the_same_file_is_refused_by_any_name(serve, database):
    """A link is no other file."""
    serve(database=database)
    link = database.with_name("link.db")
    link.symlink_to(database)

    with pytest.raises(ConfigurationError, match="another server"):
        serve(database=link)


def test_a_relative_name_stays_that_of_the_same_file(serve, tmp_path, monkeypatch):
    """Even if the process goes to another folder."""
    monkeypatch.chdir(tmp_path)
    api = serve(database="here.db")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")

    reading = api.server._store._database.reading
    with reading() as one, reading() as another, reading() as a_third:
        for connection in (one, another, a_third):
            assert connection.execute("SELECT * FROM batches").fetchall() == []
    assert os.listdir() == []


def test_what_is_not_ours_keeps_its_mode(serve, tmp_path):
    """A folder, a text, another program's database: refused, and left as it was."""
    folder, text, other = tmp_path / "folder", tmp_path / "tasks.jsonl", tmp_path / "other.db"
    folder.mkdir()
    text.write_text("{}\n" * 1000)
    with closing(sqlite3.connect(str(other))) as connection:
        connection.execute("CREATE TABLE other (id)")
    for path in (folder, text, other):
        path.chmod(0o755)
        with pytest.raises(ConfigurationError):
            serve(database=path)
        assert stat.S_IMODE(path.stat().st_mode) == 0o755


def test_a_server_that_cant_start_calls_nobody(serve, model, task, database):
    """What an earlier one left is run, and paid for, only when all else is in order."""
    model.answers(Answer(hold=threading.Event()))
    api = serve(database=database)
    api.submit(task())
    model.wait_for_requests(1)
    api.close()

    with socket.create_server(("127.0.0.1", 0)) as taken:
        with pytest.raises(ConfigurationError, match="can't listen"):
            serve(database=database, port=taken.getsockname()[1])

    assert not [thread for thread in threading.enumerate() if thread.name == "synthgen-worker"]
    assert len(model.requests) == 1


def test_more_workers_than_the_machine_has_threads_for_are_refused(serve, model, task, database, monkeypatch):
    """Those that there are call nobody."""
    model.answers(Answer(hold=threading.Event()))
    api = serve(database=database)
    api.submit(task())
    model.wait_for_requests(1)
    api.close()

    monkeypatch.setattr("synthgen.local.worker.threading.Thread.start", _start_no_third_worker)
    with pytest.raises(ConfigurationError, match="give fewer"):
        serve(database=database, workers=3)

    assert not [thread for thread in threading.enumerate() if thread.name.startswith("synthgen")]
    assert len(model.requests) == 1


def _start_no_third_worker(thread, start=threading.Thread.start):
    if [thread.name for thread in (thread, *threading.enumerate())].count("synthgen-worker") == 3:
        raise RuntimeError("can't start new thread")
    start(thread)


@pytest.mark.parametrize("content", [b"not a database at all" * 100, b"\x00" * 4096])
def test_a_file_that_is_no_database_is_refused(serve, database, content):
    """And stays as it was."""
    database.write_bytes(content)

    with pytest.raises(ConfigurationError, match=str(database)):
        serve(database=database)
    assert database.read_bytes() == content


def test_a_database_of_another_program_is_refused(serve, database):
    """And stays as it was."""
    with closing(sqlite3.connect(str(database))) as connection:
        connection.execute("CREATE TABLE other (id)")

    with pytest.raises(ConfigurationError, match="another program"):
        serve(database=database)


def test_a_database_of_another_format_is_refused(serve, database):
    """The error says which format it is."""
    serve(database=database).close()
    with closing(sqlite3.connect(str(database))) as connection:
        connection.execute("PRAGMA user_version = 99")

    with pytest.raises(ConfigurationError, match="its format is 99"):
        serve(database=database)


def test_a_missing_folder_is_refused(serve, database):
    """The error names the file."""
    with pytest.raises(ConfigurationError, match="tasks.db: No such file or directory"):
        serve(database=database.parent / "missing" / "tasks.db")


def test_whatever_waits_to_be_written_is_written():
    """However much it is: more waits here than goes into one transaction."""
    hold, count = threading.Event(), 2500
    database = Database(":memory:", "CREATE TABLE t (a);", "", application_id=1, version=1)
    database.write(lambda connection: hold.wait(DEADLINE))
    writes = [database.write(lambda connection: connection.execute("INSERT INTO t VALUES (1)")) for _ in range(count)]
    hold.set()
    done, _ = futures.wait(writes, timeout=DEADLINE)
    with database.reading() as connection:
        written = connection.execute("SELECT COUNT(*) FROM t").fetchone()[0]
    database.close()

    assert (len(done), written) == (count, count)


def set_pragma(api, text):
    """Change a setting of the connection that writes, while it has nothing to write."""
    api.server._store._database._connection.execute(f"PRAGMA {text}")


def wait_until_unhealthy(api):
    """Until the server has found out that it can't store a result."""
    deadline, pause = time.monotonic() + DEADLINE, threading.Event()
    while api.ask("GET", "/health").status_code != 503:
        assert time.monotonic() < deadline
        pause.wait(0.01)


def test_a_full_disk_refuses_an_upload_and_nothing_of_it_is_there(api, task):
    """507, and the server goes on."""
    set_pragma(api, "max_page_count = 1")
    response = api.upload("\n".join(json.dumps(task(str(number))) for number in range(1000)), batch_id="b")
    set_pragma(api, "max_page_count = 1000000")

    assert response.status_code == 507
    assert response.json() == {"detail": "the database can't be used: database or disk is full"}
    assert api.batch("b") is None
    assert api.run(task())[0]["status"] == "COMPLETED"


def test_a_result_that_meets_a_full_disk_is_kept(api, model, task):
    """It is stored when there is room again, without another call; until then health tells."""
    hold = threading.Event()
    model.answers(Answer({"choices": ["x" * 100_000]}, hold=hold))
    batch_id = api.submit(task())
    model.wait_for_requests(1)
    set_pragma(api, "max_page_count = 1")
    hold.set()
    wait_until_unhealthy(api)
    set_pragma(api, "max_page_count = 1000000")
    batch = api.wait(batch_id)

    assert batch["completed_tasks"] == len(model.requests) == 1
    assert api.ask("GET", "/health").status_code == 200


@pytest.mark.parametrize("finds_room", ["none", "some"])
def test_no_call_is_made_while_results_can_not_be_stored(api, model, task, finds_room):
    """Each would be paid for, and made again if the server ended before there is room for all, large ones too."""
    hold = threading.Event()
    large, small = Answer({"choices": ["x" * 100_000]}, hold=hold), Answer({"choices": []}, hold=hold)
    model.answers(*([large, small] * 10 + [small] if finds_room == "some" else [large]))
    batch_id = api.submit(*[task(str(number)) for number in range(200)])
    model.wait_for_requests(16)
    set_pragma(api, "max_page_count = 1")
    hold.set()
    wait_until_unhealthy(api)
    threading.Event().wait(0.5)  # in which all the others could be called
    made = len(model.requests)
    set_pragma(api, "max_page_count = 1000000")
    batch = api.wait(batch_id)

    assert made <= 2 * 16
    assert batch["completed_tasks"] == len(model.requests) == 200


def test_no_more_answers_than_there_are_workers_wait_to_be_stored(serve, model, task):
    """On a slow disk those of many calls would be lost with the process."""
    api, hold, disk = serve(workers=2), threading.Event(), threading.Event()
    model.answers(Answer({"choices": []}, hold=hold))
    batch_id = api.submit(*[task(str(number)) for number in range(20)])
    model.wait_for_requests(2)
    api.server._store._database.write(lambda connection: disk.wait(DEADLINE))
    hold.set()
    threading.Event().wait(0.5)  # in which all the others could be called
    made = len(model.requests)
    disk.set()

    assert made <= 4  # two that wait, and two that ran meanwhile
    assert api.wait(batch_id)["completed_tasks"] == len(model.requests) == 20


def test_what_found_no_room_is_stored_when_there_is_some_at_the_end(serve, model, task, database):
    """It was paid for."""
    api, hold = serve(database=database), threading.Event()
    model.answers(Answer({"choices": ["x" * 100_000]}, hold=hold))
    batch_id = api.submit(task())
    model.wait_for_requests(1)
    set_pragma(api, "max_page_count = 1")
    hold.set()
    wait_until_unhealthy(api)
    set_pragma(api, "max_page_count = 1000000")
    api.close()

    assert serve(database=database).batch(batch_id)["completed_tasks"] == len(model.requests) == 1


def test_an_answer_that_is_whole_when_the_server_closes_is_stored(serve, model, task, database, monkeypatch):
    """Its worker has only not come to tell it."""
    arrived, may_go_on = threading.Event(), threading.Event()
    take = Workers._take

    def take_late(self, ended=None):
        if ended is not None:
            arrived.set()
            may_go_on.wait(DEADLINE)
        return take(self, ended)

    monkeypatch.setattr(Workers, "_take", take_late)
    interrupt = Provider.interrupt
    monkeypatch.setattr(Provider, "interrupt", lambda self: (interrupt(self), may_go_on.set()))
    api = serve(database=database, workers=1)
    batch_id = api.submit(task())
    assert arrived.wait(DEADLINE)
    api.close()

    assert serve(database=database).wait(batch_id)["completed_tasks"] == len(model.requests) == 1


def test_a_read_only_database_is_a_clear_500(api, task):
    """And the server goes on."""
    set_pragma(api, "query_only = ON")
    response = api.upload(json.dumps(task()))
    set_pragma(api, "query_only = OFF")

    assert response.status_code == 500
    assert "readonly" in response.json()["detail"]
    assert api.run(task())[0]["status"] == "COMPLETED"
