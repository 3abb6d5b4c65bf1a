"""Streams are functions of seed, epoch and place; what cannot be read is skipped, masked or an error; threads end."""

import dataclasses
import threading
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from mimicnorm_jax.data import BatchLayout, StreamedDataset, datasets, get_spec, open_streams
from mimicnorm_jax.data.batching import epoch_order
from mimicnorm_jax.data.streaming import BadImages, Cut, Encoded, StreamingPipeline
from mimicnorm_jax.errors import DataError
from tests.data.photographs import write_folder


class Colors:
    """Single-colored images; labels count up. Remembers what was read."""

    def __init__(self, count, broken=()):
        self.count, self.broken, self.seen = count, set(broken), []

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        self.seen.append(index)
        if index in self.broken:
            raise FileNotFoundError(f"no file {index}")
        buffer = BytesIO()
        Image.new("RGB", (8, 8), (index, 2 * index, 0)).save(buffer, "PNG")
        return Encoded(buffer.getvalue(), index, f"color {index}")


def _pipeline(train, test=None, *, threads=2, bound=0, layout=None, cut=None):
    layout = layout or BatchLayout(4, 2, (0, 1))
    sources = (train, Colors(1) if test is None else test)
    return StreamingPipeline(sources, cut or Cut(8), 3, layout, BadImages(bound), threads, lambda feed: feed)


def _decoding_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("decode")]


def test_order_and_cuts_depend_on_nothing_but_seed_epoch_and_place(tmp_path):
    """Of real files: with one thread or four, from the start or from the middle; another epoch differs."""
    spec = get_spec(f"folder:{write_folder(tmp_path, 2, 8, 1)}", "", 16)
    data = open_streams(spec, "", BadImages(0))
    layout = BatchLayout(4, 1, (0,))

    def feeds(threads, first, epoch=0):
        pipeline = _pipeline(data.train, data.test, threads=threads, layout=layout, cut=Cut(16, 0.2))
        return [feed for feed, _ in pipeline.train_feeds(epoch, first)]

    whole = feeds(1, 0)
    assert len(whole) == 4
    for other in (feeds(4, 0), [*whole[:2], *feeds(2, 2)]):
        for a, b in zip(whole, other, strict=True):
            np.testing.assert_array_equal(a.images, b.images)
            np.testing.assert_array_equal(a.labels, b.labels)
    # All of another epoch: the same images, cut otherwise.
    pixels = [np.sort(np.concatenate([feed.images for feed in found]).ravel()) for found in (whole, feeds(1, 0, 1))]
    assert (pixels[0] != pixels[1]).any()


def test_steps_of_one_call_and_devices_get_their_places():
    """Two devices, three steps a call, of five: the last call's third batch is never decoded."""
    source = Colors(21)
    pipeline = _pipeline(source, layout=BatchLayout(4, 2, (0, 1), 3))
    feeds = list(pipeline.train_feeds(0, 0))
    assert [num_steps for _, num_steps in feeds] == [3, 2]
    order = epoch_order(3, 0, 21)[:20].reshape(5, 2, 2)
    for i, (feed, num_steps) in enumerate(feeds):
        assert feed.images.shape == (2, 3, 2, 8, 8, 3)
        expected = order[3 * i : 3 * i + num_steps].swapaxes(0, 1)
        np.testing.assert_array_equal(feed.labels[:, :num_steps], expected)
        np.testing.assert_array_equal(feed.images[:, :num_steps, :, 0, 0, 0], expected)
    assert sorted(source.seen) == sorted(order.ravel())


def test_a_process_reads_its_devices_share_only():
    source = Colors(16)
    (feed, _), *_ = _pipeline(source, layout=BatchLayout(8, 4, (2, 3))).train_feeds(0, 0)
    order = epoch_order(3, 0, 16).reshape(2, 4, 2)
    np.testing.assert_array_equal(feed.labels[:, 0], order[0, 2:])
    assert sorted(source.seen) == sorted(order[:, 2:].ravel())


def test_every_test_image_counts_once_and_bad_ones_do_not():
    source = Colors(10, broken={4})
    pipeline = _pipeline(Colors(4), source, bound=1)
    feeds = list(pipeline.test_feeds())
    labels = np.concatenate([feed.labels[feed.mask == 1] for feed in feeds])
    assert sorted(labels) == [0, 1, 2, 3, 5, 6, 7, 8, 9]
    assert pipeline.bad.found == {"image 4": "FileNotFoundError: no file 4"}
    assert sorted(source.seen) == list(range(10))


def test_the_next_image_stands_in_for_a_bad_one():
    order = epoch_order(3, 0, 8)
    pipeline = _pipeline(Colors(8, broken={2, 3}), bound=2)
    found = np.concatenate([feed.labels.ravel() for feed, _ in pipeline.train_feeds(0, 0)])
    np.testing.assert_array_equal(found, [4 if i in (2, 3) else i for i in order])


