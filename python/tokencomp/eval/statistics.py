"""Bootstrap intervals of means and of paired differences over samples, seeded."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
RESAMPLES = 2000
LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean over samples and the interval it lies in."""

    mean: float
    low: float
    high: float


class Bootstrap:
    """Resamples of ``count`` samples, the same ones for all that is estimated, so that pairs stay paired.

    A percentile interval over whole samples, since answers about one prompt are not independent. It is a
    little narrow below about 20 samples, and of no width where all samples score alike.

    Raises ValueError for fewer than 2 samples.
    """

    def __init__(self, count: int, seed: int, resamples: int = RESAMPLES, level: float = LEVEL) -> None:
        if count < 2:
            raise ValueError(f"bootstrap: count must be >= 2 samples, got {count}")
        self.count, self.level = count, level
        index = np.random.default_rng(seed).integers(count, size=(resamples, count))
        weights = [np.bincount(row, minlength=count) / count for row in index]
        self._weights: Floats = np.stack(weights)

    def mean(self, scores: Floats) -> Estimate:
        """The mean of ``scores`` ``[count]``, one for each sample."""
        if scores.shape != (self.count,):
            raise ValueError(f"bootstrap: scores must be [{self.count}], got {list(scores.shape)}")
        tail = 50 * (1 - self.level)
        low, high = np.percentile(self._weights @ scores, [tail, 100 - tail])
        return Estimate(float(scores.mean()), float(low), float(high))

    def difference(self, scores: Floats, base: Floats) -> Estimate:
        """The mean of ``scores - base``, sample by sample."""
        return self.mean(scores - base)
