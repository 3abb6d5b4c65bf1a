"""Any image classification data set that TFDS has prepared, by its name."""

from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from mimicnorm_jax.data import BatchLayout, get_spec, open_streams
from mimicnorm_jax.data.batching import epoch_order
from mimicnorm_jax.data.streaming import BadImages, Cut, StreamingPipeline
from mimicnorm_jax.data.tfds import TfdsSource
from mimicnorm_jax.errors import DataError


def _png(level):
    buffer = BytesIO()
    Image.new("RGB", (9 + level, 6), (level, 0, 0)).save(buffer, "PNG")
    buffer.seek(0)
    return buffer


class Plain(tfds.core.GeneratorBasedBuilder):
    """Single-colored images of several sizes; level i is of class i % 3."""

    VERSION = tfds.core.Version("1.0.0")
    LABEL = "label"

    def _info(self):
        features = {"image": tfds.features.Image(encoding_format="png")}
        features[self.LABEL] = tfds.features.ClassLabel(num_classes=3)
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(0, 12), "validation": self._generate_examples(12, 17)}

    def _generate_examples(self, *levels):
        for level in range(*levels):
            yield level, {"image": _png(level), self.LABEL: level % 3}


class Species(Plain):
    """The same with a label of another name."""

    LABEL = "species"


class Tags(Plain):
    """Several labels an image."""

    def _info(self):
        labels = tfds.features.Sequence(tfds.features.ClassLabel(num_classes=3))
        features = {"image": tfds.features.Image(encoding_format="png"), "label": labels}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _generate_examples(self, *levels):
        for level in range(*levels):
            yield level, {"image": _png(level), "label": [0, 1]}


@pytest.fixture
def data_dir(tmp_path):
    for builder in (Plain, Species, Tags):
        builder(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    return str(tmp_path)


def test_a_prepared_data_set_is_streamed_by_its_name(data_dir):
    """Every image once, with its label, in the order of the seed; counts and classes from TFDS."""
    spec = get_spec("tfds:plain", data_dir, 4)
    assert (spec.num_classes, spec.num_train, spec.num_test) == (3, 12, 5)
    data = open_streams(spec, data_dir, BadImages(0))
    np.testing.assert_allclose(data.mean, (np.mean(range(12)) / 255, 0, 0))
    pipeline = StreamingPipeline(
        (data.train, data.test), Cut(4), 3, BatchLayout(4, 1, (0,)), BadImages(0), 2, lambda feed: feed
    )
    feeds = [feed for feed, _ in pipeline.train_feeds(0, 0)]
    levels, labels = (np.concatenate(parts, 1) for parts in zip(*(feed[:2] for feed in feeds), strict=True))
    levels = levels.reshape(12, 4, 4, 3)[:, 0, 0, 0]
    np.testing.assert_array_equal(levels % 3, labels.ravel())
    stored = np.array([np.asarray(Image.open(BytesIO(data.train[i].data)))[0, 0, 0] for i in range(12)])
    assert sorted(stored) == list(range(12))
    np.testing.assert_array_equal(levels, stored[epoch_order(3, 0, 12)])
    shown = [feed.labels[feed.mask == 1] for feed in pipeline.test_feeds()]
    assert sorted(np.concatenate(shown)) == sorted(level % 3 for level in range(12, 17))


class Imagenet2012(Plain):
    """As ImageNet: the images to test with carry no labels."""

    def _split_generators(self, dl_manager):
        splits = {"train": (0, 6), "validation": (6, 10), "test": (10, 15)}
        return {name: self._generate_examples(*levels) for name, levels in splits.items()}

    def _generate_examples(self, *levels):
        for level in range(*levels):
            yield level, {"image": _png(level), "label": level % 3 if level < 10 else -1}


def test_images_without_labels_are_not_tested_with(tmp_path):
    Imagenet2012(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    data_dir = str(tmp_path)
    spec = get_spec("tfds:imagenet2012", data_dir, 4)
    assert spec.num_test == 4
    data = open_streams(spec, data_dir, BadImages(0))
    assert sorted(data.test[i].label for i in range(4)) == [0, 0, 1, 2]
    unlabeled = TfdsSource(tfds.builder_from_directory(next((tmp_path / "imagenet2012").glob("*"))), "test")
    with pytest.raises(ValueError, match="label -1"):
        unlabeled[0]


def test_what_is_no_image_classification_or_not_prepared_is_refused(data_dir):
    with pytest.raises(DataError, match=r"tfds:species has the features image, species and the splits"):
        get_spec("tfds:species", data_dir, 4)
    with pytest.raises(DataError, match=r"the label of tfds:tags is .*image classification needs a ClassLabel"):
        get_spec("tfds:tags", data_dir, 4)
    with pytest.raises(DataError, match=r"nowhere is not prepared under .*prepare-data nowhere"):
        get_spec("tfds:nowhere", data_dir, 4)
    info = next(Path(data_dir).glob("plain/*"))
    (Path(data_dir) / "forms").mkdir()
    info.parent.rename(Path(data_dir) / "forms" / "wide")
    with pytest.raises(DataError, match=r"forms is prepared .* name one, tfds:forms/wide$"):
        get_spec("tfds:forms", data_dir, 4)
    (Path(data_dir) / "forms" / "wide").rename(Path(data_dir) / "plain")
    with pytest.raises(DataError, match=r"tfds:plain have no size in common: say --config\.image_size=224"):
        get_spec("tfds:plain", data_dir)
