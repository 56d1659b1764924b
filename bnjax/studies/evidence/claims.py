"""Statements about batch norm as data: what is claimed, which measured quantities decide it, and the verdict."""

import dataclasses
import math
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bnjax.studies.evidence.statistics import Interval, interval, prediction_interval, within

VERDICTS = ("reproduced", "not reproduced", "undecided", "wrong in the source")


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
    undecided else, or where a seed lacks a value.

    Attributes:
      label: what the quantity is called in the ledger.
      metric: its name in the study's results.
      variant: the network's name there.
      minus: the network whose value is subtracted.
      low: lower end of the range.
      high: upper end.
      exact: whether the quantity is a number without an interval, which needs no seeds.
      one_run: whether the interval is that of one further run, which has to hold the published number, `low` = `high`.
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

    def judge(self, results: Any) -> "Outcome":
        """Compares the range with what a study measured, its `bnjax.studies.evidence.results.Results`."""
        values = results.values(self.variant, self.metric)
        others = results.values(self.minus, self.metric) if self.minus else None
        if values is None or (self.minus and others is None):
            return Outcome(self, Interval(math.nan, math.nan, 0), math.nan, None)
        values = np.asarray(values, np.float64) - (0 if others is None else np.asarray(others, np.float64))
        measured = prediction_interval(values) if self.one_run else interval(values)
        deviation = values[~np.isnan(values)].std(ddof=1) if measured.n > 1 else math.nan
        is_paired = self.minus or self.is_difference
        effect = measured.mean / deviation if is_paired and deviation > 0 else math.nan
        if self.exact:
            measured = Interval(measured.mean, 0.0, measured.n)
        if measured.n < len(results.seeds) or not math.isfinite(measured.half):
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
    """The measured quantity of a condition.

    Attributes:
      condition: the condition that it decides.
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
        """The text 'label mean ± half (effect)' for the ledger."""
        label, digits, measured = self.condition.label, self.condition.digits, self.measured
        if not measured.n:
            return f"{label} not measured"
        if self.condition.one_run:
            return f"{label} {measured.mean:.{digits}f} [{measured.low:.{digits}f}, {measured.high:.{digits}f}]"
        if self.condition.exact:
            return f"{label} {measured._replace(half=math.nan).text(digits)}"
        effect = f" (d {self.effect:+.1f})" if math.isfinite(self.effect) else ""
        return f"{label} {measured.text(digits)}{effect}"


@dataclasses.dataclass(frozen=True)
class Claim:
    """A statement of a source.

    Attributes:
      id: its name in the ledger, such as 'S1.1'.
      source: the document, and the place in it.
      statement: the statement in our words.
      published: the number published, or a dash.
      rule: what decides, in words, fixed before the run.
      conditions: the conditions that decide; all of them have to be met.
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

    def judge(self, results: Any) -> "Judgment":
        """Returns the verdict on a study's `bnjax.studies.evidence.results.Results`."""
        needed = [_setting(k, v) for k, v in self.needs.items() if not _meets(results.settings.get(k), v)]
        if needed:
            return Judgment(self, (), "needs " + ", ".join(needed))
        return Judgment(self, tuple(condition.judge(results) for condition in self.conditions), "")