def test_test_images_and_their_labels_leave_out_the_same_bad_ones_and_are_evenly_spread():
    data = StreamedDataset(datasets.DATASETS["digits"], Colors(1), Colors(5, broken=(1,)), (), ())
    data = dataclasses.replace(data, spec=dataclasses.replace(data.spec, image_shape=(8, 8, 3)))
    images, labels = datasets.held_out_examples(data, 3, BadImages(1))
    assert labels.tolist() == [0, 3, 2]
    assert images[:, 0, 0].tolist() == [[label, 2 * label, 0] for label in labels]
    assert datasets.held_out_examples(data, 5, BadImages(1))[1].tolist() == [0, 2, 3, 4]
    # A folder's images are sorted by class.
    spread = dataclasses.replace(data, test=Colors(14, broken=(3,)))
    assert datasets.held_out_examples(spread, 4, BadImages(1))[1].tolist() == [0, 7, 10, 1]
    assert datasets.held_out_examples(spread, 5, BadImages(1))[1].tolist() == [0, 2, 5, 8, 11]
    assert datasets.held_out_examples(spread, 14, BadImages(1))[1].tolist() == [0, 1, 2, *range(4, 14)]
    with pytest.raises(DataError, match=r"image 1 cannot be used: FileNotFoundError.* config.max_bad_images is 0"):
        datasets.held_out_examples(data, 3)
    nothing = dataclasses.replace(data, test=Colors(2, broken=(0, 1)))
    with pytest.raises(DataError, match="no test image of digits can be used"):
        datasets.held_out_examples(nothing, 2, BadImages(2))


def test_a_mean_of_no_image_is_refused(tmp_path):
    root = write_folder(tmp_path, 2, 2, 1)
    for path in root.glob("train/*/*"):
        path.write_bytes(b"")
    with pytest.raises(DataError, match=r"none of 4 training images of folder:.* can be used"):
        open_streams(get_spec(f"folder:{root}", "", 8), "", BadImages(4))


def test_one_bad_image_too_many_stops_with_its_name_and_ends_the_threads():
    pipeline = _pipeline(Colors(8, broken={5}))
    with pytest.raises(DataError, match=r"image 5 cannot be used: FileNotFoundError.* config.max_bad_images is 0"):
        list(pipeline.train_feeds(0, 0))
    assert not _decoding_threads()


def test_a_thread_that_fails_for_no_fault_of_its_image_ends_the_run(monkeypatch):
    """However many bad images are allowed; the other threads end as well."""

    def decode(*_):
        raise MemoryError("no memory")

    monkeypatch.setattr("mimicnorm_jax.data.streaming.pipeline.decode", decode)
    pipeline = _pipeline(Colors(8), bound=8)
    with pytest.raises(MemoryError, match="no memory"):
        list(pipeline.train_feeds(0, 0))
    assert not pipeline.bad.found
    assert not _decoding_threads()


def test_a_run_that_is_left_in_the_middle_leaves_no_thread():
    feeds = _pipeline(Colors(64)).train_feeds(0, 0)
    next(feeds)
    assert _decoding_threads()
    feeds.close()
    assert not _decoding_threads()


def test_a_stalled_disk_is_said_and_waited_for(monkeypatch, capsys):
    go_on = threading.Event()

    class Stalled(Colors):
        def __getitem__(self, index):
            if index == 1:
                go_on.wait(10)
            return super().__getitem__(index)

    said = []

    def say(text):
        said.append(text)
        go_on.set()

    monkeypatch.setattr("mimicnorm_jax.data.streaming.pipeline.STALL_SECONDS", 0.05)
    monkeypatch.setattr("mimicnorm_jax.data.streaming.pipeline.log_line", say)
    assert len(list(_pipeline(Stalled(8)).train_feeds(0, 0))) == 2
    assert "waiting for data" in said[0]


def test_folders_that_are_no_data_set_are_named(tmp_path, capsys):
    with pytest.raises(DataError, match=r"no size in common: say --config\.image_size=224"):
        get_spec(f"folder:{tmp_path}")
    with pytest.raises(DataError, match="train is not there"):
        get_spec(f"folder:{tmp_path}", "", 16)
    write_folder(tmp_path / "a", 2, 1, 1)
    (tmp_path / "a" / "val" / "weasel").mkdir()
    with pytest.raises(DataError, match="class 'weasel' that"):
        get_spec(f"folder:{tmp_path / 'a'}", "", 16)
    (tmp_path / "a" / "train" / "weasel").mkdir()
    (tmp_path / "a" / "train" / "weasel" / "1.heic").write_bytes(b"")
    with pytest.raises(DataError, match=r"train/weasel holds no image .*, but files of \.heic: 1: convert its files"):
        get_spec(f"folder:{tmp_path / 'a'}", "", 16)
    Image.new("L", (4, 4)).save(tmp_path / "a" / "train" / "weasel" / "1.png")
    (tmp_path / "a" / "train" / "class00" / "notes").write_bytes(b"")
    capsys.readouterr()
    get_spec(f"folder:{tmp_path / 'a'}", "", 16)
    assert "2 files are left out, no images by their names (no suffix: 1, .heic: 1)" in capsys.readouterr().out
    write_folder(tmp_path / "b", 1, 1, 1)
    with pytest.raises(DataError, match="at least 2"):
        get_spec(f"folder:{tmp_path / 'b'}", "", 16)


def test_a_stream_measures_its_mean_and_deviation_where_none_is_given(tmp_path):
    for name, (low, high) in {"one": (40, 60), "two": (80, 100)}.items():
        for split in ("train", "val"):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for level in (low, high):
                Image.new("L", (20, 30), level).save(folder / f"{level}.png")
    spec = get_spec(f"folder:{tmp_path}", "", 4)
    found = open_streams(spec, "", BadImages(0))
    np.testing.assert_allclose(found.mean, (70 / 255,) * 3)
    np.testing.assert_allclose(found.std, (np.std([40, 60, 80, 100]) / 255,) * 3)
    assert found.spec.classes == ("one", "two")
    assert open_streams(spec, "", BadImages(0), ((0.1, 0.2, 0.3), (0.5,) * 3)).mean == (0.1, 0.2, 0.3)
