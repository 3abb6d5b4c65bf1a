"""Exported files run without this package, for any batch size; bad input is named before anything is written."""

import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from mimicnorm_jax import cli, interop, models, training
from mimicnorm_jax.errors import ExportError
from mimicnorm_jax.training import build_spec, workdir
from mimicnorm_jax.training.resilience import CheckpointMetadata, Checkpoints
from tests.conftest import ROOT

READERS = re.findall(r"```py\n(.*?)```", (ROOT / "docs/export.md").read_text(), re.DOTALL)[2:]
SHAPE = (8, 8, 1)


def _network(method="mimicnorm", name="resnet8", shape=SHAPE, width=0.25):
    model = models.create(name, method=method, num_classes=10, width=width)
    return model, jax.jit(model.init)(jax.random.key(0), jnp.ones((1, *shape)))


def _images(count, shape=SHAPE):
    return np.random.default_rng(1).normal(size=(count, *shape)).astype(np.float32)


def _read_elsewhere(format, path, images, folder):
    """What the docs' program gives in a process that has neither this package nor Flax."""
    blocked = "import sys; sys.modules['mimicnorm_jax'] = sys.modules['flax'] = None\n"
    (folder / "reader.py").write_text(blocked + READERS[["stablehlo", "onnx"].index(format)])
    np.save(folder / "images.npy", images)
    arguments = [folder / "reader.py", path, folder / "images.npy", folder / "logits.npy"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, *map(str, arguments)], check=True, env=environment, cwd=folder, timeout=300)
    return np.load(folder / "logits.npy")


def _needs(format):
    for package in interop.exporting.FORMATS[format]:
        pytest.importorskip(package, reason=f"exporting {format} needs {package}: pip install 'mimicnorm_jax[export]'")


def test_a_stablehlo_file_runs_without_this_package(tmp_path):
    _needs("stablehlo")
    model, variables = interop.fold(*_network(), image_shape=SHAPE)
    path = tmp_path / "network.stablehlo"
    interop.export(model, variables, path, image_shape=SHAPE)
    images = _images(3)
    expected = np.asarray(model.apply(variables, images))
    read = _read_elsewhere("stablehlo", path, images, tmp_path)
    np.testing.assert_allclose(read, expected, atol=1e-6 * abs(expected).max())
    exported = jax.export.deserialize(bytearray(path.read_bytes()))
    assert exported.platforms == ("cpu", "cuda", "tpu")
    assert exported.call(images[:1]).shape == (1, 10)
    assert not exported.has_vjp()


def test_an_unfolded_file_can_be_differentiated_as_often_as_asked(tmp_path):
    _needs("stablehlo")
    model, variables = _network()
    interop.export(model, variables, tmp_path / "network.stablehlo", image_shape=SHAPE, vjp_order=1)
    exported = jax.export.deserialize(bytearray((tmp_path / "network.stablehlo").read_bytes()))
    images = _images(2)
    ours = jax.grad(lambda x: (model.apply(variables, x) ** 2).sum())(images)
    theirs = jax.grad(lambda x: (exported.call(x) ** 2).sum())(images)
    np.testing.assert_allclose(theirs, ours, atol=1e-5 * abs(ours).max())


