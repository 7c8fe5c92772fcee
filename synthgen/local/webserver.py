"""A small threaded HTTP/1.1 server: connections, limits and time-outs. What to answer is a function's business.

A thread per connection, and so many connections at a time; more wait in the listening socket's queue, and
a connection that only waits for its next request gives way to them.
"""

import io
import json
import logging
import socket
import threading
import time
import traceback
from contextlib import suppress
from email.message import Message
from http import HTTPStatus
from http.client import HTTPException
from http.server import BaseHTTPRequestHandler
from itertools import chain
from typing import Any, Callable, Dict, Iterable, Mapping, NamedTuple, Optional, Union
from urllib.parse import parse_qsl, unquote

from ..exceptions import ConfigurationError

logger: logging.Logger = logging.getLogger(__name__)

_MAX_CONNECTIONS = 200
#: Seconds after which a connection without a request is closed: if others wait to be accepted, and in any case.
_MIN_IDLE = 1.0
_MAX_IDLE = 120.0
_MAX_BACKLOG = 128
_MAX_HEAD_BYTES = 128 << 10
_MAX_BODY_BYTES = 256 << 20
#: How much is left of a request that does not say its length: more than any body that is taken.
_UNKNOWN = 1 << 62
#: Seconds for a request's head; for its body, so many and one more for each 64 KiB; and for each write of an answer.
_HEAD_SECONDS = 20.0
_BODY_SECONDS = 60.0
_BODY_BYTES_PER_SECOND = 64 << 10
_WRITE_SECONDS = 300.0
#: Seconds for which what is left of a request is read after its answer.
_UNWANTED_SECONDS = 10.0


class Response(NamedTuple):
    """An answer; a body that is not bytes is sent in chunks, as it comes."""

    status: int
    body: Union[bytes, Iterable[bytes]] = b""
    content_type: str = "application/json"
    headers: Mapping[str, str] = {}


class HTTPError(Exception):
    """An answer that is an error; `detail` is text, or what else the API has there."""

    def __init__(self, status: int, detail: Any, headers: Optional[Mapping[str, str]] = None) -> None:
        super().__init__(status, detail)
        self.status = status
        self.detail = detail
        self.headers: Mapping[str, str] = headers or {}


def json_response(value: Any, status: int = 200, headers: Optional[Mapping[str, str]] = None) -> Response:
    return Response(status, json.dumps(value).encode("ascii"), headers=headers or {})


class Request:
    """What was asked: the target as it came, its path decoded, the last value of each parameter; `body` reads it."""

    def __init__(self, method: str, target: str, headers: Message, body: Callable[[], bytes]) -> None:
        path, _, query = target.partition("?")
        self.method: str = method
        self.target: str = target
        self.path: str = unquote(path)
        self.query: Dict[str, str] = dict(parse_qsl(query, keep_blank_values=True))
        self.headers: Message = headers
        self.body: Callable[[], bytes] = body


