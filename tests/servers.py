"""A server that answers as it is told, and keeps what it was asked.

    with CannedServer() as server:
        server.answer("GET", "/health", {"status": "healthy"})                # JSON
        server.answer("GET", "/api/v1/batches", DROP, {"total": 0})           # one after the other; the last repeats
        server.answer("DELETE", "/api/v1/batches/b-1", Answer(status=503, headers={"Retry-After": "1"}))
        server.answer("GET", "/api/v1/tasks/stats", "<html>a proxy's page</html>")
        server.answer("POST", "/api/v1/batches", lambda request: {"batch_id": "b-1", "total_tasks": len(request.lines)})
        recorded = server.recording("batch_get_complete")                     # tests/wire/batch_get_complete.json

The newest answer that fits a request is given: its method and path are the request's, and the
parameters in its query, if it has one, are among the request's. What nothing fits is a 404.
"""

import email
import json
import socket
import socketserver
import ssl
import struct
import sys
import threading
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, Dict, Iterable, List, Mapping, NamedTuple, Optional, Set, Tuple, Union
from urllib.parse import parse_qsl, urlencode, urlsplit

WIRE = Path(__file__).parent / "wire"

#: How long to wait for what must happen, in seconds; used up only when something is broken.
DEADLINE = 30


class Request(NamedTuple):
    """What the server was asked."""

    method: str
    #: As sent: percent-encoded, with the query.
    path: str
    #: Names are case-insensitive.
    headers: Mapping[str, str]
    body: bytes

    @property
    def query(self) -> Dict[str, str]:
        return dict(parse_qsl(urlsplit(self.path).query, keep_blank_values=True))

    @property
    def file(self) -> bytes:
        """The uploaded file."""
        header = "Content-Type: {}\r\n\r\n".format(self.headers["Content-Type"]).encode("ascii")
        content: bytes = email.message_from_bytes(header + self.body).get_payload()[0].get_payload(decode=True)
        return content

    @property
    def lines(self) -> List[Any]:
        """The lines of the uploaded file, as JSON values."""
        return [json.loads(line) for line in self.file.split(b"\n") if line]


class Answer:
    """One answer.

    Args:
        body: Bytes are sent as they are, text as an HTML page, anything else as JSON.
        status: The HTTP status.
        headers: Sent with, or in place of, those that `body` implies.
        chunks: In place of `body`: pieces to send one by one, with chunked encoding. An `Event` among them
            holds the rest back until it is set.
        cut_off: Close the connection too early: after half of `body`, or before the empty chunk that ends `chunks`.
        hold: Send nothing before this is set.
        raw: In place of all that: these bytes, and the end of the connection.
    """

    def __init__(
        self,
        body: Any = None,
        status: int = 200,
        headers: Optional[Mapping[str, str]] = None,
        *,
        chunks: Optional[Iterable[Union[bytes, threading.Event]]] = None,
        cut_off: bool = False,
        hold: Optional[threading.Event] = None,
        raw: Optional[bytes] = None,
    ) -> None:
        if isinstance(body, bytes):
            self.body, content_type = body, "application/octet-stream"
        elif isinstance(body, str):
            self.body, content_type = body.encode("utf-8"), "text/html; charset=utf-8"
        else:
            self.body, content_type = json.dumps(body).encode("ascii"), "application/json"
        self.status = status
        self.headers = {"content-type": content_type}
        self.headers.update((name.lower(), value) for name, value in (headers or {}).items())
        self.chunks = chunks
        self.cut_off = cut_off
        self.hold = hold
        self.raw = raw


#: The connection is closed, and nothing sent.
DROP = Answer(raw=b"")

#: The connection is reset, and nothing sent.
RESET = Answer(raw=b"")

#: What nothing fits.
NOT_FOUND = Answer({"detail": "Not Found"}, 404)


class _Rule(NamedTuple):
    method: str
    path: str
    query: Set[Tuple[str, str]]
    answers: List[Any]

    def fits(self, request: Request) -> bool:
        same = (self.method, self.path) == (request.method, urlsplit(request.path).path)
        return same and self.query <= set(request.query.items())


