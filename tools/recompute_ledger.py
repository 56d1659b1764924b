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
LEAST = "of at least "
ROLES = {"variant": 1, "minus": -1, "control": -1, "control_minus": 1}


def relative(variant: str, kind: str) -> str:
    """Return the name of the network of another kind in a variant's family, as relu_none for relu_bn."""
    return f"{variant.split('_')[0]}_{kind}"


def stays_from(holds: np.ndarray) -> np.ndarray:
    """Return for each seed the first time, from 1, from which on a condition holds to the end."""
    return np.where(holds, 0, np.arange(1, holds.shape[1] + 1)).max(axis=1) + 1


def epochs_to_80(curves: Curves, variant: str) -> np.ndarray:
    """Return the first epoch from which on the test accuracy stays at 80 percent or above."""
    return stays_from(curves[variant, "test_accuracy"] >= 0.8)


def or_infinite(numbers: np.ndarray) -> np.ndarray:
    """Replace what is not finite by infinity, since it counts as larger than all else."""
    return np.where(np.isfinite(numbers), numbers, np.inf)


def unsteadiness(loss: np.ndarray) -> np.ndarray:
    """Return the standard deviation of a loss's change from one epoch to the next."""
    return or_infinite(np.diff(loss).std(axis=1))


def gain_in_tenth(number: int) -> Metric:
    """Return the metric that says the mean gain in test accuracy over one tenth of the measured times but the first."""

    def gain_of_part(curves: Curves, variant: str) -> np.ndarray:
        gains = (curves[variant, "test_accuracy"] - curves["none", "test_accuracy"])[:, 1:]
        return np.array_split(gains, 10, axis=1)[number - 1].mean(axis=1)

    return gain_of_part


def log10_times_fewer_steps(curves: Curves, variant: str) -> np.ndarray:
    """Return how many times fewer steps a variant needs for the plain network's accuracy at the end, as a logarithm."""
    accuracy, target = curves[variant, "test_accuracy"][:, 1:], curves["none", "test_accuracy"][:, -5:].mean(axis=1)
    return np.log10(accuracy.shape[1] / stays_from(accuracy >= target[:, None]))


