"""The version of the package: on top of everything, so that every room may know it."""

__version__ = "0.1.0"
