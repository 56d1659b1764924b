"""Recompute every row of the ledger from the published files alone, and compare it with what they say.

The computation is written from docs/rules.md and shares no code with the package. It needs numpy and scipy only.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

Curves = dict[tuple[str, str], np.ndarray]
Metric = Callable[[Curves, str], np.ndarray]

LEVEL = 0.05
CHANCE = math.log(10)
ROLES = {"variant": 1, "minus": -1, "control": -1, "control_minus": 1}
COUNTS = ("epochs_to_80_percent", "epochs_to_97_percent", "epochs_beyond_half")
SMALLEST_P = 1e-100  # Below it, p-values are the same.


def plain(variant: str) -> str:
    """Return the name of the network without a normalizer that belongs to a variant such as relu_bn."""
    return variant.split("_")[0] + "_none"


def stays_from(holds: np.ndarray) -> np.ndarray:
    """Return for each seed the first time, from 1, from which on a condition holds to the end."""
    return np.where(holds, 0, np.arange(1, holds.shape[1] + 1)).max(axis=1) + 1


def or_infinite(numbers: np.ndarray) -> np.ndarray:
    """Replace what is not finite by infinity, since it is larger than all else."""
    return np.where(np.isfinite(numbers), numbers, np.inf)


def unsteadiness(loss: np.ndarray) -> np.ndarray:
    """Return the standard deviation of a loss's change from one epoch to the next."""
    finite = np.isfinite(loss).all(axis=1)
    return np.where(finite, np.diff(np.where(finite[:, None], loss, 0.0)).std(axis=1), np.inf)


def least_gain(curves: Curves, variant: str) -> np.ndarray:
    """Return the gain in test accuracy at the time at which its mean over seeds is least."""
    gain = (curves[variant, "test_accuracy"] - curves["none", "test_accuracy"])[:, 1:]
    return gain[:, gain.mean(axis=0).argmin()]


def times_fewer_steps(curves: Curves, variant: str) -> np.ndarray:
    """Return how many times fewer steps a variant needs for the last test accuracy of the plain network."""
    accuracy = curves[variant, "test_accuracy"][:, 1:]
    return accuracy.shape[1] / stays_from(accuracy >= curves["none", "test_accuracy"][:, -1:])


