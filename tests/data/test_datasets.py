"""Datasets: the right pixels with the right labels, and errors at once where there are none."""

import io
import json
import time

import numpy as np
import pytest

from mimicnorm_jax.data import datasets, tfds
from mimicnorm_jax.errors import DataError


def test_digits_are_scikit_learns_split_without_overlap_and_by_class():
    from sklearn.datasets import load_digits

    dataset = datasets.load("digits")
    images = np.concatenate([dataset.train.images, dataset.test.images])
    labels = np.concatenate([dataset.train.labels, dataset.test.labels])
    assert (len(dataset.train), len(dataset.test)) == (1437, 360)
    bunch = load_digits()
    key = [
        (*image.ravel(), label) for image, label in zip((images / 255 * 16).round().astype(int), labels, strict=True)
    ]
    expected = [(*image.ravel(), label) for image, label in zip(bunch.images.astype(int), bunch.target, strict=True)]
    assert sorted(key) == sorted(expected)
    assert abs(np.bincount(dataset.test.labels) - 36).max() <= 2
    np.testing.assert_allclose(dataset.mean, (dataset.train.images / 255).mean(), rtol=1e-6)
    np.testing.assert_allclose(dataset.std, (dataset.train.images / 255).std(), rtol=1e-6)


@pytest.mark.cifar100
def test_cifar100_pixels_and_labels_are_those_of_the_stored_png_files(cifar100_dir):
    """Against the raw records, decoded by hand."""
    import tensorflow_datasets
    from PIL import Image

    dataset = datasets.load("cifar100", cifar100_dir)
    assert dataset.train.images.shape[1:] == (32, 32, 3)
    assert set(dataset.train.labels.tolist()) == set(range(100))
    decoders = {"image": tensorflow_datasets.decode.SkipDecoding()}
    options = {"data_dir": cifar100_dir, "split": "test", "download": False, "decoders": decoders}
    raw = tensorflow_datasets.data_source("cifar100", **options)
    for i in (0, 7, len(raw) - 1):
        np.testing.assert_array_equal(dataset.test.images[i], np.asarray(Image.open(io.BytesIO(raw[i]["image"]))))
        assert dataset.test.labels[i] == raw[i]["label"]


@pytest.mark.cifar100
def test_a_damaged_shard_is_named_with_the_way_out(cifar100_dir, tmp_path):
    import shutil

    shutil.copytree(f"{cifar100_dir}/cifar100", tmp_path / "cifar100")
    shard = next((tmp_path / "cifar100").glob("*/*train*"))
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    with pytest.raises(
        DataError, match=r"train split of cifar100 .*damaged or incomplete.*python -m mimicnorm_jax prepare-data"
    ):
        datasets.load("cifar100", str(tmp_path))


def test_missing_data_is_an_error_at_once_that_says_what_to_do(tmp_path):
    started = time.monotonic()
    (tmp_path / "cifar100" / "3.0.2").mkdir(parents=True)
    with pytest.raises(DataError) as error:
        datasets.require_prepared("cifar100", str(tmp_path))
    for part in (str(tmp_path), "TFDS_DATA_DIR", "--config.data_dir", "python -m mimicnorm_jax prepare-data cifar100"):
        assert part in str(error.value)
    assert time.monotonic() - started < 1  # TFDS by itself retries for minutes
    with pytest.raises(DataError, match="'cifar': did you mean cifar10 or cifar100"):
        datasets.require_prepared("cifar")


def test_the_environment_variable_points_to_the_data(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    assert tfds.tfds_dir() == tmp_path
    assert tfds.tfds_dir("/elsewhere") != tmp_path


def test_files_for_tensorflow_only_are_refused(tmp_path):
    folder = tmp_path / "cifar10" / "3.0.2"
    folder.mkdir(parents=True)
    (folder / "dataset_info.json").write_text(json.dumps({"fileFormat": "tfrecord"}))
    with pytest.raises(DataError, match="tfrecord files, which only TensorFlow reads"):
        datasets.require_prepared("cifar10", str(tmp_path))
    (folder / "dataset_info.json").write_text("{")
    with pytest.raises(DataError, match=r"cannot read .*dataset_info.json"):
        datasets.require_prepared("cifar10", str(tmp_path))
