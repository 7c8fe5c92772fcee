"""Hostile but ordinary environments: proxies, private certificates, old locales, no home, forks and threads."""

import json
import os
import socket
import ssl
import subprocess
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from urllib.parse import urlsplit

import pytest
import requests
from servers import DEADLINE, DROP, RESET, Answer, CannedServer

from synthgen import BatchUploadError, ConnectionFailedError, SynthgenClient, Task
from synthgen.local import DemoProvider, LocalServer

pytestmark = pytest.mark.slow

NOBODY = "http://127.0.0.1:9"
HEALTHY = {"status": "healthy"}


def equations(provider, count, start=0):
    """Tasks whose solutions are ``x = start``, ``x = start + 1``, ..."""
    prompts = [f"solve 3x + 1 = {3 * x + 1}" for x in range(start, start + count)]
    return [Task(url=provider.url, body={"messages": [{"role": "user", "content": prompt}]}) for prompt in prompts]


def contents(results):
    return [result.content for result in results]


def solutions(count, start=0):
    return [f"x = {x}" for x in range(start, start + count)]


def run(*argv, environment=(), **options):
    """Run a Python with these arguments, which finds the same package, and return what it wrote, as bytes."""
    found = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(
        [sys.executable, *argv],
        env={**os.environ, **found, **dict(environment)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=DEADLINE,
        **options,
    )
    assert done.returncode == 0, done.stderr.decode("utf-8", "replace")
    return done


# --------------------------------------------------------------------------------------------- proxies


def test_a_server_elsewhere_is_asked_through_the_proxy(server, monkeypatch):
    """HTTP_PROXY holds, uploads included."""
    server.answer("GET", "/health", HEALTHY)
    server.answer("POST", "/api/v1/batches", lambda request: {**request.query, "total_tasks": len(request.lines)})
    monkeypatch.setenv("HTTP_PROXY", server.url)
    monkeypatch.setenv("http_proxy", server.url)

    with SynthgenClient("http://synthgen.test:8002") as client:
        client.check_health()
        batch_id = client.create_batch([Task(url="http://provider.test", body={})]).batch_id

    assert [request.path for request in server.requests] == [
        "http://synthgen.test:8002/health",
        f"http://synthgen.test:8002/api/v1/batches?batch_id={batch_id}",
    ]


def test_a_server_in_no_proxy_is_asked_directly(server, monkeypatch):
    """By its address as well as by its name."""
    server.answer("GET", "/health", HEALTHY)
    monkeypatch.setenv("http_proxy", NOBODY)
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")

    for url in (server.url, server.url.replace("127.0.0.1", "localhost")):
        with SynthgenClient(url) as client:
            client.check_health()

    assert [request.path for request in server.requests] == ["/health", "/health"]


@pytest.mark.parametrize("fault", [DROP, RESET], ids=["drop", "reset"])
def test_what_breaks_off_behind_a_proxy_is_asked_for_again(server, monkeypatch, fault):
    """As without one, though urllib3 calls it a fault of the proxy; but an upload may have been taken."""
    server.answer("GET", "/api/v1/batches", fault, fault, {"total": 0, "batches": []})
    server.answer("POST", "/api/v1/batches", fault)
    monkeypatch.setenv("http_proxy", server.url)

    with SynthgenClient("http://synthgen.test:8002", retries=2, backoff_factor=0) as client:
        assert client.get_batches().total == 0
        with pytest.raises(BatchUploadError) as caught:
            client.create_batch([Task(url="http://provider.test", body={})])

    assert len(caught.value.unconfirmed) == 1
    assert [request.method for request in server.requests][:4] == ["GET", "GET", "GET", "POST"]
    assert [request.method for request in server.requests].count("POST") == 1


def test_a_proxy_that_is_not_there_is_said_to_be_so(monkeypatch):
    """The error is about the proxy, not about the server."""
    monkeypatch.setenv("http_proxy", NOBODY)

    with SynthgenClient("http://synthgen.test", retries=0) as client:
        with pytest.raises(ConnectionFailedError, match="the proxy failed"):
            client.get_batches()


def test_an_embedded_server_needs_no_proxy(monkeypatch):
    """Its own client and its calls to this machine go around one."""
    monkeypatch.setenv("http_proxy", NOBODY)

    with DemoProvider() as provider, LocalServer() as server, server.client() as client:
        assert contents(client.monitor_batch(equations(provider, 2), show_progress=False)) == solutions(2)


# -------------------------------------------------------------------------------------------- TLS, paths


@pytest.fixture(scope="module")
def authority():
    """A private certificate authority."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of cryptography, on an old Python
        import trustme
    return trustme.CA()


@pytest.fixture
def bundle(authority, tmp_path):
    """The file with its certificate."""
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    return str(tmp_path / "ca.pem")


@pytest.fixture
def tls(authority):
    """What a server needs for a certificate of that authority."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    return context


def test_a_private_authority_is_given_by_the_environment(tls, bundle, monkeypatch):
    """REQUESTS_CA_BUNDLE holds for a session of ours; without it the certificate is refused."""
    with CannedServer(tls) as server:
        server.answer("GET", "/health", HEALTHY)
        with SynthgenClient(server.url) as client:
            with pytest.raises(ConnectionFailedError, match="TLS failed.*(?i:certificate)"):
                client.check_health()
            monkeypatch.setenv("REQUESTS_CA_BUNDLE", bundle)
            assert client.check_health().status == "healthy"


def test_a_client_certificate_is_given_by_a_session(authority, tls, bundle, tmp_path):
    """The server asks for one; a session that has none gets no answer."""
    tls.verify_mode = ssl.CERT_REQUIRED
    authority.configure_trust(tls)
    authority.issue_cert("me@example.org").private_key_and_cert_chain_pem.write_to_path(str(tmp_path / "me.pem"))

    with CannedServer(tls) as server, requests.Session() as session:
        server.answer("GET", "/health", HEALTHY)
        session.verify = bundle
        client = SynthgenClient(server.url, session=session)
        with pytest.raises(ConnectionFailedError):
            client.check_health()
        session.cert = str(tmp_path / "me.pem")
        assert client.check_health().status == "healthy"


class ReverseProxy(CannedServer):
    """Hands on what is under a prefix, without it; the rest is not found."""

    def __init__(self, prefix, upstream):
        self._prefix, self._upstream = prefix, upstream
        super().__init__()

    def _answer_to(self, request):
        if not request.path.startswith(f"{self._prefix}/"):
            return super()._answer_to(request)
        connection = HTTPConnection(urlsplit(self._upstream).netloc, timeout=DEADLINE)
        try:
            path = request.path[len(self._prefix) :]
            connection.request(request.method, path, request.body or None, dict(request.headers))
            response = connection.getresponse()
            return Answer(response.read(), response.status, {"Content-Type": response.headers["Content-Type"]})
        finally:
            connection.close()


def test_a_server_may_be_under_a_path(tmp_path):
    """Behind a reverse proxy, every method reaches it."""
    with DemoProvider() as provider, LocalServer() as server:
        with ReverseProxy("/tools/synthgen", server.url) as proxy:
            with SynthgenClient(f"{proxy.url}/tools/synthgen/", server.api_key) as client:
                results = client.monitor_batch(equations(provider, 3), show_progress=False)
                batch_id, message_id = results[0].batch_id, results[0].message_id

                assert contents(results) == solutions(3)
                assert client.get_batch(batch_id).completed_tasks == client.get_batches().total * 3
                assert client.export_batch(batch_id, tmp_path / "out.jsonl") == 3
                assert client.get_batch_stats(batch_id).summary.completed_tasks == 3
                assert client.get_task_stats().completed_tasks == 3
                assert client.get_task(message_id).message_id == message_id
                client.delete_task(message_id)
                client.delete_batch(batch_id)
                assert client.get_batches().total == 0


def has_ipv6():
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")
def test_a_server_may_have_an_ipv6_address():
    """Its URL has the brackets."""
    with DemoProvider() as provider, LocalServer(host="::1") as server:
        assert server.url.startswith("http://[::1]:")
        with SynthgenClient(server.url, server.api_key) as client:
            assert contents(client.monitor_batch(equations(provider, 1), show_progress=False)) == solutions(1)


# ------------------------------------------------------------------------------------------- processes


@pytest.mark.parametrize(
    "environment",
    [
        {"PYTHONWARNINGS": "error", "PYTHONDEVMODE": "1"},
        {"PYTHONOPTIMIZE": "1"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"LC_ALL": "C", "PYTHONIOENCODING": "latin-1"},
        {"HOME": "/nowhere/at/all"},
        {"TERM": "dumb", "COLUMNS": "1"},
    ],
    ids=str,
)
def test_the_demo_runs_in(environment):
    """Ten solutions on stdout, and nothing on stderr that is not the progress."""
    done = run("-m", "synthgen", "demo", environment=environment)

    lines = done.stdout.decode("ascii").splitlines()
    assert lines[0] == "solve 2x + 4 = 10    ->  x = 3" and len(lines) == 11
    said = done.stderr.decode("ascii")
    assert "10 completed" in said
    assert "Warning" not in said and "Traceback" not in said


@pytest.mark.parametrize("encoding, written", [("latin-1", "Löse 2\\u0436"), ("ascii", "L\\xf6se 2\\u0436")])
def test_the_demo_writes_what_stdout_can_not_hold_as_escapes(encoding, written):
    """With a locale of C and an old encoding."""
    environment = {"LC_ALL": "C", "PYTHONUTF8": "1", "PYTHONIOENCODING": encoding}

    done = run("-m", "synthgen", "demo", "Löse 2ж = 10", environment=environment)

    assert done.stdout.splitlines()[0].decode(encoding) == written + " = 10  ->  \\u0436 = 5"


def test_results_are_ascii_whatever_they_hold(tmp_path):
    """A file of tasks is UTF-8, and a result a line of ASCII, in a locale of C as anywhere."""
    names = ["Größe", "漢字", "\u2028", "\U0001f600"]
    with DemoProvider() as provider:
        lines = [
            {"custom_id": name, "url": provider.url, "body": {"messages": [{"role": "user", "content": "2ж = 10"}]}}
            for name in names
        ]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (tmp_path / "tasks.jsonl").write_bytes(text.encode("utf-8"))
        environment = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}

        done = run("-m", "synthgen", "run", "tasks.jsonl", "--local", environment=environment, cwd=str(tmp_path))

    results = [json.loads(line) for line in done.stdout.decode("ascii").splitlines()]
    assert [result["custom_id"] for result in results] == names
    assert {result["completions"]["choices"][0]["message"]["content"] for result in results} == {"ж = 5"}


