"""Types that all of `fastperturb.rank` shares."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Tokens = tuple[int, ...]
Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Logits = NDArray[np.float32] | NDArray[np.float64]
