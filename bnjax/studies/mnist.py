"""S2: a perceptron 784 → 64 → 64 → 10 on MNIST with and without batch norm, over batch sizes, and other normalizers."""

import dataclasses

import optax

from bnjax import studies
from bnjax.studies import Study, data, option
from bnjax.studies.engine import Examples, Job, Report, Variant, seed_keys, train_all
from bnjax.studies.evidence import Results, plots, read_claims
from bnjax.studies.perceptrons import EPSILON, HIDDEN, NETWORKS


@dataclasses.dataclass(frozen=True)
class Options(studies.ImageOptions):
    """The options of a run on MNIST."""

    epochs: int = option(10, "epochs of training")
    batch_sizes: tuple[int, ...] = option(
        (16, 32, 64, 128, 256), "batch sizes to sweep", shown="16,32,64,128,256", metavar="A,B,…"
    )


STUDY = Study(
    "mnist",
    "a perceptron on MNIST or Fashion-MNIST with and without batch norm, over batch sizes; other normalizers",
    "S2, MNIST assignment (Keras)",
    Options,
    compiled="before_32",
    fast={"seeds": 3, "batch_sizes": (32, 128)},
    order=3,
)

NORMALIZERS = ("renorm", "layer", "group", "weight")  # before the activation, at one batch size
PUBLISHED_WITHOUT = {16: 0.9745, 32: 0.9718, 64: 0.9709, 128: 0.9720}
THRESHOLD = 0.97
PANELS = {k.replace("test", "validation"): v.replace("test", "validation") for k, v in plots.PANELS.items()}
SETTINGS = {"hidden": list(HIDDEN), "optimizer": "Adam", "learning_rate": 1e-3}
SETTINGS |= {"validation": "last fifth of training", "epsilon": EPSILON}
CLAIMS = read_claims(__file__)


def networks(options: Options, images: data.Dataset) -> dict[str, Variant]:
    """Returns both networks at each batch size, and the other normalizers at one, by name and size."""
    shape, optimizer = (images.train.x[0].size,), optax.adam(SETTINGS["learning_rate"], eps=1e-7)
    kinds = {"none": "none", "before": "bn"} | {name: name for name in NORMALIZERS}
    models = {name: NETWORKS[kind][1] for name, kind in kinds.items()}
    trainings = [(name, size) for size in options.batch_sizes for name in ("none", "before")]
    trainings += [(name, _shown(options)) for name in NORMALIZERS]
    return {
        f"{name}_{size}": Variant(
            f"{name}_{size}", f"{NETWORKS[kinds[name]][0]}, batch {size}", models[name], optimizer, shape, size
        )
        for name, size in trainings
    }


def _shown(options: Options) -> int:
    return 32 if 32 in options.batch_sizes else options.batch_sizes[0]  # for curves and the other normalizers


def run(options: Options, report: Report):
    """Trains with and without batch norm at each batch size, and the other normalizers, and judges S2.1 to S2.4."""
    dataset, epochs, batch_sizes, shown = options.dataset, options.epochs, options.batch_sizes, _shown(options)
    images = data.images(dataset, options.data_dir, report.reading).map(data.pixels)
    (x, y), kept = images.train, len(images.train.y) - len(images.train.y) // 5
    if too_large := [size for size in batch_sizes if size > kept]:
        raise ValueError(f"--batch-sizes must not exceed the {kept} training examples, got {too_large[0]}.")
    settings = {**SETTINGS, "dataset": dataset, "epochs": epochs, "batch_sizes": list(batch_sizes)}
    results = Results(STUDY.name, settings, range(options.seeds))
    held_out = {"validation": data.Split(x[kept:], y[kept:]), "test": images.test}
    examples = Examples.of(data.Split(x[:kept], y[:kept]), held_out)
    keys = {"key": seed_keys(results.seeds)}
    jobs = [Job(network.epochs(epochs, kept), keys, examples) for network in networks(options, images).values()]
    all_trained = {trained.plan.name: trained for trained in train_all(jobs, report, options)}
    for name, trained in all_trained.items():
        metrics = {
            "test_accuracy": trained.final("test_accuracy"),
            "validation_accuracy": trained.final("validation_accuracy"),
            "train_accuracy_during_epoch": trained.final("train_accuracy"),
            "validation_loss": trained.final("validation_loss"),
            "epochs_to_97_percent": trained.epochs_to("validation_accuracy", THRESHOLD),
        }
        network, size = name.split("_")
        results.add(trained, {"network": network, "batch_size": int(size)}, metrics)
    results.judge(CLAIMS)
    series = {
        label: [results.metric(f"{place}_{size}", "test_accuracy") for size in batch_sizes]
        for place, label in (("none", "without batch norm"), ("before", "with batch norm"))
    }
    published = PUBLISHED_WITHOUT if dataset == "mnist" else {}
    without, with_, *others = (all_trained[f"{network}_{shown}"] for network in ("none", "before", *NORMALIZERS))
    title = f"{dataset}, batch {shown}, {options.seeds} seeds"
    over_sizes = f"{dataset}, {epochs} epochs, {options.seeds} seeds"
    return results, {
        "histograms.png": plots.histograms([without, with_]),
        "learning_curves.png": plots.learning_curves([without, with_], PANELS, f"{title}: mean and 95 % interval"),
        "normalizers.png": plots.learning_curves([with_, *others], PANELS, f"{title}: other normalizers"),
        "batch_sizes.png": plots.sweep(batch_sizes, series, "batch size", over_sizes, base=2, published=published),
    }