def last_tenth_of_loss(curves: Curves, variant: str) -> np.ndarray:
    """Return the mean loss of the last tenth of the steps, at most ten times that of chance."""
    loss = curves[variant, "batch_loss"]
    return np.minimum(or_infinite(loss[:, -(loss.shape[1] // 10) :]).mean(axis=1), 10 * CHANCE)


def late_gain(curves: Curves, variant: str) -> np.ndarray:
    """Return what the last quarter of the epochs adds to the largest test accuracy."""
    accuracy = curves[variant, "test_accuracy"]
    return accuracy.max(axis=1) - accuracy[:, : accuracy.shape[1] - accuracy.shape[1] // 4].max(axis=1)


def share_of_epochs(curves: Curves, variant: str) -> np.ndarray:
    """Return the share of the plain network's epochs after which a variant keeps below its smallest loss."""
    other = or_infinite(curves[plain(variant), "test_loss"])
    return stays_from(curves[variant, "test_loss"] <= other.min(axis=1, keepdims=True)) / (other.argmin(axis=1) + 1)


def share_with_smaller(number: Callable[[Curves, str], np.ndarray]) -> Metric:
    """Return the metric that counts at which share of the steps a number is smaller than the plain network's."""

    def share(curves: Curves, variant: str) -> np.ndarray:
        steps = [np.atleast_2d(curves[name, "measured_at"])[0] for name in (variant, plain(variant))]
        _, own, other = np.intersect1d(*steps, return_indices=True)
        numbers = or_infinite(number(curves, variant)), or_infinite(number(curves, plain(variant)))
        return (numbers[0][:, own] < numbers[1][:, other]).mean(axis=1)

    return share


def loss_after_other_steps(curves: Curves, variant: str) -> np.ndarray:
    """Return the mean training loss over the last twentieth of as many steps as the shortest run of the family has."""
    family = variant.split("_")[0] + "_"
    lengths = [x.shape[1] for (name, curve), x in curves.items() if curve == "train_loss" and name.startswith(family)]
    steps = min(lengths)
    return curves[variant, "train_loss"][:, steps - steps // 20 : steps].mean(axis=1)


def gain(curves: Curves, variant: str) -> np.ndarray:
    """Return by how much a variant's loss is below that of the plain network and of chance."""
    losses = [or_infinite(loss_after_other_steps(curves, name)) for name in (plain(variant), variant)]
    return np.minimum(losses[0], CHANCE) - np.minimum(losses[1], 10 * CHANCE)


def gain_beyond(curves: Curves, variant: str) -> np.ndarray:
    """Return the gain of a variant beyond 80 percent of that of batch norm."""
    return gain(curves, variant) - 0.8 * gain(curves, variant.split("_")[0] + "_bn")


SHARES: dict[str, Metric] = {
    "share_with_smaller_loss_range": share_with_smaller(lambda c, v: c[v, "loss_max"] - c[v, "loss_min"]),
    "share_with_smaller_gradient_change": share_with_smaller(lambda c, v: c[v, "distance_max"]),
    "share_with_smaller_beta": share_with_smaller(lambda c, v: c[v, "smoothness"]),
}
METRICS: dict[str, dict[str, Metric]] = {
    "circles": {
        "epochs_to_80_percent": lambda c, v: stays_from(c[v, "test_accuracy"] >= 0.8),
        "epochs_beyond_half": lambda c, v: (
            stays_from(c[v, "test_accuracy"] >= 0.8) - stays_from(c["none", "test_accuracy"] >= 0.8) / 2
        ),
        "during_epoch_minus_test": lambda c, v: (
            c[v, "train_accuracy"][:, -10:].mean(axis=1) - c[v, "test_accuracy"][:, -1]
        ),
        "unsteadiness_of_loss": lambda c, v: unsteadiness(c[v, "train_loss"]),
    },
    "mnist": {
        "epochs_to_97_percent": lambda c, v: stays_from(c[v, "validation_accuracy"] >= 0.97),
        "validation_accuracy": lambda c, v: c[v, "validation_accuracy"][:, -1],
        "validation_loss": lambda c, v: c[v, "validation_loss"][:, -1],
    },
    "blobs": {"train_loss_during_epoch": lambda c, v: c[v, "train_loss"][:, -1]},
    "activations": {
        "mean_test_accuracy": lambda c, v: c[v, "test_accuracy"][:, 1:].mean(axis=1),
        "least_gain": least_gain,
        "times_fewer_steps": times_fewer_steps,
        "final_loss": last_tenth_of_loss,
    },
    "cifar": {
        "best_test_accuracy": lambda c, v: c[v, "test_accuracy"].max(axis=1),
        "best_test_loss": lambda c, v: or_infinite(c[v, "test_loss"]).min(axis=1),
        "late_gain": late_gain,
        "share_of_epochs": share_of_epochs,
        "unsteadiness_of_loss": lambda c, v: unsteadiness(c[v, "test_loss"]),
    },
    "smoothness": {
        **SHARES,
        "final_loss": loss_after_other_steps,
        "gain": gain,
        "gain_beyond_80_percent": gain_beyond,
    },
    "deep_linear": SHARES,
}


@dataclass
class Condition:
    """What follows for a condition: its kind, whether its quantity was measured, and fields as the file has them."""

    kind: str
    measured: bool
    fields: dict[str, Any]


@dataclass
class Claim:
    """What follows for a claim; where p is None nothing was tested."""

    conditions: list[Condition]
    p_for: float = 1.0
    p_against: float = 1.0
    p: float | None = None
    p_corrected: float | None = None
    verdict: str = "undecided"


def quantity(condition: dict[str, Any], variants: dict[str, Any]) -> np.ndarray | None:
    """Return a condition's quantity at each seed, or None where a metric was not measured."""
    total: np.ndarray | float = 0.0
    for role, sign in ROLES.items():
        if condition[role] is not None:
            metric = variants.get(condition[role], {"metrics": {}})["metrics"].get(condition["metric"])
            if metric is None:
                return None
            total = total + sign * np.array(metric["values"], dtype=float)
    return np.atleast_1d(total)


def t_statistic(mean: float, end: float, error: float) -> float:
    """Return the distance of a mean from an end of the range in standard errors."""
    if error == 0:
        return 0.0 if mean == end else math.copysign(math.inf, mean - end)
    return (mean - end) / error


def p_values(kind: str, mean: float, error: float, degrees: int, ends: list[float]) -> tuple[float, float]:
    """Return the p-values for and against a condition."""
    if kind == "exact":
        return 1.0, 1.0
    if kind == "one run":
        return 1.0, min(1.0, 2 * float(stats.t.cdf(-abs(t_statistic(mean, ends[0], error)), degrees)))
    low, high = (t_statistic(mean, end, error) for end in ends)
    for_it = 2 * max(stats.t.sf(low, degrees), stats.t.cdf(high, degrees))
    against = 2 * min(stats.t.cdf(low, degrees), stats.t.sf(high, degrees))
    return min(1.0, float(for_it)), min(1.0, float(against))


def is_met(kind: str, mean: float, p_for: float, p_against: float, ends: list[float]) -> bool | None:
    """Return whether a condition is met; None where the seeds do not tell."""
    if kind == "exact":
        return ends[0] <= mean <= ends[1]
    if kind == "one run":
        return p_against >= LEVEL
    return True if p_for < LEVEL else False if p_against < LEVEL else None


def judge_condition(condition: dict[str, Any], variants: dict[str, Any]) -> Condition:
    """Recompute a condition; a mean over only some of the seeds is not computed, as the rules do not define it."""
    kind, q = condition["kind"], quantity(condition, variants)
    fields: dict[str, Any] = {"p_for": 1.0, "p_against": 1.0, "met": None}
    if q is None or not np.isfinite(q).any():
        return Condition(kind, q is not None, fields | {"mean": None, "ci95": None, "interval": [None, None], "n": 0})
    if not np.isfinite(q).all() or len(q) < 2:
        return Condition(kind, True, fields)
    same, n = np.ptp(q) == 0, len(q)
    mean, deviation = (q[0], 0.0) if same else (q.mean(), q.std(ddof=1))
    error = deviation * math.sqrt(1 + 1 / n if kind == "one run" else 1 / n)
    half = stats.t.ppf(0.975, n - 1) * error
    ends = [x if (x := condition[end]) is not None else sign * math.inf for end, sign in (("low", -1), ("high", 1))]
    lowest, highest = (x if x is not None else sign * math.inf for x, sign in zip(condition["possible"], (-1, 1)))
    interval = [min(max(end, lowest), highest) for end in (mean - half, mean + half)]
    p_for, p_against = p_values(kind, mean, error, n - 1, ends)
    met = is_met(kind, mean, p_for, p_against, ends)
    numbers = {"mean": mean, "ci95": half, "interval": interval, "n": n}
    return Condition(kind, True, numbers | {"p_for": p_for, "p_against": p_against, "met": met})


def test_claim(conditions: list[Condition]) -> Claim:
    """Combine the p-values of a claim's conditions."""
    claim = Claim(conditions)
    tested = [c.fields for c in conditions if c.kind != "exact"]
    unmet = any(c.kind == "exact" and not c.fields["met"] for c in conditions)
    if tested and not unmet and all(c.measured for c in conditions):
        claim.p_for = max(c["p_for"] for c in tested)
        claim.p_against = min(1.0, len(tested) * min(c["p_against"] for c in tested))
        claim.p = min(claim.p_for, claim.p_against)
    return claim


def correct(claims: list[Claim]) -> None:
    """Correct the p-values of a study's claims by Holm's method."""
    least, ordered = 0.0, sorted((c for c in claims if c.p is not None), key=lambda c: c.p or 0.0)
    for k, claim in enumerate(ordered):
        least = claim.p_corrected = max(least, min(1.0, (claim.p or 0.0) * (len(ordered) - k)))


def verdict(claim: Claim, is_arithmetic: bool) -> str:
    """Return the verdict on a claim whose p-value has been corrected."""
    kinds, met = {c.kind for c in claim.conditions}, [c.fields["met"] for c in claim.conditions]
    if any(c.kind == "exact" and c.fields["met"] is False for c in claim.conditions):
        return "wrong in the source" if is_arithmetic else "not reproduced"
    if claim.p_corrected is not None and claim.p_corrected < LEVEL:
        return "reproduced" if claim.p_for < claim.p_against else "not reproduced"
    if claim.p_corrected is not None and "one run" in kinds and None not in met:
        return "compatible"
    return "reproduced" if kinds == {"exact"} and all(met) else "undecided"


def has(needs: dict[str, str], settings: dict[str, Any]) -> bool:
    """Tell whether a run's settings are what a claim needs."""
    least = "of at least "
    for name, need in needs.items():
        if name not in settings:
            return False
        if need.startswith(least):
            if settings[name] < float(need.removeprefix(least).replace(",", "")):
                return False
        elif str(settings[name]) != need:
            return False
    return True


def judge(study: dict[str, Any]) -> list[Claim]:
    """Recompute all claims of a study."""
    claims = []
    for claim in study["claims"]:
        conditions = claim["conditions"] if has(claim["needs"], study["settings"]) else []
        claims.append(test_claim([judge_condition(c, study["variants"]) for c in conditions]))
    correct(claims)
    for claim, published in zip(claims, study["claims"], strict=True):
        claim.verdict = verdict(claim, published["is_arithmetic"])
    return claims


def agree(published: Any, computed: Any, absolute: float) -> bool:
    """Tell whether two numbers, lists of them, truth values or texts agree."""
    if isinstance(computed, list):
        return all(agree(p, c, absolute) for p, c in zip(published, computed, strict=True))
    if computed is None or published is None or isinstance(computed, bool | str):
        return published is computed or published == computed
    return math.isclose(published, computed, rel_tol=1e-6, abs_tol=absolute)


def differences(where: str, published: dict[str, Any], computed: dict[str, Any]) -> Iterator[str]:
    """Yield a line for each computed field that the file has otherwise."""
    for name, value in computed.items():
        if not agree(published[name], value, SMALLEST_P if name.startswith("p") else 1e-12):
            yield f"{where}, {name}: published {published[name]}, computed {value}"


def compare_claim(where: str, published: dict[str, Any], claim: Claim, settings: dict[str, Any]) -> Iterator[str]:
    """Yield a line for each disagreement about a claim."""
    if has(published["needs"], settings) != bool(published["conditions"]):
        needs = f"needs {published['needs']}"
        yield f"{where}: published {len(published['conditions'])} conditions, which does not fit what it {needs}"
    for old, new in zip(published["conditions"], claim.conditions, strict=False):
        yield from differences(f"{where}, {old['label']}", old, new.fields)
    names = ("p", "p_corrected", "verdict")
    yield from differences(where, published, {name: getattr(claim, name) for name in names})


def compare_metric(where: str, published: list[float | None], computed: np.ndarray, exact: bool) -> Iterator[str]:
    """Yield a line if a metric disagrees with its curves; what is not finite may be published as not defined."""
    values = np.array(published, dtype=float)
    if values.shape != computed.shape:
        yield f"{where}: published {len(values)} seeds, computed {len(computed)}"
        return
    tolerances = (0.0, 0.0) if exact else (1e-4, 1e-6)
    values, computed = (np.where(np.isfinite(x), x, np.nan) for x in (values, computed))
    wrong = np.flatnonzero(~np.isclose(values, computed, *tolerances, equal_nan=True))
    if wrong.size:
        i = wrong[0]
        yield f"{where}: published {values[i]}, computed {computed[i]} at seed {i} ({wrong.size} seeds disagree)"


def read_curves(path: Path) -> Curves:
    """Read the curves of a study by variant and name; there are none where there is no file."""
    if not path.exists():
        return {}
    with np.load(path) as file:
        keys = [key.rsplit("/", 1) for key in file.files]
        return {(variant, curve): file[f"{variant}/{curve}"].astype(float) for variant, curve in keys}


def compare_metrics(study: dict[str, Any], curves: Curves) -> tuple[list[str], int, int]:
    """Return the disagreements of metrics with curves, and how many were compared and how many have no curves."""
    lines, compared, missing = [], 0, 0
    for name, metric in METRICS.get(study["study"], {}).items():
        for variant, entry in study["variants"].items():
            if name in entry["metrics"]:
                try:
                    computed = metric(curves, variant)
                except (KeyError, ValueError):
                    missing += 1
                    continue
                where = f"{study['study']}, {variant}/{name}"
                lines += compare_metric(where, entry["metrics"][name]["values"], computed, name in COUNTS)
                compared += 1
    return lines, compared, missing
