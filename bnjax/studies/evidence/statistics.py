"""Means over seeds with their intervals, p-values of ranges, and their correction for many claims."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import special


class Interval(NamedTuple):
    """Mean over the `n` seeds at which a quantity is defined, with half the width of its 95 % confidence interval.

    The width is by Student's t, and NaN for fewer than two seeds.
    """

    mean: float
    half: float
    n: int

    @property
    def low(self) -> float:
        """Lower end."""
        return self.mean - self.half

    @property
    def high(self) -> float:
        """Upper end."""
        return self.mean + self.half

    def text(self, digits: int | None = None) -> str:
        """Writes 'mean ± half' with some decimals, or a dash where there is nothing.

        By default so many digits are shown that two of the half width are seen (three of a mean without one).
        """
        if self.n == 0:
            return "–"
        formats = self._formats() if digits is None else (f".{digits}f",) * 2
        half = f" ± {self.half:{formats[1]}}" if math.isfinite(self.half) else ""
        return f"{self.mean:{formats[0]}}{half}"

    def _formats(self) -> tuple[str, str]:
        """Returns the formats of mean and half width, by powers of ten where these would be long."""
        known = self.half if math.isfinite(self.half) and self.half > 0 else abs(self.mean) / 10
        decimals = max(0, 1 - _power(known)) if known else 0
        if decimals <= 5 and abs(self.mean) < 1e6:
            return f".{decimals}f", f".{decimals}f"
        return f".{_power(self.mean) - _power(known) + 1 if abs(self.mean) >= known else 2}e", ".1e"


def _power(value: float) -> int:
    """Returns the power of ten of a number's first digit."""
    return math.floor(math.log10(abs(value)))


def seeds_in_words(count: int) -> str:
    """Writes '1 seed', '2 seeds', …"""
    return f"{count} seed{'s' * (count > 1)}"


def interval(values: np.ndarray) -> Interval:
    """Computes mean and 95 % confidence interval, `t(0.975, n − 1) · s / √n`, of the values that are not NaN.

    >>> print(interval(np.array([1., 2., 3., np.nan])).text(2))
    2.00 ± 2.48
    """
    values = np.asarray(values, np.float64)
    values = values[~np.isnan(values)]
    n = len(values)
    with np.errstate(over="ignore", invalid="ignore"):  # of values near the largest number
        half = float(half_width(values.std(ddof=1), n)) if n > 1 else math.nan
        return Interval(float(values.mean()) if n else math.nan, half, n)


def half_width(deviation: Any, n: int) -> Any:
    """Computes half the width of the 95 % confidence interval of a mean, from the sample deviation of n ≥ 2 values."""
    return special.stdtrit(n - 1, 0.975) * deviation / math.sqrt(n)


def prediction_interval(values: np.ndarray) -> Interval:
    """Computes where one more run would lie with 95 % probability: mean ± `t(0.975, n − 1) · s · √(1 + 1/n)`."""
    mean, half, n = interval(values)
    return Interval(mean, half * math.sqrt(n + 1), n)


def p_of_mean(values: np.ndarray, bound: float) -> tuple[float, float]:
    """Computes twice the one-sided p-values of Student's t test: that the mean lies below, and above a bound.

    The first is small where the mean lies above the bound. Either is below 0.05 where the 95 % interval does not hold
    the bound and lies on that side of it. Values that are all the same are the limit of values that are nearly so.
    """
    mean, deviation, n = float(values.mean()), float(values.std(ddof=1)), len(values)
    if np.ptp(values) == 0:
        return float(mean <= bound), float(mean >= bound)
    t = (mean - bound) / (deviation / math.sqrt(n))
    below, above = float(special.stdtr(n - 1, -t)), float(special.stdtr(n - 1, t))
    return min(1.0, 2 * below), min(1.0, 2 * above)


def p_of_one_run(values: np.ndarray, published: float) -> float:
    """Computes the two-sided p-value that a published number is of one further run, by Student's t."""
    n = len(values)
    deviation = values.std(ddof=1) * math.sqrt(1 + 1 / n)
    if not deviation:
        return float(values.mean() == published)
    return float(2 * special.stdtr(n - 1, -abs(values.mean() - published) / deviation))


def holm(p_values: Sequence[float]) -> list[float]:
    """Corrects p-values for their number, so that any is below 0.05 by chance in at most 5 % of such families.

    The k-th smallest of m is multiplied by m − k + 1, and none is smaller than one before it (Holm 1979).

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        corrected[place] = largest
    return corrected


def from_then_on(holds: np.ndarray) -> np.ndarray:
    """Returns the time, from 1, from which on something holds to the end; one more than there are if not at the end.

    >>> print(from_then_on(np.array([[True, False, True, True], [True, True, True, False]])))
    [3. 5.]
    """
    stays = np.logical_and.accumulate(holds[:, ::-1], 1)[:, ::-1]
    return np.where(stays.any(1), stays.argmax(1) + 1.0, stays.shape[1] + 1.0)


def log10_largest_rate(rates: np.ndarray, losses: np.ndarray, level: float) -> np.ndarray:
    """Computes log₁₀ of the largest learning rate at which the loss is at most some level, between those tried.

    From the last rate with such a loss on it is interpolated linearly, in the logarithm of the rate, to the next; it is
    that rate where it is the last of all, and NaN where no rate has such a loss. `losses` are finite, `[seeds, rates]`.

    >>> print(log10_largest_rate(np.array([0.01, 0.1, 1.0]), np.array([[2.0, 1.0, 3.0], [1.0, 1.0, 1.0]]), 2.0))
    [-0.5  0. ]
    """
    found, where = np.full(len(losses), np.nan), np.log10(rates)
    for seed, loss in enumerate(losses):
        if (loss <= level).any():
            last = int(np.flatnonzero(loss <= level)[-1])
            found[seed] = where[last]
            if last + 1 < len(loss):
                share = (level - loss[last]) / (loss[last + 1] - loss[last])
                found[seed] += share * (where[last + 1] - where[last])
    return found


def of_test_set(accuracy: float, examples: int) -> float:
    """Computes half the width of the 95 % interval that a test set of so many examples leaves of an accuracy.

    It is `1.96 √(a (1 − a) / n)`, the binomial distribution's; what seeds leave open comes on top of it.
    """
    return 1.96 * math.sqrt(max(0.0, accuracy * (1 - accuracy)) / examples)
