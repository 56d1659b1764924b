"""Data sets as arrays: generated ones, and image sets of TensorFlow Datasets, read without TensorFlow."""

import contextlib
import functools
import glob
import gzip
import hashlib
import importlib.util
import io
import os
import socket
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import numpy as np
from jaxtyping import Float, Int, UInt8

from bnjax._extras import needs

_ABANDONED = 3600  # seconds after which an unfinished file is one of a process that was killed
_READ_CHUNK = 2000  # records per read: 0.1 to 1 s


class DataError(Exception):
    """Data that is missing, corrupt or not of the expected kind; the message says what to do."""


class Split(NamedTuple):
    """Inputs and labels of one split, on the host.

    Attributes:
      x: inputs, the example axis first.
      y: int32 labels, one for each example.
    """

    x: Float[np.ndarray, "examples ..."] | UInt8[np.ndarray, "examples height width channels"]
    y: Int[np.ndarray, " examples"]


class Dataset(NamedTuple):
    """A data set of `num_classes` classes.

    Attributes:
      name: its name, for tables and messages.
      train: the training split.
      test: the test split.
      num_classes: how many classes the labels count.
    """

    name: str
    train: Split
    test: Split
    num_classes: int

    def map(self, function: Callable[[np.ndarray], np.ndarray]) -> "Dataset":
        """Applies a function to the inputs of both splits."""
        train, test = (Split(function(x), y) for x, y in (self.train, self.test))
        return self._replace(train=train, test=test)


def circles(count: int = 1000, seed: int = 1) -> Dataset:
    """Draws two noisy concentric circles, points of scikit-learn's `make_circles(noise=0.1)`.

    The first half trains and the second half tests: float32 inputs `[500, 2]`, labels 0 (outer circle) and 1.

    Args:
      count: number of points.
      seed: its `random_state`.

    >>> circles().train.x.shape
    (500, 2)
    """
    with needs("data"):
        from sklearn.datasets import make_circles

    x, y = make_circles(n_samples=count, noise=0.1, random_state=seed)
    x, y, half = np.asarray(x, np.float32), np.asarray(y, np.int32), count // 2
    return Dataset("circles", Split(x[:half], y[:half]), Split(x[half:], y[half:]), 2)


def blobs(seed: int = 0) -> Dataset:
    """Draws two overlapping Gaussian blobs: 1000 points around (0, 0) and (0.5, 0.1), standard deviation 0.25.

    A random three quarters train and the rest test: float32 inputs `[750, 2]` and `[250, 2]`.

    Args:
      seed: of scikit-learn's `make_blobs` and `train_test_split`.

    >>> blobs(seed=3).test.x.shape
    (250, 2)
    """
    with needs("data"):
        from sklearn.datasets import make_blobs
        from sklearn.model_selection import train_test_split

    x, y = make_blobs(n_samples=1000, centers=[[0.0, 0.0], [0.5, 0.1]], cluster_std=0.25, random_state=seed)[:2]
    train, test = train_test_split(np.arange(1000), random_state=seed)
    x, y = np.asarray(x, np.float32), np.asarray(y, np.int32)
    return Dataset("blobs", Split(x[train], y[train]), Split(x[test], y[test]), 2)


def blank(name: str) -> Dataset:
    """Makes two images, black and white, in the place of an image set, to make networks for it without data.

    >>> blank("cifar100").train.x.shape
    (2, 32, 32, 3)
    """
    shape = (28, 28, 1) if name.endswith("mnist") else (32, 32, 3)
    x = np.stack([np.zeros(shape, np.uint8), np.full(shape, 255, np.uint8)])
    split = Split(x, np.zeros(2, np.int32))
    return Dataset(name, split, split, 100 if name == "cifar100" else 10)


def pixels(images: np.ndarray) -> np.ndarray:
    """Pixels in [0, 1], one float32 vector for each image."""
    return (images.reshape(len(images), -1) / np.float32(255)).astype(np.float32)


