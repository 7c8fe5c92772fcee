"""Errors: one tree, attributes to act on, pickles without keys."""

import copy
import pickle
import re

import pytest

from synthgen import exceptions
from synthgen.exceptions import (
    APIError,
    BatchIncompleteError,
    BatchStalledError,
    BatchTimeoutError,
    BatchUploadError,
    ConfigurationError,
    ConnectionFailedError,
    ContentError,
    ErrorResponse,
    MissingDependencyError,
    RateLimitError,
    SynthgenError,
)
from synthgen.models import Batch, HealthResponse, Task, TaskResponse

KEY = "sk-never-to-be-seen"

ERRORS = [getattr(exceptions, name) for name in exceptions.__all__ if name != "ErrorResponse"]

TASK = Task(url="http://provider.test/v1", body={}, api_key=KEY)
RESPONSE = ErrorResponse(404, {"Content-Type": "application/json"}, '{"detail": "gone"}', "http://server.test/x")

FULL = [
    APIError("m", status_code=404, response=RESPONSE),
    RateLimitError("m", status_code=429, response=RESPONSE, retry_after=1.5),
    BatchUploadError(
        "m", status_code=503, batch_id="b", uploaded=7, unconfirmed=[TASK], remaining=[TASK], idempotency_key="k"
    ),
    BatchTimeoutError("m", batch_id="b", batch=Batch(batch_id="b", batch_status="PENDING")),
    BatchStalledError("m", batch_id="b", health=HealthResponse(status="healthy")),
    BatchIncompleteError(
        "m", batch_id="b", results=[TaskResponse(message_id="1", status="COMPLETED")], missing=[TASK]
    ),
]


def comparable(error):
    """The attributes of an error, without the keys of its tasks, as values that compare."""
    state = {name: vars(value) if isinstance(value, ErrorResponse) else value for name, value in vars(error).items()}
    for name in ("unconfirmed", "remaining", "missing"):
        if state.get(name):
            state[name] = [task.model_copy(update={"api_key": None}) for task in state[name]]
    return state


def drawn_tree():
    """Each error's name and the names of those above it, as the module's docstring draws them."""
    above = []
    for line in exceptions.__doc__.splitlines():
        match = re.match(r"    ([│├└─ ]*)(\w+)", line)
        if match:
            above = above[: len(match.group(1)) // 4] + [match.group(2)]
            yield above[-1], above[:-1]


def test_the_tree_is_as_drawn():
    """The docstring names every error, under the one that it inherits from."""
    drawn = dict(drawn_tree())

    assert set(drawn) == {error.__name__ for error in ERRORS}
    for name, above in drawn.items():
        assert [base.__name__ for base in getattr(exceptions, name).__mro__ if base in ERRORS][1:] == above[::-1]


@pytest.mark.parametrize(
    "error, builtin",
    [
        (ConfigurationError, ValueError),
        (MissingDependencyError, ImportError),
        (ContentError, ValueError),
        (BatchTimeoutError, TimeoutError),
    ],
)
def test_an_error_is_also_what_python_calls_it(error, builtin):
    """It may be caught by either name."""
    assert issubclass(error, SynthgenError) and issubclass(error, builtin)


@pytest.mark.parametrize("error", ERRORS)
def test_a_message_is_enough(error):
    """Everything else has a default, and the message is the text."""
    made = error("what happened")

    assert made.message == str(made) == "what happened"


@pytest.mark.parametrize("error", [error("m") for error in ERRORS] + FULL, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("duplicate", [lambda error: pickle.loads(pickle.dumps(error)), copy.copy])
def test_an_error_survives_pickling_and_copying(error, duplicate):
    """With all its attributes: process pools send errors home this way."""
    copied = duplicate(error)

    assert type(copied) is type(error) and str(copied) == str(error)
    assert comparable(copied) == comparable(error)


@pytest.mark.parametrize("error", FULL, ids=lambda error: type(error).__name__)
def test_a_pickled_error_holds_no_key(error):
    """The tasks in it lose theirs."""
    assert KEY.encode() not in pickle.dumps(error)


@pytest.mark.parametrize("error", FULL, ids=lambda error: type(error).__name__)
def test_a_printed_error_shows_no_key(error):
    """Not in its text, nor in that of its attributes."""
    assert KEY not in str(error) + repr(error) + str(vars(error))


def test_remaining_tasks_that_can_be_read_once_do_not_pickle():
    """An iterator becomes None rather than an error."""
    error = BatchUploadError("m", remaining=iter([TASK]))

    assert pickle.loads(pickle.dumps(error)).remaining is None
    assert next(error.remaining) is TASK


def test_an_upload_error_keeps_the_keys_while_it_is_not_pickled():
    """``unconfirmed`` and ``remaining`` are there to be sent again."""
    error = BatchUploadError("m", unconfirmed=[TASK], remaining=[TASK])

    assert error.unconfirmed[0].api_key == error.remaining[0].api_key == KEY


def test_no_answer_means_no_status():
    """A connection that failed has neither a status nor a response."""
    error = ConnectionFailedError("refused")

    assert error.status_code is None and error.response is None


def test_the_response_of_an_error_is_true():
    """``if error.response:`` means that there was an answer, whatever its status."""
    assert RESPONSE
    assert (RESPONSE.status_code, RESPONSE.url) == (404, "http://server.test/x")


def test_the_headers_of_a_response_are_found_in_any_case():
    """As in HTTP, after a pickle too."""
    assert pickle.loads(pickle.dumps(RESPONSE)).headers["content-TYPE"] == "application/json"


def test_a_response_gives_its_json():
    """And a ValueError where the body is a proxy's page."""
    assert RESPONSE.json() == {"detail": "gone"}
    with pytest.raises(ValueError):
        ErrorResponse(502, {}, "<html>", "http://server.test/x").json()
