"""What the README shows of the progress: frames of a real run, whose provider waits until they are taken.

``python tests/readme_frame.py`` draws them anew; look at them before you keep them.
"""

import re
import threading
from pathlib import Path
from typing import List

import requests
from servers import CannedServer
from story import BATCH_ID, PRICES, Clock, frame, terminal

from synthgen import Task
from synthgen.local import DemoProvider, LocalServer

README = Path(__file__).parent.parent / "README.md"
FRAME = re.compile(r"(?<=readme_frame\.py from a real run -->\n```text\n).*?(?=^```$)", re.DOTALL | re.MULTILINE)
WIDTH = 80
TASKS, WORKERS = 10, 2


def draw() -> str:
    """The health table, the panel in the middle of a batch, and the one at its end."""
    from synthgen._rich import RichMonitor

    screen, clock = terminal(WIDTH), Clock()
    start = clock.now
    frames: List[str] = []
    answers = threading.Semaphore(0)  # that the provider may give
    moments = [(0, 0.0, 6), (6, 3.0, TASKS)]  # so many tasks finished, the time in seconds, answers to give then

    class Recorder(RichMonitor):
        def batch(self, batch, submitted, cost):
            if moments and (batch.finished_tasks, batch.processing_tasks) == (moments[0][0], WORKERS):
                _, seconds, given = moments.pop(0)
                clock.now = start + seconds
                super().batch(batch, submitted, cost)
                frames.append(frame(self, WIDTH))
                for _ in range(given):
                    answers.release()

        def finish(self, batch, cost):
            clock.now = start + 5.0
            super().finish(batch, cost)
            frames.append(frame(self, WIDTH))

    def answer(request):
        answers.acquire()
        return requests.post(demo.url, data=request.body, timeout=10).json()

    with DemoProvider() as demo, CannedServer() as provider, LocalServer(workers=WORKERS) as server:
        provider.answer("POST", "/v1/chat/completions", answer)
        tasks = [Task(url=f"{provider.url}/v1/chat/completions", body=_body(i)) for i in range(1, TASKS + 1)]
        with server.client() as client:
            results = client.monitor_batch(tasks, None, *PRICES, monitor=Recorder(screen, clock=clock))
    health = screen.file.getvalue().split("\x1b")[0]
    drawn = "".join([health, *frames[1:]]).replace(results[0].batch_id, BATCH_ID)
    return re.sub(r" +\n", "\n", drawn)


def _body(i):
    """As in the README's first example."""
    return {"model": "demo", "messages": [{"role": "user", "content": f"solve {i}x + 4 = {4 + 3 * i}"}]}


if __name__ == "__main__":
    text = README.read_text(encoding="utf-8")
    README.write_text(FRAME.sub(lambda _: draw(), text, count=1), encoding="utf-8")
