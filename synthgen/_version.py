"""The version of the package, for the package itself and for its build."""

__all__ = ["__version__"]

__version__ = "1.1.0"