def images(
    name: str,
    data_dir: str | os.PathLike | None = None,
    progress: Callable[[str, float], Any] = lambda text, fraction: None,
) -> Dataset:
    """Reads an image classification set of TensorFlow Datasets: uint8 `[N, H, W, C]` and int32 labels `[N]`.

    The records are decoded once and cached (in `$BNJAX_CACHE`, or `bnjax` in the user's cache directory); a set that is
    not there is downloaded. The order is the one of the records, which TFDS shuffles once. TensorFlow is not needed for
    the four sets below, nor to read any that is there; TFDS opens the archives of others with it.

    Args:
      name: of the set in TFDS, such as 'mnist', 'fashion_mnist', 'cifar10', 'cifar100', with optional ':version'.
      data_dir: where prepared sets are; by default `$TFDS_DATA_DIR`, or TFDS's own default directory.
      progress: is told what is being read, and the fraction done.

    Raises:
      DataError: for an unknown or missing set that can't be downloaded, a corrupt one, or one without fixed-size images
        and labels.
    """
    builder = _builder(name, data_dir)
    image, label = _feature_names(builder)
    missing = {"train", "test"} - set(builder.info.splits)
    if missing:
        raise DataError(
            f"{name} has no split {sorted(missing)}, only {sorted(builder.info.splits)}; choose another set."
        )
    train, test = (_split(builder, split, image, label, progress) for split in ("train", "test"))
    features: Any = builder.info.features
    return Dataset(builder.name, train, test, features[label].num_classes)


def _builder(name: str, data_dir: str | os.PathLike | None):
    """Makes a TFDS builder whose records are on disk, downloaded where they were not."""
    with needs("data"):
        import tensorflow_datasets as tfds
    if not hasattr(tfds, "builder"):  # it only logs what it can't import
        raise DataError(
            "TensorFlow Datasets is installed, but its import fails, as with a tensorflow-metadata that does not fit "
            "protobuf: pip install 'bnjax[data]', and start Python anew."
        )
    if importlib.util.find_spec("array_record") is None:
        raise DataError(
            f"{name} is read by array_record, which is not installed; it is made for Linux and for macOS on Apple "
            "silicon: pip install 'bnjax[data]' there."
        )
    where = os.fspath(data_dir) if data_dir is not None else os.environ.get("TFDS_DATA_DIR")
    if data_dir is not None and not Path(data_dir).is_dir():
        raise DataError(f"the data directory {where} does not exist; create it, or give another with --data-dir.")
    try:
        builder = tfds.builder(name, data_dir=where)
    except tfds.core.DatasetNotFoundError:
        raise DataError(
            f"{name!r} is no data set of TensorFlow Datasets; try mnist, fashion_mnist, cifar10 or cifar100."
        ) from None
    except Exception as error:  # TFDS raises many kinds for unreadable metadata
        raise DataError(
            f"the data set {name} in {where} can't be read ({first_line(error)}); {_again(name, where)}"
        ) from error
    _check_metadata(builder, name)
    if not builder.data_path.exists():
        _download(builder, name, where or os.fspath(builder.data_path.parents[1]))
    elif (stored := getattr(builder.info.file_format, "value", None)) != "array_record":
        raise DataError(
            f"{name} in {builder.data_path} is stored as {stored}, which needs TensorFlow to be read; "
            f"prepare it as array_record in another directory: {_command(name, 'OTHER_DIRECTORY')}"
        )
    return builder


def _check_metadata(builder, name: str) -> None:
    """Raises DataError for a set whose files are there, but not what says what they hold."""
    path = Path(builder.data_path)
    if path.exists() and not (path / "dataset_info.json").exists():
        raise DataError(f"{name} in {path} has no dataset_info.json: {_delete(builder)}")
    for split, about in builder.info.splits.items() if path.exists() else ():
        lengths = about.shard_lengths
        sizes = sum(file.stat().st_size for file in path.glob(f"{glob.escape(builder.name)}-{split}*"))
        if min(lengths, default=0) < 0 or sum(lengths) > sizes:  # a record takes a byte at the very least
            raise DataError(
                f"dataset_info.json of {name} in {path} counts {sum(lengths):,} records of split {split} in {sizes:,} "
                f"bytes: {_delete(builder)}"
            )


def _delete(builder) -> str:
    where = os.fspath(builder.data_path.parent.parent)
    return f"delete that directory and {_again(builder.name, where)}"


