"""What a study measured: intervals, claims, and the files it leaves.

`results.json`, schema 1:

    {
      "schema": 1,
      "study": name, "command": the command line, "settings": {…}, "seeds": [ints], "seconds": wall time,
      "started": UTC time, "versions": {package: version}, "machine": {"system", "python", "backend", "devices"},
      "variants": {name: {"label": text, "settings": {…},
                          "metrics": {metric: {"values": [one per seed, null where undefined], "mean", "ci95", "n"}}}},
      "claims": [{"id", "source", "statement", "published", "rule", "measured", "verdict"}],
      "notes": {…}
    }

`ci95` is half the width of the 95 % confidence interval of the mean over seeds, by Student's t; `n` counts the seeds
at which the metric is defined. Every claim's rule was fixed before the runs. `curves.npz` holds, for each variant, its
curves `<variant>/<split>_<metric>` as `[seeds, epochs]`, and the first seed's histograms.
"""

import dataclasses
import datetime
import importlib.metadata
import json
import math
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import special

from bnjax.data import atomic_file

_PACKAGES = ("bnjax", "jax", "jaxlib", "flax", "optax", "chex", "numpy", "scikit-learn", "tensorflow-datasets")


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

    def text(self, digits: int = 4) -> str:
        """'mean ± half', or a dash where there is nothing."""
        if self.n == 0:
            return "–"
        return f"{self.mean:.{digits}f}" + (f" ± {self.half:.{digits}f}" if math.isfinite(self.half) else "")


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


@dataclasses.dataclass(frozen=True)
class Claim:
    """A statement of a source and what was measured.

    Attributes:
      id: such as 'S1.1'.
      source: document and place.
      statement: in our words.
      published: the number published, or a dash.
      rule: what decides, fixed before the run.
      measured: the numbers that decide, as text.
      outcomes: for each condition of the rule True, False or None (undecided).
    """

    id: str
    source: str
    statement: str
    published: str
    rule: str
    measured: str
    outcomes: Sequence[bool | None]

    @property
    def verdict(self) -> str:
        """'reproduced' if every condition holds, 'not reproduced' if any fails, else 'undecided'."""
        if any(outcome is False for outcome in self.outcomes):
            return "not reproduced"
        return "reproduced" if all(self.outcomes) else "undecided"


@dataclasses.dataclass
class Results:
    """All that a study measured.

    Attributes:
      study: its name.
      settings: common settings.
      seeds: which seeds.
      variants: name to `(label, settings, {metric: values over seeds})`.
      claims: statements checked.
      arrays: for `curves.npz`.
      notes: further numbers.
      texts: title and text of what the terminal shows beside the tables.
    """

    study: str
    settings: Mapping[str, Any]
    seeds: Sequence[int]
    variants: dict[str, tuple[str, Mapping[str, Any], Mapping[str, np.ndarray]]] = dataclasses.field(
        default_factory=dict
    )
    claims: list[Claim] = dataclasses.field(default_factory=list)
    arrays: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    notes: dict[str, Any] = dataclasses.field(default_factory=dict)
    texts: list[tuple[str, str]] = dataclasses.field(default_factory=list)

    def add(self, trained, settings: Mapping[str, Any], metrics: Mapping[str, np.ndarray]) -> None:
        """Adds a trained variant with its curves, histograms and the metrics computed from them."""
        name = trained.variant.name
        self.variants[name] = (trained.variant.label, settings, metrics)
        self.arrays.update({f"{name}/{curve}": values for curve, values in trained.curves.items()})
        for path, (counts, ends) in trained.histograms.items():
            self.arrays[f"{name}/histograms/{path}/counts"] = counts
            self.arrays[f"{name}/histograms/{path}/range"] = ends

    def metric(self, variant: str, metric: str) -> np.ndarray:
        """Values of a metric over seeds."""
        return self.variants[variant][2][metric]

    def difference(self, metric: str, variant: str, other: str) -> Interval:
        """Interval of a metric's paired difference `variant − other` over seeds."""
        return interval(self.metric(variant, metric) - self.metric(other, metric))

    def to_json(self, seconds: float, started: datetime.datetime) -> dict[str, Any]:
        """The content of `results.json`."""
        import jax

        devices = jax.devices()
        return {
            "schema": 1,
            "study": self.study,
            "command": " ".join(["bnjax", *sys.argv[1:]]),
            "settings": dict(self.settings),
            "seeds": list(self.seeds),
            "seconds": round(seconds, 2),
            "started": started.isoformat(timespec="seconds"),
            "versions": {package: importlib.metadata.version(package) for package in _PACKAGES},
            "machine": {
                "system": f"{platform.system()} {platform.machine()}",
                "python": platform.python_version(),
                "backend": jax.default_backend(),
                "devices": [device.device_kind for device in devices],
            },
            "variants": {
                name: {
                    "label": label,
                    "settings": dict(settings),
                    "metrics": {
                        metric: {"values": values.tolist(), "mean": mean, "ci95": half, "n": n}
                        for metric, values in metrics.items()
                        for mean, half, n in [interval(values)]
                    },
                }
                for name, (label, settings, metrics) in self.variants.items()
            },
            "claims": [
                {
                    **{
                        key: getattr(claim, key)
                        for key in ("id", "source", "statement", "published", "rule", "measured")
                    },
                    "verdict": claim.verdict,
                }
                for claim in self.claims
            ],
            "notes": self.notes,
        }


