"""How many tokens requests have: the length distributions of the paper's evaluation, by name.

The paper (Llumnix, OSDI'24, section 6.1) gives each one's mean and four percentiles, no more.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

CAP = 6000
"""Tokens: the longest input, and the longest output (section 6.1)."""

Floats = NDArray[np.float64]

_MIDPOINTS: Floats = (np.arange(20_000) + 0.5) / 20_000


@dataclass(frozen=True)
class Lengths:
    """A distribution of lengths, in tokens, with the mean and the percentiles of a table.

    From one token to P99 it is interpolated: some power of the length grows linearly between the
    percentiles. Any power meets those, and one of them meets the mean as well; with powers near 0
    it is the length's logarithm that grows linearly, which suits heavy tails. Beyond P99 goes on
    the power law through P95 and P99, until CAP.
    """

    mean: float
    p50: float
    p80: float
    p95: float
    p99: float

    def sample(self, count: int, rng: np.random.Generator) -> NDArray[np.int64]:
        """`count` lengths, each from 1 to CAP."""
        return np.rint(self._quantiles(rng.random(count), self._power)).astype(np.int64)

    @cached_property
    def _power(self) -> float:
        # The mean grows with the power. No midpoint of these bounds is 0, which is no power.
        low, high = -1.0, 2.0
        while high - low > 1e-4:
            power = (low + high) / 2
            if self._quantiles(_MIDPOINTS, power).mean() < self.mean:
                low = power
            else:
                high = power
        return low

    def _quantiles(self, p: Floats, power: float) -> Floats:
        """The lengths at probabilities."""
        lengths = np.array([1, self.p50, self.p80, self.p95, self.p99])
        body = np.interp(p, (0, 0.5, 0.8, 0.95, 0.99), lengths**power) ** (1 / power)
        decline = np.log(self.p99 / self.p95) / np.log(0.05 / 0.01)
        tail = self.p99 * ((1 - p) / 0.01) ** -decline
        return np.where(p < 0.99, body, np.minimum(tail, CAP))


_POWER_LAW = {
    "S": Lengths(mean=128, p50=38, p80=113, p95=413, p99=1464),
    "M": Lengths(mean=256, p50=32, p80=173, p95=1288, p99=4208),
    "L": Lengths(mean=512, p50=55, p80=582, p95=3113, p99=5166),
}

INPUTS: Mapping[str, Lengths] = {
    **_POWER_LAW,
    "sharegpt": Lengths(mean=306, p50=74, p80=348, p95=1484, p99=3388),
    "burstgpt": Lengths(mean=830, p50=582, p80=1427, p95=2345, p99=3549),
}

OUTPUTS: Mapping[str, Lengths] = {
    **_POWER_LAW,
    "sharegpt": Lengths(mean=500, p50=487, p80=781, p95=988, p99=1234),
    "burstgpt": Lengths(mean=271, p50=243, p80=434, p95=669, p99=964),
}
