"""The methods that the demo compares: the same net, data and steps, and another noise for each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypedDict

from fastperturb.config import PerturbConfig
from fastperturb.estimators import Telescope

# Fixed isotropic noise is tried at these scales: standard deviations in grid units, where the true
# noise has 0.3 along one axis. The demo reports the scale that is best out of support, which only
# the known truth can tell: this favours fixed noise.
SWEEP = (0.07, 0.1, 0.15)


class JointLaw(TypedDict, total=False):
    """The options of `ops.perturb_embed` for the joint distribution of the samples."""

    antithetic: bool
    strata: int


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way to train. Field names are keys of saved results."""

    name: str
    transform: str | None = None  # None: the exact prefix
    estimator: str = "iwae"
    quadratic: float = 0.0  # weight of the quadratic estimator, added to the other's value
    num_samples: int = 16
    scale: float = 0.2  # standard deviation per embedding dimension; if learned, the initial one
    latent_dim: int = 4
    sampling: str = "independent"

    @property
    def learned(self) -> bool:
        """True for a transform that trains; diagonal is the fixed noise."""
        return self.transform not in (None, "diagonal")

    @property
    def telescope(self) -> Telescope | None:
        """For sumo and mlmc, the distribution of levels; num_samples belongs to the deepest."""
        if self.estimator not in ("sumo", "mlmc"):
            return None
        return Telescope(self.estimator, self.num_samples)

    @property
    def expected_samples(self) -> float:
        """Mean number of samples that a row takes."""
        return self.telescope.expected_draws if self.telescope else self.num_samples

    @property
    def config_estimator(self) -> str | dict[str, float]:
        """The estimator, or the mixture of two, as PerturbConfig takes it."""
        if not self.quadratic:
            return self.estimator
        return {self.estimator: 1.0, "quadratic": self.quadratic}

    @property
    def joint_law(self) -> JointLaw:
        """The joint distribution of the samples of a training step."""
        if self.transform is None:
            return {"antithetic": False, "strata": 1}
        config = self.config(1.0)
        return {"antithetic": config.draws_pairs, "strata": config.strata()}

    def config(self, embed_rms: float) -> PerturbConfig:
        """Return the library's configuration, whose scales are relative to the embeddings."""
        assert self.transform is not None, "an exact prefix has no perturbation to configure"
        return PerturbConfig(
            transform=self.transform,
            latent_dim=self.latent_dim,
            estimator=self.config_estimator,
            num_samples=self.num_samples,
            init_scale=self.scale / embed_rms,
            sampling=self.sampling,
        )


def _learned(name: str, estimator: str, num_samples: int, sampling: str = "independent") -> Method:
    return Method(
        name=name,
        transform="lowrank",
        estimator=estimator,
        num_samples=num_samples,
        sampling=sampling,
    )


METHODS = {
    method.name: method
    for method in (
        Method(name="exact", estimator="jensen", num_samples=1),
        Method(name="jensen", transform="diagonal", estimator="jensen", scale=0.15),
        Method(name="fixed", transform="diagonal"),
        _learned("learned", "iwae", 16),
        _learned("learned_iwae_m4", "iwae", 4),
        _learned("learned_stratified_m4", "iwae", 4, "stratified"),
        _learned("learned_jvi_clip_m4", "jvi_clip", 4),
        _learned("learned_quadratic_m2", "quadratic", 2),
        _learned("learned_mlmc", "mlmc", 16),
    )
}
