"""`fastperturb demo`: learned, fixed and no noise, compared on a synthetic language."""

from fastperturb.demo.command import DemoOptions, run

__all__ = ["DemoOptions", "run"]
