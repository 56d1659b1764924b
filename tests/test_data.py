import gzip
import io
import os
import sys
import tarfile

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from bnjax.studies import data
from bnjax.studies.data import sets


class TinySet(tfds.core.GeneratorBasedBuilder):
    """Twelve images whose pixels are their label."""

    VERSION = tfds.core.Version("1.0.0")
    shape, num_classes = (4, 5, 1), 3

    def _info(self):
        image, label = tfds.features.Image(shape=self.shape), tfds.features.ClassLabel(num_classes=self.num_classes)
        features = {"image": image, "label": label}
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), supervised_keys=("image", "label")
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(12), "test": self._generate_examples(6)}

    def _generate_examples(self, count):
        for i in range(count):
            yield i, {"image": np.full((4, 5, 1), 50 * (i % 3), np.uint8), "label": i % 3}


class TinyText(TinySet):
    """No image set."""

    def _info(self):
        features = {"text": tfds.features.Text(), "label": tfds.features.ClassLabel(num_classes=3)}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _generate_examples(self, count):
        for i in range(count):
            yield i, {"text": "a", "label": i % 3}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BNJAX_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def data_dir(tmp_path):
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


def test_circles_are_the_sources():
    circles = data.circles()
    assert circles.train.x.shape == circles.test.x.shape == (500, 2)
    assert circles.train.x.dtype == np.float32
    assert circles.train.y.sum() + circles.test.y.sum() == 500
    radius = np.linalg.norm(circles.train.x, axis=1)
    assert radius[circles.train.y == 0].mean() > 0.95
    assert radius[circles.train.y == 1].mean() < 0.85
    np.testing.assert_array_equal(data.circles().test.x, circles.test.x)


def test_blobs_are_drawn_by_seed():
    blobs = data.blobs(3)
    assert (blobs.train.x.shape, blobs.test.x.shape) == ((750, 2), (250, 2))
    x, y = np.concatenate([blobs.train.x, blobs.test.x]), np.concatenate([blobs.train.y, blobs.test.y])
    np.testing.assert_allclose(x[y == 0].mean(0), [0, 0], atol=0.05)
    np.testing.assert_allclose(x[y == 1].mean(0), [0.5, 0.1], atol=0.05)
    np.testing.assert_allclose(x[y == 0].std(0), 0.25, atol=0.03)
    np.testing.assert_array_equal(data.blobs(3).train.x, blobs.train.x)
    assert not np.array_equal(data.blobs(4).train.x, blobs.train.x)


def test_a_set_is_prepared_without_tensorflow_and_then_cached(data_dir, monkeypatch):
    told = []
    first = data.images("tiny_set", data_dir, lambda *now: told.append(now))
    assert (first.train.x.shape, first.test.x.shape, first.num_classes) == ((12, 4, 5, 1), (6, 4, 5, 1), 3)
    assert first.train.x.dtype == np.uint8
    np.testing.assert_array_equal(first.train.x[:, 0, 0, 0], 50 * first.train.y)
    assert sorted(first.train.y) == sorted(i % 3 for i in range(12))
    assert [text for text, _ in told] == ["reading tiny_set train", "reading tiny_set test"]
    monkeypatch.setattr(sets, "_records", None)  # a second reading would fail
    again = data.images("tiny_set", data_dir)
    np.testing.assert_array_equal(again.train.x, first.train.x)


def test_the_environment_names_the_directory(data_dir, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(data_dir))
    data.images("tiny_set")
    assert (data_dir / "tiny_set" / "1.0.0").is_dir()


def archives(name, directory):
    """What is downloaded of a set, with few images; and images and labels of its splits."""
    rng, splits = np.random.default_rng(0), {}
    files = (
        {"batches.meta.txt": 10} if name == "cifar10" else {"coarse_label_names.txt": 20, "fine_label_names.txt": 100}
    )
    files = {file: "\n".join(f"name{i}" for i in range(count)).encode() for file, count in files.items()}
    for split, count in {"train": 10, "test": 3}.items():
        shape = (count, 28, 28, 1) if "mnist" in name else (count, 32, 32, 3)
        x, y = rng.integers(256, size=shape, dtype=np.uint8), rng.integers(10, size=count, dtype=np.uint8)
        splits[split] = x, y
        if "mnist" in name:
            for kind, content in ("images-idx3", bytes(16) + x.tobytes()), ("labels-idx1", bytes(8) + y.tobytes()):
                file = f"{'train' if split == 'train' else 't10k'}-{kind}-ubyte.gz"
                (directory / file).write_bytes(gzip.compress(content))
        else:
            coarse = b"\x05" if name == "cifar100" else b""
            rows = [
                coarse + bytes([label]) + image.transpose(2, 0, 1).tobytes() for image, label in zip(x, y, strict=True)
            ]
            if (name, split) == ("cifar10", "train"):
                files |= {f"data_batch_{i + 1}.bin": b"".join(rows[2 * i : 2 * i + 2]) for i in range(5)}
            else:
                files["test_batch.bin" if name == "cifar10" else f"{split}.bin"] = b"".join(rows)
    if "cifar" in name:
        with tarfile.open(directory / f"cifar-{name[5:]}-binary.tar.gz", "w:gz") as archive:
            for file, content in files.items():
                member = tarfile.TarInfo(f"folder/{file}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return splits


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "cifar10", "cifar100"])
def test_real_sets_are_downloaded_without_tensorflow(data_dir, tmp_path, monkeypatch, name):
    def download(manager, urls):
        return jax.tree.map(lambda url: tmp_path / url.rpartition("/")[2], urls)

    splits = archives(name, tmp_path)
    monkeypatch.setattr(tfds.download.DownloadManager, "download", download)
    monkeypatch.setattr(sets.socket, "getaddrinfo", lambda *arguments: None)
    read = data.images(name, data_dir)
    assert read.num_classes == (100 if name == "cifar100" else 10)
    for split, (x, y) in splits.items():
        found = getattr(read, split)
        places = [next(i for i in range(len(x)) if np.array_equal(x[i], image)) for image in found.x]
        assert sorted(places) == list(range(len(x)))
        np.testing.assert_array_equal(found.y, y[places])
    features = tfds.builder(name, data_dir=data_dir).info.features
    if "cifar" in name:
        assert features["label"].names[-1] == f"name{read.num_classes - 1}"
    assert "tensorflow" not in sys.modules


