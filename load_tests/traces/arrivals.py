"""When requests arrive: a renewal process of which rate and burstiness can be set."""

import numpy as np
from numpy.typing import NDArray


def arrival_times(
    count: int, rate: float, rng: np.random.Generator, cv: float = 1.0
) -> NDArray[np.float64]:
    """Times, in seconds, of `count` arrivals at `rate` requests/s with Gamma-distributed gaps.

    `cv`: the gaps' coefficient of variation. 1 is a Poisson process; the paper goes up to 8
    (section 6.1). The same generator gives the same pattern at every rate, only stretched.
    """
    gaps = rng.gamma(shape=cv**-2, scale=cv**2 / rate, size=count)
    return np.cumsum(gaps)