@dataclasses.dataclass(frozen=True)
class Judgment:
    """A claim and the outcome of each of its conditions; none where the run can't decide it, for a reason in words."""

    claim: Claim
    outcomes: tuple[Outcome, ...]
    reason: str

    @property
    def verdict(self) -> str:
        """The verdict: 'reproduced' if every condition is met, 'not reproduced' if one fails, else 'undecided'."""
        if any(outcome.met is False for outcome in self.outcomes):
            return "wrong in the source" if self.claim.is_arithmetic else "not reproduced"
        return "reproduced" if self.outcomes and all(outcome.met for outcome in self.outcomes) else "undecided"

    @property
    def measured(self) -> str:
        """The numbers that decide, for the ledger."""
        return self.reason or "; ".join(outcome.text for outcome in self.outcomes)

    def to_json(self) -> dict[str, Any]:
        """Returns the entry in `results.json`."""
        claim = self.claim
        texts = {key: getattr(claim, key) for key in ("id", "source", "statement", "published", "rule", "amended")}
        texts["needs"] = {key: str(value) for key, value in claim.needs.items()}
        declared = ("label", "metric", "variant", "minus", "low", "high", "one_run", "every_seed")
        conditions = [
            {key: getattr(o.condition, key) for key in declared}
            | {"mean": o.measured.mean, "ci95": o.measured.half, "n": o.measured.n, "effect": o.effect, "met": o.met}
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


def read_claims(study_file: str, text: str | None = None) -> tuple[Claim, ...]:
    """Reads the claims of a study from TOML: tables `[[sources]]`, each with tables `[[sources.claims]]`.

    A source has a `name` and the `needs` of its claims, where these have none of their own. The keys of a claim are the
    attributes of `Claim`, those of its conditions the attributes of `Condition`; `published` is a dash by default. In
    `needs` the value `{at_least = 500}` is a number that may be larger, and `digits = "auto"` shows as many decimals as
    the interval leaves.

    Args:
      study_file: the file of the study's module. Its claims are in `claims/<study>.toml` beside it.
      text: the claims, where the module holds them itself.

    Raises:
      ValueError: for claims that are not so; the message names file, claim and field.
    """
    path = Path(study_file)
    if text is None:
        path = path.parent / "claims" / f"{path.stem}.toml"
        text = path.read_text(encoding="utf-8")
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path}: {error}.") from None
    _check(document, {"sources": list}, str(path))
    claims: dict[str, Claim] = {}
    for number, source in enumerate(document["sources"], 1):
        _check(source, {"name": str, "claims": list, "needs": dict}, f"{path}, source {number}", optional=("needs",))
        for table in source["claims"]:
            claim = _claim(table, source, str(path))
            if claim.id in claims:
                raise ValueError(f"{path}, claim {claim.id}: id must be that of one claim only.")
            claims[claim.id] = claim
    return tuple(claims.values())


def _claim(table: Any, source: Mapping[str, Any], where: str) -> Claim:
    where += f", claim {table['id']}" if isinstance(table, dict) and "id" in table else f", a claim of {source['name']}"
    kinds = {field.name: field.type for field in dataclasses.fields(Claim) if field.name != "source"}
    kinds |= {"conditions": list, "needs": dict}
    _check(table, kinds, where, optional=("published", "needs", "amended", "is_arithmetic"))
    conditions = tuple(_condition(c, f"{where}, condition {i}") for i, c in enumerate(table["conditions"], 1))
    needs = dict(table.get("needs", source.get("needs", {})))
    for key, value in needs.items():
        if isinstance(value, dict):
            _check(value, {"at_least": float}, f"{where}, needs.{key}")
            needs[key] = AtLeast(value["at_least"])
    return Claim(**{"published": "–", **table, "source": source["name"], "conditions": conditions, "needs": needs})


def _condition(table: Any, where: str) -> Condition:
    kinds = {field.name: field.type for field in dataclasses.fields(Condition)}
    if isinstance(table, dict) and table.get("digits") == "auto":
        table = {**table, "digits": None}
    _check(table, kinds, where, optional=tuple(kinds)[3:])
    condition = Condition(**table)
    low, high = condition.low, condition.high
    if not low <= high or (low, high) == (-math.inf, math.inf):
        raise ValueError(f"{where}: low and high must be the ends of a range, got {low} and {high}.")
    if condition.one_run and low != high:
        raise ValueError(f"{where}: low and high must both be the published number with one_run, got {low} and {high}.")
    return condition


def _check(table: Any, kinds: Mapping[str, Any], where: str, optional: Sequence[str] = ()) -> None:
    """Raises ValueError where a table lacks a field, has one that is not known, or one of another kind."""
    if not isinstance(table, dict):
        raise ValueError(f"{where}: expected a table, got {table!r}.")
    if unknown := sorted(set(table) - set(kinds)):
        raise ValueError(f"{where}: {unknown[0]} is not a field; expected {', '.join(kinds)}.")
    if missing := [name for name in kinds if name not in table and name not in optional]:
        raise ValueError(f"{where}: {missing[0]} is missing.")
    for name, value in table.items():
        kind = kinds[name]
        allowed = int | float if kind is float else kind
        if not isinstance(value, allowed) or (isinstance(value, bool) and kind is not bool):
            text = kind.__name__ if isinstance(kind, type) else kind
            raise ValueError(f"{where}: {name} must be of type {text}, got {value!r}.")
