"""Settings: from arguments, the environment or a file, and one clear error for each that is wrong."""

import json
import pathlib

import pytest

from synthgen import SynthgenClient
from synthgen.exceptions import ConfigurationError

KEY = "sk-never-to-be-seen"


@pytest.fixture
def config_file(tmp_path):
    """Writes a configuration file, of an object or of bytes as they are, and gives its path."""

    def write(content):
        path = tmp_path / "synthgen.json"
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode("ascii"))
        return path

    return write


@pytest.fixture
def key_sent(server):
    """What a client sends as its key, or None."""
    server.answer("GET", "/api/v1/batches", {"total": 0, "batches": []})

    def ask(**settings):
        with SynthgenClient(server.url, **settings) as client:
            client.get_batches()
        return server.requests[-1].headers.get("Authorization")

    return ask


def test_without_settings_the_defaults_hold():
    """The server of this machine, an hour for an answer."""
    client = SynthgenClient()

    assert (client.base_url, client.timeout) == ("http://localhost:8002", 3600)


def test_an_argument_wins_over_the_environment_and_that_over_the_file(monkeypatch, config_file):
    """Each setting is looked for by itself."""
    path = config_file({"base_url": "http://file.test", "timeout": 1})
    monkeypatch.setenv("SYNTHGEN_BASE_URL", "http://environment.test")

    assert SynthgenClient("http://argument.test", config_file=path).base_url == "http://argument.test"
    assert SynthgenClient(config_file=path).base_url == "http://environment.test"
    assert SynthgenClient(config_file=path).timeout == 1
    monkeypatch.delenv("SYNTHGEN_BASE_URL")
    assert SynthgenClient(config_file=path).base_url == "http://file.test"


def test_the_key_has_the_same_precedence(monkeypatch, config_file, key_sent):
    """Seen by what is sent, since nothing shows it."""
    path = config_file({"api_key": "of-the-file"})

    assert key_sent() is None
    assert key_sent(config_file=path) == "Bearer of-the-file"
    monkeypatch.setenv("SYNTHGEN_API_KEY", "of-the-environment")
    assert key_sent(config_file=path) == "Bearer of-the-environment"
    assert key_sent(config_file=path, api_key="of-the-argument") == "Bearer of-the-argument"


@pytest.mark.parametrize("name", ["BASE_URL", "API_KEY", "TIMEOUT"])
def test_an_empty_variable_is_none(monkeypatch, name):
    """As a shell script leaves it that has nothing to say."""
    monkeypatch.setenv(f"SYNTHGEN_{name}", "")

    client = SynthgenClient()

    assert (client.base_url, client.timeout) == ("http://localhost:8002", 3600)


def test_a_timeout_in_the_environment_is_a_number_in_text(monkeypatch):
    """Decimals too."""
    monkeypatch.setenv("SYNTHGEN_TIMEOUT", "2.5")

    assert SynthgenClient().timeout == 2.5


def test_a_file_may_leave_out_or_null_what_it_does_not_set(config_file):
    """The default holds then."""
    client = SynthgenClient(config_file=config_file({"base_url": None, "api_key": None}))

    assert (client.base_url, client.timeout) == ("http://localhost:8002", 3600)


def test_a_file_may_begin_with_a_byte_order_mark(config_file):
    """Windows editors write one."""
    path = config_file(b'\xef\xbb\xbf{"base_url": "http://file.test"}')

    assert SynthgenClient(config_file=str(path)).base_url == "http://file.test"


@pytest.mark.parametrize(
    "content, says",
    [
        (b"", "is not JSON"),
        (b"{'base_url': 1}", "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (["http://file.test"], "must hold an object"),
        ({"url": "http://file.test"}, "unknown key 'url'; known are base_url, api_key, timeout"),
        ({"base_url": 8002}, "base_url must be a text"),
        ({"api_key": ["k"]}, "api_key must be a text"),
        ({"timeout": "60"}, "timeout must be a number of seconds"),
        ({"timeout": True}, "timeout must be a number of seconds"),
    ],
)
def test_a_malformed_file_is_named_with_what_is_wrong_in_it(config_file, content, says):
    """And with what would be right."""
    path = config_file(content)

    with pytest.raises(ConfigurationError) as caught:
        SynthgenClient(config_file=path)

    assert str(path) in str(caught.value) and says in str(caught.value)


@pytest.mark.parametrize("name", ["missing.json", "."])
def test_a_file_that_can_not_be_read_is_named(tmp_path, name):
    """Missing, or a directory."""
    path = tmp_path / name

    with pytest.raises(ConfigurationError, match="configuration file") as caught:
        SynthgenClient(config_file=path)

    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "url",
    ["", "localhost:8002", "server.test", "ftp://server.test", "http://", "http:///path", "http://server.test:port"]
    + ["http://server.test:99999", "http://[::1", "http://ser ver.test", "http://server.test/\n", "http://h/?a=b"]
    + ["http://h?", "http://h/#top", "http://h#", 8002],
)
def test_a_base_url_that_is_none_is_refused_with_an_example(url):
    """No scheme, another scheme, no host, no port, or more than an address."""
    with pytest.raises(ConfigurationError, match="http://localhost:8002"):
        SynthgenClient(url)


