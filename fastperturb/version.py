"""The version, in one place that a build and a bare checkout can both read."""

__version__ = "0.2.0"
