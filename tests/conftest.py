"""What holds for every test: nothing of the machine's own settings, and a server that answers as told."""

import os
import signal

import pytest
from hypothesis import settings
from servers import CannedServer

# The same examples every time, and no limit on how long one may take: tests don't measure the machine.
settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
settings.load_profile("repeatable")

_OF_THE_MACHINE = {
    "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "NETRC",
}  # fmt: skip


@pytest.fixture(autouse=True, scope="session")
def _ctrl_c_works():
    """It is ignored in a background job, and in whatever that starts, until someone says otherwise."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True)
def _no_settings_of_the_machine(monkeypatch, tmp_path_factory):
    """Proxies, certificates, netrc files and our own variables are those that a test sets, or none."""
    for name in list(os.environ):
        if name.upper() in _OF_THE_MACHINE or name.startswith("SYNTHGEN_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path_factory.getbasetemp()))
    monkeypatch.setenv("USERPROFILE", str(tmp_path_factory.getbasetemp()))


@pytest.fixture
def server():
    """A server that answers as told; see `CannedServer`."""
    with CannedServer() as running:
        yield running