@pytest.mark.parametrize("url", ["http://server.test/", "https://server.test:8443/synthgen/v2//", "http://[::1]:8002/"])
def test_a_base_url_may_have_a_path_and_end_in_slashes(url):
    """Paths are appended to what is before the last of them."""
    assert SynthgenClient(url).base_url == url.rstrip("/")


@pytest.mark.parametrize(
    "url", [f"http://me:{KEY}@server.test", f"me:{KEY}@server.test", f"http://me:{KEY}@server.test:port"]
    + [f"http://me:{KEY}@[::1", f"http://{KEY}@server.test"],
)  # fmt: skip
def test_a_password_in_the_base_url_is_refused_and_not_shown(url):
    """However malformed the rest of it is: it would be in every error message."""
    with pytest.raises(ConfigurationError, match="user name or password") as caught:
        SynthgenClient(url)

    assert KEY not in str(caught.value)


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), float("inf"), 1e12, 10**400, True, "soon", [60]])
def test_a_timeout_that_is_none_is_refused(timeout):
    """Zero, endless, longer than a socket takes, or no number."""
    with pytest.raises(ConfigurationError, match="number of seconds above 0"):
        SynthgenClient(timeout=timeout)


def test_the_longest_timeout_works(server):
    """It can be set on a socket."""
    server.answer("GET", "/api/v1/batches", {"total": 0, "batches": []})

    with SynthgenClient(server.url, timeout=2e6) as client:
        assert client.get_batches().batches == []


@pytest.mark.parametrize("key", [f"{KEY}\n", f"{KEY}\r\nX: y", f" {KEY}", f"{KEY}\x00", f"{KEY}€", [KEY]])
def test_a_key_that_fits_no_header_is_refused_and_not_shown(key):
    """Requests would print it in its own error."""
    with pytest.raises(ConfigurationError, match="API key") as caught:
        SynthgenClient(api_key=key)

    assert KEY not in str(caught.value) and KEY not in str(caught.value.__cause__)


@pytest.mark.parametrize("source", ["argument", "environment", "file"])
def test_nothing_shows_the_key(monkeypatch, config_file, source):
    """Wherever it came from."""
    if source == "environment":
        monkeypatch.setenv("SYNTHGEN_API_KEY", KEY)
    client = SynthgenClient(
        "http://server.test",
        api_key=KEY if source == "argument" else None,
        config_file=config_file({"api_key": KEY}) if source == "file" else None,
    )

    assert repr(client) == "SynthgenClient('http://server.test')"


def test_a_malformed_file_does_not_show_the_key_in_it(config_file):
    """Nor does the error's cause, which would hold the whole file."""
    path = config_file(f'{{"api_key": "{KEY}",}}'.encode("ascii"))

    with pytest.raises(ConfigurationError) as caught:
        SynthgenClient(config_file=path)

    assert KEY not in str(caught.value) and caught.value.__cause__ is None


@pytest.mark.parametrize(
    "name, value", [("retries", -1), ("retries", 1.5), ("backoff_factor", -1), ("backoff_factor", float("nan"))]
)
def test_a_number_of_retries_that_is_none_is_refused(name, value):
    """By its name."""
    with pytest.raises(ConfigurationError, match=name):
        SynthgenClient(**{name: value})


def test_a_path_object_names_a_file_too():
    """A missing one is named as any other."""
    with pytest.raises(ConfigurationError, match="nowhere.json"):
        SynthgenClient(config_file=pathlib.Path("nowhere.json"))
