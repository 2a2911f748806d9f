"""From which probability on a guess can be relied upon, as the validation lines tell."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

RELIABLE = 0.9  # share of lines of a probability that have to be right
NEVER = 2.0  # no probability is enough


def sure_from(probabilities: NDArray[np.float64], right: NDArray[np.bool_]) -> float:
    """Give the lowest probability at which nine of ten validation lines were right.

    probabilities (lines,): of the guesses.   right (lines,): whether they are. The share that is
    right is taken to rise with the probability: isotonic regression, which pools neighbours until
    it does (Ayer et al. 1955). A share counts as Laplace's rule of succession expects it to go on:
    a single line that is right promises little. NEVER where no probability is high enough; that of
    the least certain line where all are: nothing is known of what is below.
    """
    values, place = np.unique(probabilities, return_inverse=True)
    counts = np.bincount(place)
    hits = np.bincount(place, weights=right)
    pools: list[tuple[float, int, float]] = []  # lines right, lines, lowest probability
    for pool in zip(hits.tolist(), counts.tolist(), values.tolist(), strict=True):
        while pools and pools[-1][0] * pool[1] >= pool[0] * pools[-1][1]:  # its share is no lower
            earlier = pools.pop()
            pool = (earlier[0] + pool[0], earlier[1] + pool[1], earlier[2])
        pools.append(pool)
    reliable = (low for known, lines, low in pools if known + 1 >= RELIABLE * (lines + 2))
    return next(reliable, NEVER)
