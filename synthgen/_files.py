"""Files that no other process shall meddle with: written beside their place, and moved there; or held."""

import errno
import glob
import os
import shutil
import sys
import uuid
from contextlib import contextmanager, suppress
from typing import IO, Any, BinaryIO, Iterator, Union


@contextmanager
def replacing(path: Union[str, "os.PathLike[str]"]) -> Iterator[BinaryIO]:
    """A binary file that takes the place of ``path`` when all went well; otherwise nothing has changed."""
    target = os.path.realpath(path)
    if not os.path.isdir(os.path.dirname(target)):
        raise OSError(errno.ENOENT, "no such folder", os.path.dirname(target))
    if os.path.exists(target) and not os.path.isfile(target):
        raise OSError(errno.EINVAL, "there is something else than a file", target)
    for left in glob.glob(f"{glob.escape(target)}.{'[0-9a-f]' * 8}.part"):  # by a killed process, if nobody holds it
        with suppress(OSError), open(left, "ab") as file:
            hold(file)
            os.unlink(left)
    part = f"{target}.{uuid.uuid4().hex[:8]}.part"
    try:
        with open(part, "xb", buffering=256 * 1024) as file:  # by default each line of an export would be a write
            with suppress(OSError):  # where the file system knows no locks, nothing is removed above
                hold(file)
            yield file
            file.flush()
            os.fsync(file.fileno())
        if os.path.exists(target):
            shutil.copymode(target, part)
        os.replace(part, target)
    finally:
        with suppress(FileNotFoundError):  # it was moved
            os.unlink(part)


def hold(file: IO[Any]) -> None:
    """Keep an open file from every other `hold`, until it is closed or the process ends.

    Raises:
        OSError: It is held already.
    """
    if sys.platform == "win32":
        import msvcrt

        file.seek(0)  # where every process locks the same byte
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
