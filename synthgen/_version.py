"""The version of the package, for the package itself and for its build."""

__version__ = "1.1.0"
