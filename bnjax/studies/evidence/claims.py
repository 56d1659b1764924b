"""Statements about batch norm as data: what is claimed, which measured quantities decide it, and the verdict."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from bnjax.studies.evidence.statistics import Interval, interval, prediction_interval, within

VERDICTS = ("reproduced", "not reproduced", "undecided", "wrong in the source")


@runtime_checkable
class Record(Protocol):
    """A study's results, just measured or read from its `results.json`."""

    settings: Mapping[str, Any]
    seeds: Sequence[int]

    def values(self, variant: str, metric: str) -> np.ndarray | None:
        """A metric of a variant at each seed; None where it was not measured."""
        ...


@dataclasses.dataclass(frozen=True)
class AtLeast:
    """A setting that a claim needs to be so large, such as the number of steps."""

    value: float

    def __str__(self) -> str:
        return f"of at least {self.value:,}"


@dataclasses.dataclass(frozen=True)
class Condition:
    """A measured quantity, and the range in which it lies if the claim holds.

    The quantity is a metric of a variant or, with `minus`, its difference to another variant's at the same seed. It is
    met where the whole 95 % interval of its mean over seeds lies in the range, fails where none of it does, and is
    undecided else, or where a seed lacks a value. With `one_run` the interval is that of one further run, which has to
    hold the published number: `low`, the same as `high`. With `every_seed` the values themselves have to lie in the
    range.

    Attributes:
      label: what the quantity is called in the ledger.
      metric: its name in the study's results.
      variant: the network's name there.
      minus: the network whose value is subtracted.
      low: lower end of the range.
      high: upper end.
      exact: whether the quantity is a number without an interval, which needs no seeds.
      one_run: whether a single published run is to be covered by the prediction interval.
      every_seed: whether the value at every seed has to lie in the range, rather than their mean.
      is_difference: whether the metric is a paired difference already, so that it has an effect size.
      digits: decimals in the ledger; None for as many as the interval leaves.
    """

    label: str
    metric: str
    variant: str
    minus: str | None = None
    low: float = -math.inf
    high: float = math.inf
    one_run: bool = False
    every_seed: bool = False
    is_difference: bool = False
    exact: bool = False
    digits: int | None = 4

    def judge(self, record: Record) -> "Outcome":
        """What was measured of it."""
        values = record.values(self.variant, self.metric)
        others = record.values(self.minus, self.metric) if self.minus else None
        if values is None or (self.minus and others is None):
            return Outcome(self, Interval(math.nan, math.nan, 0), math.nan, None)
        values = np.asarray(values, np.float64) - (0 if others is None else np.asarray(others, np.float64))
        measured = prediction_interval(values) if self.one_run else interval(values)
        deviation = values[~np.isnan(values)].std(ddof=1) if measured.n > 1 else math.nan
        is_paired = self.minus or self.is_difference
        effect = measured.mean / deviation if is_paired and deviation > 0 else math.nan
        if self.exact:
            measured = Interval(measured.mean, 0.0, measured.n)
        if measured.n < len(record.seeds) or not math.isfinite(measured.half):
            met = None
        elif self.one_run:
            met = measured.low <= self.low <= measured.high
        elif self.every_seed:
            met = bool(np.all((values >= self.low) & (values <= self.high)))
        else:
            met = within(measured, self.low, self.high)
        return Outcome(self, measured, float(effect), met)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What was measured of a condition.

    Attributes:
      condition: which.
      measured: mean over seeds and 95 % interval (that of one run with `one_run`).
      effect: of a paired difference, its mean divided by its standard deviation over seeds (Cohen's d_z); else NaN.
      met: True, False, or None where that is undecided or was not measured.
    """

    condition: Condition
    measured: Interval
    effect: float
    met: bool | None

    @property
    def text(self) -> str:
        """'label mean ± half (effect)' for the ledger."""
        condition = self.condition
        if not self.measured.n:
            return f"{condition.label} not measured"
        digits = condition.digits
        if condition.one_run:
            low, high = self.measured.low, self.measured.high
            return f"{condition.label} {self.measured.mean:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"
        if condition.exact:
            return f"{condition.label} {Interval(self.measured.mean, math.nan, self.measured.n).text(digits)}"
        effect = f" (d {self.effect:+.1f})" if math.isfinite(self.effect) else ""
        return f"{condition.label} {self.measured.text(digits)}{effect}"


@dataclasses.dataclass(frozen=True)
class Claim:
    """A statement of a source.

    Attributes:
      id: such as 'S1.1'.
      source: document, and place in it.
      statement: in our words.
      published: the number published, or a dash.
      rule: what decides, in words, fixed before the run.
      conditions: what decides; all of them have to be met.
      needs: settings that the run must have had; numbers may be `AtLeast`.
      amended: what of the rule was changed after results had been seen, and why; empty where nothing was.
      is_arithmetic: whether the statement can be checked without a run; if it fails, the source is wrong.
    """

    id: str
    source: str
    statement: str
    published: str
    rule: str
    conditions: tuple[Condition, ...]
    needs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    amended: str = ""
    is_arithmetic: bool = False

    def judge(self, record: Record) -> "Judgment":
        """The verdict on a study's results."""
        differing = [key for key, value in self.needs.items() if not _meets(record.settings.get(key), value)]
        if differing:
            reason = "needs " + ", ".join(_setting(key, self.needs[key]) for key in differing)
            return Judgment(self, (), reason)
        return Judgment(self, tuple(condition.judge(record) for condition in self.conditions), "")


@dataclasses.dataclass(frozen=True)
class Source:
    """A document whose statements are checked.

    Attributes:
      name: of the document, and place in it.
      needs: settings that a run must have had to decide its claims, where these do not say otherwise.
    """

    name: str
    needs: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def claim(
        self,
        id: str,
        statement: str,
        rule: str,
        *conditions: Condition,
        published: str = "–",
        needs: Mapping[str, Any] | None = None,
        amended: str = "",
        is_arithmetic: bool = False,
    ) -> Claim:
        """A claim of this source, of the attributes of `Claim`."""
        needs = self.needs if needs is None else needs
        return Claim(id, self.name, statement, published, rule, conditions, needs, amended, is_arithmetic)


@dataclasses.dataclass(frozen=True)
class Judgment:
    """A claim and what was measured of it.

    Attributes:
      claim: which.
      outcomes: of its conditions; none where the run can't decide it.
      reason: why not, in words.
    """

    claim: Claim
    outcomes: tuple[Outcome, ...]
    reason: str

    @property
    def verdict(self) -> str:
        """'reproduced' if every condition is met, 'not reproduced' if one fails, else 'undecided'."""
        if any(outcome.met is False for outcome in self.outcomes):
            return "wrong in the source" if self.claim.is_arithmetic else "not reproduced"
        return "reproduced" if self.outcomes and all(outcome.met for outcome in self.outcomes) else "undecided"

    @property
    def measured(self) -> str:
        """The numbers that decide, for the ledger."""
        return self.reason or "; ".join(outcome.text for outcome in self.outcomes)

    def to_json(self) -> dict[str, Any]:
        """Its entry in `results.json`."""
        claim = self.claim
        texts = {key: getattr(claim, key) for key in ("id", "source", "statement", "published", "rule", "amended")}
        texts["needs"] = {key: str(value) for key, value in claim.needs.items()}
        conditions = [
            {
                **{key: getattr(o.condition, key) for key in ("label", "metric", "variant", "minus", "low", "high")},
                "one_run": o.condition.one_run,
                "every_seed": o.condition.every_seed,
                "mean": o.measured.mean,
                "ci95": o.measured.half,
                "n": o.measured.n,
                "effect": o.effect,
                "met": o.met,
            }
            for o in self.outcomes
        ]
        return {**texts, "conditions": conditions, "measured": self.measured, "verdict": self.verdict}


def _setting(key: str, value: Any) -> str:
    text = key.replace("_", " ")
    return text if value is True else f"not {text}" if value is False else f"{text} {value}"


def _meets(value: Any, wanted: Any) -> bool:
    if isinstance(wanted, AtLeast):
        return isinstance(value, int | float) and value >= wanted.value
    return value == wanted