def save(
    results: Results, figures: Mapping[str, Any], out: Path, seconds: float, started: datetime.datetime
) -> list[Path]:
    """Writes `results.json`, `curves.npz`, `summary.md` and the figures, each complete or not at all.

    Args:
      results: what was measured.
      figures: file name to matplotlib figure.
      out: directory, made where it is missing.
      seconds: wall time.
      started: when the run began.

    Returns:
      The paths written.
    """
    paths = []
    for name, figure in figures.items():
        with atomic_file(out / name) as file:
            figure.savefig(file, format="png", dpi=120)
        paths.append(out / name)
    with atomic_file(out / "curves.npz") as file:
        arrays: dict[str, Any] = results.arrays
        np.savez_compressed(file, **arrays)
    document = json.dumps(_without_nan(results.to_json(seconds, started)), indent=1, ensure_ascii=False)
    for name, text in (("summary.md", summary_markdown(results)), ("results.json", document)):
        with atomic_file(out / name) as file:
            file.write(text.encode() + b"\n")
        paths.append(out / name)
    return [out / "curves.npz", *paths]


def _without_nan(value: Any) -> Any:
    """The value with null for what JSON has no number for."""
    if isinstance(value, dict):
        return {key: _without_nan(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def metric_rows(results: Results) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table of variants: mean ± 95 % interval (and, where not at all, at how many seeds)."""
    names = list(dict.fromkeys(metric for _, _, metrics in results.variants.values() for metric in metrics))
    rows = []
    for label, _, metrics in results.variants.values():
        cells = [label]
        for name in names:
            if name not in metrics:
                cells.append("")
                continue
            measured = interval(metrics[name])
            if "accuracy" in name:
                measured = Interval(100 * measured.mean, 100 * measured.half, measured.n)
            digits = 1 if name.startswith("epochs") else 2 if "accuracy" in name else 4
            missing = "" if measured.n == len(results.seeds) else f" ({measured.n}/{len(results.seeds)} seeds)"
            cells.append(measured.text(digits) + missing)
        rows.append(cells)
    header = [name.replace("_", " ").replace("accuracy", "accuracy [%]") for name in names]
    return ["variant", *header], rows


def claim_rows(results: Results) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table of claims."""
    rows = [[c.id, c.statement, c.published, c.measured, c.verdict] for c in results.claims]
    return ["claim", "statement", "published", "measured", "verdict"], rows


def summary_markdown(results: Results) -> str:
    """Both tables in Markdown."""
    parts = [f"# {results.study}: {len(results.seeds)} seeds, mean ± 95 % interval"]
    for header, rows in (metric_rows(results), claim_rows(results)):
        if rows:
            lines = [header, ["---"] * len(header), *rows]
            parts.append("\n".join("| " + " | ".join(line) + " |" for line in lines))
    return "\n\n".join(parts)
