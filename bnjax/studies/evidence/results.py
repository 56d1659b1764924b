"""Results of a study: its numbers and claims, the files that it leaves, and tables of them.

The page of the studies (docs/studies.md) has the schema of `results.json`.
"""

import contextlib
import dataclasses
import datetime
import functools
import importlib.metadata
import math
import os
import platform
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bnjax.studies import STUDIES
from bnjax.studies.data import atomic_file
from bnjax.studies.data.sets import first_line
from bnjax.studies.evidence import record
from bnjax.studies.evidence.claims import Claim, Judgment, judge
from bnjax.studies.evidence.statistics import Interval, interval

GAP = 2
"""Spaces between two columns of a table on the terminal."""
PUBLISHED, SOURCES = Path(__file__).parents[1] / "published", Path(__file__).parents[3] / "docs" / "results"
"""Directory of the published results in the installed package, and in the sources."""
_PACKAGES = ("bnjax", "jax", "jaxlib", "flax", "optax", "numpy", "scikit-learn", "tensorflow-datasets")

Arrays = Mapping[str, np.ndarray]
Measured = tuple[str, Mapping[str, Any], dict[str, np.ndarray]]
Shapes = Mapping[str, Mapping[str, Sequence[int]]]


@dataclasses.dataclass
class Results:
    """All that a study measured, just now or as its `results.json` says.

    Attributes:
      study: name of the study.
      settings: settings that all variants have in common.
      seeds: seeds of the trainings.
      variants: name to `(label, settings, {metric: values over seeds})`.
      claims: the claims that were judged.
      arrays: arrays for `curves.npz`.
      examples: number of held-out examples that an accuracy is of, by metric.
      notes: numbers that are no metric of a variant.
      texts: title and text of what the terminal shows beside the tables.
      options: options of the run, as `Options.to_json` gives them.
      figures: file name to what it shows.
      parameters: collection ('params', 'batch_stats') to path to shape, for each variant.
      document: the content of the file that it was read from.
    """

    study: str
    settings: Mapping[str, Any]
    seeds: Sequence[int]
    variants: dict[str, Measured] = dataclasses.field(default_factory=dict)
    claims: list[Judgment] = dataclasses.field(default_factory=list)
    arrays: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    examples: Mapping[str, int] = dataclasses.field(default_factory=dict)
    notes: dict[str, Any] = dataclasses.field(default_factory=dict)
    texts: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    figures: Mapping[str, str] = dataclasses.field(default_factory=dict)
    parameters: dict[str, Shapes] = dataclasses.field(default_factory=dict)
    document: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def load(cls, path: Path) -> "Results | None":
        """Reads the results in a directory, or in a file; None where there is none.

        Raises:
          RecordError: if they can't be read, or are those of a study that is not installed.
        """
        path = path / "results.json" if path.is_dir() else path
        try:
            document = record.read(path)
        except FileNotFoundError:
            return None
        if document["study"] not in STUDIES:
            raise record.RecordError(
                f"{path}: study must be one of {', '.join(STUDIES)}, got {document['study']!r:.60}."
            )
        variants: Any = {
            name: (of["label"], of["settings"], {k: np.array(v["values"], float) for k, v in of["metrics"].items()})
            for name, of in document["variants"].items()
        }
        common = document["study"], document["settings"], document["seeds"]
        given = {"options": document["options"], "examples": document["examples"]}
        return cls(*common, variants, **given, document=document)

    @classmethod
    def published(cls, study: str) -> "Results":
        """Reads the results that the project publishes of a study: every metric at every seed, without the curves.

        They are in the package, or in `docs/results/` of the sources that it is used from. `document["claims"]` has the
        claims with their verdicts.

        Raises:
          RecordError: if no results of that name are published.

        >>> Results.published("circles").metric("after", "test_accuracy").shape
        (32,)
        """
        directory = PUBLISHED if PUBLISHED.is_dir() else SOURCES
        if study in STUDIES and (found := cls.load(directory / f"{study}.json")):
            return found
        names = ", ".join(name for name in STUDIES if (directory / f"{name}.json").is_file())
        raise record.RecordError(f"No results of {study!r:.60} are published, but those of {names}.")

    @property
    def command(self) -> str:
        """The command that makes them again."""
        words = ["bnjax", "run", self.study]
        fields = STUDIES[self.study].fields if self.study in STUDIES else {}
        for key, value in self.options.items():
            if key not in fields or value != fields[key].default:
                words.append(f"--{key.replace('_', '-')}")
                if value is not True:
                    words.append(",".join(map(str, value)) if isinstance(value, list) else str(value))
        return record.plain(shlex.join(words))

    def add(self, trained: Any, settings: Mapping[str, Any], metrics: Arrays, curves: Arrays | None = None) -> None:
        """Adds a `bnjax.studies.engine.plan.Trained` with its histograms, metrics and curves (its own by default)."""
        name = trained.plan.name
        self.variants[name], self.parameters[name] = (trained.plan.label, settings, dict(metrics)), trained.parameters
        self.arrays |= {f"{name}/{k}": v for k, v in (trained.curves if curves is None else curves).items()}
        for path, (counts, ends) in trained.histograms.items():
            self.arrays[f"{name}/histograms/{path}/counts"] = counts
            self.arrays[f"{name}/histograms/{path}/range"] = ends

    def metric(self, variant: str, metric: str) -> np.ndarray:
        """Returns the values of a metric over seeds."""
        return self.variants[variant][2][metric]

    def set_metric(self, variant: str, metric: str, values: np.ndarray) -> None:
        """Adds a metric to a variant."""
        self.variants[variant][2][metric] = values

    def values(self, variant: str, metric: str) -> np.ndarray | None:
        """Returns the values of a metric over seeds; None where it was not measured."""
        return self.variants[variant][2].get(metric) if variant in self.variants else None

    def judge(self, claims: Sequence[Claim]) -> None:
        """Sets the verdicts on some claims."""
        self.claims = judge(claims, [self])

    def to_json(self, seconds: float, started: datetime.datetime) -> dict[str, Any]:
        """Returns the content of `results.json`."""
        import jax

        return {
            "schema": record.SCHEMA,
            "study": self.study,
            "command": self.command,
            "options": dict(self.options),
            "settings": dict(self.settings),
            "seeds": list(self.seeds),
            "seconds": round(seconds, 2),
            "started": started.isoformat(timespec="seconds"),
            "versions": _installed_versions(),
            "machine": {
                "system": f"{platform.system()} {platform.machine()}",
                "processor": _processor(),
                "cores": os.cpu_count(),
                "python": platform.python_version(),
                "backend": jax.default_backend(),
                "devices": [device.device_kind for device in jax.devices()],
            },
            "variants": {
                name: {
                    "label": label,
                    "settings": dict(settings),
                    "parameters": self.parameters.get(name, {}),
                    "metrics": {
                        metric: {"values": values.tolist(), "mean": mean, "ci95": half, "n": n}
                        for metric, values in metrics.items()
                        for mean, half, n in [interval(values)]
                    },
                }
                for name, (label, settings, metrics) in self.variants.items()
            },
            "examples": dict(self.examples),
            "claims": [judgment.to_json() for judgment in self.claims],
            "figures": dict(self.figures),
            "notes": self.notes,
        }


