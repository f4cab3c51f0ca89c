"""The kinds of perturbation, by the name of their config's class."""

from __future__ import annotations

from fastperturb.engine.continuous import Continuous
from fastperturb.engine.edits import TokenEdits
from fastperturb.engine.hybrid import Hybrid
from fastperturb.engine.protocol import Perturbation

PERTURBATIONS: dict[str, Perturbation] = {
    kind.config_class.__name__: kind for kind in (Continuous(), TokenEdits(), Hybrid())
}
