"""How to run a batch."""

import math
import os
from dataclasses import dataclass
from typing import Optional, Tuple, Union


@dataclass
class RunOptions:
    """How to run a batch; checked when they are made. ``call`` is how that was asked for, up to the ``batch_id``."""

    call: str
    batch_id: Optional[str]
    prices: Tuple[float, float]
    chunk_size: int
    poll_interval: float
    timeout: Optional[float]
    stall_timeout: Optional[float]
    checkpoint: Optional[Union[str, "os.PathLike[str]"]]

    def __post_init__(self) -> None:
        check_chunk_size(self.chunk_size)
        for name in ("poll_interval", "timeout", "stall_timeout"):
            seconds = getattr(self, name)
            is_for_ever = seconds is None and name != "poll_interval"
            if not is_for_ever and not (isinstance(seconds, (int, float)) and seconds >= 0):
                raise ValueError(f"{name} must be a number of seconds from 0 on, not {seconds!r}")
        try:
            self.prices = float(self.prices[0]), float(self.prices[1])
            are_possible = all(0 <= price < math.inf for price in self.prices)
        except (TypeError, ValueError):
            are_possible = False
        if not are_possible:
            raise ValueError(f"prices must be numbers from 0 on, not {self.prices!r}")
        check_checkpoint(self.checkpoint, self.batch_id)

    def way_back(self, batch_id: str) -> str:
        """How to come back to a batch that was begun."""
        return "the same call, by its checkpoint" if self.checkpoint else f"{self.call}batch_id={batch_id!r})"


def check_chunk_size(chunk_size: int) -> None:
    if not isinstance(chunk_size, int) or chunk_size < 1:
        raise ValueError(f"chunk_size must be a whole number from 1 on, not {chunk_size!r}")


def check_checkpoint(checkpoint: Optional[Union[str, "os.PathLike[str]"]], *names: Optional[str]) -> None:
    if checkpoint is not None and any(name is not None for name in names):
        raise ValueError("a checkpoint names the batch and its uploads itself: give no batch_id or idempotency_key")
