"""From the bytes of an upload to the rows of its tasks: the multipart form, then the lines of its file."""

import codecs
import io
import json
from email.message import Message
from email.parser import BytesHeaderParser
from typing import Any, Dict, Iterator, List, Tuple

from ..models import is_header_value
from .webserver import HTTPError

__all__ = ["invalid", "read_file", "read_rows"]

_MAX_PART_HEADERS = 16 << 10
_MAX_PARTS = 100
_MAX_ERRORS = 100

_NONE = type(None)
#: The fields of a line: whether it must be there, the types that it may have, and what to call them.
_FIELDS: Tuple[Tuple[str, bool, Tuple[type, ...], str], ...] = (
    ("custom_id", True, (str, _NONE), "text or null"),
    ("method", True, (str,), "text"),
    ("url", True, (str,), "text"),
    ("api_key", False, (str, _NONE), "text or null"),
    ("body", True, (dict,), "an object"),
    ("dataset", False, (str, _NONE), "text or null"),
    ("source", False, (dict, _NONE), "an object or null"),
    ("use_cache", False, (bool, _NONE), "true or false"),
    ("track_progress", False, (bool, _NONE), "true or false"),
)
_to_json = json.JSONEncoder(allow_nan=False).encode


def invalid(*errors: Dict[str, Any]) -> HTTPError:
    """A 422, in FastAPI's form."""
    return HTTPError(422, list(errors))


def read_file(content_type: str, body: bytes) -> bytes:
    """The content of a form's field ``file``.

    Raises:
        HTTPError: 400 not a form, or a file of another name; 422 no such field.
    """
    header = Message()
    header["Content-Type"] = content_type
    boundary = header.get_boundary()
    if header.get_content_type() == "multipart/form-data" and boundary:
        for name, filename, content in _parts(body, boundary):
            if name == "file" and filename is not None:
                if not filename.endswith(".jsonl"):
                    raise HTTPError(400, "Only JSONL files are supported")
                return content
    raise invalid({"type": "missing", "loc": ["body", "file"], "msg": "Field required", "input": None})


def _parts(body: bytes, boundary: str) -> Iterator[Tuple[Any, Any, bytes]]:
    """Name, file name and content of each part of a form."""
    try:
        delimiter = b"\r\n--" + boundary.encode("ascii")
    except UnicodeEncodeError:
        raise _not_a_form() from None
    # At the very start the first delimiter has no line break before it.
    end = 0 if body.startswith(delimiter[2:]) else body.find(delimiter)
    start = end + len(delimiter) - (0 if end else 2)
    for _ in range(_MAX_PARTS):
        if end < 0 or body[start : start + 2] not in (b"\r\n", b"--"):
            raise _not_a_form()
        if body[start : start + 2] == b"--":
            return
        content = body.find(b"\r\n\r\n", start, start + _MAX_PART_HEADERS)
        end = body.find(delimiter, content)
        if content < 0 or end < 0:
            raise _not_a_form()
        headers = BytesHeaderParser().parsebytes(body[start + 2 : content + 2])
        yield headers.get_param("name", header="content-disposition"), headers.get_filename(), body[content + 4 : end]
        start = end + len(delimiter)
    raise _not_a_form()


def _not_a_form() -> HTTPError:
    return HTTPError(400, "There was an error parsing the body")


def read_rows(content: bytes) -> List[Tuple[Any, ...]]:
    """The rows of a file's tasks, as the store takes them; blank lines hold none.

    Raises:
        HTTPError: 422, naming the lines that are no tasks by their numbers alone: they may hold keys.
    """
    rows: List[Tuple[Any, ...]] = []
    errors: List[Dict[str, Any]] = []
    file = io.BytesIO(content)  # its lines end at a newline alone, whatever else JSON strings hold
    file.seek(len(codecs.BOM_UTF8) if content.startswith(codecs.BOM_UTF8) else 0)
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            rows.append(_row(line.rstrip(b"\n")))
        except ValueError as exc:
            message = f"line {number}: {exc}"
            errors.append({"type": "value_error", "loc": ["body", "file", number], "msg": message, "input": None})
            if len(errors) == _MAX_ERRORS:
                break
    if errors:
        raise invalid(*errors)
    if not rows:
        raise invalid({"type": "value_error", "loc": ["body", "file"], "msg": "the file has no tasks", "input": None})
    return rows


def _row(line: bytes) -> Tuple[Any, ...]:
    try:
        task = json.loads(line.decode("utf-8"))
        if not isinstance(task, dict):
            raise ValueError("not an object")
        for name, is_required, types, wanted in _FIELDS:
            if name not in task:
                if is_required:
                    raise ValueError(f"'{name}' is missing")
            elif not isinstance(task[name], types):
                raise ValueError(f"'{name}' must be {wanted}")
        custom_id, method, url, body = task["custom_id"], task["method"], task["url"], _to_json(task["body"])
        api_key, dataset, source = task.get("api_key"), task.get("dataset"), _to_json(task.get("source"))
        f"{custom_id}{method}{url}{dataset}".encode()  # raises for half of a surrogate pair
    except json.JSONDecodeError as exc:
        raise ValueError(f"not JSON: {exc.msg}, column {exc.colno}") from None
    except UnicodeDecodeError as exc:
        raise ValueError(f"not UTF-8 from byte {exc.start} on") from None
    except UnicodeEncodeError:
        raise ValueError("half of a surrogate pair in a text") from None
    except RecursionError:
        raise ValueError("nested too deep") from None
    if api_key and not is_header_value(api_key):
        raise ValueError("'api_key' can't be sent in a header")
    flags = (bool(task.get("use_cache")), bool(task.get("track_progress")))
    return (custom_id, method, url, api_key, body, dataset, source, *flags)
