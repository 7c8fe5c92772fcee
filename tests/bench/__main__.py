"""Every benchmark: python tests/bench [--quick]

Medians of several runs in turn, each in a process of its own; see measuring.py. Nothing fails when a number is not
what it should be: the last column says so. With --quick there are few tasks, to see that all of it still runs.
"""

import platform
import sys
import time
from itertools import chain

import embedded
import exports
import growth
import imports
import monitoring
import uploads
from measuring import print_table


def run(quick: bool) -> None:
    started = time.monotonic()
    print(f"{platform.python_implementation()} {platform.python_version()}, {platform.platform()}\n")
    if quick:
        print("So few tasks say nothing about speed.\n")
    print_table(chain.from_iterable(group.rows(quick) for group in (exports, uploads, monitoring, imports, embedded)))
    print()
    growth.tables(quick)
    print(f"\n{time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    run("--quick" in sys.argv)