def test_a_damaged_cache_is_made_anew(data_dir, tmp_path):
    first = data.images("tiny_set", data_dir)
    for file in (tmp_path / "cache" / "data").iterdir():
        file.write_bytes(file.read_bytes()[:-200])
    np.testing.assert_array_equal(data.images("tiny_set", data_dir).test.x, first.test.x)


def test_damaged_records_are_a_clear_error(data_dir):
    data.images("tiny_set", data_dir)
    for file in (data_dir / "tiny_set" / "1.0.0").glob("*array_record*"):
        content = bytearray(file.read_bytes())
        content[20:] = os.urandom(len(content) - 20)
        file.write_bytes(content)
    with pytest.raises(data.DataError, match=r"tiny_set .* corrupt .* download it again"):
        data.images("tiny_set", data_dir)


def tiny(data_dir):
    data.images("tiny_set", data_dir)
    return data_dir / "tiny_set" / "1.0.0"


def change(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("dataset_info.json", '"12"', '"13"', "corrupt"),
        ("dataset_info.json", '"12"', '"900000000000000"', "counts 900,000,000,000,000 records of split train in"),
        ("dataset_info.json", '"12"', '"-5"', "counts -5 records of split train in"),
        ("dataset_info.json", "{", "", "can't be read"),
    ],
)
def test_metadata_that_is_wrong_is_a_clear_error(data_dir, file, old, new, message):
    change(tiny(data_dir) / file, old, new)
    with pytest.raises(data.DataError, match=message) as raised:
        data.images("tiny_set", data_dir)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 2}, "record [0-9]+ has label 2, and there are 2 classes"),
        ({"shape": (5, 4, 1)}, r"an image of shape \(4, 5, 1\) and uint8 instead of \(5, 4, 1\) and uint8"),
        ({"shape": (4, 5, 3)}, r"an image of shape \(4, 5, 1\) and uint8 instead of \(4, 5, 3\) and uint8"),
    ],
)
def test_records_that_are_not_as_the_metadata_says_are_a_clear_error(data_dir, monkeypatch, options, message):
    tiny(data_dir)
    for name, value in options.items():
        monkeypatch.setattr(TinySet, name, value)
    with pytest.raises(data.DataError, match=message):
        data.images("tiny_set", data_dir)


def test_missing_metadata_is_a_clear_error(data_dir):
    (tiny(data_dir) / "dataset_info.json").unlink()
    with pytest.raises(data.DataError, match=r"has no dataset_info\.json: delete that directory and download it again"):
        data.images("tiny_set", data_dir)


def test_missing_without_a_network_is_a_clear_error(data_dir, monkeypatch):
    def no_network(*arguments):
        raise OSError("no such name")

    monkeypatch.setattr(sets.socket, "getaddrinfo", no_network)
    with pytest.raises(data.DataError, match=r"mnist is not in .*no network.* python -c .*images.*--data-dir"):
        data.images("mnist", data_dir)


def test_wrong_names_and_kinds_are_clear_errors(data_dir):
    with pytest.raises(data.DataError, match="'no_such_set' is no data set of TensorFlow Datasets; try mnist"):
        data.images("no_such_set", data_dir)
    with pytest.raises(data.DataError, match="does not exist"):
        data.images("mnist", data_dir / "nowhere")
    with pytest.raises(data.DataError, match=r"tiny_text is no image classification set.*\['label', 'text'\]"):
        data.images("tiny_text", data_dir)


def test_files_appear_only_when_complete(tmp_path):
    target = tmp_path / "file"

    def interrupted():
        with data.atomic_file(target) as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []
    with data.atomic_file(target) as file:
        file.write(b"whole")
    assert target.read_bytes() == b"whole"


def test_decoding_checks_the_shape():
    with pytest.raises(ValueError, match="instead of"):
        sets._pixels(Image.fromarray(np.zeros((3, 3), np.uint8)), (4, 5, 1))


@pytest.mark.parametrize(
    ("name", "first"),
    [("mnist", [4, 1, 0, 7, 8]), pytest.param("fashion_mnist", None, marks=pytest.mark.exhaustive)],
)
def test_real_sets(shared_data, name, first):
    images = data.images(name, shared_data)
    assert images.train.x.shape == (60000, 28, 28, 1)
    assert images.test.x.shape == (10000, 28, 28, 1)
    assert set(images.test.y) == set(range(10))
    if first:
        assert images.train.y[:5].tolist() == first
