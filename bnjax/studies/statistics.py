"""Means over seeds with their intervals, and whether these lie in a range."""

import math
from typing import Any, NamedTuple

import numpy as np
from scipy import special


class Interval(NamedTuple):
    """Mean over seeds with its 95 % confidence interval.

    Attributes:
      mean: over the seeds at which the quantity is defined.
      half: half the width of the interval, by Student's t; NaN for fewer than two.
      n: number of those seeds.
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
        """'mean ± half', or a dash where there is nothing.

        Args:
          digits: decimals; by default so many that two digits of the half width are seen (three of a mean without one).
        """
        if self.n == 0:
            return "–"
        if digits is None:
            has_half = math.isfinite(self.half) and self.half > 0
            size = (
                math.floor(math.log10(self.half if has_half else abs(self.mean) / 10)) if has_half or self.mean else 1
            )
            digits = max(0, 1 - size)
            if digits > 5 or abs(self.mean) >= 1e6:
                shown = (
                    f"{self.mean:.2e}" if not has_half or abs(self.mean) < self.half else _scientific(self.mean, size)
                )
                return shown + (f" ± {self.half:.1e}" if math.isfinite(self.half) else "")
        return f"{self.mean:.{digits}f}" + (f" ± {self.half:.{digits}f}" if math.isfinite(self.half) else "")


def _scientific(mean: float, size: int) -> str:
    """With as many digits as an uncertainty of this power of ten leaves, and one more."""
    return f"{mean:.{max(0, math.floor(math.log10(abs(mean))) - size + 1)}e}"


def interval(values: np.ndarray) -> Interval:
    """Mean and 95 % confidence interval, `t(0.975, n − 1) · s / √n`, of the values that are not NaN.

    >>> print(interval(np.array([1., 2., 3., np.nan])).text(2))
    2.00 ± 2.48
    """
    values = np.asarray(values, np.float64)
    values = values[~np.isnan(values)]
    n = len(values)
    if n == 0:
        return Interval(math.nan, math.nan, 0)
    half = float(half_width(values.std(ddof=1), n)) if n > 1 else math.nan
    return Interval(float(values.mean()), half, n)


def half_width(deviation: Any, n: int) -> Any:
    """Half the width of the 95 % confidence interval of a mean, from the sample deviation of n ≥ 2 values."""
    return special.stdtrit(n - 1, 0.975) * deviation / math.sqrt(n)


def prediction_interval(values: np.ndarray) -> Interval:
    """Where one further run would lie with 95 % probability: mean ± `t(0.975, n − 1) · s · √(1 + 1/n)`."""
    mean, half, n = interval(values)
    return Interval(mean, half * math.sqrt(n + 1), n)


def within(measured: Interval, low: float, high: float) -> bool | None:
    """True where the whole interval lies in [low, high], False where none of it does, None where that is undecided."""
    if measured.low >= low and measured.high <= high:
        return True
    if measured.high < low or measured.low > high:
        return False
    return None