def test_the_home_is_left_alone(tmp_path):
    """It may be read-only: nothing is written there, with rich or without."""
    home = tmp_path / "home"
    home.mkdir(mode=0o500)

    run("-m", "synthgen", "demo", environment={"HOME": str(home), "USERPROFILE": str(home)}, cwd=str(tmp_path))

    assert list(home.iterdir()) == []
    assert list(tmp_path.iterdir()) == [home]


def test_a_home_is_not_needed(monkeypatch):
    """As in a container or a unit of systemd."""
    for name in ("HOME", "USERPROFILE", "XDG_CONFIG_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

    assert b"x = 4" in run("-m", "synthgen", "demo", "solve 7x - 3 = 25").stdout


FORKED = """
import os, sys
from synthgen import SynthgenClient
from synthgen.local import LocalServer

def ask(client, name):
    for _ in range(50):
        assert client.get_task(name).message_id == name

client = SynthgenClient(sys.argv[1], retries=0)
client.get_task("parent")  # leaves a connection open
child = os.fork()
if child:
    ask(client, "parent")
    sys.exit(os.WEXITSTATUS(os.waitpid(child, 0)[1]))
try:
    ask(client, "child")
    client.close()
except BaseException as exc:
    print(repr(exc), file=sys.stderr)
    os._exit(1)
os._exit(0)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_after_a_fork_both_processes_get_their_own_answers(server):
    """Neither writes to a connection of the other."""
    both = threading.Barrier(2)

    def answer(name):
        def respond(request):
            if not first.is_set():  # the parent's, before the fork
                first.set()
            else:
                both.wait(DEADLINE)  # two requests at a time, so two connections
            return {"message_id": name, "status": "COMPLETED"}

        return respond

    first = threading.Event()
    for name in ("parent", "child"):
        server.answer("GET", f"/api/v1/tasks/{name}", answer(name))

    run("-c", FORKED, server.url)


SPAWNED = """
import multiprocessing, sys
from synthgen import SynthgenClient

client = SynthgenClient(timeout=20)

def ask(name):
    return client.get_task(name).message_id

def ask_with(client):
    return client.get_task("m").message_id

if __name__ == "__main__":
    assert ask("m") == "m"
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.map(ask, ["m"]) == ["m"]
        try:
            pool.map(ask_with, [client])
        except TypeError as exc:
            print(exc)
"""


def test_a_spawned_process_makes_its_own_client(server, tmp_path):
    """At the top of a module one is made in each; handing one over is refused, and the error says what to do."""
    server.answer("GET", "/api/v1/tasks/m", {"message_id": "m", "status": "COMPLETED"})
    script = tmp_path / "script.py"
    script.write_text(SPAWNED, encoding="utf-8")

    done = run(str(script), environment={"SYNTHGEN_BASE_URL": server.url})

    assert done.stdout.decode().strip() == "a client can't be pickled, since its key would be; make one in each process"


def test_clients_and_batches_in_threads_do_not_meet():
    """Two clients, each of them shared by threads, with a batch in each thread."""
    with DemoProvider() as provider, LocalServer() as server, server.client() as one, server.client() as other:

        def job(number):
            client = (one, other)[number % 2]
            tasks = equations(provider, 5, start=10 * number)
            return contents(client.monitor_batch(tasks, poll_interval=0.2, show_progress=False))

        with ThreadPoolExecutor(8) as threads:
            assert list(threads.map(job, range(8))) == [solutions(5, 10 * number) for number in range(8)]
