"""Logs of a run for TensorBoard and Weights & Biases: scalars, histograms, figures, and the tables of parameters."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bnjax._extras import needs
from bnjax.studies.evidence.results import Results, claim_rows, markdown_table, metric_rows, parameter_rows

_POINTS = 500  # largest number of points of a curve


class TensorBoard:
    """Event files below `<directory>/tensorboard`, one run for each training, by tensorboardX.

    A training's name and its steps come with every value.
    """

    def __init__(self, directory: Path, study: str, options: Mapping[str, Any]):
        with needs("tensorboard"):
            import tensorboardX
        self._directory = directory / "tensorboard"
        self._make, self._writers = tensorboardX.SummaryWriter, {}

    def _writer(self, training: str):
        if training not in self._writers:
            self._writers[training] = self._make(str(self._directory / re.sub(r"[^\w.=-]+", "_", training)))
        return self._writers[training]

    def scalars(self, training: str, step: float, values: Mapping[str, float]) -> None:
        """Logs numbers of a training."""
        for name, value in values.items():
            self._writer(training).add_scalar(name, value, round(step))

    def histogram(self, training: str, name: str, step: float, counts: np.ndarray, edges: np.ndarray) -> None:
        """Logs counts between edges."""
        centers = (edges[:-1] + edges[1:]) / 2
        ends = {"min": float(edges[0]), "max": float(edges[-1]), "bucket_limits": edges[1:].tolist()}
        sums = {"num": int(counts.sum()), "sum": float(counts @ centers), "sum_squares": float(counts @ centers**2)}
        at = {"bucket_counts": counts.tolist(), "global_step": round(step)}
        self._writer(training).add_histogram_raw(name, **ends, **sums, **at)

    def figure(self, name: str, path: Path, text: str) -> None:
        """Logs an image."""
        from PIL import Image

        with Image.open(path) as image:
            self._writer("study").add_image(name, np.asarray(image.convert("RGB")), dataformats="HWC")

    def table(self, name: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Logs a table of texts."""
        self._writer("study").add_text(name, markdown_table(header, rows))

    def close(self) -> None:
        """Writes what is left."""
        for writer in self._writers.values():
            writer.close()


class WeightsAndBiases:
    """A run of the project 'bnjax' (or $WANDB_PROJECT); WANDB_MODE=offline needs neither account nor network."""

    def __init__(self, directory: Path, study: str, options: Mapping[str, Any]):
        with needs("wandb"):
            import wandb
        self._wandb, self._trainings = wandb, set()
        try:
            self._run = wandb.init(project="bnjax", name=study, dir=str(directory), config=dict(options))
        except wandb.Error as error:
            raise ValueError(f"--log wandb: {error} (WANDB_MODE=offline works without an account).") from None

    def scalars(self, training: str, step: float, values: Mapping[str, Any]) -> None:
        """Logs numbers of a training."""
        if training not in self._trainings:  # each has steps of its own
            self._trainings.add(training)
            self._run.define_metric(f"{training}/*", step_metric=f"{training}/step")
        named = {f"{training}/{name}": value for name, value in values.items()}
        self._run.log({f"{training}/step": step, **named})

    def histogram(self, training: str, name: str, step: float, counts: np.ndarray, edges: np.ndarray) -> None:
        """Logs counts between edges."""
        self.scalars(training, step, {name: self._wandb.Histogram(np_histogram=(counts, edges))})

    def figure(self, name: str, path: Path, text: str) -> None:
        """Logs an image."""
        self._run.log({f"figures/{name}": self._wandb.Image(str(path), caption=text)})

    def table(self, name: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Logs a table of texts."""
        self._run.log({name: self._wandb.Table(list(header), [list(row) for row in rows])})

    def close(self) -> None:
        """Writes what is left."""
        self._run.finish()


class Logs:
    """All the logs of a run of a study with some options, of names among `bnjax.studies.LOGS`, as one.

    Raises:
      MissingExtraError: if the package of one is not installed.
      ValueError: if one refuses.
    """

    def __init__(self, names: Sequence[str], directory: Path, study: str, options: Mapping[str, Any]):
        makers = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}
        self._logs = [makers[name](directory, study, options) for name in dict.fromkeys(names)]
        self._lengths: dict[str, float] = {}

    def begin(self, training: str, length: float) -> None:
        """Says how many steps or epochs a training has."""
        self._lengths[training] = length

    def scalars(self, training: str, step: float, values: Mapping[str, float]) -> None:
        """Logs the latest means over seeds of a training."""
        for log in self._logs:
            log.scalars(training, step, values)

    def results(self, results: Results, out: Path) -> None:
        """Logs a study's curves (means over seeds), the first seed's histograms, figures, and tables."""
        for training in results.variants:
            prefix = f"{training}/"
            arrays = {key[len(prefix) :]: v for key, v in results.arrays.items() if key.startswith(prefix)}
            for name, values in arrays.items():
                if not name.startswith("histograms/") and values.ndim == 2:
                    self._curve(training, name, values)
            for name in (key.removesuffix("/counts") for key in arrays if key.endswith("/counts")):
                counted = arrays[f"{name}/counts"], arrays[f"{name}/range"]
                self._histograms(training, name.removeprefix("histograms/"), *counted)
        tables = {"metrics": metric_rows(results), "claims": claim_rows(results.claims)}
        tables |= {f"parameters/{name}": parameter_rows(shapes) for name, shapes in results.parameters.items()}
        for log in self._logs:
            for name, text in results.figures.items():
                log.figure(name.removesuffix(".png"), out / name, text)
            for name, (header, rows) in tables.items():
                if rows:
                    log.table(name, header, rows)

    def _steps(self, training: str, count: int) -> list[float]:
        """Returns the steps at which a curve was measured, the last at the end of the training."""
        return (self._lengths.get(training, count) * np.arange(1, count + 1) / count).tolist()

    def _curve(self, training: str, name: str, values: np.ndarray) -> None:
        means, steps = values.mean(0).tolist(), self._steps(training, values.shape[1])
        for i in np.unique(np.linspace(0, len(means) - 1, min(len(means), _POINTS)).round().astype(int)):
            if np.isfinite(means[i]):
                self.scalars(training, steps[i], {f"curves/{name}": means[i]})

    def _histograms(self, training: str, name: str, counts: np.ndarray, ends: np.ndarray) -> None:
        for count, (low, high), step in zip(counts, ends, self._steps(training, len(counts)), strict=True):
            if count.sum():
                for log in self._logs:
                    log.histogram(training, name, step, count, np.linspace(low, high, len(count) + 1))

    def close(self) -> None:
        """Writes what is left."""
        for log in self._logs:
            log.close()
