"""A proxy that breaks things, on its way to a server and back; the same seed breaks the same things.

    with Framework() as server, FaultyProxy(server.url, seed=1) as proxy:
        client = SynthgenClient(proxy.url, ...)
        ...
        assert proxy.injected["answer lost"]

It is meant for one client at a time: with more, their order decides who meets what.
"""

import http.client
import random
import threading
from collections import Counter
from email.utils import formatdate
from typing import Callable, Dict, FrozenSet, List, NamedTuple
from urllib.parse import urlsplit

from servers import DEADLINE, DROP, NOT_FOUND, RESET, Answer, CannedServer, Request

_PAGE = "<html><head><title>Gateway</title></head><body>One moment, please</body></html>"


class Fault(NamedTuple):
    """A way in which a request can go wrong.

    Attributes:
        is_forwarded: Whether the server gets the request; if not, `breaks` is given an empty answer.
        breaks: What the client gets in place of the server's answer.
    """

    is_forwarded: bool
    breaks: Callable[[Answer, random.Random], Answer]


def _instead(answer: Answer) -> Callable[[Answer, random.Random], Answer]:
    return lambda whole, rng: answer


def _silence(whole: Answer, rng: random.Random) -> Answer:
    return Answer(hold=threading.Event())


def _status(status: int, **headers: str) -> Callable[[Answer, random.Random], Answer]:
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda whole, rng: rng.choice([Answer(_PAGE, status, names), Answer({"detail": "broken"}, status, names)])


def _date(whole: Answer, rng: random.Random) -> Answer:
    return Answer({"detail": "slow down"}, 429, {"Retry-After": formatdate(usegmt=True)})


