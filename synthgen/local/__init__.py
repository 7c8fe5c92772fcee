"""A server of the same API on one machine, with nothing to install, and a model provider to try it with."""

from .demo import DemoProvider
from .server import LocalServer

__all__ = ["DemoProvider", "LocalServer"]
