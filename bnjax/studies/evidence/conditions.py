"""Measured quantities with the ranges in which they lie if a claim holds, and what the seeds say of that."""

import dataclasses
import math
from typing import Annotated, Any, Literal

import numpy as np

from bnjax._extras import needs
from bnjax.studies.evidence.statistics import (
    Interval,
    interval,
    of_test_set,
    p_of_mean,
    p_of_one_run,
    prediction_interval,
)

with needs("studies"):
    from msgspec import Meta, Struct

LEVEL = 0.05
"""The chance, in each family of claims, that any of its verdicts is wrong by the draw of the seeds."""
Text = Annotated[str, Meta(min_length=1)]


class Condition(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A measured quantity, and the range in which it lies if the claim holds.

    The quantity is a metric of a variant at each seed; with `minus` its difference to another variant's at the same
    seed; and with `control` beyond that of a control (minus `control_minus` where that is given).

    Attributes:
      label: what the quantity is called in the ledger.
      metric: its name in the study's results.
      variant: the network's name there.
      minus: the network whose value is subtracted.
      control: the network whose quantity is subtracted from that, such as the one without batch norm.
      control_minus: what is subtracted from the control's.
      low: lower end of the range.
      high: upper end.
      kind: 'mean' for the mean over seeds, by Student's t; 'one run' for a published number, `low` and `high`, that is
        to be compared with one further run; 'exact' for a number that seeds do not change.
      possible: the ends of what the quantity can be, which no interval exceeds.
      effect: of 'one run', the difference that the source reports, which says whether the interval could tell.
      is_difference: whether the metric is a paired difference already, so that it has an effect size.
      digits: decimals in the ledger; 'auto' for as many as the interval leaves.
    """

    label: Text
    metric: Text
    variant: Text
    minus: str | None = None
    control: str | None = None
    control_minus: str | None = None
    low: float = -math.inf
    high: float = math.inf
    kind: Literal["mean", "one run", "exact"] = "mean"
    possible: tuple[float, float] = (-math.inf, math.inf)
    effect: float | None = None
    is_difference: bool = False
    digits: int | Literal["auto"] = 4

    def __post_init__(self):
        if not self.low <= self.high or (self.low, self.high) == (-math.inf, math.inf):
            raise ValueError(f"low and high must be the ends of a range, got {self.low} and {self.high}")
        if self.kind == "one run" and self.low != self.high:
            raise ValueError(f"low and high must both be the published number, got {self.low} and {self.high}")
        if self.control_minus and not self.control:
            raise ValueError("control_minus must come with control")

    @property
    def signs(self) -> dict[str, int]:
        """The networks whose values make the quantity, with their signs."""
        terms = zip((self.variant, self.minus, self.control, self.control_minus), (1, -1, -1, 1), strict=True)
        return {name: sign for name, sign in terms if name}

    def values(self, results: Any) -> np.ndarray | None:
        """Returns the quantity at each seed of a study's results, NaN where it is not finite.

        None where it was not measured, or at no seed, so that a record, which holds finite numbers only, says the same.
        """
        terms = [(sign, results.values(name, self.metric)) for name, sign in self.signs.items()]
        if any(values is None for _, values in terms):
            return None
        with np.errstate(invalid="ignore"):
            found = np.asarray(sum(sign * np.asarray(values, np.float64) for sign, values in terms))
        found[~np.isfinite(found)] = np.nan
        return None if np.isnan(found).all() else found

    def judge(self, results: Any) -> "Outcome":
        """Compares the range with what a study measured, its `bnjax.studies.evidence.results.Results`."""
        values = self.values(results)
        if values is None:
            return Outcome(self, Interval(math.nan, math.nan, 0))
        measured = (prediction_interval if self.kind == "one run" else interval)(values)
        known = values[~np.isnan(values)]
        low, high = (min(max(end, self.possible[0]), self.possible[1]) for end in (measured.low, measured.high))
        if self.kind == "exact":
            measured = Interval(measured.mean, 0.0, measured.n)
            low = high = measured.mean
        deviation = known.std(ddof=1) if len(known) > 1 else math.nan
        is_paired = self.minus or self.control or self.is_difference
        effect = float(measured.mean / deviation) if is_paired and deviation > 0 else math.nan
        outcome = Outcome(self, measured, low, high, effect, test_set=self._of_test_set(results))
        if len(known) < len(results.seeds):
            return outcome
        if self.kind == "exact":
            return dataclasses.replace(outcome, met=self.low <= measured.mean <= self.high)
        if len(known) < 2:
            return outcome
        if self.kind == "one run":
            p = p_of_one_run(known, self.low)
            return dataclasses.replace(outcome, met=p >= LEVEL, p_against=p)
        p_above_low, p_below_low = p_of_mean(known, self.low) if self.low > -math.inf else (0.0, 1.0)
        p_above_high, p_below_high = p_of_mean(known, self.high) if self.high < math.inf else (1.0, 0.0)
        p_for, p_against = max(p_above_low, p_below_high), min(p_below_low, p_above_high)
        met = True if p_for < LEVEL else False if p_against < LEVEL else None
        return dataclasses.replace(outcome, met=met, p_for=p_for, p_against=p_against)

    def _of_test_set(self, results: Any) -> float:
        """Returns half the interval that the size of the test set leaves of an accuracy, or of a difference of such.

        Those of a difference are added as if the networks erred independently, which is the widest that they can be
        where they tend to err on the same examples. NaN for another quantity.
        """
        examples = getattr(results, "examples", {}).get(self.metric)
        if not examples or self.kind == "exact":
            return math.nan
        means = [interval(results.values(name, self.metric)).mean for name in self.signs]
        return math.sqrt(sum(of_test_set(mean, examples) ** 2 for mean in means))


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The measured quantity of a condition.

    Attributes:
      condition: the condition that it decides.
      measured: mean over seeds and half its 95 % interval (that of one run, of 'one run').
      low: lower end of the interval, within what is possible.
      high: upper end.
      effect: of a paired difference, its mean divided by its standard deviation over seeds (Cohen's d_z); else NaN.
      met: True, False, or None where that is undecided or was not measured, before any correction.
      p_for: twice the p-value of the quantity not being in the range.
      p_against: twice the p-value of its being there; of 'one run', that of the published number.
      test_set: half the 95 % interval that the size of the test set leaves, beside that of the seeds; else NaN.
    """

    condition: Condition
    measured: Interval
    low: float = math.nan
    high: float = math.nan
    effect: float = math.nan
    met: bool | None = None
    p_for: float = 1.0
    p_against: float = 1.0
    test_set: float = math.nan

    @property
    def text(self) -> str:
        """The text 'label mean ± half (d_z effect)' for the ledger."""
        condition, measured = self.condition, self.measured
        digits = None if condition.digits == "auto" else condition.digits
        if not measured.n:
            return f"{condition.label} not measured"
        if condition.kind == "exact":
            return f"{condition.label} {measured._replace(half=math.nan).text(digits)}"
        more = []
        if condition.kind == "one run":
            text = f"{measured.mean:.{digits}f} [{self.low:.{digits}f}, {self.high:.{digits}f}]"
            if condition.effect:
                times = (self.high - self.low) / abs(condition.effect)
                more.append(f"an interval {times:.1f} times as wide as the published effect, {condition.effect:g}")
        elif (self.low, self.high) != (measured.low, measured.high) and math.isfinite(self.low):
            text = f"{measured.mean:.{digits}f} [{self.low:.{digits}f}, {self.high:.{digits}f}]"
        else:
            text = measured.text(digits)
        if math.isfinite(self.effect):
            more.append(f"d_z {self.effect:+.1f}")
        if math.isfinite(self.test_set):
            more.append(f"test set ± {self.test_set:.{digits or 4}f}")
        return f"{condition.label} {text}" + f" ({'; '.join(more)})" * bool(more)
