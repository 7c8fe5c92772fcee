"""A copy inside another package, where no ``synthgen`` is to be found, and no rich.

These tests import nothing of the package: they also run where it is not installed.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from servers import Answer

pytestmark = pytest.mark.slow

SOURCE = Path(__file__).parent.parent / "synthgen"

#: What may be deleted from a copy; see the README.
OPTIONAL = ["_rich.py", "aio.py", "__main__.py", "local"]

WITHOUT_OTHERS = "import sys; sys.modules['synthgen'] = sys.modules['rich'] = None\n"


@pytest.fixture
def vendored(tmp_path):
    """The folder of an application that has a copy as app._vendor.synthgen."""
    copy = tmp_path / "app" / "_vendor" / "synthgen"
    shutil.copytree(str(SOURCE), str(copy), ignore=shutil.ignore_patterns("__pycache__"))
    for package in (tmp_path / "app", tmp_path / "app" / "_vendor"):
        (package / "__init__.py").touch()
    return tmp_path


def run(folder, script, *arguments):
    """The stdout of a script in that folder, with neither synthgen nor rich, and every warning an error."""
    completed = subprocess.run(
        [sys.executable, "-W", "error", "-c", WITHOUT_OTHERS + script, *arguments],
        cwd=str(folder),
        env={**os.environ, "PYTHONPATH": str(folder)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        check=True,
    )
    return completed.stdout.decode("utf-8")


def test_a_copy_runs_the_whole_job(vendored):
    """Client, monitor, embedded server and demo provider need nothing from the package's own name."""
    script = """
from app._vendor.synthgen import Task
from app._vendor.synthgen.local import DemoProvider, LocalServer
with DemoProvider() as provider, LocalServer() as server, server.client() as client:
    task = Task(url=provider.url, body={"messages": [{"role": "user", "content": "solve 2x + 4 = 10"}]})
    print(client.monitor_batch([task])[0].content)
"""
    assert run(vendored, script) == "x = 3\n"


def test_a_copy_has_the_async_client(vendored):
    """The same job, awaited."""
    script = """
import asyncio
from app._vendor.synthgen import Task
from app._vendor.synthgen.aio import AsyncSynthgenClient
from app._vendor.synthgen.local import DemoProvider, LocalServer
async def main():
    with DemoProvider() as provider, LocalServer() as server:
        async with AsyncSynthgenClient(server.url, server.api_key) as client:
            task = Task(url=provider.url, body={"messages": [{"role": "user", "content": "solve 2x + 4 = 10"}]})
            print((await client.monitor_batch([task], show_progress=False))[0].content)
asyncio.run(main())
"""
    assert run(vendored, script) == "x = 3\n"


def test_a_copy_has_the_command_line(vendored):
    """As ``python -m app._vendor.synthgen``."""
    script = "import runpy; runpy.run_module('app._vendor.synthgen', run_name='__main__', alter_sys=True)"

    with pytest.raises(subprocess.CalledProcessError) as caught:
        run(vendored, script, "no-such-command")
    assert caught.value.returncode == 2

    assert "x = 4" in run(vendored, script, "demo", "solve 7x - 3 = 25")


def test_an_error_of_a_copy_pickles(vendored):
    """Under the copy's name."""
    script = """
import pickle
from app._vendor.synthgen import BatchUploadError, Task
error = BatchUploadError("m", batch_id="b", unconfirmed=[Task(url="http://provider.test", body={})])
copy = pickle.loads(pickle.dumps(error))
print(type(copy).__module__, copy.batch_id, len(copy.unconfirmed))
"""
    assert run(vendored, script) == "app._vendor.synthgen.exceptions b 1\n"


def test_a_copy_cut_down_to_the_client_works(vendored, server):
    """Without drawing, async, command line and embedded server: a batch is submitted, watched and collected."""
    for name in OPTIONAL:
        path = vendored / "app" / "_vendor" / "synthgen" / name
        if path.is_dir():
            shutil.rmtree(str(path))
        elif path.exists():
            path.unlink()
    batch = {"batch_status": "COMPLETED", "total_tasks": 1, "completed_tasks": 1}
    completions = {"choices": [{"message": {"content": "one"}}]}
    result = {"message_id": "m-1", "status": "COMPLETED", "body": {"n": 1}, "completions": completions}
    server.answer("GET", "/health", {"status": "healthy", "services": {"api": "healthy"}})
    server.answer("POST", "/api/v1/batches", lambda request: {**request.query, "total_tasks": len(request.lines)})
    server.answer("GET", "/api/v1/batches/b", {"batch_id": "b", **batch})
    server.answer("GET", "/api/v1/batches/b/tasks/export", Answer({"tasks": [result], "total": 1}))
    script = """
from app._vendor.synthgen import SynthgenClient, Task
with SynthgenClient(sys.argv[1]) as client:
    tasks = [Task(custom_id="first", url="http://provider.test", body={"n": 1})]
    batch = client.create_batch(tasks, batch_id="b")
    (result,) = client.monitor_batch(tasks, batch.batch_id)
    print(result.custom_id, result.content)
"""
    assert run(vendored, script, server.url) == "first one\n"
