"""Published networks by name, as facts: PyTorch's names and shapes of each, mapped by rule one to one.

`published.json` lists what the smallest network of a family has there, a name and its shape each, of 100 classes, or
1000 in the ImageNet forms. Every other network of the authors' code but the largest has a SHA-256 of such a list in
conformance's `official.json`, first 32 digits of the sorted lines.
"""

import hashlib
import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from mimicnorm_jax import models
from mimicnorm_jax.interop import torch
from mimicnorm_jax.interop.layouts import torch_shape
from tests.conftest import also

OFFICIAL = json.loads((Path(__file__).parents[1] / "conformance" / "official.json").read_text())
PUBLISHED = json.loads((Path(__file__).parent / "published.json").read_text())
FAST = {"vgg11,mimicnorm", "resnet18,mimicnorm", "resnet18,fixup", "squeezenet,mimicnorm", "mobilenetv2,mimicnorm"}
FAST |= {"seresnet18,mimicnorm", "resnet18_imagenet,batchnorm", "shufflenetv2_x0.5_imagenet,mimicnorm"}
CASES = [(name, method) for name, methods in OFFICIAL.items() for method, known in methods.items() if "names" in known]


def _model(name, method, width=1.0):
    return models.create(name, method=method, num_classes=1000 if name.endswith("imagenet") else 100, width=width)


def _shapes(name, model):
    """Shapes of our variables by path."""
    side = 224 if name.endswith("imagenet") else 32
    template = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, side, side, 3), np.float32))
    return {path: leaf.shape for path, leaf in flatten_dict(template).items()}


def _unused(name, method):
    """The published ResNets of CIFAR hold one scalar that nothing uses."""
    return method == "mimicnorm" and name.startswith("resnet") and not name.endswith("imagenet")


@pytest.mark.parametrize(("name", "method"), [case if ",".join(case) in FAST else also(*case) for case in CASES])
def test_names_and_shapes_are_the_published_ones(name, method):
    model, official = _model(name, method), OFFICIAL[name][method]
    names, shapes = torch.names(model), _shapes(name, model)
    assert sorted(names.values()) == sorted(shapes)
    found = {there: torch_shape(shapes[path]) for there, path in names.items()}
    if _unused(name, method):
        found["bias1"] = (1,)
    lines = sorted(" ".join((there, *map(str, shape))) for there, shape in found.items())
    if f"{name},{method}" in PUBLISHED:
        assert lines == sorted(PUBLISHED[f"{name},{method}"])
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest()[:32] == official["names"]
    _assert_in_order(names)


def _assert_in_order(names):
    """Arrays that differ in numbers alone, there and here, stand there in the order in which they stand here."""
    alike = {}
    for there, path in names.items():
        kinds = tuple(re.sub(r"\d+", "0", said) for said in ("/".join(path), there))
        numbers = (tuple(map(int, re.findall(r"\d+", said))) for said in ("/".join(path), there))
        alike.setdefault(kinds, []).append(tuple(numbers))
    for numbers in alike.values():
        assert sorted(numbers) == sorted(numbers, key=lambda pair: pair[1])


@pytest.mark.parametrize(
    ("name", "method", "depth"),
    [
        ("densenet121", "batchnorm", {"blocks": (1, 2)}),
        ("densenet121", "mimicnorm", {"blocks": (2, 1)}),
        ("seresnet50", "batchnorm", {"stages": (1, 1)}),
        ("seresnet18", "mimicnorm", {"stages": (1, 1)}),
        ("vgg11_imagenet", "mimicnorm", {}),
        *(also(*case.split(","), {}) for case in PUBLISHED),
    ],
)
def test_every_array_comes_back_as_it_was(name, method, depth):
    model, rng = _model(name, method, width=0.125).clone(**depth), np.random.default_rng(0)
    variables = {path: rng.random(shape, np.float32) for path, shape in _shapes(name, model).items()}
    state_dict = torch.dump(unflatten_dict(variables), model)
    assert len(state_dict) == len(variables) + _unused(name, method)
    assert all(array.flags.c_contiguous for array in state_dict.values())
    again = flatten_dict(torch.load(state_dict, model))
    assert again.keys() == variables.keys()
    assert all(np.array_equal(again[path], array) for path, array in variables.items())


@pytest.mark.parametrize(("name", "numbered_as"), [also("vgg11", "mimicnorm"), ("vgg13", "batchnorm")])
def test_networks_with_neither_norm_have_the_names_of_one_with(name, numbered_as):
    """The published VGG-13 and -19 of CIFAR keep BatchNorms' places."""
    bare = set(torch.names(_model(name, "weightmean", width=0.1)))
    other = torch.names(_model(name, numbered_as, width=0.1))
    assert bare == {there for there, path in other.items() if not {"bn", "last_bn"} & {*path}}


def test_an_array_lands_where_a_reader_expects_it():
    model = _model("resnet18_imagenet", "batchnorm", width=0.25).clone(stages=(1, 1))
    names, shapes, rng = torch.names(model), _shapes("resnet18_imagenet", model), np.random.default_rng(0)
    state_dict = {there: rng.random(torch_shape(shapes[path]), np.float32) for there, path in names.items()}
    variables = torch.load(state_dict, model)
    block = variables["params"]["stage2_block1"]
    kernel = state_dict["layer2.0.conv2.weight"]
    assert (block["conv2"]["conv"]["kernel"][2, 0, 5, 7] == kernel[7, 5, 2, 0]).all()
    assert (block["shortcut"]["bn"]["scale"] == state_dict["layer2.0.downsample.1.weight"]).all()
    statistics = variables["batch_stats"]["stage2_block1"]["conv1"]["bn"]
    assert (statistics["var"] == state_dict["layer2.0.bn1.running_var"]).all()
    assert (variables["params"]["classifier"]["kernel"][3, 4] == state_dict["fc.weight"][4, 3]).all()


def test_a_flattened_map_of_any_size_is_permuted():
    """PyTorch's row of a hidden unit runs over channels, then pixels."""
    model = _model("vgg11", "none", width=0.0625)
    image_shape = (64, 96, 3)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, *image_shape), np.float32))
    variables = jax.tree.map(lambda leaf: np.random.default_rng(0).random(leaf.shape, np.float32), shapes)
    kernel = variables["params"]["dense1"]["kernel"]
    weight = torch.dump(variables, model, image_shape=image_shape)["classifier.0.weight"]
    assert kernel.shape == (2 * 3 * 32, 256)
    assert np.array_equal(weight.reshape(256, 32, 2, 3).transpose(2, 3, 1, 0).reshape(-1, 256), kernel)
