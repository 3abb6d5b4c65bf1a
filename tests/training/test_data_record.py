"""What a run keeps of its data: what images are normalized by, and what its labels mean."""

import json
import os
import shutil
from dataclasses import replace

import jax
import numpy as np
import pytest
from PIL import Image

from mimicnorm_jax.cli.export import main as export
from mimicnorm_jax.data import get_spec, require_prepared
from mimicnorm_jax.data.folder import sources
from mimicnorm_jax.errors import DataError, WorkdirError
from mimicnorm_jax.monitoring import networks
from mimicnorm_jax.training import base, build_spec, build_trainer, evaluate_checkpoints, loop, validate
from mimicnorm_jax.training.restore import read_checkpoint, start
from tests.training.runs import stopped_after_a_save

# Orbax leaves coroutines behind where it reads, and where a file that it reads is missing.
pytestmark = [
    pytest.mark.usefixtures("one_block"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


def _write(root, factor=1.0, classes=("a", "b")):
    """Noise whose training images are darker by a factor; those to test with are the same ones always."""
    shutil.rmtree(root, ignore_errors=True)
    rng = np.random.default_rng(0)
    for split, by in (("val", 1.0), ("train", factor)):
        for name in classes:
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(8):
                Image.fromarray((rng.integers(0, 256, (8, 8, 3)) * by).astype(np.uint8)).save(folder / f"{i}.png")
    sources.cache_clear()  # as in another process


def _config(root, **fields):
    defaults = {"width_multiplier": 0.25, "batch_size": 8, "epochs": 2, "warmup_epochs": 0.0, "learning_rate": 0.01}
    return validate(base(dataset=f"folder:{root}", image_size=8, **defaults | fields))


@pytest.fixture
def run(tmp_path):
    """The config and folder of a finished run, whose training images are no longer what they were."""
    fields = _config(tmp_path / "data")
    _write(tmp_path / "data")
    loop.run(fields, tmp_path / "run")
    results = evaluate_checkpoints(fields, tmp_path / "run")
    _write(tmp_path / "data", 0.5)
    return fields, tmp_path / "run", results


def test_a_finished_run_is_read_with_its_own_mean_and_deviation(run):
    fields, folder, results = run
    assert evaluate_checkpoints(fields, folder) == results
    config, _ = networks.from_checkpoint(folder, "latest", "float32")
    shown = networks.images(config, 4, "real", "float32")
    fresh = build_trainer(build_spec(fields)).dataset
    kept = json.loads((folder / "data.json").read_text())
    assert not np.allclose(kept["mean"], fresh.mean, rtol=0.1)
    pixels = np.stack([np.asarray(Image.open(fresh.test[4 * i].name)) for i in range(4)]) / 255
    np.testing.assert_allclose(shown, (pixels - kept["mean"]) / kept["std"], rtol=1e-5, atol=1e-5)
    assert export([f"--workdir={folder}"]) == 0  # beside which stands what a server needs
    about = json.loads((folder / "resnet8.stablehlo.json").read_text())
    assert about | {name: kept[name] for name in ("mean", "std")} == about
    assert about["classes"] == ["a", "b"]


def test_a_run_outlives_its_images(run, tmp_path, monkeypatch):
    """Exported, started from and looked into as before, whatever lies in their place; what needs them says so."""
    fields, folder, _ = run
    file, images = folder / "resnet8.stablehlo", np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32)

    def exported():
        assert export([f"--workdir={folder}"]) == 0
        logits = jax.export.deserialize(bytearray(file.read_bytes())).call(images)
        return np.asarray(logits), json.loads((folder / f"{file.name}.json").read_text())

    logits, about = exported()
    os.rename(tmp_path / "data", tmp_path / "moved")
    for there in (None, ("b", "c", "d")):
        if there is not None:
            _write(tmp_path / "data", classes=there)
        sources.cache_clear()
        again, about_again = exported()
        np.testing.assert_array_equal(again, logits)
        assert about_again == about
        started = start(build_spec(replace(fields, dataset=f"folder:{tmp_path / 'moved'}", init_from=str(folder))))
        expected = read_checkpoint(folder, "best").variables["params"]
        jax.tree.map(np.testing.assert_array_equal, started.params, expected)
        config, found = networks.from_checkpoint(folder, "latest", "float32")
        assert networks.images(config, 2, "random", "float32", found.image_shape).shape == images.shape
    with pytest.raises(WorkdirError, match=r"holds a run on 2 classes, and .* has 3 now"):
        evaluate_checkpoints(fields, folder)
    shutil.rmtree(tmp_path / "data")
    with pytest.raises(DataError, match=r"data/train is not there: a folder of images is"):
        evaluate_checkpoints(fields, folder)
    monkeypatch.setattr("os.scandir", lambda *_: (_ for _ in ()).throw(PermissionError("not yours")))
    with pytest.raises(DataError, match=r"cannot list .*moved: not yours\. Mend that"):
        build_spec(replace(fields, dataset=f"folder:{tmp_path / 'moved'}"))


def test_a_run_of_an_earlier_version_records_what_it_lacks_as_it_goes_on(tmp_path, monkeypatch, capsys):
    fields, folder = _config(tmp_path / "data"), tmp_path / "run"
    _write(tmp_path / "data")
    with stopped_after_a_save(monkeypatch):
        loop.run(fields, folder)
    kept = json.loads((folder / "data.json").read_text())
    (folder / "data.json").write_text(json.dumps({name: kept[name] for name in ("mean", "std", "classes")}))
    os.rename(tmp_path / "data", tmp_path / "moved")
    sources.cache_clear()
    assert export([f"--workdir={folder}"]) == 2
    assert "data/train is not there" in capsys.readouterr().err
    os.rename(tmp_path / "moved", tmp_path / "data")
    loop.run(fields, folder)
    assert json.loads((folder / "data.json").read_text()) == kept


def test_a_folder_is_the_one_of_the_working_directory_and_listed_anew_by_every_run(tmp_path, monkeypatch):
    for name, classes in (("here", ("a", "b")), ("there", ("b", "c", "d"))):
        _write(tmp_path / name / "data", classes=classes)
    spec = {}
    for name in ("here", "there"):
        monkeypatch.chdir(tmp_path / name)
        spec[name] = get_spec("folder:data", "", 8)
    assert [spec[name].classes for name in ("here", "there")] == [("a", "b"), ("b", "c", "d")]
    monkeypatch.chdir(tmp_path / "here")
    shutil.copy(tmp_path / "here/data/train/a/0.png", tmp_path / "here/data/train/a/more.png")
    require_prepared("folder:data", "", 8)
    assert get_spec("folder:data", "", 8).num_train == spec["here"].num_train + 1


def test_a_run_goes_on_with_the_mean_and_deviation_that_it_began_with(tmp_path, monkeypatch):
    fields = _config(tmp_path / "data")
    _write(tmp_path / "data")
    with stopped_after_a_save(monkeypatch):
        loop.run(fields, tmp_path / "run")
    seen = []
    monkeypatch.setattr(loop, "evaluate", lambda run, *_: seen.append(run.step_config.mean) or 1 / 0)
    kept = tuple(json.loads((tmp_path / "run" / "data.json").read_text())["mean"])
    _write(tmp_path / "data", 0.5)
    with pytest.raises(ZeroDivisionError):
        loop.run(fields, tmp_path / "run")
    assert seen == [kept]
    _write(tmp_path / "data", classes=("b", "c"))
    message = r"of which number 0 is 'b' and was 'a': its labels would be others"
    for again in (loop.run, evaluate_checkpoints):
        with pytest.raises(WorkdirError, match=message):
            again(fields, tmp_path / "run")
    (tmp_path / "run" / "data.json").write_text("[")
    with pytest.raises(WorkdirError, match=r"data\.json, by which images are normalized, cannot be read"):
        loop.run(fields, tmp_path / "run")


def test_a_run_that_never_saved_leaves_no_mean_to_the_next_one_in_its_folder(tmp_path, monkeypatch):
    _write(tmp_path / "data")
    _write(tmp_path / "other", 0.5, ("c", "d"))
    seen = []
    monkeypatch.setattr(loop, "train_epoch", lambda run, *_: seen.append(run.step_config.mean) or 1 / 0)
    for name in ("data", "other"):
        with pytest.raises(ZeroDivisionError):
            loop.run(_config(tmp_path / name), tmp_path / "run")
    assert seen == [build_trainer(build_spec(_config(tmp_path / name))).dataset.mean for name in ("data", "other")]
    assert json.loads((tmp_path / "run" / "data.json").read_text())["classes"] == ["c", "d"]


def test_a_channel_that_does_not_vary_is_named_before_it_is_divided_by(tmp_path):
    for split in ("train", "val"):
        for name in ("a", "b"):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for i in range(8):
                Image.new("RGB", (8, 8), (0, 9 * i, 0)).save(folder / f"{i}.png")
    with pytest.raises(DataError, match=r"channel 0 is the same in all pixels .* as in --config\.std=\(0\.25,"):
        build_trainer(build_spec(_config(tmp_path)))
    assert build_trainer(build_spec(_config(tmp_path, std=(0.5, 0.5, 0.5)))).dataset.std == (0.5, 0.5, 0.5)
