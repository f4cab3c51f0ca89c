"""The configuration of a perturbed language model: one frozen, validated dataclass."""

from __future__ import annotations

import dataclasses
import difflib
import math
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

TRANSFORMS = ("diagonal", "lowrank", "gated", "affine", "mlp", "context")
CONTEXT_SOURCES = ("embedding", "trunk")
LATENTS = ("gaussian", "uniform", "rademacher")
SCOPES = ("token", "sequence")
MARGINALS = ("token", "sequence")
ESTIMATORS = ("jensen", "iwae", "jvi", "jvi_clip", "resample", "sumo", "mlmc", "quadratic")
PLANS = ("auto", "batched", "chunked", "resample")
PROPOSALS = ("prior", "gradient")
SAMPLINGS = ("independent", "antithetic", "stratified")
# The numbers of samples that a stratified group can have.
GROUP_SIZES = tuple(2**k for k in range(1, 9))

# These run a random number of samples, few on average.
TELESCOPES = ("sumo", "mlmc")
# These combine samples as if they were independent. An antithetic pair is not; stratified groups
# are, and these take them as their units.
INDEPENDENT_SAMPLES = ("quadratic", "jvi", "jvi_clip", "sumo", "mlmc")
# These can be mixed in one loss: their values come from all samples of one pass.
MIXABLE = ("jensen", "iwae", "jvi", "jvi_clip", "quadratic")
# These compare samples with each other: one sample leaves nothing to compare.
AT_LEAST_TWO_SAMPLES = ("quadratic", "jvi", "jvi_clip", "mlmc")


