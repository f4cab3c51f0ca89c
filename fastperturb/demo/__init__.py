"""`fastperturb demo`: learned against fixed noise on a synthetic language."""

from fastperturb.demo.command import DemoOptions, run

__all__ = ["DemoOptions", "run"]