def _half_json(whole: Answer, rng: random.Random) -> Answer:
    return Answer(whole.body[: len(whole.body) // 2], whole.status, whole.headers)


def _cut(whole: Answer, rng: random.Random) -> Answer:
    return _cut_at(whole, rng.randrange(len(whole.body) + 1), is_chunked=rng.random() < 0.5)


def _cut_character(whole: Answer, rng: random.Random) -> Answer:
    inside = [i for i, byte in enumerate(whole.body) if 0x80 <= byte < 0xC0]
    return _cut_at(whole, rng.choice(inside), is_chunked=True) if inside else DROP


def _cut_at(whole: Answer, end: int, is_chunked: bool) -> Answer:
    """The headers, and the body up to there: within a chunk, or within what Content-Length says."""
    size = len(whole.body) + 1
    frame = "Transfer-Encoding: chunked\r\n\r\n{:x}" if is_chunked else "Content-Length: {}\r\n"
    head = f"HTTP/1.1 {whole.status} OK\r\nContent-Type: {whole.headers['content-type']}\r\n{frame.format(size)}\r\n"
    return Answer(raw=head.encode("ascii") + whole.body[:end])


def _stall(whole: Answer, rng: random.Random) -> Answer:
    half = len(whole.body) // 2
    chunks = [whole.body[:half], threading.Event(), whole.body[half:]]
    return Answer(status=whole.status, headers=whole.headers, chunks=chunks)


def _in_pieces(whole: Answer, rng: random.Random) -> Answer:
    """The same answer, cut into chunks anywhere."""
    cuts = sorted(rng.randrange(len(whole.body)) for _ in range(rng.randrange(5)))
    pieces = [whole.body[start:end] for start, end in zip([0, *cuts], [*cuts, len(whole.body)])]
    return Answer(status=whole.status, headers=whole.headers, chunks=pieces)


FAULTS: Dict[str, Fault] = {
    "reset before": Fault(False, _instead(RESET)),
    "hung up before": Fault(False, _instead(DROP)),
    "silent before": Fault(False, _silence),
    "429": Fault(False, _status(429)),
    "429 in decimals": Fault(False, _status(429, Retry_After="0.01")),
    "429 until a date": Fault(False, _date),
    "503 with Retry-After": Fault(False, _status(503, Retry_After="0")),
    "page before": Fault(False, _instead(Answer(_PAGE))),
    "answer reset": Fault(True, _instead(RESET)),
    "answer lost": Fault(True, _instead(DROP)),
    "answer stalled": Fault(True, _stall),
    "500": Fault(True, _status(500)),
    "502": Fault(True, _status(502)),
    "503": Fault(True, _status(503)),
    "504": Fault(True, _status(504)),
    "page": Fault(True, _instead(Answer(_PAGE))),
    "half JSON": Fault(True, _half_json),
    "cut": Fault(True, _cut),
    "cut in a character": Fault(True, _cut_character),
}
_NO_FAULT = Fault(True, lambda whole, rng: _in_pieces(whole, rng) if whole.body else whole)
#: These need an answer that has more than ASCII in it: an export of the framework's.
NOT_ASCII: FrozenSet[str] = frozenset(["cut in a character"])
_LOSE_THE_ANSWER = ["answer lost", "answer reset"]


class FaultyProxy(CannedServer):
    """The proxy.

    Faults are drawn from a shuffled deck that holds each of them once, one deck for uploads and one for all else, so
    that uploads meet the same faults whatever is polled meanwhile; the first two lose the answer.

    Args:
        upstream: The URL of the server; may be changed.
        seed: What happens.
        rate: The share of requests that go wrong.
        without: Faults left out.

    Attributes:
        rate: May be changed.
        injected: How often each fault was.
        lost_uploads: How many uploads reached the server, and their answers not the client.
    """

    def __init__(self, upstream: str, seed: int, rate: float = 0.3, without: FrozenSet[str] = frozenset()) -> None:
        self.rate = rate
        self.injected: Counter[str] = Counter()
        self.lost_uploads = 0
        self.upstream = upstream
        self._names = frozenset(FAULTS) - without
        self._idle = threading.Condition()
        self._forwarding = 0
        self._rngs = {True: random.Random(seed), False: random.Random(-seed - 1)}
        self._decks: Dict[bool, List[str]] = {True: [], False: []}
        super().__init__()

    @property
    def missing(self) -> FrozenSet[str]:
        """The faults that were not injected yet."""
        return self._names - set(self.injected)

    def wait_until_idle(self) -> None:
        """Block until everything that was forwarded has been answered."""
        with self._idle:
            assert self._idle.wait_for(lambda: not self._forwarding, DEADLINE)

    def _answer_to(self, request: Request) -> Answer:
        told = super()._answer_to(request)
        if told is not NOT_FOUND:
            return told
        is_upload = request.method == "POST"
        rng = self._rngs[is_upload]
        with self._idle:
            fault = FAULTS[self._draw(is_upload, request)] if rng.random() < self.rate else _NO_FAULT
            self.lost_uploads += is_upload and fault.is_forwarded and fault is not _NO_FAULT
            self._forwarding += 1
        whole = self.forward(request) if fault.is_forwarded else Answer(b"")
        with self._idle:
            self._forwarding -= 1
            self._idle.notify_all()
            return fault.breaks(whole, rng)

    def _draw(self, is_upload: bool, request: Request) -> str:
        usable = self._names if request.path.endswith("/export") else self._names - NOT_ASCII
        deck = self._decks[is_upload]
        if usable.isdisjoint(deck):
            deck += _LOSE_THE_ANSWER + self._rngs[is_upload].sample(sorted(self._names), len(self._names))
        name = next(name for name in deck if name in usable)
        deck.remove(name)
        self.injected[name] += 1
        return name

    def forward(self, request: Request) -> Answer:
        """The server's answer."""
        connection = http.client.HTTPConnection(urlsplit(self.upstream).netloc, timeout=DEADLINE)
        headers = {name: value for name, value in request.headers.items() if name.lower() != "connection"}
        try:
            connection.request(request.method, request.path, request.body or None, headers)
            response = connection.getresponse()
            body = response.read()
        except (OSError, http.client.HTTPException) as exc:
            return Answer({"detail": f"bad gateway: {exc!r}"}, 502)
        finally:
            connection.close()
        return Answer(body, response.status, {"content-type": response.headers.get("Content-Type", "")})