def last_tenth(loss: np.ndarray) -> np.ndarray:
    """Return the mean of the last tenth of a loss, at most ten times that of chance."""
    return np.minimum(or_infinite(loss[:, -(loss.shape[1] // 10) :]).mean(axis=1), 10 * CHANCE)


def late_gain(accuracy: np.ndarray) -> np.ndarray:
    """Return what the last quarter of the epochs adds to the largest accuracy."""
    return accuracy.max(axis=1) - accuracy[:, : accuracy.shape[1] - accuracy.shape[1] // 4].max(axis=1)


def log10_share_of_epochs(curves: Curves, variant: str) -> np.ndarray:
    """Return the share of the plain network's epochs after which a variant's best loss is its best, as a logarithm."""
    plain = or_infinite(curves[relative(variant, "none"), "test_loss"])
    best = np.minimum.accumulate(or_infinite(curves[variant, "test_loss"]), axis=1)
    return np.log10(stays_from(best <= plain.min(axis=1, keepdims=True)) / (plain.argmin(axis=1) + 1))


def share_with_smaller(number: Callable[[Curves, str], np.ndarray]) -> Metric:
    """Return the metric that says at which share of the steps a number is smaller than the plain network's."""

    def share(curves: Curves, variant: str) -> np.ndarray:
        own, plain = (or_infinite(number(curves, name)) for name in (variant, relative(variant, "none")))
        own_steps = np.broadcast_to(curves[variant, "measured_at"], own.shape)
        plain_steps = np.broadcast_to(curves[relative(variant, "none"), "measured_at"], plain.shape)
        both = [np.intersect1d(*steps, return_indices=True)[1:] for steps in zip(own_steps, plain_steps, strict=True)]
        return np.array([(own[seed, i] < plain[seed, j]).mean() for seed, (i, j) in enumerate(both)])

    return share


def loss_at_other_steps(curves: Curves, variant: str) -> np.ndarray:
    """Return the mean training loss over the last twentieth of the steps of the shortest run in the family."""
    loss, family = curves[variant, "train_loss"], relative(variant, "")
    steps = min(x.shape[1] for (name, curve), x in curves.items() if curve == "train_loss" and name.startswith(family))
    return loss[:, steps - steps // 20 : steps].mean(axis=1)


def gain(curves: Curves, variant: str) -> np.ndarray:
    """Return by how much a variant's loss is below that of the plain network and of chance."""
    plain, own = (or_infinite(loss_at_other_steps(curves, v)) for v in (relative(variant, "none"), variant))
    return np.minimum(plain, CHANCE) - np.minimum(own, 10 * CHANCE)


def last_part(curves: Curves, variant: str) -> np.ndarray:
    """Return the mean loss of the last twentieth of a training at one of the learning rates."""
    if not variant.startswith(("none_", "bn_")):
        raise KeyError(variant)
    return or_infinite(curves[variant, "train_loss"][:, -1])


def log10_largest_rate(curves: Curves, variant: str) -> np.ndarray:
    """Return the largest rate at which the loss is a tenth below chance's, interpolated to the next, as a logarithm."""
    family = variant.partition("_")[0]
    rates = sorted({float(name.partition("_")[2]) for name, _ in curves if name.startswith(f"{family}_")})
    losses = np.array([np.minimum(last_part(curves, f"{family}_{rate:g}"), 10 * CHANCE) for rate in rates])
    at, level, found = np.log10(rates), 0.9 * CHANCE, []
    for loss in losses.T:
        last = max(i for i, value in enumerate(loss) if value <= level)
        found.append(np.interp(level, loss[last : last + 2], at[last : last + 2]))
    return np.array(found)


SHARES: dict[str, Metric] = {
    "share_with_smaller_loss_range": share_with_smaller(lambda c, v: c[v, "loss_max"] - c[v, "loss_min"]),
    "share_with_smaller_gradient_change": share_with_smaller(lambda c, v: c[v, "distance_max"]),
    "share_with_smaller_beta": share_with_smaller(lambda c, v: c[v, "smoothness"]),
}
METRICS: dict[str, dict[str, Metric]] = {
    "circles": {
        "epochs_to_80_percent": epochs_to_80,
        "epochs_beyond_half": lambda c, v: epochs_to_80(c, v) - epochs_to_80(c, "none") / 2,
        "during_epoch_minus_test": lambda c, v: c[v, "train_accuracy"][:, -10:].mean(1) - c[v, "test_accuracy"][:, -1],
        "unsteadiness_of_loss": lambda c, v: unsteadiness(c[v, "train_loss"]),
    },
    "mnist": {
        "epochs_to_97_percent": lambda c, v: stays_from(c[v, "validation_accuracy"] >= 0.97),
        "validation_accuracy": lambda c, v: c[v, "validation_accuracy"][:, -1],
        "validation_loss": lambda c, v: c[v, "validation_loss"][:, -1],
    },
    "sensitivity": {"early_test_accuracy": lambda c, v: c[v, "test_accuracy"][:, 1]},
    "blobs": {"train_loss_during_epoch": lambda c, v: c[v, "train_loss"][:, -1]},
    "activations": {
        "mean_test_accuracy": lambda c, v: c[v, "test_accuracy"][:, 1:].mean(axis=1),
        **{f"gain_in_tenth_{number}": gain_in_tenth(number) for number in range(1, 11)},
        "log10_times_fewer_steps": log10_times_fewer_steps,
        "final_loss": lambda c, v: last_tenth(c[v, "batch_loss"]),
    },
    "cifar": {
        "best_test_accuracy": lambda c, v: c[v, "test_accuracy"].max(axis=1),
        "best_test_loss": lambda c, v: or_infinite(c[v, "test_loss"]).min(axis=1),
        "late_gain": lambda c, v: late_gain(c[v, "test_accuracy"]),
        "log10_share_of_epochs": log10_share_of_epochs,
        "rises_of_loss": lambda c, v: np.maximum(np.diff(or_infinite(c[v, "test_loss"]), axis=1), 0).mean(axis=1),
        "accuracy_lost_since_best": lambda c, v: c[v, "test_accuracy"].max(axis=1) - c[v, "test_accuracy"][:, -1],
    },
    "smoothness": {
        "final_loss": loss_at_other_steps,
        "gain": gain,
        "gain_beyond_80_percent": lambda c, v: gain(c, v) - 0.8 * gain(c, relative(v, "bn")),
        **SHARES,
    },
    "deep_linear": SHARES,
    "papers": {"final_loss": last_part, "log10_largest_rate": log10_largest_rate},
}


@dataclass
class Condition:
    """What follows for a condition: its kind, whether its quantity was measured, and fields as the file has them."""

    kind: str
    measured: bool
    fields: dict[str, Any]


@dataclass
class Claim:
    """What follows for a claim, of which p is None where nothing is tested."""

    conditions: list[Condition]
    p_for: float = 1.0
    p_against: float = 1.0
    p: float | None = None
    p_corrected: float | None = None
    verdict: str = "undecided"


def quantity(condition: dict[str, Any], variants: dict[str, Any]) -> np.ndarray | None:
    """Return a condition's quantity at each seed, or None where a metric was not measured."""
    total = None
    for role, sign in ROLES.items():
        if condition[role] is not None:
            metric = variants.get(condition[role], {"metrics": {}})["metrics"].get(condition["metric"])
            if metric is None:
                return None
            term = sign * np.array(metric["values"], dtype=float)
            total = term if total is None else total + term
    return total


def sides(mean: float, error: float, n: int, end: float) -> tuple[float, float]:
    """Return twice the one-sided p-values that a mean lies above an end, and below it."""
    if math.isinf(end):
        return (0.0, 1.0) if end < 0 else (1.0, 0.0)
    if error == 0:  # values that are all the same
        return float(mean <= end), float(mean >= end)
    t = (mean - end) / error
    return min(1.0, 2 * float(stats.t.sf(t, n - 1))), min(1.0, 2 * float(stats.t.cdf(t, n - 1)))


def test(kind: str, mean: float, error: float, n: int, ends: list[float]) -> dict[str, Any]:
    """Return the p-values for and against a condition, and whether it is met (None where the seeds do not tell)."""
    if kind == "exact":
        return {"p_for": 1.0, "p_against": 1.0, "met": ends[0] <= mean <= ends[1]}
    if kind == "one run":
        p = 2 * float(stats.t.cdf(-abs(mean - ends[0]) / error, n - 1)) if error else float(mean == ends[0])
        return {"p_for": 1.0, "p_against": p, "met": p >= LEVEL}
    (above_low, below_low), (above_high, below_high) = (sides(mean, error, n, end) for end in ends)
    p_for, p_against = max(above_low, below_high), min(below_low, above_high)
    met = True if p_for < LEVEL else False if p_against < LEVEL else None
    return {"p_for": p_for, "p_against": p_against, "met": met}


def judge_condition(condition: dict[str, Any], variants: dict[str, Any]) -> Condition:
    """Recompute a condition, without the mean where only some of the seeds have a finite value."""
    kind, q = condition["kind"], quantity(condition, variants)
    fields: dict[str, Any] = {"p_for": 1.0, "p_against": 1.0, "met": None}
    if q is None or not np.isfinite(q).any():
        return Condition(kind, False, fields | {"mean": None, "ci95": None, "interval": [None, None], "n": 0})
    if len(q) < 2 or not np.isfinite(q).all():
        return Condition(kind, True, fields)
    n, same = len(q), bool((q == q[0]).all())
    mean, deviation = float(q[0] if same else q.mean()), 0.0 if same else float(q.std(ddof=1))
    error = deviation * math.sqrt(1 / n + (kind == "one run"))
    half = float(stats.t.ppf(0.975, n - 1)) * error
    bounds = (condition["low"], condition["high"], *condition["possible"])
    low, high, lowest, highest = (
        sign * math.inf if bound is None else bound for sign, bound in zip((-1, 1, -1, 1), bounds, strict=True)
    )
    interval = [max(mean - half, lowest), min(mean + half, highest)]
    fields = {"mean": mean, "ci95": half, "interval": interval, "n": n}
    return Condition(kind, True, fields | test(kind, mean, error, n, [low, high]))


def combine(conditions: list[Condition]) -> Claim:
    """Return the claim that has these conditions, with its p-values."""
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
    tested = sorted((claim for claim in claims if claim.p is not None), key=lambda claim: claim.p)
    last = 0.0
    for k, claim in enumerate(tested):
        last = claim.p_corrected = max(last, min(1.0, claim.p * (len(tested) - k)))


def verdict(claim: Claim, is_arithmetic: bool) -> str:
    """Return the verdict on a claim whose p-value has been corrected."""
    kinds, met = {c.kind for c in claim.conditions}, [c.fields["met"] for c in claim.conditions]
    if any(c.kind == "exact" and c.fields["met"] is False for c in claim.conditions):
        return "wrong in the source" if is_arithmetic else "not reproduced"
    if claim.p_corrected is None:
        return "reproduced" if kinds == {"exact"} and all(met) else "undecided"
    if claim.p_corrected < LEVEL:
        return "reproduced" if claim.p_for < claim.p_against else "not reproduced"
    return "compatible" if "one run" in kinds and None not in met else "undecided"


def has_needs(claim: dict[str, Any], settings: dict[str, Any]) -> bool:
    """Tell whether the run has all that a claim needs, each of which is a value or a least number."""
    for name, need in claim["needs"].items():
        least = float(need.removeprefix(LEAST).replace(",", "")) if need.startswith(LEAST) else None
        if name not in settings or (str(settings[name]) != need if least is None else settings[name] < least):
            return False
    return True


def judge(study: dict[str, Any]) -> list[Claim]:
    """Recompute all claims of a study."""
    claims = []
    for published in study["claims"]:
        conditions = published["conditions"] if has_needs(published, study["settings"]) else []
        claims.append(combine([judge_condition(c, study["variants"]) for c in conditions]))
    correct(claims)
    for claim, published in zip(claims, study["claims"], strict=True):
        claim.verdict = verdict(claim, published["is_arithmetic"])
    return claims


def agree(published: Any, computed: Any, absolute: float) -> bool:
    """Tell whether two numbers, lists of numbers, truth values or texts agree."""
    if isinstance(published, list) and isinstance(computed, list) and len(published) == len(computed):
        return all(agree(p, c, absolute) for p, c in zip(published, computed, strict=True))
    if isinstance(published, int | float) and type(computed) in (int, float):
        return math.isclose(published, computed, rel_tol=1e-6, abs_tol=absolute)
    return published == computed


def differences(where: str, published: dict[str, Any], computed: dict[str, Any]) -> Iterator[str]:
    """Yield a line for each computed field that the file has otherwise."""
    for name, value in computed.items():
        if not agree(published.get(name), value, 1e-100 if name.startswith("p") else 1e-12):
            yield f"{where}, {name}: published {published.get(name)}, computed {value}"


def compare_claims(study: dict[str, Any], claims: list[Claim]) -> Iterator[str]:
    """Yield a line for each disagreement about the claims of a study."""
    for published, claim in zip(study["claims"], claims, strict=True):
        where = f"{study['study']}, {published['id']}"
        fits = has_needs(published, study["settings"])
        if fits != bool(published["conditions"]):
            needs = "are" if fits else "are not"
            yield f"{where}: published {len(published['conditions'])} conditions, but its needs {needs} met"
        for old, new in zip(published["conditions"], claim.conditions, strict=False):
            yield from differences(f"{where}, {old['label']}", old, new.fields)
        names = ("p", "p_corrected", "verdict")
        yield from differences(where, published, {name: getattr(claim, name) for name in names})


def compare_metric(where: str, published: list[float | None], computed: np.ndarray, exact: bool) -> Iterator[str]:
    """Yield a line if a metric disagrees with its curves, where null stands for all that is not finite."""
    values = or_infinite(np.array(published, dtype=float))
    if values.shape != computed.shape:
        yield f"{where}: published {values.size} seeds, computed {computed.size}"
        return
    relative_tolerance, absolute = (0.0, 0.0) if exact else (1e-4, 1e-6)
    wrong = np.flatnonzero(~np.isclose(or_infinite(computed), values, relative_tolerance, absolute))
    if wrong.size:
        i = wrong[0]
        yield f"{where}: published {published[i]}, computed {computed[i]} at index {i}; {wrong.size} seeds disagree"


def compare_metrics(study: dict[str, Any], curves: Curves) -> tuple[list[str], int, int]:
    """Return the disagreements of metrics with curves, how many were compared, and how many have no curves."""
    lines, compared, missing = [], 0, 0
    for name, metric in METRICS.get(study["study"], {}).items():
        for variant in [v for v, entry in study["variants"].items() if name in entry["metrics"]]:
            where, published = f"{study['study']}, {variant}/{name}", study["variants"][variant]["metrics"][name]
            try:
                lines += compare_metric(where, published["values"], metric(curves, variant), name.startswith("epochs_"))
                compared += 1
            except KeyError:
                missing += 1
            except ValueError as error:
                lines.append(f"{where}: cannot be computed from its curves ({error})")
    return lines, compared, missing


def report(path: Path, study: dict[str, Any], claims: list[Claim]) -> list[str]:
    """Return the line of a study, and a line for each of its disagreements."""
    curves: Curves = {}
    if path.with_suffix(".npz").exists():
        with np.load(path.with_suffix(".npz")) as file:
            curves = {tuple(key.rsplit("/", 1)): file[key].astype(float) for key in file.files}
    lines, compared, missing = compare_metrics(study, curves)
    lines = [*compare_claims(study, claims), *lines]
    conditions = sum(len(claim.conditions) for claim in claims)
    counts = f"{len(claims)} claims, {conditions} conditions, {compared} metrics of curves"
    without = f" ({missing} more have no curves)" if missing else ""
    return [f"{study['study']}: {counts}{without}: {f'{len(lines)} disagree' if lines else 'all agree'}", *lines]


def rows(study: dict[str, Any], claims: list[Claim]) -> Iterator[str]:
    """Yield the rows of the table for a study."""
    for published, claim in zip(study["claims"], claims, strict=True):
        numbers = ["-" if p is None else f"{p:.3g}" for p in (claim.p, claim.p_corrected)]
        yield f"{published['id']:<22}{numbers[0]:<12}{numbers[1]:<12}{claim.verdict}"


def main() -> int:
    """Check the ledger in a directory, and return the exit status."""
    parser = argparse.ArgumentParser(
        description="Recompute the ledger of claims from the published results by docs/rules.md, and compare them.",
        epilog="The exit status is 0 if all agree, 1 if anything disagrees, and 2 if there is nothing to read.",
    )
    default = Path(__file__).resolve().parent.parent / "docs" / "results"
    help_text = "folder of STUDY.json and STUDY.npz (default: docs/results beside this script's folder)"
    parser.add_argument("directory", nargs="?", type=Path, default=default, help=help_text)
    parser.add_argument("--table", action="store_true", help="print claim, p, corrected p and verdict as recomputed")
    arguments = parser.parse_args()
    contents = {path: json.loads(path.read_text("utf-8")) for path in sorted(arguments.directory.glob("*.json"))}
    studies = {path: content for path, content in contents.items() if isinstance(content, dict) and "study" in content}
    if not studies:
        reason = "holds no study" if arguments.directory.is_dir() else "is not a directory"
        print(f"{parser.prog}: {arguments.directory} {reason}", file=sys.stderr)
        return 2
    output, table, status = [], [f"{'claim':<22}{'p':<12}{'corrected p':<12}verdict"], 0
    for path, study in studies.items():
        if not study.get("claims"):
            output.append(f"{study['study']}: not run yet by these rules")
            continue
        with np.errstate(all="ignore"):
            claims = judge(study)
            lines = report(path, study, claims)
        output += lines
        table += rows(study, claims)
        status = max(status, int(len(lines) > 1))
    print("\n".join(table if arguments.table else output))
    return status


if __name__ == "__main__":
    sys.exit(main())
