"""Build the extended logit matrix, and measure its spectrum, exponent, KL by rank and angles."""

from fastperturb.rank.measure.angles import (
    Angles,
    column_space_angles,
    random_angles,
    row_space_angles,
)
from fastperturb.rank.measure.exponents import (
    Exponent,
    JackknifeEstimate,
    SubmatrixFit,
    exponent_difference,
    power_law,
    submatrix_fits,
)
from fastperturb.rank.measure.matrix import LogitMatrix, distinct_contexts, logit_matrix
from fastperturb.rank.measure.singular_values import Spectrum, spectrum
from fastperturb.rank.measure.truncation import KLByRank, kl_by_rank

__all__ = [
    "Angles",
    "Exponent",
    "JackknifeEstimate",
    "KLByRank",
    "LogitMatrix",
    "Spectrum",
    "SubmatrixFit",
    "column_space_angles",
    "distinct_contexts",
    "exponent_difference",
    "kl_by_rank",
    "logit_matrix",
    "power_law",
    "random_angles",
    "row_space_angles",
    "spectrum",
    "submatrix_fits",
]