class CannedServer:
    """The server, on a free port of 127.0.0.1, from its making to `close`."""

    def __init__(self, ssl_context: Optional[ssl.SSLContext] = None) -> None:
        #: Everything asked so far, in order.
        self.requests: List[Request] = []
        self._rules: List[_Rule] = []
        self._changed = threading.Condition()
        self._server = _Server(self._answer_to, ssl_context)
        self.url = "{}://127.0.0.1:{}".format("https" if ssl_context else "http", self._server.server_address[1])
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    def __enter__(self) -> "CannedServer":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop listening, end every connection, held ones too, and wait for their threads."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def answer(self, method: str, path: str, *answers: Any) -> None:
        """Answer a method and path with JSON values, `Answer`s, or functions of the `Request` that return either."""
        parts = urlsplit(path)
        query = set(parse_qsl(parts.query, keep_blank_values=True))
        with self._changed:
            self._rules.insert(0, _Rule(method, parts.path, query, list(answers)))

    def recording(self, name: str) -> Dict[str, Any]:
        """Answer as the real server did in ``tests/wire/NAME.json``, which is returned."""
        recorded: Dict[str, Any] = json.loads((WIRE / f"{name}.json").read_text(encoding="utf-8"))
        request, response = recorded["request"], recorded["response"]
        if response["headers"].get("content-type") == "application/x-ndjson":
            body = {"chunks": [response["body"].encode("utf-8")], "cut_off": response.get("cut_off", False)}
        else:
            body = {"body": b"" if response["status"] in (204, 307) else json.dumps(response["body"]).encode("ascii")}
        answer = Answer(status=response["status"], headers=response["headers"], **body)
        self.answer(request["method"], request["path"] + "?" + urlencode(request["params"]), answer)
        return recorded

    def hang_up(self, data: bytes = b"") -> None:
        """End every connection, idle ones too, after sending these bytes as they are, outside of TLS."""
        self._server.hang_up(data)

    def wait_for_requests(self, count: int) -> List[Request]:
        """The requests, once there are that many."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.requests) >= count, DEADLINE), self.requests
            return list(self.requests)

    def _answer_to(self, request: Request) -> Answer:
        with self._changed:
            self.requests.append(request)
            self._changed.notify_all()
            answers = next((rule.answers for rule in self._rules if rule.fits(request)), [NOT_FOUND])
            answer = answers.pop(0) if len(answers) > 1 else answers[0]
        if callable(answer):
            answer = answer(request)
        return answer if isinstance(answer, Answer) else Answer(answer)


class _Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    request_queue_size = 128

    def __init__(self, answer_to: Any, ssl_context: Optional[ssl.SSLContext]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        if ssl_context:
            self.socket = ssl_context.wrap_socket(self.socket, server_side=True, do_handshake_on_connect=False)
        self.answer_to = answer_to
        self.closing = threading.Event()
        self._connections: Set[socket.socket] = set()

    def process_request(self, request: Any, client_address: Any) -> None:
        self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._connections.discard(request)
        super().shutdown_request(request)

    def server_close(self) -> None:
        self.closing.set()
        self.hang_up()
        super().server_close()

    def hang_up(self, data: bytes = b"") -> None:
        for connection in list(self._connections):
            try:
                socket.socket.sendall(connection, data)
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # the client was faster

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], OSError):  # a client that went away is what some tests want
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def _respond(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        body = self.rfile.read(length)
        if len(body) < length:  # the client went away: nothing was asked
            self.close_connection = True
            return
        answer = self.server.answer_to(Request(self.command, self.path, self.headers, body))
        self._wait(answer.hold)
        self.close_connection = answer.raw is not None or answer.cut_off
        if answer is RESET:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            socket.close(self.connection.detach())
        elif answer.raw is not None:
            self.wfile.write(answer.raw)
        else:
            self._send(answer)

    do_GET = do_POST = do_PUT = do_DELETE = _respond

    def _send(self, answer: Answer) -> None:
        body = b"" if answer.status == 204 else answer.body
        send = self.send_response_only if "date" in answer.headers else self.send_response  # which sends its own
        send(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        if answer.chunks is None:
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: len(body) // 2] if answer.cut_off else body)
            return
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for chunk in answer.chunks:
            if isinstance(chunk, threading.Event):
                self._wait(chunk)
            elif chunk:
                self.wfile.write(b"%x\r\n%b\r\n" % (len(chunk), chunk))
        if not answer.cut_off:
            self.wfile.write(b"0\r\n\r\n")

    def _wait(self, event: Optional[threading.Event]) -> None:
        while event is not None and not event.wait(0.02) and not self.server.closing.is_set():
            pass

    def log_message(self, *args: object) -> None:
        pass
