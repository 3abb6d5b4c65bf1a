"""Records of a folder are the folder, with less files."""

import importlib.util

import numpy as np
import pytest

from mimicnorm_jax.cli.prepare_data import main
from mimicnorm_jax.data import get_spec, open_streams, records, require_prepared
from mimicnorm_jax.data.folder import sources
from mimicnorm_jax.data.streaming import BadImages
from mimicnorm_jax.errors import DataError
from tests.data.photographs import write_folder


def _images(name):
    data = open_streams(get_spec(name, "", 8), "", BadImages(0), ((0.5,) * 3, (0.5,) * 3))
    return [
        sorted((found.data, found.label) for found in map(source.__getitem__, range(len(source))))
        for source in (data.train, data.test)
    ]


def test_records_hold_the_files_of_the_folder_and_are_written_on_where_writing_stopped(tmp_path, monkeypatch):
    """In several files; a file that was begun is written anew, one that is done is not."""
    root, out = write_folder(tmp_path / "data", 3, 9, 2), tmp_path / "records"
    write, calls = records.pack, []

    def stopping(encoded):
        calls.append(encoded.name)
        if len(calls) == 20:
            raise KeyboardInterrupt
        return write(encoded)

    monkeypatch.setattr(records, "pack", stopping)
    with pytest.raises(KeyboardInterrupt):
        records.write(root, out, shard_bytes=10_000)
    with pytest.raises(DataError, match=r"holds no records: cannot read .*dataset.json.* prepare-data folder:DIR"):
        get_spec(f"records:{out}", "", 8)
    done = {path: path.stat().st_mtime_ns for path in out.glob("*.array_record")}
    assert done
    records.write(root, out, shard_bytes=10_000)
    assert len(calls) < 20 + 27 + 6
    assert done == {path: path.stat().st_mtime_ns for path in done}
    assert len(list(out.glob("train-*"))) > len(done)
    assert not list(out.glob("*.partial"))
    assert _images(f"records:{out}") == _images(f"folder:{root}")


def test_lost_files_and_foreign_records_are_named(tmp_path, capsys):
    root = write_folder(tmp_path / "data", 2, 2, 1)
    assert main([f"folder:{root}"]) == 2
    assert "say where with --out=DIR" in capsys.readouterr().err
    assert main([f"folder:{root}", f"--out={tmp_path / 'out'}", "--data_dir=here"]) == 2
    assert "--data_dir=here is of data sets of TFDS" in capsys.readouterr().err
    assert main(["cifar10", f"--out={tmp_path / 'out'}"]) == 2
    assert "say where cifar10 goes with --data_dir=DIR" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert main([f"folder:{root}", f"--out={tmp_path / 'file'}"]) == 2
    assert "file: " in capsys.readouterr().err
    gone = root / "train" / "class00" / "gone.jpg"
    gone.symlink_to(tmp_path / "nowhere")
    sources.cache_clear()  # as in another process
    assert main([f"folder:{root}", f"--out={tmp_path / 'out'}"]) == 2
    assert f"cannot read {gone}" in capsys.readouterr().err
    gone.unlink()
    sources.cache_clear()
    assert main([f"folder:{root}", f"--out={tmp_path / 'out'}"]) == 0
    other = write_folder(tmp_path / "other", 2, 3, 1)
    with pytest.raises(DataError, match="records of another data set"):
        records.write(other, tmp_path / "out")
    next((tmp_path / "out").glob("test-*")).unlink()
    spec = get_spec(f"records:{tmp_path / 'out'}", "", 8)
    with pytest.raises(DataError, match="holds 0 files of the test split"):
        open_streams(spec, "", BadImages(0))
    np.testing.assert_array_equal((spec.num_train, spec.num_test, spec.num_classes), (4, 2, 2))


def _stop_at_test_images(path, *arguments, write=records._write_shard):
    if path.name.startswith("test"):
        raise KeyboardInterrupt
    write(path, *arguments)


def test_what_another_folder_began_is_refused_and_goes_on_from_its_own(tmp_path, monkeypatch):
    """Both folders have as many images of as many classes; so has one of whose images a file was replaced."""
    first = write_folder(tmp_path / "first", 2, 3, 1)
    second = write_folder(tmp_path / "second", 2, 3, 1)
    victim = next((second / "train").glob("*/*"))
    victim.write_bytes(victim.read_bytes() + b"more")
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(records, "_write_shard", _stop_at_test_images)
        with pytest.raises(KeyboardInterrupt):
            records.write(first, out)
    for shard_bytes, root in ((2**27, second), (1000, first)):
        with pytest.raises(DataError, match="out holds records of another data set: choose another folder"):
            records.write(root, out, shard_bytes)
    records.write(first, out)
    assert _images(f"records:{out}") == _images(f"folder:{first}")
    assert not (out / records.BEGUN).exists()
    (out / records.INDEX).unlink()
    with pytest.raises(DataError, match="holds records of a data set that no index names"):
        records.write(first, out)


@pytest.mark.parametrize("content", ["{}", "[]", '{"classes": [], "splits": {"train": 1}}'])
def test_an_index_that_is_not_ours_is_refused_by_name(tmp_path, content):
    (tmp_path / records.INDEX).write_text(content)
    with pytest.raises(DataError, match=r"holds no records: cannot read .*dataset.json \(it does not hold `classes`"):
        get_spec(f"records:{tmp_path}", "", 8)


def test_a_missing_package_is_named_before_any_image_is_read(tmp_path, monkeypatch):
    root = write_folder(tmp_path / "data", 2, 2, 1)
    records.write(root, tmp_path / "out")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "array_record" else find(name))
    wanted = r"array_record: pip install 'mimicnorm_jax\[imagenet\]'"
    with pytest.raises(DataError, match=wanted):
        records.write(root, tmp_path / "other")
    for name in (f"records:{tmp_path / 'out'}", "imagenet2012"):
        with pytest.raises(DataError, match=wanted):
            require_prepared(name, str(tmp_path), 8)
    require_prepared(f"folder:{root}", "", 8)
