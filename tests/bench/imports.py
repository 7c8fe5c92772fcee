"""`import synthgen`, as whole processes."""

import subprocess
import sys
import tempfile
import time
from typing import Iterator, Optional

from measuring import PUBLISHED, Job, Measured, Row, environment_of, in_turn, main, print_table, ratio

#: pydantic is lazy: most of it is imported when a model is defined.
NEEDED = "import requests, pydantic\nclass M(pydantic.BaseModel): n: int"


def importing(code: str, folder: str, python: Optional[str] = sys.executable) -> Job:
    """Start a Python that runs this, and ends; what is compiled is kept in a folder, as if installed."""

    def run() -> Optional[Measured]:
        if python is None:
            return None
        environment = {**environment_of(python), "PYTHONPYCACHEPREFIX": folder}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        started = time.perf_counter()
        subprocess.run([python, "-c", code], cwd=folder, env=environment, check=True)
        return Measured(time.perf_counter() - started, 0)

    return run


def rows(quick: bool = False) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as folder:
        jobs = [
            importing("import synthgen", folder),
            importing(NEEDED, folder),
            importing("import requests, pydantic", folder),
            importing("import synthgen", folder, PUBLISHED),
        ]
        in_turn(1, *jobs)  # to compile them
        ours, needed, lazy, theirs = in_turn(1 if quick else 21, *jobs)
    assert ours and needed and lazy
    what = "`import synthgen`"
    more, more_than_lazy = ((ours.seconds - others.seconds) * 1000 for others in (needed, lazy))
    yield Row(what, "requests, pydantic and one model", ours, needed, more, at_most=15, unit=" ms")
    yield Row(what, "requests and pydantic, not in use", ours, lazy, more_than_lazy, at_most=15, unit=" ms")
    yield Row(what, "0.0.7", ours, theirs, ratio(ours, theirs), at_most=0.5)


if __name__ == "__main__":
    main(globals(), lambda quick: print_table(rows(quick)))