class _Incoming(io.RawIOBase):
    """What a client sends, under one deadline for all reads together."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    def allow(self, seconds: float, size: float = float("inf")) -> None:
        """Let so many bytes come within so many seconds from now."""
        self._deadline = time.monotonic() + seconds
        self._allowed = size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if self._allowed <= 0:
            raise HTTPException(f"the headers are larger than {_MAX_HEAD_BYTES} bytes")  # http.server makes it a 431
        self._connection.settimeout(max(self._deadline - time.monotonic(), 0.001))
        received = self._connection.recv_into(buffer)
        self._allowed -= received
        return received


class _Connection(BaseHTTPRequestHandler):
    """One client's connection: reads requests, writes answers."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    rfile: io.BufferedReader
    server: "WebServer"  # type: ignore[assignment]

    def setup(self) -> None:
        super().setup()
        self.rfile.close()
        self._incoming = _Incoming(self.connection)
        self.rfile = io.BufferedReader(self._incoming)

    def handle_one_request(self) -> None:
        self.close_connection = True
        self._unread = 0
        self._expects_continue = False
        if self._has_request():
            self._incoming.allow(_HEAD_SECONDS, _MAX_HEAD_BYTES)
            super().handle_one_request()

    def _has_request(self) -> bool:
        """Wait for a request; False when there will be none, or others wait for a connection."""
        end = time.monotonic() + _MAX_IDLE
        while time.monotonic() < end:
            self._incoming.allow(min(_MIN_IDLE, _MAX_IDLE))
            with suppress(socket.timeout):
                return bool(self.rfile.peek(1))
            if self.server.is_full:
                break
        return False

    def handle_expect_100(self) -> bool:
        self._expects_continue = True  # until the body is wanted
        return True

    def answer(self) -> None:
        self.headers = self.headers or Message()  # later releases of Python may have a plain dict where there are none
        try:
            self._unread = self._content_length()
            response = self.server.respond(Request(self.command, self.path, self.headers, self.read_body))
        except HTTPError as error:
            response = self._error(error)
        except OSError:  # the client went away, or was too slow, in the middle of its request
            raise
        except Exception as exc:
            _log_failure(exc)
            response = self._error(HTTPError(500, "Internal Server Error"))
        self._send(response)

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = answer

    def read_body(self) -> bytes:
        size = self._unread
        if size > _MAX_BODY_BYTES:
            raise HTTPError(413, f"the request is larger than {_MAX_BODY_BYTES >> 20} MiB; send less at a time")
        if self._expects_continue:
            self._expects_continue = False
            self.connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        self._incoming.allow(_BODY_SECONDS + size / _BODY_BYTES_PER_SECOND)
        body = self.rfile.read(size)
        if len(body) < size:
            raise ConnectionError(f"{len(body)} of {size} bytes came")
        self._unread = 0
        return body

    def _content_length(self) -> int:
        self._unread = _UNKNOWN
        lengths = {length.strip() for length in self.headers.get_all("Content-Length", [])}
        if "Transfer-Encoding" in self.headers or (not lengths and self.command in ("POST", "PUT", "PATCH")):
            raise HTTPError(411, "a request with a body needs a Content-Length, and no Transfer-Encoding")
        length = lengths.pop() if lengths else "0"
        if lengths or not (length.isascii() and length.isdigit()):
            raise HTTPError(400, "the Content-Length is not a number")
        return int(length) if len(length) < 19 else _UNKNOWN

    def _discard_body(self) -> None:
        """Read what is left of the request, so that a client that is still sending gets to see the answer."""
        if self.close_connection:
            self.connection.shutdown(socket.SHUT_WR)
        self._incoming.allow(_UNWANTED_SECONDS)
        while self._unread and not self._expects_continue:
            received = len(self.rfile.read1(min(self._unread, 1 << 16)))
            self._unread -= received or self._unread  # the end

    def _send(self, response: Response) -> None:
        body, headers = response.body, {**response.headers, "Content-Type": response.content_type}
        if self._expects_continue or self._unread > _MAX_BODY_BYTES:
            self.close_connection = True
        if isinstance(body, bytes):
            if response.status != 204:
                headers["Content-Length"] = str(len(body))
            body = [b"" if self.command == "HEAD" else body]
        elif self.request_version == "HTTP/1.1":
            headers["Transfer-Encoding"] = "chunked"
            body = (b"%x\r\n%b\r\n" % (len(part), part) for part in chain(body, [b""]))  # an empty one is the end
        else:
            self.close_connection = True
        if self.close_connection:
            headers["Connection"] = "close"
        fields = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        head = f"HTTP/1.1 {response.status} {HTTPStatus(response.status).phrase}\r\n{fields}\r\n".encode("latin-1")
        self.connection.settimeout(_WRITE_SECONDS)
        parts = iter(body)
        for part in chain([head + next(parts, b"")], parts):  # the first together with the head, in one packet
            self.connection.sendall(part)
        self._discard_body()

    def _error(self, error: HTTPError) -> Response:
        return json_response(self.server.error_body(error), error.status, error.headers)

    def send_error(self, code: int, message: Optional[str] = None, explain: Optional[str] = None) -> None:
        """Answer a request that http.server could not make sense of."""
        self._unread = _UNKNOWN
        self._send(self._error(HTTPError(code, message or HTTPStatus(code).phrase)))

    def log_message(self, format: str, *args: Any) -> None:
        logger.debug(format, *args)


