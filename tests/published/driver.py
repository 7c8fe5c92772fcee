"""What a script does with the published client, 0.0.7, which has to be what ``import synthgen`` finds here.

    python driver.py CHECK        with the address, the key and the provider in the environment

Each check talks to a running server and fails by an assertion.
"""

import os
import sys

import synthgen
from synthgen import SynthgenClient, TaskStatus
from synthgen.exceptions import APIError
from synthgen.models import Task

assert synthgen.__version__ == "0.0.7", synthgen.__file__

PROVIDER = os.environ["PROVIDER_URL"]


def connect(api_key=None):
    address, _, port = os.environ["SERVER_URL"].rpartition(":")
    return SynthgenClient(address, port, api_key or os.environ["SERVER_KEY"])


def equations(numbers, **fields):
    """A task for each number, whose answer is that number."""
    return [
        Task(
            custom_id=f"x-{number}",
            url=PROVIDER,
            body={"model": "demo", "messages": [{"role": "user", "content": f"solve 2x - {2 * number} = 0"}]},
            **fields,
        )
        for number in numbers
    ]


def contents(results):
    return sorted(result.completions["choices"][0]["message"]["content"] for result in results)


def health():
    state = connect().check_health()

    assert state.status == state.services.rabbitmq == state.services.elasticsearch == "healthy"
    assert state.services.task_queue_consumers > 0


def several_chunks():
    client = connect()
    submitted = client.create_batch(equations(range(25)), chunk_size=10)
    assert submitted.total_tasks == 25

    results = client.monitor_batch(batch_id=submitted.batch_id)

    assert contents(results) == sorted(f"x = {number}" for number in range(25))
    batch = client.get_batch(submitted.batch_id)
    assert (batch.total_tasks, batch.batch_status) == (25, TaskStatus.COMPLETED)
    assert batch.total_tokens == batch.prompt_tokens + batch.completion_tokens > 0
    assert submitted.batch_id in [listed.batch_id for listed in client.get_batches().batches]


def submitting_and_monitoring():
    results = connect().monitor_batch(equations([101, 102]), cost_by_1m_input_token=1.0, cost_by_1m_output_token=2.0)

    assert contents(results) == ["x = 101", "x = 102"]
    assert all(result.status is TaskStatus.COMPLETED and result.duration is not None for result in results)


def cache():
    client = connect()
    client.monitor_batch(equations([201, 202]))

    again = client.monitor_batch(equations([201, 202]))

    assert contents(again) == ["x = 201", "x = 202"]
    assert all(result.cached for result in again)
    batch = client.get_batch(again[0].batch_id)
    assert (batch.cached_tasks, batch.completed_tasks, batch.total_tokens) == (2, 0, 0)


def filters():
    client = connect()
    refused = Task(custom_id="refused", url=PROVIDER + "/nowhere", body={"model": "demo"})
    batch_id = client.monitor_batch([*equations([301]), refused])[0].batch_id

    (failed,) = client.get_batch_tasks(batch_id, task_status=TaskStatus.FAILED)
    (completed,) = client.get_batch_tasks(batch_id, task_status=TaskStatus.COMPLETED)

    assert failed.completions["error"]
    assert contents([completed]) == ["x = 301"]
    assert client.get_batch_tasks(batch_id, task_status=TaskStatus.PENDING) == []
    assert client.get_batch(batch_id).batch_status is TaskStatus.FAILED


def single_tasks():
    client = connect()
    (result,) = client.monitor_batch(equations([401], dataset="published", source={"row": 1}))

    task = client.get_task(result.message_id)
    assert (task.custom_id, task.dataset, task.source) == ("x-401", "published", {"row": 1})
    assert task.completions == result.completions

    before = client.get_task_stats().total_tasks
    client.delete_task(result.message_id)
    assert client.get_task_stats().total_tasks == before - 1


def deletions():
    client = connect()
    batch_id = client.monitor_batch(equations([501]))[0].batch_id

    client.delete_batch(batch_id)

    assert client.get_batch(batch_id) is None
    assert client.get_batch_tasks(batch_id) == []


def wrong_key():
    try:
        connect("not-the-key").get_batches()
    except APIError as exc:
        assert exc.status_code == 401
    else:
        raise AssertionError("let in with a wrong key")


if __name__ == "__main__":
    globals()[sys.argv[1]]()
