"""Published networks by name, as facts: PyTorch's names and shapes of each, mapped by rule one to one."""

import json
import math
from pathlib import Path

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from mimicnorm_jax import models
from mimicnorm_jax.interop import torch
from tests.conftest import also

# Names with shapes, read off the authors' networks: 100 classes, 1000 in the ImageNet forms; counts of parameters.
PUBLISHED = json.loads((Path(__file__).parent / "published.json").read_text())
SMALL = ("vgg11", "resnet18", "squeezenet", "shufflenetv2_x0.5", "mobilenetv2", "resnet18_imagenet")
LARGE = ("vgg19", "resnet50", "resnet50_imagenet")
FAST = {"vgg11,batchnorm", "resnet18,fixup", "resnet18_imagenet,batchnorm", *(f"{name},mimicnorm" for name in SMALL)}
CASES = [case if case in FAST else also(case) for case in PUBLISHED]


def _model(case):
    name, method = case.split(",")
    return models.create(name, method=method, num_classes=1000 if name.endswith("imagenet") else 100)


def _shapes(lines):
    return {name: tuple(map(int, shape)) for name, *shape in (line.split(" ") for line in lines)}


def _random(case, seed=0):
    rng = np.random.default_rng(seed)
    shapes = _shapes(PUBLISHED[case]["params"] + PUBLISHED[case]["buffers"])
    return {name: rng.random(shape, np.float32) for name, shape in shapes.items()}


def test_every_family_is_among_the_facts():
    assert {case.split(",")[0] for case in PUBLISHED} == {*SMALL, *LARGE}


@pytest.mark.parametrize("case", CASES)
def test_names_map_one_to_one_and_every_array_comes_back_as_it_was(case):
    facts, state_dict, model = PUBLISHED[case], _random(case), _model(case)
    variables = torch.load(state_dict, model)
    leaves = flatten_dict(variables)
    used = {name for name in state_dict if name != "bias1" or case.endswith("fixup")}
    assert len(leaves) == len(used)
    parameters = sum(math.prod(shape) for shape in _shapes(facts["params"]).values())
    unused = len(state_dict) - len(used)
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) + unused == parameters == facts["count"]
    back = torch.dump(variables, model)
    assert set(back) == set(state_dict)
    assert all(np.array_equal(back[name], state_dict[name]) for name in used)
    assert all(array.flags.c_contiguous for array in back.values())


def test_an_array_lands_where_a_reader_expects_it():
    case = "resnet18_imagenet,batchnorm"
    state_dict = _random(case)
    variables = torch.load(state_dict, _model(case))
    block = variables["params"]["stage2_block1"]
    kernel = state_dict["layer2.0.conv2.weight"]
    assert (block["conv2"]["conv"]["kernel"][2, 0, 5, 7] == kernel[7, 5, 2, 0]).all()
    assert (block["shortcut"]["bn"]["scale"] == state_dict["layer2.0.downsample.1.weight"]).all()
    statistics = variables["batch_stats"]["stage2_block1"]["conv1"]["bn"]
    assert (statistics["var"] == state_dict["layer2.0.bn1.running_var"]).all()
    assert (variables["params"]["classifier"]["kernel"][3, 4] == state_dict["fc.weight"][4, 3]).all()