class WebServer:
    """Listens at `url`, until closed, and gives each request to a function, in any thread; that may raise `HTTPError`.

    Port 0 takes a free one. `error_body` gives the JSON value for an error. An address that can't be listened on
    is a ConfigurationError.
    """

    def __init__(
        self,
        host: str,
        port: int,
        respond: Callable[[Request], Response],
        error_body: Callable[[HTTPError], Any] = lambda error: {"detail": error.detail},
    ) -> None:
        self.respond = respond
        self.error_body = error_body
        try:
            family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
            self._listener = socket.create_server((host, port), family=family, backlog=_MAX_BACKLOG)
        except (OSError, OverflowError, UnicodeError) as exc:
            raise ConfigurationError(f"can't listen on {host}, port {port}: {exc}") from exc
        host, port = self._listener.getsockname()[:2]
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # all addresses, loopback among them
        self._address = (host, port)
        self.url: str = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        self._is_open = True
        self._connections: Dict[threading.Thread, socket.socket] = {}
        self._accepting = threading.Thread(target=self._accept, name="synthgen-accept", daemon=True)
        self._accepting.start()

    @property
    def is_full(self) -> bool:
        """Whether no more connections are accepted, until one of them ends."""
        # Not by is_alive(): connections ask this, too, and until 3.12 it can fail where two threads ask it at a time.
        return sum(connection.fileno() >= 0 for connection in self._connections.values()) >= _MAX_CONNECTIONS

    def close(self) -> None:
        """End every connection and every thread; twice is fine."""
        self._is_open = False
        while self._accepting.is_alive():
            with suppress(OSError):  # one more connection, for who waits for one
                socket.create_connection(self._address, timeout=1).close()
            self._accepting.join(0.1)
        for connection in self._connections.values():
            with suppress(OSError):  # gone already
                connection.shutdown(socket.SHUT_RDWR)
        for thread in self._connections:
            thread.join()
        self._listener.close()

    def _accept(self) -> None:
        while self._is_open:
            if self.is_full:
                time.sleep(0.01)
                continue
            try:
                connection, address = self._listener.accept()
            except OSError as exc:  # no file descriptors left, or the client is gone already
                logger.warning("can't accept a connection: %s", exc)
                time.sleep(0.1)
                continue
            thread = threading.Thread(target=self._serve, args=(connection, address), name="synthgen-http", daemon=True)
            try:
                thread.start()
            except RuntimeError as exc:  # no more threads
                logger.warning("can't serve a connection: %s", exc)
                connection.close()
            else:
                alive = {other: of_other for other, of_other in self._connections.items() if other.is_alive()}
                self._connections = {**alive, thread: connection}

    def _serve(self, connection: socket.socket, address: Any) -> None:
        try:
            _Connection(connection, address, self)  # type: ignore[arg-type]
        except OSError as exc:  # clients come and go
            logger.debug("a connection ended: %s", exc)
        except Exception as exc:  # in mid-stream, too late for another status; a body that breaks off says it
            _log_failure(exc)
        finally:
            connection.close()


def _log_failure(exc: Exception) -> None:
    """Log where an error came from; not its message, which may hold what a request said."""
    trace = "".join(traceback.format_tb(exc.__traceback__))
    logger.error("%s while answering a request:\n%s", type(exc).__name__, trace)
