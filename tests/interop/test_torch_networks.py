"""Networks in PyTorch and here, of one state dict: the same logits."""

import importlib

import jax
import numpy as np
import pytest

from mimicnorm_jax import interop, models
from tests.conftest import also
from tests.interop import torch_networks as there

torch = there.torch

pytestmark = pytest.mark.filterwarnings("ignore:.*:DeprecationWarning", "ignore:.*:UserWarning")

# Of logits whose standard deviation is between 0.1 and 1. Both sum in float32, in their own orders.
ATOL = 1e-4


def _package(name):
    try:
        return importlib.import_module(name)
    except (ImportError, RuntimeError) as error:  # RuntimeError: built for another PyTorch
        pytest.skip(f"comparing networks with those of {name} needs it ({error})")


def _randomized(net, x, seed=0):
    """With norms and scalars away from their initial values, and with the running statistics of a batch.

    Branches of deep ResNets add a quarter of their sum, less than at first, as trained ones do: with whole branches
    a random network of 152 layers multiplies rounding errors so that PyTorch's float32 is as far from its own float64
    (6e-3) as from us.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for norm in filter(lambda module: isinstance(module, torch.nn.BatchNorm2d), net.modules()):
            norm.weight.uniform_(0.5, 1.5, generator=generator)
            norm.bias.normal_(0, 0.2, generator=generator)
        for module in net.modules():
            if isinstance(module, there.Scale | there.CifarBlock) and module.scale is not None:
                module.scale.fill_(0.7)
            if last := getattr(module, "bn3", getattr(module, "bn2", None)):
                last.weight *= 0.25
            if hasattr(module, "momentum"):
                module.momentum = 1.0  # the running statistics become the batch's
        net.train()(x)
    return net.eval()


def _difference(net, model, x):
    """Largest difference of logits, and the standard deviation of PyTorch's."""
    height, width = x.shape[2:]
    variables = interop.torch.load(net.state_dict(), model, image_shape=(height, width, 3))
    ours = model.apply(variables, x.permute(0, 2, 3, 1).numpy())
    with torch.no_grad():
        theirs = net(x).numpy()
    return abs(ours - theirs).max(), theirs.std()


@pytest.mark.parametrize("depth", [18, *map(also, (34, 50, 101, 152))])
def test_resnets_of_torchvisions_topology_have_equal_logits(depth):
    model = models.create(f"resnet{depth}_imagenet", method="batchnorm", num_classes=1000)
    torch.manual_seed(0)
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    net = _randomized(there.ResNet(depth), x)
    difference, spread = _difference(net, model, x)
    assert spread > 0.1
    assert difference < ATOL


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "method", "theirs", "side"),
    [
        ("resnet18_imagenet", "batchnorm", "resnet18", 64),
        ("resnet50_imagenet", "batchnorm", "resnet50", 64),
        ("shufflenetv2_x0.5_imagenet", "batchnorm", "shufflenet_v2_x0_5", 224),
        ("shufflenetv2_x1_imagenet", "batchnorm", "shufflenet_v2_x1_0", 224),
        ("vgg11_imagenet", "batchnorm", "vgg11_bn", 224),
        ("vgg11_imagenet", "none", "vgg11", 224),
    ],
)
def test_torchvisions_own_networks_have_equal_logits(name, method, theirs, side):
    torch.manual_seed(0)
    net = getattr(_package("torchvision.models"), theirs)()
    model = models.create(name, method=method, num_classes=1000)
    x = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))
    difference, spread = _difference(_randomized(net, x), model, x)
    assert spread > 1e-3
    assert difference < min(ATOL, 1e-3 * spread)


RESNETS = [(f"resnet{depth}_imagenet", "batchnorm", f"resnet{depth}") for depth in there.RESNETS]
WIDTHS = {"x0.5": "x0_5", "x1": "x1_0", "x1.5": "x1_5", "x2": "x2_0"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("package", "networks"),
    [
        ("timm", RESNETS),
        ("torchvision.models", RESNETS),
        ("torchvision.models", [(f"vgg{depth}_imagenet", "batchnorm", f"vgg{depth}_bn") for depth in (11, 16, 19)]),
        ("torchvision.models", [(f"vgg{depth}_imagenet", "none", f"vgg{depth}") for depth in (11, 16, 19)]),
        (
            "torchvision.models",
            [(f"shufflenetv2_{w}_imagenet", "batchnorm", f"shufflenet_v2_{t}") for w, t in WIDTHS.items()],
        ),
    ],
)
def test_names_are_those_of_other_packages(package, networks):
    build = _package(package)
    for name, method, theirs in networks:
        with torch.device("meta"):
            net = build.create_model(theirs) if package == "timm" else getattr(build, theirs)()
        names = {name for name in net.state_dict() if "num_batches_tracked" not in name}
        assert names == set(interop.torch.names(models.create(name, method=method, num_classes=1000))), theirs


def test_pytorch_takes_what_dump_gives():
    model = models.create("resnet18_imagenet", method="batchnorm", num_classes=1000)
    net, other = there.ResNet(18), there.ResNet(18)
    state_dict = interop.torch.dump(interop.torch.load(net.state_dict(), model), model)
    other.load_state_dict({name: torch.from_numpy(array) for name, array in state_dict.items()})
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), other.state_dict().values(), strict=True))


@pytest.mark.parametrize("method", ["batchnorm", "mimicnorm"])
@pytest.mark.parametrize(
    ("build", "name", "width", "depth"),
    [
        ("cifar_resnet", "resnet18", 0.25, {"stages": (1, 1)}),
        ("seresnet", "seresnet18", 0.25, {"stages": (1, 1)}),
        ("densenet", "densenet121", 0.25, {"blocks": (2, 2)}),
        ("vgg", "vgg11_imagenet", 0.0625, {}),
    ],
)
def test_the_authors_networks_have_equal_logits(build, name, width, depth, method):
    model = models.create(name, method=method, num_classes=10, width=width).clone(**depth)
    side = 64 if build == "vgg" else 12
    x = torch.randn(8, 3, side, side, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(0)
    net = getattr(there, build)(norm=method == "batchnorm")
    if method == "mimicnorm":
        _center(net, least=0 if build == "vgg" else 51)
    difference, spread = _difference(_randomized(net, x), model, x)
    assert spread > 0.05
    assert difference < ATOL * spread


def _center(net, least):
    """As the authors' training keeps kernels of at least that fan-in."""
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, torch.nn.Conv2d) and module.weight[0].numel() >= least:
                module.weight -= module.weight.mean((1, 2, 3), keepdim=True)


def test_files_of_every_format_are_read_alike(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch", reason="writing safetensors needs that package")
    model = models.create("resnet18", method="mimicnorm", num_classes=10, width=0.25).clone(stages=(1, 1))
    net = there.cifar_resnet(norm=False)
    expected = interop.torch.load(net.state_dict(), model)
    torch.save(net.state_dict(), tmp_path / "weights.pth")
    torch.save({"state_dict": net.state_dict(), "epoch": 3}, tmp_path / "weights.tar")
    np.savez(tmp_path / "weights.npz", **{name: array.numpy() for name, array in net.state_dict().items()})
    safetensors.save_file(net.state_dict(), tmp_path / "weights.safetensors")
    for path in sorted(tmp_path.iterdir()):
        read = interop.torch.load(path, model)
        assert jax.tree.all(jax.tree.map(np.array_equal, read, expected)), path.name