def _download(builder, name: str, where: str) -> None:
    """Downloads and prepares a set, with a clear message where that is not possible."""
    message = f"the data set {name} is not in {where}, and could not be downloaded"
    hosts = {urlsplit(url).hostname for url in builder.url_infos or ()}
    for host in sorted(filter(None, hosts)):
        try:
            socket.getaddrinfo(host, 443)
        except OSError as error:  # answers at once, where TFDS would retry for minutes
            raise DataError(
                f"{message} (no network: {host} can't be resolved); on a machine with a network run "
                f"{_command(name, where)} and copy that directory here, or give its place with --data-dir."
            ) from error
    image, _ = _feature_names(builder)
    _encode_with_pillow(builder.info.features[image])
    if builder.name in _READERS:
        # The method that each builder of TFDS defines for itself; what it gives is numbered, and shuffled, as by TFDS.
        builder._split_generators = functools.partial(_READERS[builder.name], builder)
    try:
        builder.download_and_prepare(file_format="array_record")
    except Exception as error:
        raise DataError(f"{message} ({first_line(error)}); try again: {_command(name, where)}") from error


def _encode_with_pillow(feature) -> None:
    """Lets an image feature take arrays without TensorFlow: of what it takes, TFDS encodes pictures with Pillow."""
    with needs("data"):
        from PIL import Image
    encode = feature.encode_example

    def encode_example(image: Any) -> Any:
        if isinstance(image, np.ndarray):
            image = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
        return encode(image)

    feature.encode_example = encode_example  # of this one object, which belongs to its builder


def _mnist_splits(builder, downloads) -> dict[str, Iterator[tuple[int, dict]]]:
    """Reads the examples of MNIST's and Fashion-MNIST's files, which TFDS reads with TensorFlow."""
    paths = downloads.download({url.rpartition("/")[2]: url for url in builder.url_infos})

    def examples(split: str) -> Iterator[tuple[int, dict]]:
        files = (f"{split}-{kind}-ubyte.gz" for kind in ("images-idx3", "labels-idx1"))
        pixels, labels = (gzip.decompress(Path(paths[file]).read_bytes()) for file in files)
        images = np.frombuffer(pixels, np.uint8, offset=16).reshape(-1, 28, 28, 1)
        for i, (image, label) in enumerate(zip(images, np.frombuffer(labels, np.uint8, offset=8), strict=True)):
            yield i, {"image": image, "label": label}

    return {"train": examples("train"), "test": examples("t10k")}


def _cifar_splits(builder, downloads) -> dict[str, Iterator[tuple[int, dict]]]:
    """Reads the examples of CIFAR-10's or CIFAR-100's archive, which TFDS reads with TensorFlow."""
    [url] = builder.url_infos
    features, files = builder.info.features, {}
    with tarfile.open(Path(downloads.download(url))) as archive:
        for member in archive:
            if (file := archive.extractfile(member)) is not None:
                files[Path(member.name).name] = file.read()
    for name, text in ("label", "batches.meta"), ("label", "fine_label_names"), ("coarse_label", "coarse_label_names"):
        if f"{text}.txt" in files:
            features[name].names = files[f"{text}.txt"].decode().split()
    labels = [name for name in ("coarse_label", "label") if name in features]

    def examples(split: str, *starts: str) -> Iterator[tuple[int, dict]]:
        rows = b"".join(files[file] for file in sorted(files) if file.startswith(starts) and file.endswith(".bin"))
        for i, row in enumerate(np.frombuffer(rows, np.uint8).reshape(-1, len(labels) + 3 * 32 * 32)):
            image = row[len(labels) :].reshape(3, 32, 32).transpose(1, 2, 0)
            yield i, {"id": f"{split}_{i:05d}", "image": image, **dict(zip(labels, row, strict=False))}

    return {"train": examples("train", "data_batch", "train"), "test": examples("test", "test")}


_READERS = {"mnist": _mnist_splits, "fashion_mnist": _mnist_splits, "cifar10": _cifar_splits, "cifar100": _cifar_splits}


