"""State that a wrapped model keeps between calls."""

from __future__ import annotations

from dataclasses import dataclass, field

from fastperturb.engine.planner import Planner, PlanReport
from fastperturb.engine.sample_split import SampleSplit


@dataclass
class CallState:
    """Modes that a call obeys, and measurements that later calls use."""

    exact: bool = False
    temperature: float = 1.0
    split: SampleSplit = field(default_factory=SampleSplit)
    planner: Planner = field(default_factory=Planner)
    report: PlanReport | None = None  # of the last forward
    training_steps: int = 0
    collapsed: bool = False
