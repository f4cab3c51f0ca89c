"""`fastperturb study`: methods trained on one domain, and compared on all with controls."""

from fastperturb.study.command import run
from fastperturb.study.options import StudyOptions

__all__ = ["StudyOptions", "run"]
