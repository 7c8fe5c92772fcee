"""The other ends of the wire, each in a process of its own: a framework and a model provider that cost next to nothing.

    python canned.py framework         keeps no upload, and has finished everything; prints its address
    python canned.py provider [DELAY]  answers each call the same, so many seconds later

A batch whose id is a number has that many tasks; one that was posted to has as many as were posted. Of batch
`huge-25` the only task has 25 MB. An export is sent as the framework does it: lines of 10,000 tasks, each one chunk.
"""

import asyncio
import json
import random
import sys
from collections import Counter
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Dict, Iterator, List
from typing import Counter as CounterType

TASKS_PER_LINE = 10_000
_NUMBER = "[number]"

_random = random.Random(1)
_TEXTS = [" ".join(_random.choices(["alpha", "beta", "gamma", "delta", "omega", "sigma"], k=90)) for _ in range(500)]


def body(number: int) -> Dict[str, Any]:
    """What the provider is sent for a task: each has its own."""
    content = f"question {number} {_TEXTS[number % len(_TEXTS)]}"
    return {"model": "test-model", "messages": [{"role": "user", "content": content}]}


def completion(text: str) -> Dict[str, Any]:
    return {
        "choices": [{"finish_reason": "stop", "index": 0, "logprobs": None, "message": _message(text)}],
        "created": 1795347588,
        "id": "chatcmpl-5da988f25ed8442099b59253",
        "model": "test-model",
        "object": "chat.completion",
        "usage": {"completion_tokens": 5, "prompt_tokens": 4, "total_tokens": 9},
    }


def _message(text: str) -> Dict[str, str]:
    return {"content": text, "role": "assistant"}


def _exported(text: str) -> List[bytes]:
    """A task's JSON, in pieces: between them go the number in its message_id and that in its body."""
    task = {
        "message_id": f"5f3c1c7e-0000-4000-8000-{_NUMBER}",
        "batch_id": "b",
        "status": "COMPLETED",
        "cached": False,
        "body": {"model": "test-model", "messages": [{"role": "user", "content": f"question {_NUMBER} {text}"}]},
        "result": {},
        "created_at": "2026-11-22T11:39:52.517865+00:00",
        "started_at": "2026-11-22T11:39:52.522427992Z",
        "completed_at": "2026-11-22T11:39:52.524256310Z",
        "duration": 60,
        "completions": completion(text),
        "dataset": None,
        "source": None,
    }
    return json.dumps(task).encode("ascii").split(_NUMBER.encode("ascii"))


@lru_cache(maxsize=None)
def _templates() -> List[List[bytes]]:
    return [_exported(text) for text in _TEXTS]


def _export(total: int) -> Iterator[bytes]:
    templates = _templates()
    for start in range(0, total, TASKS_PER_LINE):
        pieces = [b'{"tasks": [']
        for number in range(start, min(start + TASKS_PER_LINE, total)):
            head, middle, tail = templates[number % len(templates)]
            pieces += (head, b"%012d" % number, middle, b"%d" % number, tail, b", ")
        pieces[-1] = b'], "total": %d}\n' % TASKS_PER_LINE
        yield b"".join(pieces)


class _Framework(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1
    posted: CounterType[str] = Counter()

    def do_POST(self) -> None:
        uploaded = self.rfile.read(int(self.headers["Content-Length"]))
        batch_id = self.path.partition("batch_id=")[2]
        lines = uploaded.count(b'"custom_id"')  # what is around them in the form has line breaks, too
        self.posted[batch_id] += lines
        self._send({"batch_id": batch_id, "total_tasks": lines})

    def do_GET(self) -> None:
        if self.path == "/health":
            services = {"api": "healthy", "rabbitmq": "healthy", "elasticsearch": "healthy", "task_queue_consumers": 1}
            return self._send({"status": "healthy", "services": services, "error": None})
        batch_id = self.path.split("/")[4]
        if self.path.endswith("/export"):
            return self._stream(batch_id)
        total = 1 if batch_id.startswith("huge") else self.posted[batch_id] or int(batch_id)
        counts = {"total_tasks": total, "completed_tasks": total}
        counts.update(dict.fromkeys(["failed_tasks", "pending_tasks", "processing_tasks", "cached_tasks"], 0))
        times = {"created_at": "2026-11-22T11:39:52.517865+00:00"}
        self._send({"batch_id": batch_id, "batch_status": "COMPLETED", **counts, **times})

    def _send(self, answer: Any) -> None:
        content = json.dumps(answer).encode("ascii")
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
        self.wfile.flush()

    def _stream(self, batch_id: str) -> None:
        if batch_id.startswith("huge-"):
            megabytes = int(batch_id[len("huge-") :])
            lines = iter([b'{"tasks": [%b], "total": 1}\n' % b"0".join(_exported("x" * (megabytes << 19)))])
        else:
            lines = _export(self.posted[batch_id] or int(batch_id))
        self.send_response(200)
        self.send_header("Content-Type", "application/x-ndjson")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for line in lines:
            self.wfile.write(b"%x\r\n%b\r\n" % (len(line), line))
        self.wfile.write(b"0\r\n\r\n")
        self.wfile.flush()

    def log_message(self, *args: object) -> None:
        pass


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], OSError):  # a client that had seen enough
            super().handle_error(request, client_address)


class _Provider(asyncio.Protocol):
    """As little HTTP as our callers need; of http.server one would measure little else."""

    answer: bytes
    delay: float

    def connection_made(self, transport: Any) -> None:
        self._transport, self._received = transport, b""

    def data_received(self, data: bytes) -> None:
        self._received += data
        while b"\r\n\r\n" in self._received:
            head, _, rest = self._received.partition(b"\r\n\r\n")
            length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0])
            if len(rest) < length:
                return
            self._received = rest[length:]
            if self.delay:
                asyncio.get_event_loop().call_later(self.delay, self._transport.write, self.answer)
            else:
                self._transport.write(self.answer)


async def _provide(delay: float) -> None:
    content = json.dumps(completion("x = 3 " * 20)).encode("ascii")
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(content)
    _Provider.answer, _Provider.delay = head + content, delay
    server = await asyncio.get_event_loop().create_server(_Provider, "127.0.0.1", 0, backlog=128)
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1/chat/completions", flush=True)
    await server.serve_forever()


def _frame() -> None:
    with _Server(("127.0.0.1", 0), _Framework) as server:
        print(f"http://127.0.0.1:{server.server_port}", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    if sys.argv[1] == "framework":
        _frame()
    else:
        asyncio.run(_provide(float(sys.argv[2])))
