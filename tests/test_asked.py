"""What the package was asked to do, ``asked.md``, does it: its Python blocks run, in order, in one namespace.

Changed are only addresses, keys and ids, and the dots that stand for a task's other parameters; given are
only the names that no block defines. (A block calls its results ``tasks``, and a later one submits them: they
are run again.) The provider is the demo one, the server the embedded one.
"""

import re
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from synthgen import CalendarInterval, SynthgenClient, Task
from synthgen.local import DemoProvider, LocalServer

BLOCKS = re.findall(r"^```python\n(.*?)^```", (Path(__file__).parent / "asked.md").read_text("utf-8"), re.M | re.S)

OTHER_PARAMETERS = 'url=provider, api_key=api_key, body={"messages": [{"role": "user", "content": "solve x = 1"}]}'


class Asked:
    """The blocks, made to run against these servers."""

    def __init__(self, server, provider, client):
        self._server = server
        self._provider = provider
        self._client = client
        self.namespace = {"CalendarInterval": CalendarInterval}

    def run(self, block):
        """Run a block; its ``config.json`` is there, and so are the batch and the task that it names."""
        code = self._with_ids(self._with_addresses(block))
        if "config.json" in code:
            config = re.search(r"^# (\{\n.*?^# \})", code, re.M | re.S).group(1)
            Path("config.json").write_text(config.replace("\n#", "\n"), "utf-8")
        if "task_result" in code:
            self.namespace["task_result"] = self.namespace["results"][0]
        exec(compile(code, "asked.md", "exec"), self.namespace)

    def _with_addresses(self, code):
        for old, new in [
            ("https://api.synthgen.example.com", self._server.url),
            ("http://localhost:8002", self._server.url),
            ("http://host.docker.internal:11434/v1/chat/completions", self._provider.url),
            ("your-api-key", self._server.api_key),
            ("# Other parameters...\n", OTHER_PARAMETERS + ",\n"),
            (", ...)", f", {OTHER_PARAMETERS})"),
        ]:
            code = code.replace(old, new)
        return code

    def _with_ids(self, code):
        body = {"messages": [{"role": "user", "content": "solve 3x = 9"}]}
        result = self._client.monitor_batch([Task(url=self._provider.url, body=body)], show_progress=False)[0]
        for old, new in [
            ('"existing-batch-id"', result.batch_id),
            ('"batch-id"', result.batch_id),
            ('"task-message-id"', result.message_id),
        ]:
            code = code.replace(old, repr(new))
        return code


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """The blocks, in an empty folder, with the server in the environment for ``SynthgenClient()``."""
    with DemoProvider() as provider, LocalServer() as server, server.client() as client:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("SYNTHGEN_BASE_URL", server.url)
        monkeypatch.setenv("SYNTHGEN_API_KEY", server.api_key)
        yield Asked(server, provider, client)


@pytest.mark.slow
def test_every_block_runs(asked, capsys):
    """One after the other, with all that their comments and prints use."""
    with ExitStack() as opened:
        for block in BLOCKS:
            asked.run(block)
            if "client" in asked.namespace:
                opened.enter_context(closing(asked.namespace["client"]))

    printed = capsys.readouterr().out
    for text in [
        r"Task \S+: COMPLETED\nGenerated 0 records",
        r"Retrieved from cache",
        r"System status: healthy\nAPI: healthy\nRabbitMQ: healthy\nElasticsearch: healthy\nQueue consumers: [1-9]",
        r"Task status: COMPLETED\nCompletion time: 20",
        r"Total batches: [1-9]",
        r"Completed tasks: \d+/1\nToken usage: \d+",
        r"Timestamp: 20.*\nCompleted tasks: \d+\nTotal tokens: \d+\nAvg response time: [\d.]+ms\nThroughput: [\d.]+ ",
        r"Total tasks: 1\nCache hit rate: (100|0)\.00%\nAverage response time: [\d.]+ms\nOverall throughput: [\d.]+ ",
        r"API Error: .+\nStatus code: 404",
        r"Input tokens: \d+\nOutput tokens: \d+\nTotal tokens: \d+",
        r"Task not found",
    ]:
        assert re.search(text, printed), f"{text!r} is not in:\n{printed}"


def test_the_error_block_prints_the_answer_of_a_401(asked, capsys):
    """``if e.response:`` is true for an error."""
    (block,) = (block for block in BLOCKS if "if e.response:" in block)
    with SynthgenClient(api_key="wrong") as asked.namespace["client"]:
        asked.run(block)

    assert re.search(r"API Error: .+\nStatus code: 401\nResponse: .*Invalid auth", capsys.readouterr().out)
