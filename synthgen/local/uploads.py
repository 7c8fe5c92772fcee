"""From the bytes of an upload to the rows of its tasks: the multipart form, then the lines of its file."""

import codecs
import io
import json
from email.message import Message
from email.parser import BytesHeaderParser
from typing import Any, Dict, Iterator, List, Literal, Optional, Tuple

from pydantic import BaseModel, ConfigDict, ValidationError

from ..models import is_header_value
from .webserver import HTTPError

_MAX_PART_HEADERS = 16 << 10
_MAX_PARTS = 100
_MAX_ERRORS = 100

_to_json = json.JSONEncoder(allow_nan=False).encode


class _Line(BaseModel):
    """What a line must have, and may have, to be a task."""

    model_config = ConfigDict(strict=True)

    custom_id: Optional[str]
    method: Literal["POST", "PUT", "PATCH"]
    url: str
    api_key: Optional[str] = None
    body: Dict[str, Any]
    dataset: Optional[str] = None
    source: Optional[Dict[str, Any]] = None
    use_cache: Optional[bool] = None
    track_progress: Optional[bool] = None


def problem(message: str, *location: object, kind: str = "value_error", given: Optional[str] = None) -> Dict[str, Any]:
    """What is wrong with a request, for the list that is a 422's detail, in FastAPI's form."""
    return {"type": kind, "loc": location, "msg": message, "input": given}


def read_file(content_type: str, body: bytes) -> bytes:
    """The content of a form's field ``file``.

    Raises:
        HTTPError: 400 not a form, or a file of another name; 422 no such field.
    """
    header = Message()
    header["Content-Type"] = content_type
    boundary = header.get_boundary()
    if header.get_content_type() == "multipart/form-data" and boundary:
        for part, content in _parts(body, boundary.encode("utf-8")):
            filename = part.get_filename()
            if part.get_param("name", header="content-disposition") == "file" and filename is not None:
                if not filename.endswith(".jsonl"):
                    raise HTTPError(400, "Only JSONL files are supported")
                return content
    raise HTTPError(422, [problem("Field required", "body", "file", kind="missing")])


def _parts(body: bytes, boundary: bytes) -> Iterator[Tuple[Message, bytes]]:
    """The headers and the content of each part of a form."""
    delimiter = b"\r\n--" + boundary
    position = body.find(delimiter[2:]) + len(delimiter[2:])  # the first may be at the very start
    for _ in range(_MAX_PARTS):
        if body.startswith(b"--", position):
            return
        content = body.find(b"\r\n\r\n", position, position + _MAX_PART_HEADERS) + 4
        end = body.find(delimiter, content)
        if content < 4 or end < 0 or not body.startswith(b"\r\n", position):
            break
        yield BytesHeaderParser().parsebytes(body[position + 2 : content]), body[content:end]
        position = end + len(delimiter)
    raise HTTPError(400, "There was an error parsing the body")


def read_rows(content: bytes) -> List[Tuple[Any, ...]]:
    """The rows of a file's tasks, as the store takes them; blank lines hold none.

    Raises:
        HTTPError: 422, naming the lines that are no tasks by their numbers alone: they may hold keys.
    """
    rows: List[Tuple[Any, ...]] = []
    problems: List[Dict[str, Any]] = []
    file = io.BytesIO(content)  # its lines end at a newline alone, whatever else JSON strings hold
    file.seek(len(codecs.BOM_UTF8) if content.startswith(codecs.BOM_UTF8) else 0)
    for number, line in enumerate(file, 1):
        if line.strip() and len(problems) < _MAX_ERRORS:
            try:
                rows.append(_row(line))
            except ValueError as exc:  # pydantic's is one
                problems.append(problem(f"line {number}: {_fault(exc)}", "body", "file", number))
    if problems or not rows:
        raise HTTPError(422, problems or [problem("the file has no tasks", "body", "file")])
    return rows


def _row(text: bytes) -> Tuple[Any, ...]:
    line = _Line.model_validate_json(text)
    if line.api_key and not is_header_value(line.api_key):
        raise ValueError("'api_key' can't be sent in a header")
    texts = (line.custom_id, line.method, line.url, line.api_key, _to_json(line.body), line.dataset)
    return (*texts, _to_json(line.source), bool(line.use_cache), bool(line.track_progress))


def _fault(error: ValueError) -> str:
    """What is wrong with a line, without what it holds."""
    if not isinstance(error, ValidationError):
        return str(error)
    fault = error.errors(include_url=False)[0]
    message = fault["msg"].replace("at line 1 column", "at column")
    if not fault["loc"]:
        return message
    name = f"'{fault['loc'][0]}'"
    return f"{name} is missing" if fault["type"] == "missing" else message.replace("Input should be", f"{name} must be")
