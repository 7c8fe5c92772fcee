"""What ``help()`` and an editor show: every public name is explained, with its units, and every example runs."""

import doctest
import importlib
import inspect
import pkgutil
import pydoc
import re
from typing import Union

import pytest

import synthgen
import synthgen.aio
import synthgen.local
from synthgen import SynthgenClient, Task, models
from synthgen.aio import AsyncSynthgenClient
from synthgen.local import DemoProvider, LocalServer

#: A name that ends in one of these has its unit, or says what it counts or when it was.
UNITS = ("tasks", "tokens", "messages", "consumers", "ms", "per_second", "at")


def public_names():
    """The public classes and functions, and their public methods and properties."""
    for module in (synthgen, synthgen.aio, synthgen.local):
        for name in module.__all__:
            value = getattr(module, name)
            if name != "__version__":
                yield f"{module.__name__}.{name}", value
            for member, attribute in vars(value).items() if inspect.isclass(value) else ():
                if not member.startswith("_") and (inspect.isroutine(attribute) or isinstance(attribute, property)):
                    yield f"{module.__name__}.{name}.{member}", getattr(value, member)


def fields():
    """The fields of the models: each with its name, its type, and what is written about it."""
    for name in models.__all__:
        model = getattr(models, name)
        for field, info in getattr(model, "model_fields", {}).items():
            lines = re.search(rf"((?:^    #: .*\n)*)^    {field}: ", inspect.getsource(model), re.MULTILINE).group(1)
            yield f"{name}.{field}", info.annotation, re.sub(r"\n? *#:", "", lines).strip()


FIELDS = {name: (annotation, text) for name, annotation, text in fields()}


@pytest.mark.parametrize("name, value", list(public_names()))
def test_every_public_name_has_a_docstring(name, value):
    """Of its own, or that of the method that it stands for, and its first line is a sentence."""
    text = value.__doc__ or ""

    assert re.match(r"\S.*[.:](\n|$)", text), text


@pytest.mark.parametrize("name", FIELDS)
def test_every_number_of_a_model_has_a_unit(name):
    """In its name, in the line above it, or in what the class says of it."""
    annotation, text = FIELDS[name]
    model, _, field = name.partition(".")
    types = getattr(annotation, "__args__", ()) if getattr(annotation, "__origin__", None) is Union else (annotation,)
    if {int, float}.isdisjoint(types):
        return

    assert field.endswith(UNITS) or text or field in getattr(models, model).__doc__


@pytest.mark.parametrize(
    "name, unit",
    [
        ("TaskResponse.duration", "milliseconds"),
        ("Batch.duration", "whole seconds"),
        ("TimeSeriesDataPoint.avg_duration_ms", "milliseconds"),
        ("TimeSeriesDataPoint.timestamp", "UTC"),
        ("StatsSummary.average_response_time", "milliseconds"),
        ("StatsSummary.cache_hit_rate", "from 0 to 1"),
        ("Batch.completed_tasks", "Without the cached"),
    ],
)
def test_what_could_be_misread_is_explained(name, unit):
    """The wire's own names mean milliseconds here and seconds there."""
    assert unit in FIELDS[name][1]


@pytest.mark.parametrize(
    "value, argument, unit",
    [
        (SynthgenClient, "timeout", "in seconds"),
        (SynthgenClient, "backoff_factor", "in seconds"),
        (SynthgenClient.monitor_batch, "poll_interval", "in seconds"),
        (SynthgenClient.monitor_batch, "timeout", "in seconds"),
        (SynthgenClient.monitor_batch, "stall_timeout", "in seconds"),
        (SynthgenClient.monitor_batch, "cost_by_1m_input_token", "a million input tokens"),
        (SynthgenClient.monitor_batch, "chunk_size", "tasks"),
        (SynthgenClient.create_batch, "chunk_size", "tasks"),
        (SynthgenClient.get_batch_stats, "time_range", "``h``"),
        (synthgen.RateLimitError, "retry_after", "in seconds"),
    ],
)
def test_an_argument_has_its_unit(value, argument, unit):
    """Where it is described."""
    described = re.search(rf"^ *{argument}: ((?:.*\n)(?: {{12,}}.*\n)*)", value.__doc__ + "\n", re.MULTILINE).group(1)

    assert unit in described


@pytest.mark.parametrize("value", [SynthgenClient, AsyncSynthgenClient, LocalServer, DemoProvider])
def test_help_shows_what_is_public(value):
    """No private name is in it, and every public method is."""
    shown = pydoc.plain(pydoc.render_doc(value))

    assert set(re.findall(r"\b_[a-z]\w*", shown, re.IGNORECASE)) <= {"__main__"}
    for name in vars(value):
        assert name.startswith("_") or re.search(rf"^ \|  (async )?{name}\b", shown, re.MULTILINE), name


MODULES = ["synthgen", *(info.name for info in pkgutil.walk_packages(synthgen.__path__, "synthgen."))]


@pytest.mark.parametrize("module", MODULES)
def test_every_example_runs(module):
    """And prints what it says; `tasks`, where one has them, are there."""
    if module == "synthgen._rich":
        pytest.importorskip("rich")
    module = importlib.import_module(module)
    with DemoProvider() as provider:
        body = {"messages": [{"role": "user", "content": "solve 2x + 4 = 10"}]}
        given = {"tasks": [Task(url=provider.url, body=body)]}
        result = doctest.testmod(module, extraglobs=given)

    assert result == (0, inspect.getsource(module).count(">>> "))
