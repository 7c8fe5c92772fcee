"""Settings: from arguments, the environment, or a JSON file, in this order."""

import json
import math
import os
from typing import Any, Dict, Optional, Tuple, Union
from urllib.parse import urlsplit

from .exceptions import ConfigurationError
from .models import is_header_value

_DEFAULT_BASE_URL = "http://localhost:8002"
_DEFAULT_TIMEOUT = 3600.0
_LONGEST_TIMEOUT = 2e6  # 23 days; a socket takes no more milliseconds than fit into 32 bits
_FILE_KEYS = {
    "base_url": 'a text such as "http://localhost:8002"',
    "api_key": "a text",
    "timeout": "a number of seconds such as 3600",
}


def read_config(
    base_url: Optional[str],
    api_key: Optional[str],
    timeout: Optional[float],
    config_file: Optional[Union[str, "os.PathLike[str]"]],
) -> Tuple[str, Optional[str], float]:
    """The base URL, the key and the time-out that hold; for a malformed one, an error that says what would be right."""
    file = {} if config_file is None else _read_file(os.fspath(config_file))

    def pick(name: str, argument: Any, default: Any = None) -> Any:
        places = (argument, os.environ.get(f"SYNTHGEN_{name.upper()}") or None, file.get(name))
        return next((value for value in places if value is not None), default)

    return (
        _checked_base_url(pick("base_url", base_url, _DEFAULT_BASE_URL)),
        _checked_api_key(pick("api_key", api_key)),
        _checked_timeout(pick("timeout", timeout, _DEFAULT_TIMEOUT)),
    )


def _read_file(path: str) -> Dict[str, Any]:
    where = f"configuration file {path}"
    try:
        with open(path, encoding="utf-8-sig") as file:
            config = json.load(file)
    except OSError as exc:
        raise ConfigurationError(f"{where}: {exc.strerror or exc}") from None
    except (ValueError, RecursionError) as exc:  # not shown as the cause: it holds the whole file
        raise ConfigurationError(f"{where} is not JSON: {exc}") from None
    if not isinstance(config, dict):
        raise ConfigurationError(f'{where} must hold an object such as {{"base_url": "..."}}')
    for key, value in config.items():
        if key not in _FILE_KEYS:
            raise ConfigurationError(f"{where}: unknown key {key!r}; known are {', '.join(_FILE_KEYS)}")
        right = isinstance(value, (int, float) if key == "timeout" else str) and not isinstance(value, bool)
        if value is not None and not right:
            raise ConfigurationError(f"{where}: {key} must be {_FILE_KEYS[key]}")
    return config


def _checked_base_url(value: Any) -> str:
    example = "it should look like http://localhost:8002 or https://host/prefix, without a query or spaces"
    if not isinstance(value, str):
        raise ConfigurationError(f"the base URL must be a text: {example}")
    if "@" in value:  # not shown
        raise ConfigurationError("the base URL holds a user name or password; give a session with its auth instead")
    try:
        parts = urlsplit(value)
        parts.port  # raises for a malformed one
    except ValueError as exc:
        raise ConfigurationError(f"base URL {value!r}: {exc}; {example}") from None
    plain = value.isprintable() and not any(char in value for char in " ?#")
    if not plain or parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigurationError(f"base URL {value!r}: {example}")
    return value.rstrip("/")


def _checked_api_key(value: Any) -> Optional[str]:
    if value not in (None, "") and not (isinstance(value, str) and is_header_value(value)):
        raise ConfigurationError(
            "the API key can't be sent in a header: it must be text without line breaks or spaces around it"
        )
    return value or None


def _checked_timeout(value: Any) -> float:
    try:
        seconds = float(value)
    except (TypeError, ValueError, OverflowError):
        seconds = math.nan
    if isinstance(value, bool) or not 0 < seconds <= _LONGEST_TIMEOUT:
        raise ConfigurationError(
            f"timeout must be a number of seconds above 0, and at most {_LONGEST_TIMEOUT:,.0f}, not {value!r}"
        )
    return seconds