@pytest.mark.slow
@pytest.mark.usefixtures("shallow")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "method", "shape"),
    [
        ("resnet8", "mimicnorm", SHAPE),
        ("mobilenetv2", "batchnorm", (32, 32, 3)),
        ("squeezenet", "mimicnorm", (32, 32, 3)),
        ("shufflenetv2_x0.5", "mimicnorm", (32, 32, 3)),
        ("resnet18_imagenet", "mimicnorm", (64, 64, 3)),
        ("densenet121", "mimicnorm", (32, 32, 3)),
        ("seresnet18", "mimicnorm", (32, 32, 3)),
        ("vgg11", "mimicnorm", (32, 32, 3)),
    ],
)
def test_an_onnx_file_runs_without_this_package(name, method, shape, tmp_path):
    _needs("onnx")
    model, variables = interop.fold(*_network(method, name, shape), image_shape=shape)
    interop.export(model, variables, tmp_path / "network.onnx", image_shape=shape, format="onnx")
    images = _images(3, shape)
    expected = np.asarray(model.apply(variables, images))
    read = _read_elsewhere("onnx", tmp_path / "network.onnx", images, tmp_path)
    np.testing.assert_allclose(read, expected, atol=1e-4 * abs(expected).max())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_shape": (None, None, 1)}, "image_shape is .* one size: give"),
        ({"image_shape": (8, 8)}, "image_shape is .* one size: give"),
        ({"image_shape": (8, 8, 3)}, "does not take images .8, 8, 3. in batches of any size"),
        ({"format": "onx"}, "unknown format 'onx': did you mean onnx"),
        ({"format": "onnx", "vjp_order": 1}, "vjp_order is 1"),
        ({"vjp_order": -1}, "vjp_order is -1"),
        ({"path": "nowhere/network.onnx"}, "there is no folder"),
    ],
)
def test_bad_input_is_named_and_nothing_written(changes, message, tmp_path):
    model, variables = _network()
    options = {"image_shape": SHAPE} | changes
    with pytest.raises(ExportError, match=message):
        interop.export(model, variables, tmp_path / options.pop("path", "network"), **options)
    assert list(tmp_path.iterdir()) == []


def test_a_network_of_fixed_batch_and_a_missing_package_are_named(tmp_path, monkeypatch):
    class Fixed(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3)(x.reshape(4, 64))

    variables = Fixed().init(jax.random.key(0), _images(4))
    with pytest.raises(ExportError, match="the Fixed does not map each image of a batch to a row"):
        interop.export(Fixed(), variables, tmp_path / "network", image_shape=SHAPE)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ExportError, match=r"needs the package jax2onnx: pip install 'mimicnorm_jax\[export\]'"):
        interop.export(*_network(), tmp_path / "network", image_shape=SHAPE, format="onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def run(tmp_path):
    """A run's folder with one checkpoint of a fresh state."""
    config = training.base(model="resnet8", method="mimicnorm", width_multiplier=0.25)
    config = training.validate(config)
    folder = tmp_path / "run"
    workdir.prepare(folder, config)
    state = build_spec(config, 1).init_state()
    with Checkpoints(folder / "checkpoints", 1) as checkpoints:
        checkpoints.save(state, CheckpointMetadata(1, 0.5))
    return folder, state


def test_the_command_exports_a_run_without_its_data(run, monkeypatch, capsys):
    _needs("stablehlo")
    folder, state = run
    monkeypatch.setattr("mimicnorm_jax.data.datasets.load", lambda *_: pytest.fail("read the data set"))
    assert cli.main(["export", f"--workdir={folder}"]) == 0
    assert "resnet8 under mimicnorm, latest checkpoint (epoch 1)" in capsys.readouterr().out
    exported = jax.export.deserialize(bytearray((folder / "resnet8.stablehlo").read_bytes()))
    expected = models.create("resnet8", num_classes=10, width=0.25).apply(state.eval_variables, _images(2))
    np.testing.assert_allclose(exported.call(_images(2)), expected, atol=1e-5 * float(abs(expected).max()))
    # Folded: nothing is normalized, and no kernel has its mean subtracted.
    assert "rsqrt" not in exported.mlir_module()
    assert "subtract" not in exported.mlir_module()


def test_the_command_names_bad_input(run, capsys, tmp_path, monkeypatch):
    folder, _ = run
    before = sorted(folder.iterdir())
    assert cli.main(["export", f"--workdir={tmp_path / 'nowhere'}"]) == 2
    assert "holds no run" in capsys.readouterr().err
    assert cli.main(["export", f"--workdir={folder}", "--out=/nowhere/network"]) == 2
    assert "there is no folder /nowhere" in capsys.readouterr().err
    monkeypatch.setattr("mimicnorm_jax.cli.export.read_checkpoint", lambda *_: pytest.fail("began to work"))
    assert cli.main(["export", f"--workdir={folder}", f"--out={folder}"]) == 2
    assert f"{folder} is a folder: name the file to write" in capsys.readouterr().err
    assert sorted(folder.iterdir()) == before
