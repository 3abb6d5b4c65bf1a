"""State dicts: what they may be wrapped in, what is refused and named, and the function that is loaded."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict

from mimicnorm_jax import LastBatchNorm, cli, interop, models
from mimicnorm_jax.errors import StateDictError
from mimicnorm_jax.interop import layouts
from mimicnorm_jax.methods import METHODS

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.*:DeprecationWarning")


def _equal(a, b):
    return jax.tree.all(jax.tree.map(np.array_equal, dict(a), dict(b)))


def _network(method="mimicnorm", name="resnet8", width=0.5):
    """A small network with random variables, no two of them alike, and its state dict."""
    model = models.create(name, method=method, num_classes=10, width=width)
    template = jax.eval_shape(model.init, jax.random.key(0), jnp.ones((2, 32, 32, 3)))
    rng = np.random.default_rng(0)
    variables = jax.tree.map(lambda leaf: rng.uniform(0.1, 1, leaf.shape).astype(leaf.dtype), template)
    return model, variables, interop.torch.dump(variables, model)


@pytest.mark.parametrize("method", ["batchnorm", "mimicnorm", "weightmean", "lastbn", "none", "fixup"])
def test_variables_come_back_from_a_state_dict(method):
    model, variables, state_dict = _network(method)
    assert _equal(interop.torch.load(state_dict, model), variables)


def test_uncentered_weights_are_the_same_function():
    model, _, state_dict = _network()
    # As the published training keeps them: fan-in above 50, each output channel's mean subtracted.
    centered = {
        name: array - array.mean((1, 2, 3), keepdims=True) if array.ndim == 4 and array[0].size > 50 else array
        for name, array in state_dict.items()
    }
    changed = [name for name in centered if not np.array_equal(centered[name], state_dict[name])]
    assert len(changed) == 6  # all but the stem and the shortcuts, of fan-in 27, 8 and 16
    x = jax.random.normal(jax.random.key(1), (4, 8, 8, 3))
    logits = [model.apply(interop.torch.load(d, model), x) for d in (state_dict, centered)]
    assert float(abs(logits[0]).max()) > 1e-2
    np.testing.assert_allclose(logits[0], logits[1], atol=1e-5 * float(abs(logits[0]).max()))


def test_a_wrapped_state_dict_with_counters_is_read():
    model, variables, state_dict = _network("batchnorm")
    wrapped = {f"module.{name}": array for name, array in state_dict.items()}
    wrapped["module.conv1.1.num_batches_tracked"] = np.array(7)
    assert _equal(interop.torch.load({"epoch": 3, "state_dict": wrapped}, model), variables)


def test_all_that_is_missing_unexpected_or_misshapen_is_named_at_once():
    model, _, state_dict = _network()
    del state_dict["fc.bias"]
    state_dict["conv9_x.0.scale"] = np.ones(1, np.float32)
    state_dict["conv1.0.weight"] = np.ones((8, 1, 3, 3), np.float32)
    with pytest.raises(StateDictError, match="under method='mimicnorm'") as caught:
        interop.torch.load(state_dict, model)
    assert caught.value.missing == ["fc.bias"]
    assert caught.value.unexpected == ["conv9_x.0.scale"]
    assert caught.value.misshapen == ["conv1.0.weight (8, 1, 3, 3) instead of (8, 3, 3, 3)"]
    assert all(name in str(caught.value) for name in ("fc.bias", "conv9_x.0.scale", "conv1.0.weight (8, 1, 3, 3)"))


def test_another_networks_state_dict_and_variables_are_refused():
    model, variables, state_dict = _network()
    other, *_ = _network(name="squeezenet")
    with pytest.raises(StateDictError, match=r"not that of this SqueezeNet under method='mimicnorm'.* more"):
        interop.torch.load(state_dict, other)
    with pytest.raises(StateDictError, match="the tree of variables is not that of this SqueezeNet"):
        interop.torch.dump(variables, other)
    with pytest.raises(StateDictError, match="missing"):
        interop.torch.load({}, model)


def test_networks_without_names_there_are_refused():
    with pytest.raises(StateDictError, match="under method='skipinit'"):
        interop.torch.load({}, models.create("resnet18", method="skipinit"))
    with pytest.raises(StateDictError, match="ImageNet ResNet under fixup"):
        interop.torch.load({}, models.create("resnet18_imagenet", method="fixup"))
    surer = dataclasses.replace(METHODS["mimicnorm"], logit_scale=2.0)
    with pytest.raises(StateDictError, match="multiplies logits by 2: use the network with logit_scale 1"):
        interop.torch.load({}, models.create("resnet18", method=surer))
    with pytest.raises(StateDictError, match="of a LastBatchNorm are not known"):
        interop.torch.load({}, LastBatchNorm())


def test_integers_are_no_weights():
    model, _, state_dict = _network()
    state_dict["fc.bias"] = np.arange(10)
    with pytest.raises(StateDictError, match=r"fc.bias is of int64"):
        interop.torch.load(state_dict, model)


def test_a_flattened_map_is_read_in_its_own_order():
    rng = np.random.default_rng(0)
    weight, x = rng.normal(size=(5, 4 * 6)), rng.normal(size=(4, 2, 3))  # there: (out, C H W) and (C, H, W)
    kernel = layouts.to_flax(weight, (24, 5), pixels=6)
    np.testing.assert_allclose(x.transpose(1, 2, 0).reshape(-1) @ kernel, weight @ x.reshape(-1))
    assert np.array_equal(layouts.to_torch(kernel, pixels=6), weight)


def test_a_file_of_arrays_is_imported_by_the_command_and_read_back(tmp_path, capsys):
    _, variables, _ = _network()
    whole, _, state_dict = _network(width=1)
    np.savez(tmp_path / "weights.npz", **state_dict)
    out = tmp_path / "variables.npz"
    arguments = [str(tmp_path / "weights.npz"), "--model=resnet8", "--num_classes=10", f"--out={out}"]
    assert cli.main(["import-torch", *arguments]) == 0
    assert "resnet8 under mimicnorm" in capsys.readouterr().out
    assert _equal(interop.read_variables(out), interop.torch.load(state_dict, whole))
    interop.write_variables(out, variables)
    assert _equal(interop.read_variables(out), variables)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["variables.npz", "weights.npz"]


def test_variables_that_a_file_would_change_are_refused_and_boxes_left_out(tmp_path):
    out = tmp_path / "variables.npz"
    weight = np.ones((2, 3), np.float32)
    with pytest.raises(StateDictError, match="'Dense_0/kernel/scale' has a slash"):  # as nn.WeightNorm names it
        interop.write_variables(out, {"params": {"WeightNorm_0": {"Dense_0/kernel/scale": weight}}})
    with pytest.raises(StateDictError, match="collection 'ema' has no place"):
        interop.write_variables(out, {"params": {"kernel": weight}, "ema": {"kernel": weight}})
    assert not out.exists()
    interop.write_variables(out, {"params": {"kernel": nn.Partitioned(weight, (None, "model"))}})
    assert _equal(interop.read_variables(out), {"params": {"kernel": weight}})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("--method=batchnorm", "not that of this ResNet under method='batchnorm'"),
        ("--model=resnet9", "did you mean resnet8"),
        ("--out=/nowhere/x.npz", "there is no folder /nowhere"),
    ],
)
def test_bad_input_of_the_command_is_one_sentence_and_writes_nothing(change, message, tmp_path, capsys):
    np.savez(tmp_path / "weights.npz", **_network(width=1)[2])
    arguments = [str(tmp_path / "weights.npz"), "--model=resnet8", "--num_classes=10", f"--out={tmp_path / 'x.npz'}"]
    assert cli.main(["import-torch", *arguments, change]) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["weights.npz"]


def test_files_that_cannot_be_read_say_so(tmp_path):
    model, _, state_dict = _network()
    objects, damaged, odd = tmp_path / "objects.npz", tmp_path / "damaged.npz", tmp_path / "weights.h5"
    np.savez(objects, **{**state_dict, "fc.bias": np.array([print], dtype=object)})
    damaged.write_bytes(b"PK no archive")
    odd.touch()
    for path, message in ((objects, "pickle"), (damaged, "cannot be read"), (odd, "by its name"), ("x.npz", "no file")):
        with pytest.raises(StateDictError, match=message):
            interop.torch.load(path, model)
    np.savez(tmp_path / "theirs.npz", **state_dict)
    with pytest.raises(StateDictError, match="holds no variables"):
        interop.read_variables(tmp_path / "theirs.npz")


def test_without_torch_a_pth_file_is_refused_with_the_way_out(tmp_path, monkeypatch):
    (tmp_path / "weights.pth").touch()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(StateDictError, match="pip install torch"):
        interop.torch.load(tmp_path / "weights.pth", _network()[0])


def test_safetensors_are_read(tmp_path):
    numpy = pytest.importorskip("safetensors.numpy", reason="reading safetensors needs the package safetensors")
    model, variables, state_dict = _network("batchnorm")
    path = tmp_path / "weights.safetensors"
    numpy.save_file(state_dict, path)
    assert _equal(interop.torch.load(path, model), variables)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(StateDictError, match="cannot be read as safetensors"):
        interop.torch.load(path, model)


class _RunsCode:
    def __reduce__(self):
        return print, ("run",)


def test_a_pickle_with_code_is_refused_and_a_pth_file_read(tmp_path, capsys):
    torch = pytest.importorskip("torch", reason="reading .pth needs PyTorch")
    model, variables, state_dict = _network("batchnorm")
    path = tmp_path / "weights.pth"
    tensors = {name: torch.from_numpy(array) for name, array in state_dict.items()}
    torch.save({"state_dict": tensors, "epoch": 3}, path)
    assert _equal(interop.torch.load(path, model), variables)
    assert _equal(interop.torch.load(tensors, model), variables)
    torch.save({**tensors, "fc.bias": _RunsCode()}, path)
    with pytest.raises(StateDictError, match="one that holds more is refused"):
        interop.torch.load(path, model)
    assert capsys.readouterr().out == ""
    torch.save([1, 2], path)
    with pytest.raises(StateDictError, match="holds a list and not a state dict"):
        interop.torch.load(path, model)


def test_flat_names_are_those_of_the_tree():
    model, variables, _ = _network()
    assert set(interop.torch.names(model).values()) == set(flatten_dict(variables))
