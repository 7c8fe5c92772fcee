"""The embedded server, spoken to over HTTP as any client would."""

import json
import threading
import time

import pytest
import requests
from servers import DEADLINE, CannedServer

from synthgen.local import LocalServer
from synthgen.local.provider import CallPolicy

PATH = "/v1/chat/completions"


class QuickServer(LocalServer):
    """Does not wait long before it calls a provider again."""

    _policy = CallPolicy(backoff=0.001, longest_pause=0.2, read_timeout=DEADLINE)


class Api:
    """A server, and requests to it."""

    def __init__(self, **settings):
        self.server = QuickServer(**settings)
        self.server.start()
        self.session = requests.Session()
        self.session.trust_env = False
        self.session.headers["Authorization"] = f"Bearer {self.server.api_key}"

    def close(self):
        self.session.close()
        self.server.close()

    def ask(self, method, path, **options):
        """The response, whatever its status."""
        return self.session.request(method, self.server.url + path, timeout=DEADLINE, allow_redirects=False, **options)

    def get(self, path, **parameters):
        """The JSON value that is there."""
        response = self.ask("GET", path, params=parameters)
        assert response.status_code == 200, response.text
        return response.json()

    def upload(self, content, name="batch.jsonl", key=None, **parameters):
        """The response to an upload of a file."""
        headers = {"Idempotency-Key": key} if key else {}
        files = {"file": (name, content)}
        return self.ask("POST", "/api/v1/batches", files=files, params=parameters, headers=headers)

    def submit(self, *tasks, **options):
        """The id of a new batch."""
        response = self.upload("\n".join(map(json.dumps, tasks)), **options)
        assert response.status_code == 200, response.text
        return response.json()["batch_id"]

    def batch(self, batch_id):
        return self.get(f"/api/v1/batches/{batch_id}")

    def wait(self, batch_id, until=lambda batch: not batch["pending_tasks"] and not batch["processing_tasks"]):
        """The batch, once it has ended or is as told."""
        deadline, pause = time.monotonic() + DEADLINE, threading.Event()
        while True:
            batch = self.batch(batch_id)
            if batch and until(batch):
                return batch
            assert time.monotonic() < deadline, batch
            pause.wait(0.005)

    def export(self, batch_id, **parameters):
        """The tasks of a batch, in the order of the export."""
        response = self.ask("GET", f"/api/v1/batches/{batch_id}/tasks/export", params=parameters)
        return [task for line in response.text.split("\n") if line for task in json.loads(line)["tasks"]]

    def run(self, *tasks, **options):
        """The tasks as they ended, in the order submitted."""
        batch_id = self.submit(*tasks, **options)
        self.wait(batch_id)
        return self.export(batch_id)[::-1]


@pytest.fixture
def serve(request):
    """Starts servers; the keyword arguments are `LocalServer`'s."""

    def start(**settings):
        api = Api(**settings)
        request.addfinalizer(api.close)
        return api

    return start


@pytest.fixture
def api(serve):
    """A server, and requests to it."""
    return serve()


@pytest.fixture(scope="module")
def running():
    """One server for all the examples of a property; at its end none of its threads is left."""
    api = Api()
    yield api
    api.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("synthgen")]


class Model(CannedServer):
    """A provider whose answers are told; unless told otherwise it repeats the prompt."""

    def __init__(self):
        super().__init__()
        self.url += PATH
        self.answers(self.echo)

    @classmethod
    def echo(cls, request):
        content = cls.prompt(request)
        return {
            "choices": [{"index": 0, "message": {"role": "assistant", "content": f"echo: {content}"}}],
            "usage": {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5},
        }

    def answers(self, *answers):
        """Answer so, one after the other; the last repeats."""
        self.answer("POST", PATH, *answers)

    def prompts(self):
        """What was asked so far."""
        return [prompt for prompt in map(self.prompt, list(self.requests)) if prompt is not None]

    @staticmethod
    def prompt(request):
        """What a request asks; None if its sender was killed before it was whole."""
        return json.loads(request.body)["messages"][-1]["content"] if request.body else None


@pytest.fixture
def model():
    """A model's provider; see `Model`."""
    with Model() as running:
        yield running


@pytest.fixture
def task(model):
    """Makes a task for the model, of its prompt and any other fields."""

    def make(prompt="hello", **fields):
        body = {"model": "test-model", "messages": [{"role": "user", "content": prompt}]}
        made = {"custom_id": None, "method": "POST", "url": model.url, "api_key": "provider-key", "body": body}
        return {**made, "use_cache": True, "track_progress": True, **fields}

    return make
