"""Whether what would be published works: the wheel runs the demo, the sdist its own tests.

    python tests/check_dist.py DIRECTORY        holding one wheel and one sdist
"""

import subprocess
import sys
import tarfile
import tempfile
import venv
from pathlib import Path


def main(directory: str) -> None:
    (wheel,) = Path(directory).glob("*.whl")
    (sdist,) = Path(directory).glob("*.tar.gz")
    with tempfile.TemporaryDirectory() as folder:
        run_the_demo(wheel, folder)
    with tempfile.TemporaryDirectory() as folder:
        run_the_tests(sdist, folder)


def run_the_demo(wheel: Path, folder: str) -> None:
    """From a fresh environment, with nothing but what the wheel itself requires."""
    venv.create(folder)
    run(folder, sys.executable, "-m", "pip", "--python", folder, "install", "--quiet", wheel.resolve())
    run(folder, Path(folder, "Scripts" if sys.platform == "win32" else "bin", "synthgen"), "demo")


def run_the_tests(sdist: Path, folder: str) -> None:
    """Of the unpacked sdist, on the package beside them."""
    with tarfile.open(str(sdist)) as archive:
        archive.extractall(folder)
    (unpacked,) = Path(folder).iterdir()
    run(unpacked, sys.executable, "-m", "pytest", "-n", "4", "--dist", "worksteal", "-m", "not slow and not hypothesis")


def run(folder: object, *command: object) -> None:
    print("$", *command, flush=True)
    subprocess.run([str(part) for part in command], cwd=str(folder), stdin=subprocess.DEVNULL, check=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
