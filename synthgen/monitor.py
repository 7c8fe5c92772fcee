"""What a user sees while waiting.

`Monitor` is the interface, and silent; `PlainMonitor` writes lines, for logs; ``_rich.RichMonitor`` draws.
All of it goes to stderr: stdout belongs to the script.
"""

import os
import sys
import warnings
from contextlib import suppress
from functools import partial
from typing import Any, Optional, TextIO

from .plain import Monitor, PlainMonitor

__all__ = ["GuardedMonitor", "Monitor", "PlainMonitor", "choose_monitor", "load_rich"]


class GuardedMonitor(Monitor):
    """The same monitor, but an exception in it ends the watching, with a warning, and not the batch."""

    def __init__(self, monitor: Monitor) -> None:
        self._monitor = monitor
        self._broken = False

    def __getattribute__(self, name: str) -> Any:
        """Each method of the interface tells the monitor."""
        return super().__getattribute__(name) if name.startswith("_") else partial(self._tell, name)

    def _tell(self, event: str, *args: Any) -> None:
        if self._broken and event != "close":  # a broken monitor, too, has to give the terminal back
            return
        try:
            getattr(self._monitor, event)(*args)
        except Exception as exc:
            if not self._broken:
                self._broken = True
                name = f"{type(self._monitor).__name__}.{event}"
                text = f"{name} raised {type(exc).__name__}: {exc}; the batch goes on, unwatched"
                # Warnings may be errors, and stderr closed: neither may end the batch.
                with suppress(RuntimeWarning, ValueError):
                    warnings.warn(text, RuntimeWarning)


def choose_monitor() -> PlainMonitor:
    """A monitor for where we are: drawn on a terminal and in Jupyter, if rich is there; written in lines elsewhere."""
    rich = load_rich(sys.stderr)
    monitor: PlainMonitor = rich.RichMonitor() if rich else PlainMonitor()
    return monitor


def load_rich(stream: Optional[TextIO]) -> Any:
    """The module ``_rich``, where it can draw: None if the stream is no terminal or rich is not installed."""
    try:
        terminal = stream is not None and stream.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")
    except (AttributeError, ValueError):  # something that only writes, or that is closed
        terminal = False
    if not terminal and "ipykernel" not in sys.modules:
        return None
    try:
        from . import _rich
    except ImportError:  # of rich, or of a _rich.py that a vendored copy goes without
        return None
    return _rich