def save(
    results: Results, figures: Mapping[str, Any], out: Path, seconds: float, started: datetime.datetime
) -> tuple[list[Path], list[str]]:
    """Writes `results.json`, `summary.md`, `curves.npz` and the figures, each complete or not at all, numbers first.

    `figures` are by file name, `out` is made where it is missing, and the run of some seconds began at `started`. The
    paths written are returned, and what is wrong with figures that could not be.
    """
    arrays: dict[str, Any] = results.arrays
    contents: dict[str, Callable[[Any], Any]] = {
        "results.json": lambda file: file.write(record.write(results.to_json(seconds, started))),
        "summary.md": lambda file: file.write(summary_markdown(results).encode() + b"\n"),
        "curves.npz": lambda file: np.savez_compressed(file, **arrays),
        **{name: functools.partial(figure.savefig, format="png", dpi=120) for name, figure in figures.items()},
    }
    problems = {}
    for name, write in contents.items():
        try:
            with atomic_file(out / name) as file:
                write(file)
        except Exception as error:  # the numbers are there, or the next file may be
            problems[name] = error
    drawn = {name: figure for name, figure in figures.items() if name not in problems}
    results.figures = {name: _description(name, figure) for name, figure in drawn.items()}
    with atomic_file(out / "results.json") as file:  # once more, with the figures that are there
        contents["results.json"](file)
    for name, error in problems.items():
        if name not in figures:
            raise error
    missing = [f"{out / name} can't be saved: {first_line(error)}" for name, error in problems.items()]
    return [out / name for name in contents if name not in problems], missing


