"""The package as a whole: what it exports, what its import does, and what its files promise."""

import ast
import configparser
import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest

import synthgen
from synthgen import exceptions, models

ROOT = Path(__file__).parent.parent

#: Where this very package is imported from, be it a checkout or site-packages.
PACKAGE = Path(synthgen.__file__).parent


def run(*arguments, **environment):
    """The stdout of a Python of its own, which finds the same package."""
    completed = subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": str(PACKAGE.parent), **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        check=True,
    )
    return completed.stdout.decode("utf-8")


def test_all_is_what_is_there():
    """Every public name is listed, in order, and everything listed is there."""
    public = [name for name, value in vars(synthgen).items() if not name.startswith("_")]
    public = [name for name in public if not isinstance(getattr(synthgen, name), types.ModuleType)]

    assert synthgen.__all__ == sorted([*public, "__version__"])


def test_every_model_and_every_error_is_exported():
    """Nobody has to know in which module it is."""
    assert set(exceptions.__all__ + models.__all__) <= set(synthgen.__all__)


def test_the_import_loads_nothing_that_may_not_be_needed():
    """Beyond what requests and pydantic load by themselves."""
    loaded = run(
        "-c",
        "import requests, pydantic.main, sys; before = set(sys.modules); import synthgen;"
        "print(*set(sys.modules) - before)",
    ).split()

    assert "synthgen.client" in loaded
    not_needed = ("rich", "asyncio", "sqlite3", "http.server")
    assert [name for name in loaded for module in not_needed if (name + ".").startswith(module + ".")] == []


def imported_by(path):
    """The modules of the package that a module imports, late ones included; not what only type checkers read."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    conditions = [node for node in ast.walk(tree) if isinstance(node, ast.If)]
    unread = [inner for node in conditions if getattr(node.test, "id", "") == "TYPE_CHECKING" for inner in node.body]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level and node not in unread:
            names = {(node.module or alias.name).replace(".", "/") for alias in node.names}
            places = [path.parents[node.level - 1] / name for name in names]
            yield from (place / "__init__.py" if place.is_dir() else place.with_suffix(".py") for place in places)


def test_imports_go_one_way():
    """No module imports one that imports it, be it by way of others."""
    left = {path: set(imported_by(path)) for path in PACKAGE.rglob("*.py")}
    assert set().union(*left.values()) <= set(left)

    while left:
        last = [path for path, imported in left.items() if not imported & left.keys()]
        assert last, sorted(left)
        for path in last:
            del left[path]


def test_the_import_configures_no_logging():
    """One NullHandler on our own logger, and nothing else anywhere."""
    script = """
import logging, requests, pydantic
before = set(logging.root.manager.loggerDict)
import synthgen
new = {name: logging.getLogger(name) for name in set(logging.root.manager.loggerDict) - before}
own = [logger for name, logger in new.items() if name.split(".")[0] == "synthgen"]
assert [type(handler) for logger in own for handler in logger.handlers] == [logging.NullHandler], own
assert logging.root.handlers == [] and logging.root.level == logging.WARNING
assert all(logger.level == logging.NOTSET and logger.propagate for logger in new.values()), new
"""
    run("-c", script)


def test_the_import_reads_no_file_and_no_environment_variable():
    """But for its modules, and what pydantic asks for each model; seen at a second import, with all others loaded."""
    script = """
import os, sys
import synthgen

class Recording(type(os.environ)):
    def __getitem__(self, name):
        asked.add(name)
        return super().__getitem__(name)
    def __iter__(self):
        asked.add("all")
        return super().__iter__()

asked, opened = set(), []
os.environ.__class__ = Recording
assert os.getenv("PATH") and dict(os.environ) and asked >= {"PATH", "all"}
asked.clear()
sys.addaudithook(lambda event, arguments: opened.append(str(arguments[0])) if event == "open" else None)
for name in [name for name in sys.modules if name.split(".")[0] == "synthgen"]:
    del sys.modules[name]
import synthgen
assert all(name.startswith("PYDANTIC_") for name in asked), asked
assert opened and all("synthgen" in path and ".py" in path for path in opened), opened
"""
    run("-c", script)


@pytest.mark.slow
@pytest.mark.parametrize("flags", [["-OO"], ["-bb"]], ids=" ".join)
def test_the_whole_job_runs_under_any_flags(flags):
    """Without assertions or docstrings, and with what confuses bytes and text an error."""
    script = """
import sys
from synthgen import Task
from synthgen.local import DemoProvider, LocalServer
with DemoProvider() as provider, LocalServer() as server, server.client() as client:
    task = Task(url=provider.url, body={"messages": [{"role": "user", "content": "solve 2x + 4 = 10"}]})
    print(client.monitor_batch([task], show_progress=False)[0].content)
"""
    assert run(*flags, "-c", script) == "x = 3\n"


def test_the_version_is_a_literal():
    """Read without an import: by setup.cfg, and by whoever vendors the package."""
    source = (PACKAGE / "_version.py").read_text(encoding="utf-8")

    assert re.search(r'^__version__ = "(.+?)"', source, re.MULTILINE).group(1) == synthgen.__version__


def test_the_changelog_begins_with_this_version():
    """A release that it does not mention is not finished."""
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")

    assert re.search(r"^## (\S+)", changelog, re.MULTILINE).group(1) == synthgen.__version__


def test_the_lower_bounds_are_those_that_are_tested():
    """Each ``name>=version`` of setup.cfg is a ``name==version`` of tox's `oldest`, and there are no other bounds."""
    options, tox = configparser.ConfigParser(), configparser.ConfigParser(interpolation=None)
    options.read(str(ROOT / "setup.cfg"))
    tox.read(str(ROOT / "tox.ini"))
    required = options["options"]["install_requires"] + options["options.extras_require"]["rich"]

    bounds = {line for line in required.splitlines() if line and not line.startswith("#")}
    tested = {line for line in tox["testenv:oldest"]["deps"].splitlines() if "==" in line}

    assert {bound.replace(">=", "==") for bound in bounds} == tested


def test_the_package_is_marked_as_typed():
    """Or users' type checkers would ignore its annotations."""
    assert (PACKAGE / "py.typed").is_file()


def test_json_of_a_recorded_answer_is_shipped_with_the_tests():
    """An sdist runs its own tests, recordings included."""
    recordings = list((ROOT / "tests" / "wire").glob("*.json"))

    assert len(recordings) > 100
    assert all(json.loads(path.read_text(encoding="utf-8"))["case"] == path.stem for path in recordings)