def _feature_names(builder) -> tuple[str, str]:
    """Finds the names of the image and the label among the features of a set."""
    import tensorflow_datasets as tfds

    keys, features = builder.info.supervised_keys, builder.info.features
    image, label = keys[:2] if keys else ("image", "label")
    kinds = {image: tfds.features.Image, label: tfds.features.ClassLabel}
    if not all(key in features and isinstance(features[key], kind) for key, kind in kinds.items()):
        raise DataError(f"{builder.name} is no image classification set: its features are {sorted(features)}.")
    if None in features[image].shape:
        raise DataError(
            f"the images of {builder.name} differ in size {features[image].shape}; choose a set of one size."
        )
    return image, label


def _split(builder, split: str, image: str, label: str, progress: Callable[[str, float], Any]) -> Split:
    """Reads one split as arrays, from the cache where it is there."""
    count, shape = builder.info.splits[split].num_examples, builder.info.features[image].shape
    classes = builder.info.features[label].num_classes
    cached = _cache_path(builder, split)
    if cached.exists():
        with contextlib.suppress(Exception), cached.open("rb") as file, np.load(file) as arrays:  # else made anew
            x, y = arrays["x"], arrays["y"]
            fits = x.shape == (count, *shape) and y.shape == (count,) and x.dtype == np.uint8 and y.dtype == np.int32
            if fits and np.all((y >= 0) & (y < classes)):
                return Split(x, y)
    with needs("data"):
        from PIL import Image
    try:
        x, y = np.empty((count, *shape), np.uint8), np.empty(count, np.int32)
        for start, records in _records(builder, split, image):
            for i, record in enumerate(records, start):
                with Image.open(io.BytesIO(record[image])) as picture:
                    x[i] = _pixels(picture, shape)
                y[i] = record[label]
                if not 0 <= y[i] < classes:
                    raise ValueError(f"record {i} has label {y[i]}, and there are {classes} classes")
            progress(f"reading {builder.name} {split}", min(1.0, (start + _READ_CHUNK) / count))
    except Exception as error:
        raise DataError(
            f"the {split} records of {builder.name} in {builder.data_path} are corrupt ({first_line(error)}); "
            f"{_delete(builder)}"
        ) from error
    with contextlib.suppress(OSError), atomic_file(cached) as file:  # a read-only cache directory only costs time
        np.savez(file, x=x, y=y)
    return Split(x, y)


def _records(builder, split: str, image: str) -> Iterator[tuple[int, list[dict]]]:
    import tensorflow_datasets as tfds

    source = builder.as_data_source(split=split, decoders={image: tfds.decode.SkipDecoding()})
    count = builder.info.splits[split].num_examples
    if len(source) != count:
        raise ValueError(f"{len(source)} records instead of {count}")
    for start in range(0, count, _READ_CHUNK):
        yield start, source.__getitems__(range(start, min(start + _READ_CHUNK, count)))


def _pixels(picture, shape: tuple[int, int, int]) -> np.ndarray:
    pixels = np.asarray(picture)
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    if pixels.shape != shape or pixels.dtype != np.uint8:
        raise ValueError(f"an image of shape {pixels.shape} and {pixels.dtype} instead of {shape} and uint8")
    return pixels


def _cache_path(builder, split: str) -> Path:
    """Returns the path of the decoded split, whose name changes with the files that it was read from."""
    root = os.environ.get("BNJAX_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bnjax"
    files = sorted(Path(builder.data_path).glob(f"*{split}*"))
    state = repr([(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files])
    digest = hashlib.sha256(state.encode()).hexdigest()[:16]
    return Path(root) / "data" / f"{builder.name}-{builder.version}-{split}-{digest}.npz"


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[io.BufferedWriter]:
    """Opens a binary file for writing that appears under its name only when it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for partial in path.parent.glob(f".{glob.escape(path.name)}-*"):
        with contextlib.suppress(OSError):  # another user's, or a directory
            if time.time() - partial.stat().st_mtime > _ABANDONED:
                partial.unlink()
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        if isinstance(error, OSError) and error.filename is None:  # as of a full disk, which knows no path
            raise OSError(error.errno, error.strerror, os.fspath(path)) from error
        raise


def _command(name: str, where: str | None) -> str:
    return f'python -c "import bnjax.studies.data as data; data.images({name!r}, {where!r})"'


def _again(name: str, where: str | None) -> str:
    return f"download it again: {_command(name, where)}"


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message, or its kind where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
