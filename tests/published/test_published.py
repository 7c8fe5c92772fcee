"""The published client, 0.0.7, works unchanged against ``synthgen serve``.

It has our distribution's name and our package's, so it lives in an environment of its own, whose Python
is named by PUBLISHED_PYTHON (tox -e published). Its get_batch_stats() fails against the framework too.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from synthgen.local import DemoProvider

DRIVER = Path(__file__).with_name("driver.py")


@pytest.fixture(scope="module")
def servers():
    """Where a server and a provider are, in variables of the driver's."""
    command = [sys.executable, "-m", "synthgen", "serve", "--port", "0"]
    serve = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE)
    with DemoProvider() as provider, serve:
        said = {}
        while len(said) < 2:  # the two lines to be copied into a shell
            line = serve.stderr.readline().decode("utf-8")
            assert line, "the server ended"
            if line.startswith("export "):
                name, _, value = line[len("export ") :].strip().partition("=")
                said[name] = value
        yield {
            "SERVER_URL": said["SYNTHGEN_BASE_URL"],
            "SERVER_KEY": said["SYNTHGEN_API_KEY"],
            "PROVIDER_URL": provider.url,
        }
        serve.terminate()


@pytest.mark.parametrize(
    "check",
    [
        "health",
        "several_chunks",
        "submitting_and_monitoring",
        "cache",
        "filters",
        "single_tasks",
        "deletions",
        "wrong_key",
    ],
)
def test_a_script_of_the_published_client_runs(servers, check):
    """Against our server as against the framework."""
    subprocess.run(
        [os.environ["PUBLISHED_PYTHON"], "-I", str(DRIVER), check],
        env={**os.environ, **servers},
        stdin=subprocess.DEVNULL,
        check=True,
    )