def _installed_versions() -> dict[str, str]:
    """Returns the versions of the packages that results may depend on, of those that are installed."""
    versions = {}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions


def _processor() -> str:
    """Returns the processor's model, where the system tells."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return platform.processor()


def _description(name: str, figure: Any) -> str:
    """Says what a figure shows: its title (or name), what is drawn against what, and of which networks."""
    titles = [text for text in (figure.get_suptitle(), *(axis.get_title() for axis in figure.axes)) if text]
    title = titles[0] if titles else name.removesuffix(".png").replace("_", " ")
    drawn = [f"{axis.get_ylabel()} against {axis.get_xlabel()}" for axis in figure.axes if axis.get_xlabel()]
    panels = [text for text in titles[1:] if text != title]
    legends = [*figure.legends, *(axis.get_legend() for axis in figure.axes if axis.get_legend())]
    labels = [text.get_text() for legend in legends for text in legend.get_texts()]
    parts = [", ".join(dict.fromkeys(part)) for part in (drawn, panels, labels) if part]
    return ". ".join([title, *parts])


def metric_rows(results: Results) -> tuple[list[str], list[list[str]]]:
    """Returns header and rows of the table of variants: mean ± 95 % interval (where not of all seeds, of how many)."""
    names = list(dict.fromkeys(metric for _, _, metrics in results.variants.values() for metric in metrics))
    seeds = len(results.seeds)

    def text(name: str, values: np.ndarray) -> str:
        mean, half, n = interval(values)
        percent = 100 if "accuracy" in name else 1
        digits = 1 if name.startswith("epochs") else 2 if "accuracy" in name else None
        written = Interval(percent * mean, percent * half, n).text(digits)
        return written if n == seeds else f"{written} ({n}/{seeds} seeds)"

    header = [name.replace("_", " ").replace("accuracy", "accuracy [%]") for name in names]
    return ["variant", *header], [
        [label, *(text(name, metrics[name]) if name in metrics else "" for name in names)]
        for label, _, metrics in results.variants.values()
    ]


def metric_tables(results: Results, columns: int, width: float = math.inf) -> list[tuple[list[str], list[list[str]]]]:
    """Returns `metric_rows` as several tables of so many numbers, not one too wide to read; without empty rows.

    Where `width` is given, each also has no more numbers, though one, than make so many characters with their gaps.
    """
    header, rows = metric_rows(results)
    tables, end = [], 1
    while end < len(header):
        start, taken = end, 0
        while end < len(header) and (end == start or end - start < columns):
            taken += GAP + column_width([row[end] for row in (header, *rows)])
            if taken > width and end > start:
                break
            end += 1
        first, *rest = ([row[0], *row[start:end]] for row in (header, *rows))
        tables.append((first, [row for row in rest if any(row[1:])]))
    return tables


def column_width(column: Sequence[str]) -> int:
    """Returns how wide a column of a table is on the terminal, where only its header, the first, is wrapped."""
    return max(map(len, (*column[0].split(), *column[1:])))


def claim_rows(judgments: Sequence[Judgment]) -> tuple[list[str], list[list[str]]]:
    """Returns header and rows of the table of claims."""
    rows = [[j.claim.id, j.claim.statement, j.claim.published, j.measured, j.p_text, j.verdict] for j in judgments]
    return ["claim", "statement", "published", "measured", "p", "verdict"], rows


def parameter_rows(shapes: Shapes) -> tuple[list[str], list[list[str]]]:
    """Returns header and rows of a network's table: parameters with their sum, then batch statistics with theirs.

    `shapes` goes from collection ('params', 'batch_stats') to path to shape.
    """
    rows = []
    for collection, title in (("params", "trainable"), ("batch_stats", "batch statistics")):
        of = shapes.get(collection, {})
        rows += [[title, path, " × ".join(map(str, shape)), f"{math.prod(shape):,}"] for path, shape in of.items()]
        rows.append([title, "all", "", f"{sum(map(math.prod, of.values())):,}"])
    return ["collection", "parameter", "shape", "numbers"], rows if shapes else []


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Writes a table in Markdown."""
    lines = [header, ["---"] * len(header), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def summary_markdown(results: Results) -> str:
    """Writes both tables in Markdown."""
    tables = [markdown_table(*table) for table in (metric_rows(results), claim_rows(results.claims)) if table[1]]
    return "\n\n".join([f"# {results.study}: {len(results.seeds)} seeds, mean ± 95 % interval", *tables])
