"""`fastperturb study`: every method on one domain, judged on all."""

from fastperturb.study.command import run
from fastperturb.study.options import StudyOptions

__all__ = ["StudyOptions", "run"]
