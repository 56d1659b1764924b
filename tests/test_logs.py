"""The files that `--log` writes, read back."""

import struct
import sys

import numpy as np
import pytest

from bnjax._extras import MissingExtraError
from bnjax.studies import circles
from bnjax.studies.cli.logs import Logs
from bnjax.studies.cli.main import main
from bnjax.studies.evidence.results import parameter_rows

SOME = {name: circles.VARIANTS[name] for name in ("none", "after")}
SHAPES = {
    "params": {"Dense_0/kernel": (2, 50), "BatchNorm_0/scale": (50,)},
    "batch_stats": {"BatchNorm_0/mean": (50,)},
}


def events(directory):
    """All events of the files in a directory, as TensorFlow's records frame them."""
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
    found = []
    for path in directory.glob("events.out.tfevents.*"):
        content, at = path.read_bytes(), 0
        while at < len(content):
            (length,) = struct.unpack("<Q", content[at : at + 8])
            found.append(event_pb2.Event.FromString(content[at + 12 : at + 12 + length]))
            at += 16 + length
    return found


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    pytest.importorskip("tensorboardX")
    out, patch = tmp_path_factory.mktemp("logged"), pytest.MonkeyPatch()
    patch.setattr(circles, "VARIANTS", SOME)
    assert (
        main(["run", "circles", "--seeds", "2", "--epochs", "4", "--log", "tensorboard", "--quiet", "--out", str(out)])
        == 0
    )
    patch.undo()
    return out


def values_of(directory):
    return [(event.step, value) for event in events(directory) for value in event.summary.value]


@pytest.mark.exhaustive
def test_scalars_of_each_training(logged):
    curves = np.load(logged / "curves.npz")
    scalars = {}
    for step, value in values_of(logged / "tensorboard" / "after"):
        if value.WhichOneof("value") == "simple_value":
            scalars.setdefault(value.tag, {})[step] = value.simple_value
    assert list(scalars["test_accuracy"]) == [1, 2, 3, 4]
    expected = curves["after/test_accuracy"].mean(0)
    np.testing.assert_allclose(list(scalars["test_accuracy"].values()), expected, rtol=1e-6)
    np.testing.assert_allclose(list(scalars["curves/test_accuracy"].values()), expected, rtol=1e-6)
    assert list(scalars["curves/test_accuracy"]) == [1, 2, 3, 4]


def test_histograms_of_each_layer(logged):
    curves = np.load(logged / "curves.npz")
    found = {}
    for step, value in values_of(logged / "tensorboard" / "after"):
        if value.WhichOneof("value") == "histo":
            found.setdefault(value.tag, {})[step] = value.histo
    layers = (
        "BatchNorm_0/bias",
        "BatchNorm_0/scale",
        "Dense_0/bias",
        "Dense_0/kernel",
        "Dense_1/bias",
        "Dense_1/kernel",
    )
    assert set(found) == {f"{kind}/{layer}" for kind in ("weight", "gradient") for layer in layers}
    kernel = found["weight/Dense_0/kernel"]
    assert list(kernel) == [1, 2, 3, 4] and all(histogram.num == 100 for histogram in kernel.values())
    low, high = curves["after/histograms/weight/Dense_0/kernel/range"][2]
    assert (kernel[3].min, kernel[3].max) == (low, high) and sum(kernel[3].bucket) == 100
    assert low <= kernel[3].bucket_limit[0] and kernel[3].bucket_limit[-1] == pytest.approx(high)


def test_figures_and_tables_of_the_study(logged):
    values = {value.tag: value for _, value in values_of(logged / "tensorboard" / "study")}
    assert values["learning_curves"].image.width > 500
    table = values["parameters/after/text_summary"].tensor.string_val[0].decode()
    assert "| trainable | Dense_0/kernel | 2 × 50 | 100 |" in table
    assert "| trainable | all |  | 301 |" in table and "| batch statistics | all |  | 100 |" in table
    assert "S1.5" in values["claims/text_summary"].tensor.string_val[0].decode()


def test_parameter_table_separates_what_is_trained():
    header, rows = parameter_rows(SHAPES)
    assert len(header) == len(rows[0]) == 4
    assert [row[::3] for row in rows] == [
        ["trainable", "100"],
        ["trainable", "50"],
        ["trainable", "150"],
        ["batch statistics", "50"],
        ["batch statistics", "50"],
    ]


@pytest.mark.parametrize(("name", "package"), [("tensorboard", "tensorboardX"), ("wandb", "wandb")])
def test_missing_package_is_named_before_anything_runs(name, package, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, package, None)
    assert main(["run", "circles", "--log", name, "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"bnjax: error: {package} is not installed: pip install 'bnjax[{name}]'\n"
    with pytest.raises(MissingExtraError, match=f"{package} is not installed"):
        Logs([name], tmp_path, "circles", {})


@pytest.mark.exhaustive
@pytest.mark.filterwarnings("default")
def test_wandb_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setattr(circles, "VARIANTS", SOME)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    arguments = ["run", "circles", "--seeds", "2", "--epochs", "2", "--log", "wandb", "--quiet", "--out", str(tmp_path)]
    assert main(arguments) == 0
    (run,) = (tmp_path / "wandb").glob("offline-run-*")
    assert next(run.glob("*.wandb")).stat().st_size > 10_000
    media = {path.name.rsplit("_", 2)[0] for path in (run / "files" / "media").rglob("*.*")}
    assert {"learning_curves", "claims"} <= media
