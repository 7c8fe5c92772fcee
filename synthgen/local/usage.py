"""Statistics over time: minutes added up to calendar intervals, in UTC."""

import re
from collections import Counter, defaultdict
from datetime import datetime, timedelta, timezone
from typing import Any, Dict, Iterable, List, Mapping, Optional

#: In microseconds, as all times in the store.
MINUTE = 60_000_000
_EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)
#: Minutes in a unit of a time range, its name, how many are allowed, and how long that is.
_UNITS = {"m": (1, "Minutes", 1440, "24 hours"), "h": (60, "Hours", 720, "30 days"), "d": (1440, "Days", 365, "1 year")}
_SUMS = ("total_tasks", "completed_tasks", "failed_tasks", "cached_tasks", "total_tokens")
_UNABBREVIATED = {"1m": "minute", "1h": "hour", "1d": "day", "1w": "week", "1M": "month", "1q": "quarter", "1y": "year"}


def format_time(microseconds: Optional[int]) -> Optional[str]:
    """A time of the store, as the API gives it."""
    if microseconds is None:
        return None
    return (_EPOCH + timedelta(microseconds=microseconds)).isoformat(timespec="microseconds")


def parse_time_range(text: str) -> int:
    """The length of a range such as ``24h``, in microseconds.

    Raises:
        ValueError: With the framework's words.
    """
    match = re.fullmatch(r"([0-9]{1,9})([mhd])", text)
    if match:
        count, (size, name, highest, longest) = int(match.group(1)), _UNITS[match.group(2)]
        if 0 < count <= highest:
            return count * size * MINUTE
        message = f"{name} should not exceed {highest} ({longest})" if count else "Time range value must be positive"
    else:
        form = "'Xm', 'Xh', or 'Xd' where X is a positive number and m=minutes, h=hours, d=days"
        message = f"Time range must be in format {form}"
    raise ValueError(
        f"1 validation error for TimeRange\ntime_range\n  Value error, {message} "
        f"[type=value_error, input_value={text!r}, input_type=str]\n"
        "    For further information visit https://errors.pydantic.dev/2.10/v/value_error"
    )


def time_series(minutes: Iterable[Mapping[str, int]], interval: str) -> List[Dict[str, Any]]:
    """One point for each interval in which something happened, oldest first."""
    buckets: Dict[datetime, Counter[str]] = defaultdict(Counter)
    for minute in minutes:
        buckets[_start(_EPOCH + timedelta(minutes=minute["minute"]), interval)].update(minute)
    return [
        {
            "timestamp": start.strftime("%Y-%m-%d %H:%M:%S"),
            **{name: sums[name] for name in (*_SUMS, "prompt_tokens", "completion_tokens")},
            "avg_duration_ms": _ratio(sums["duration"], sums["total_tasks"]),
            "tokens_per_second": _ratio(1000 * sums["completion_tokens"], sums["duration"], 2),
        }
        for start, sums in sorted(buckets.items())
    ]


def summary(minutes: Iterable[Mapping[str, int]]) -> Dict[str, Any]:
    """All minutes together."""
    sums: Counter[str] = sum(map(Counter, minutes), Counter())
    return {
        **{name: sums[name] for name in (*_SUMS, "processing_tasks")},
        "total_prompt_tokens": sums["prompt_tokens"],
        "total_completion_tokens": sums["completion_tokens"],
        "average_response_time": _ratio(sums["duration"], sums["total_tasks"]),
        "tokens_per_second": _ratio(1000 * sums["completion_tokens"], sums["completed_duration"], 2),
        "cache_hit_rate": _ratio(100 * sums["cached_tasks"], sums["total_tasks"], 2),
    }


def _start(moment: datetime, interval: str) -> datetime:
    """Where the interval around a moment begins; weeks do on Monday."""
    day = moment.replace(hour=0, minute=0)
    starts = {
        "minute": moment,
        "hour": moment.replace(minute=0),
        "day": day,
        "week": day - timedelta(days=day.weekday()),
        "month": day.replace(day=1),
        "quarter": day.replace(month=day.month - (day.month - 1) % 3, day=1),
        "year": day.replace(month=1, day=1),
    }
    return starts[_UNABBREVIATED.get(interval, interval)]


def _ratio(part: int, whole: int, digits: Optional[int] = None) -> float:
    return round(part / whole if whole else 0.0, digits)