@dataclass(frozen=True, kw_only=True)
class PerturbConfig:
    """The perturbation of prefix embeddings, and the estimation of the marginal likelihood."""

    transform: str = "lowrank"
    """Family of the perturbation T(e, z): diagonal, lowrank, gated, affine, mlp or context."""

    latent: str = "gaussian"
    """Distribution of the latent z: gaussian, uniform or rademacher."""

    latent_dim: int = 16
    """Number of entries of the latent z; diagonal ignores it and has as many as an embedding."""

    hidden_dim: int = 64
    """Width of the hidden layer of gated and mlp, and of context's state; the others ignore it."""

    context_source: str = "embedding"
    """Source of context's state: embedding, the exact embeddings so far; or trunk, the last hidden
    states of another pass, without gradient, of the exact prefix."""

    scope: str = "token"
    """Reach of one z: token draws a new one at every position, sequence one for all positions."""

    marginal: str = "token"
    """Probability that is averaged over the samples: of each token, or of the whole sequence."""

    estimator: str | Mapping[str, float] = "iwae"
    """Estimator: iwae, jensen, jvi_clip, mlmc, quadratic, resample, sumo, or weights of several;
    mlmc and sumo need a thousand labels a step, for their gradients have heavy tails."""

    num_samples: int = 8
    """Number M of Monte-Carlo samples of z for every sequence."""

    backward_samples: int | None = None
    """Number K of samples that resample runs backward through; None means round(sqrt(M / 2))."""

    init_scale: float = 0.2
    """RMS shift at the start of training, relative to the RMS of the embeddings."""

    min_scale: float = 0.0
    """Smallest allowed RMS shift, relative to the RMS of the embeddings."""

    sampling: str = "independent"
    """Joint law of the samples: independent, antithetic (pairs z, -z), or stratified, in
    groups spread evenly over the latent's distribution: the most accurate for the same cost."""

    group_size: int | None = None
    """Number of samples in a stratified group; None means the largest that num_samples allows."""

    proposal: str = "prior"
    """Distribution that latents are drawn from: prior, the latent's own; or gradient, a normal one
    around where a row's labels are likely, with weights that leave the marginal exact. It serves
    marginal='sequence', whose samples otherwise hardly matter but for one or two."""

    proposal_steps: int = 4
    """Number of gradient steps by which proposal='gradient' finds that place in every batch; each
    costs what a sample costs."""

    antithetic: bool | None = False
    """Old spelling: while it is True, sampling is antithetic; set sampling instead."""

    deterministic: bool = False
    """Make z a fixed function of the token's id (with scope sequence: one z for all tokens): a
    control with the same parameters and no randomness."""

    plan: str = "auto"
    """Schedule of the samples: batched (all at once), chunked, resample or auto (by memory)."""

    chunk_size: int | None = None
    """Number of samples in a chunk; setting it makes auto use chunked."""

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            _require_choice(name, getattr(self, name), choices)
        if isinstance(self.estimator, Mapping):
            _check_mixture(self.estimator)
            object.__setattr__(self, "estimator", dict(self.estimator))
        else:
            _require_choice("estimator", self.estimator, ESTIMATORS)
        for name in ("latent_dim", "hidden_dim", "num_samples", "proposal_steps"):
            _require_count(name, getattr(self, name))
        if self.chunk_size is not None:
            _require_count("chunk_size", self.chunk_size, or_none=True)
        check_backward_samples(self.backward_samples, self.num_samples)
        if not isinstance(self.deterministic, bool):
            raise TypeError(f"deterministic must be True or False, got {self.deterministic!r}")
        self._check_sampling()
        self._check_proposal()
        _require_scale("init_scale", self.init_scale, positive=True)
        _require_scale("min_scale", self.min_scale, positive=False)
        if "quadratic" in self.equations and self.marginal == "sequence":
            raise ValueError(
                "marginal='sequence' has no estimator='quadratic': the quadratic estimator sums "
                "over every possible label, and there are too many sequences; use "
                f"marginal='token' or another estimator of {ESTIMATORS}"
            )
        if self.plan == "resample" and tuple(self.equations) not in (("iwae",), ("resample",)):
            raise ValueError(
                f"plan='resample' estimates the iwae gradient, got estimator={self.estimator!r}; "
                "use estimator='iwae' or 'resample', or another plan of "
                f"{tuple(plan for plan in PLANS if plan != 'resample')}"
            )
        self.strata()

    def _check_sampling(self) -> None:
        _require_choice("sampling", self.sampling, SAMPLINGS)
        if not isinstance(self.antithetic, bool | None):
            raise TypeError(f"antithetic must be True or False, got {self.antithetic!r}")
        if self.antithetic and self.sampling == "stratified":
            raise ValueError(
                "antithetic=True is the old spelling of sampling='antithetic', got "
                "sampling='stratified' as well: leave antithetic unset"
            )
        object.__setattr__(self, "antithetic", bool(self.antithetic))
        if self.antithetic:
            object.__setattr__(self, "sampling", "antithetic")
        if self.sampling in ("antithetic", "stratified") and self.deterministic:
            raise ValueError(
                f"sampling={self.sampling!r} draws samples that differ, and deterministic=True has "
                "only one: use one of the two"
            )
        if self.group_size is None:
            return
        if self.group_size not in GROUP_SIZES or type(self.group_size) is not int:
            raise ValueError(
                f"group_size must be one of {GROUP_SIZES} or None, got {self.group_size!r}"
            )
        if self.sampling != "stratified":
            raise ValueError(
                f"group_size={self.group_size} is the size of stratified groups, got "
                f"sampling={self.sampling!r}: set sampling='stratified', or leave group_size unset"
            )

    def _check_proposal(self) -> None:
        if self.proposal != "prior" and (reason := self._reason_against_proposals()):
            raise ValueError(f"proposal={self.proposal!r} {reason}; use proposal='prior'")

    def warn_of_proposal(self, *, stacklevel: int) -> None:
        """Warn of training by a proposal that gains nothing for its cost."""
        if self.proposal != "prior" and self.marginal == "token":
            warnings.warn(
                f"proposal={self.proposal!r} moves latents to where a whole row is likely, which "
                "helps the probability of the row and not of each token, at the cost of "
                f"proposal_steps={self.proposal_steps} samples: use marginal='sequence', or "
                "proposal='prior'",
                stacklevel=stacklevel,
            )

    @property
    def can_propose(self) -> bool:
        """True if proposal='gradient' is possible with all else as it is."""
        return self._reason_against_proposals() is None

    def _reason_against_proposals(self) -> str | None:
        reason = None
        if self.latent != "gaussian":
            reason = f"moves a gaussian latent, got latent={self.latent!r}"
        elif self.deterministic:
            reason = "draws samples, and deterministic=True has only one"
        elif "quadratic" in self.equations:
            reason = (
                "weighs log-probs, and the quadratic estimator takes whole distributions, got "
                f"estimator={self.estimator!r}"
            )
        return reason

    @property
    def draws_pairs(self) -> bool:
        """True if samples come in antithetic pairs."""
        return self.sampling == "antithetic"

    def strata(self, num_samples: int | None = None) -> int:
        """Return the number of samples in a stratified group, 1 if samples are independent.

        num_samples: of the call, default the config's. Raises where the estimators cannot use it.
        """
        count = self.num_samples if num_samples is None else num_samples
        for name in self.equations:
            check_num_samples(name, count, antithetic=self.draws_pairs)
        compares_units = any(name in INDEPENDENT_SAMPLES for name in self.equations)
        return self.strata_of_mean(count, 2 if compares_units else 1)

    def strata_of_mean(self, num_samples: int, min_groups: int = 1) -> int:
        """Return `strata` for samples that are averaged, whatever the estimators are.

        min_groups: how many groups there must be; what compares independent units needs two.
        """
        check_num_samples("iwae", num_samples, antithetic=self.draws_pairs)
        if self.sampling != "stratified":
            return 1
        size = self.group_size or largest_group(num_samples, min_groups)
        if size == 1 or num_samples % size or num_samples // size < min_groups:
            raise ValueError(_no_group(num_samples, min_groups, self.group_size))
        return size

    def strata_of_errors(self, num_samples: int) -> int:
        """Return `strata` for a mean that comes with a Monte-Carlo error, which compares groups.

        There are 8 groups or more, or as many of 4 and 2 as samples allow; where they allow
        neither, samples are independent. A group is no larger than group_size.
        """
        if self.sampling != "stratified":
            return self.strata_of_mean(num_samples)
        check_num_samples("iwae", num_samples)
        sizes = (largest_group(num_samples, groups) for groups in (8, 4, 2))
        size = next((size for size in sizes if size > 1), 1)
        return min(size, self.group_size or size)

    @property
    def equations(self) -> dict[str, float]:
        """The estimators in the loss, by name, and their weights."""
        if isinstance(self.estimator, str):
            return {self.estimator: 1.0}
        return dict(self.estimator)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data that `from_dict` turns back into an equal config."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PerturbConfig:
        """Return a config from plain data; raise on a key that is not a field."""
        check_keys(cls, values)
        return cls(**values)


