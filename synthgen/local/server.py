"""The embedded server: the store, the workers and the API, behind one address."""

import math
import os
import secrets
from contextlib import ExitStack, closing
from typing import TYPE_CHECKING, Any, Optional, Union

from ..exceptions import ConfigurationError
from ..models import is_header_value
from .api import API
from .pace import Limits
from .provider import CallPolicy
from .store import Store
from .webserver import WebServer
from .worker import Workers

if TYPE_CHECKING:
    from ..client import SynthgenClient

#: Each is a thread with connections of its own.
_MOST_WORKERS = 4096


class LocalServer:
    """The framework's REST API on this machine: SQLite instead of its services, threads instead of its workers.

        >>> with LocalServer() as server, server.client() as client:
        ...     results = client.monitor_batch(tasks)

    A task that was accepted survives the end of the process, and of the machine. After a restart on the
    same file every unfinished task is run; one that was being called is called once more.

    Args:
        database: A file, made if it is not there; ``:memory:`` is a private temporary file, gone at the end.
        host: The address to listen on.
        port: 0 takes a free one.
        api_key: What requests must bring; with None a key is made up.
        workers: How many providers' answers may be waited for at a time.
        rpm: How many calls a minute each account (a provider with a key) allows, if it is known. It is found out else.
        tpm: How many tokens a minute it allows.
        max_cost: What all batches in the database together may cost, those of earlier starts included, at these prices.
            A call that there might be no money for waits; a start with a higher cap goes on.
        input_cost: The price of a million prompt tokens.
        output_cost: The price of a million completion tokens.

    Attributes:
        api_key: What requests must bring.

    Raises:
        ConfigurationError: A setting is of no use; from `start`, if that is found out only there.
    """

    _policy = CallPolicy()

    def __init__(
        self,
        database: Union[str, "os.PathLike[str]"] = ":memory:",
        host: str = "127.0.0.1",
        port: int = 0,
        api_key: Optional[str] = None,
        workers: int = 16,
        *,
        rpm: Optional[float] = None,
        tpm: Optional[float] = None,
        max_cost: Optional[float] = None,
        input_cost: float = 0.0,
        output_cost: float = 0.0,
    ) -> None:
        if not isinstance(workers, int) or workers < 1:
            raise ConfigurationError(f"workers must be at least 1, not {workers!r}")
        if workers > _MOST_WORKERS:
            raise ConfigurationError(f"workers must be at most {_MOST_WORKERS}, not {workers}")
        if api_key is not None and not (api_key and is_header_value(api_key)):
            raise ConfigurationError("api_key can't be sent in a header: it is empty, or has a line break or spaces")
        for name, limit in (("rpm", rpm), ("tpm", tpm), ("max_cost", max_cost)):
            if limit is not None and not _as_float(limit) > 0:
                raise ConfigurationError(f"{name} must be more than 0, not {limit}")
        if rpm is not None and float(rpm) < 1:  # a minute has room for one call at least
            raise ConfigurationError(f"rpm must be at least 1, not {rpm}")
        for name, price in (("input_cost", input_cost), ("output_cost", output_cost)):
            if not 0 <= _as_float(price) < math.inf:
                raise ConfigurationError(f"{name} must be a price from 0 on, not {price}")
        if max_cost is not None and not (input_cost or output_cost):
            raise ConfigurationError("max_cost is nothing without prices: give input_cost and output_cost, too")
        self.api_key: str = secrets.token_urlsafe(32) if api_key is None else api_key
        self._database = database
        self._address = (host, port)
        self._workers = workers
        rpm, tpm, max_cost = (None if limit is None else float(limit) for limit in (rpm, tpm, max_cost))
        self._limits = Limits(rpm, tpm, max_cost, float(input_cost), float(output_cost))
        self._opened = ExitStack()
        self._url: Optional[str] = None

    def __repr__(self) -> str:
        return f"<LocalServer {self._url or 'not started'}>"

    def __enter__(self) -> "LocalServer":
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def start(self) -> None:
        """Listen, and run what is unfinished in the database; nothing if it was started before."""
        if self._url is not None:
            return
        with ExitStack() as opened:
            self._file = None if self._database == ":memory:" else os.path.realpath(self._database)
            self._store = opened.enter_context(closing(Store(self._database)))
            workers = opened.enter_context(closing(Workers(self._store, self._workers, self._policy, self._limits)))
            api = API(self._store, workers, self.api_key)
            server = opened.enter_context(closing(WebServer(*self._address, respond=api)))
            workers.start()  # now that nothing can fail: calls cost money
            self._opened, self._url = opened.pop_all(), server.url

    def close(self) -> None:
        """End every connection and every thread; twice is fine.

        Calls to providers that are running are broken off. Their tasks stay PENDING, and are called
        again when a server is started on the same file.
        """
        self._opened.close()
        self._url = None

    @property
    def url(self) -> str:
        """The base URL for clients."""
        if self._url is None:
            raise ConfigurationError("the server is not started: use it in a with statement, or call start()")
        return self._url

    def client(self, **kwargs: Any) -> "SynthgenClient":
        """A `SynthgenClient` of this server; arguments go to it. No proxy gets in between."""
        from ..client import SynthgenClient

        kwargs.setdefault("idempotent_uploads", True)
        client = SynthgenClient(self.url, self.api_key, **kwargs)
        client._trust_env = False  # HTTP_PROXY means other hosts
        client._server_name = self._file  # the next start has another port
        return client


def _as_float(value: Any) -> float:
    """A number of any kind, a Decimal say, which does not go with floats; NaN for what is none."""
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan
