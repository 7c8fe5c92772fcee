"""What a user's type checker sees: read by mypy --strict, against the package as installed, and never run."""

from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional

from pydantic import BaseModel

from synthgen import (
    APIError,
    Batch,
    BatchCost,
    BatchUploadError,
    CalendarInterval,
    ContentError,
    HealthResponse,
    Monitor,
    NotFoundError,
    RateLimitError,
    SynthgenClient,
    Task,
    TaskResponse,
    TaskStatus,
)
from synthgen.aio import AsyncSynthgenClient
from synthgen.local import DemoProvider, LocalServer


class Counting(Monitor):
    """A monitor of the user's own."""

    finished: int = 0

    def batch(self, batch: Optional[Batch], submitted: int, cost: BatchCost) -> None:
        self.finished = batch.finished_tasks if batch else 0


def prompts(texts: List[str]) -> Iterator[Task]:
    for number, text in enumerate(texts):
        yield Task(
            custom_id=f"task-{number}",
            url="https://provider.test/v1/chat/completions",
            api_key="key",
            body={"model": "m", "messages": [{"role": "user", "content": text}]},
            dataset="demo",
            source={"row": number},
            use_cache=False,
        )


def submit(client: SynthgenClient, tasks: Iterator[Task]) -> str:
    try:
        return client.create_batch(tasks, chunk_size=500).batch_id
    except BatchUploadError as error:
        left: List[Task] = [*error.unconfirmed, *(error.remaining or [])]
        return client.create_batch(left, batch_id=error.batch_id).batch_id


def collect(client: SynthgenClient, batch_id: str) -> List[Optional[str]]:
    results: List[TaskResponse] = client.monitor_batch(
        batch_id=batch_id, cost_by_1m_input_token=0.1, timeout=60, poll_interval=0.5, monitor=Counting()
    )
    failed = [result.error for result in results if not result.ok]
    tokens = sum(result.usage.total_tokens for result in results if result.usage is not None)
    print(f"{len(failed)} failed, {tokens} tokens")
    return [result.content for result in results]


def look_around(client: SynthgenClient, batch_id: str) -> float:
    health: HealthResponse = client.check_health()
    consumers: Optional[int] = health.services.queue_consumers
    batches: List[Batch] = client.get_batches().batches
    cost: float = client.get_batch(batch_id).cost(0.1, 0.4).total
    for task in client.iter_batch_tasks(batch_id, TaskStatus.FAILED):
        message: str = task.message_id
        client.get_task(message)
    stats = client.get_batch_stats(batch_id, "7d", CalendarInterval.DAY)
    by_name = client.get_batch_stats(batch_id, interval="1d")
    busiest: int = max(point.total_tasks for point in [*stats.time_series, *by_name.time_series])
    written: int = client.export_batch(batch_id, Path("results.jsonl"))
    print(consumers, len(batches), busiest, written)
    return cost + stats.summary.cache_hit_rate


class Solution(BaseModel):
    """A model of the user's own."""

    x: float


def parse(result: TaskResponse) -> Optional[float]:
    try:
        solution: Solution = result.parse(Solution)
    except ContentError as error:
        print(error.message, result.finish_reason, result.cut_off or result.filtered)
        return None
    row: Dict[str, Any] = result.to_row()
    return solution.x + len(row)


def handle(client: SynthgenClient) -> Optional[float]:
    try:
        client.delete_task("m-1")
    except NotFoundError:
        return None
    except RateLimitError as error:
        return error.retry_after
    except APIError as error:
        if error.response:
            print(error.status_code, error.response.text, error.response.headers.get("Content-Type"))
        raise
    return 0.0


async def collect_async(tasks: List[Task]) -> List[Optional[str]]:
    async with AsyncSynthgenClient("http://localhost:8002", api_key="key") as client:
        results: List[TaskResponse] = await client.monitor_batch(tasks, timeout=60)
        async for task in client.iter_batch_tasks("b-1", TaskStatus.COMPLETED):
            results.append(task)
        batch: Batch = await client.get_batch("b-1")
        print(batch.done)
    return [result.content for result in results]


def main() -> None:
    with DemoProvider() as provider, LocalServer() as server, server.client() as client:
        task = Task(url=provider.url, body={"messages": [{"role": "user", "content": "solve 2x + 4 = 10"}]})
        print(client.monitor_batch([task], show_progress=False)[0].content)