_CHOICES = {
    "transform": TRANSFORMS,
    "context_source": CONTEXT_SOURCES,
    "latent": LATENTS,
    "scope": SCOPES,
    "marginal": MARGINALS,
    "plan": PLANS,
    "proposal": PROPOSALS,
}


def largest_group(num_samples: int, min_groups: int = 1) -> int:
    """Return the size of the largest groups that samples split into, 1 if there is none."""
    sizes = (size for size in GROUP_SIZES if num_samples % size == 0)
    return max((size for size in sizes if num_samples // size >= min_groups), default=1)


def _no_group(num_samples: int, min_groups: int, group_size: int | None) -> str:
    """Return the error of a number of samples that does not split into the groups needed."""
    size = "even" if group_size is None else f"a multiple of group_size={group_size}"
    needed = f"num_samples must be {size} with sampling='stratified'"
    if min_groups > 1:
        needed += (
            f", and at least {(group_size or 2) * min_groups} for {min_groups} groups, which "
            f"{INDEPENDENT_SAMPLES}, jackknifes and Monte-Carlo errors compare"
        )
    return f"{needed}; got {num_samples}: change it, group_size or sampling"


def _check_mixture(estimator: Mapping[Any, Any]) -> None:
    if not estimator:
        raise ValueError(f"estimator must name at least one of {MIXABLE}, got {estimator!r}")
    for name, weight in estimator.items():
        if name not in MIXABLE:
            raise ValueError(
                f"estimator={estimator!r} mixes {name!r}; a mixture can have {MIXABLE}"
            )
        _require_scale(f"the weight of {name!r} in estimator", weight, positive=True)


def check_num_samples(estimator: str, num_samples: int, *, antithetic: bool = False) -> None:
    """Raise for a number of samples, or for pairs of them, that the estimator cannot use."""
    _require_count("num_samples", num_samples)
    if num_samples < 2 and estimator in AT_LEAST_TWO_SAMPLES:
        raise ValueError(
            f"num_samples must be at least 2 for estimator={estimator!r}, got {num_samples}"
        )
    if antithetic and num_samples % 2:
        raise ValueError(
            "num_samples must be even with sampling='antithetic' (samples come in pairs z, -z), "
            f"got {num_samples}"
        )
    if antithetic and estimator in INDEPENDENT_SAMPLES:
        allowed = tuple(name for name in ESTIMATORS if name not in INDEPENDENT_SAMPLES)
        raise ValueError(
            f"sampling='antithetic' pairs the samples, but estimator={estimator!r} needs "
            "independent ones; use sampling='independent' or 'stratified', or an estimator of "
            f"{allowed}"
        )


def check_groups(estimator: str, num_samples: int, strata: int) -> None:
    """Raise unless samples are two or more whole groups, which the estimator takes as units."""
    if num_samples % strata or num_samples < 2 * strata:
        raise ValueError(
            f"num_samples must be two or more groups of strata={strata} samples for "
            f"estimator={estimator!r}, got {num_samples}"
        )


def check_keys(config_class: Any, values: object) -> None:
    """Raise unless `values` is a mapping whose keys are all fields of a config class."""
    name = config_class.__name__
    if not isinstance(values, Mapping):
        raise TypeError(f"values must be a mapping of {name}'s keys, got {values!r}")
    fields = [field.name for field in dataclasses.fields(config_class)]
    for key in values:
        if key not in fields:
            hint = suggestion(str(key), fields)
            raise ValueError(f"{name} has no key {key!r}{hint}; keys are {fields}")


def check_backward_samples(backward_samples: int | None, num_samples: int) -> None:
    """Raise for a K that is not a positive number, or is above the number of samples."""
    if backward_samples is None:
        return
    _require_count("backward_samples", backward_samples, or_none=True)
    if backward_samples > num_samples:
        raise ValueError(
            f"backward_samples must not exceed num_samples={num_samples}, got {backward_samples!r}"
        )


def suggestion(name: str, choices: Collection[str]) -> str:
    """Return the end of an error about an unknown name: the closest choice, if any is close."""
    close = difflib.get_close_matches(name, choices, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _require_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        hint = suggestion(str(value), choices)
        raise ValueError(f"{name} must be one of {choices}, got {value!r}{hint}")


def _require_count(name: str, value: object, *, or_none: bool = False) -> None:
    wanted = "a positive int or None" if or_none else "a positive int"
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be {wanted}, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be {wanted}, got {value!r}")


def _require_scale(name: str, value: object, *, positive: bool) -> None:
    wanted = "a finite number above 0" if positive else "a finite number, 0 or above"
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be {wanted}, got {value!r}")
    if not math.isfinite(value) or value < 0 or (positive and value == 0):
        raise ValueError(f"{name} must be {wanted}, got {value!r}")
