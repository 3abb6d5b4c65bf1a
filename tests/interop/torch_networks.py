"""PyTorch networks under the names of torchvision's and of the authors' code, written apart from ours; needs torch."""

from collections import OrderedDict

import pytest

torch = pytest.importorskip("torch", reason="comparing networks with PyTorch's needs it: pip install -e '.[torch]'")
nn, relu = torch.nn, torch.relu

RESNETS = {
    18: ((3, 3), (2, 2, 2, 2)),
    34: ((3, 3), (3, 4, 6, 3)),
    50: ((1, 3, 1), (3, 4, 6, 3)),
    101: ((1, 3, 1), (3, 4, 23, 3)),
    152: ((1, 3, 1), (3, 8, 36, 3)),
}
"""Windows in a block and blocks in a stage, by depth."""


def conv(inputs, outputs, window, stride=1, *, bias=False):
    return nn.Conv2d(inputs, outputs, window, stride, padding=window // 2, bias=bias)


class Block(nn.Module):
    """Torchvision's names; the stride is the first 3x3 window's."""

    def __init__(self, inputs, channels, stride, windows):
        super().__init__()
        self.depth = len(windows)
        outputs = channels * (4 if self.depth == 3 else 1)
        widths = [inputs, *[channels] * (self.depth - 1), outputs]
        for i, window in enumerate(windows):
            strides = stride if i == windows.index(3) else 1
            self.add_module(f"conv{i + 1}", conv(widths[i], widths[i + 1], window, strides))
            self.add_module(f"bn{i + 1}", nn.BatchNorm2d(widths[i + 1]))
        changes = stride > 1 or inputs != outputs
        self.downsample = (
            nn.Sequential(conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs)) if changes else nn.Identity()
        )

    def forward(self, x):
        y = x
        for i in range(1, self.depth + 1):
            y = self.get_submodule(f"bn{i}")(self.get_submodule(f"conv{i}")(y))
            y = relu(y) if i < self.depth else y
        return relu(y + self.downsample(x))


class ResNet(nn.Module):
    """A ResNet of 1000 classes, of torchvision's topology and under its names."""

    def __init__(self, depth):
        super().__init__()
        windows, stages = RESNETS[depth]
        self.conv1, self.bn1 = conv(3, 64, 7, 2), nn.BatchNorm2d(64)
        inputs = 64
        for stage, repeats in enumerate(stages):
            channels, blocks = 64 * 2**stage, []
            for i in range(repeats):
                blocks.append(Block(inputs, channels, 2 if stage and not i else 1, windows))
                inputs = channels * (4 if len(windows) == 3 else 1)
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        self.fc = nn.Linear(inputs, 1000)

    def forward(self, x):
        x = nn.functional.max_pool2d(relu(self.bn1(self.conv1(x))), 3, 2, 1)
        for stage in range(1, 5):
            x = self.get_submodule(f"layer{stage}")(x)
        return self.fc(x.mean((2, 3)))


class Scale(nn.Module):
    """The authors' learnable scalar."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return x * self.scale


def named(**parts):
    return nn.Sequential(OrderedDict(parts))


def _norm(channels, norm):
    return [nn.BatchNorm2d(channels)] if norm else []


def _norm_or_scale(channels, norm):
    return [nn.BatchNorm2d(channels) if norm else Scale()]


def _norm_or_place(channels, norm):
    return nn.BatchNorm2d(channels) if norm else nn.Identity()


def _classified(classifier, channels, norm, **body):
    """A body, the mean over pixels, ten classes, and the last BatchNorm where no other norm is."""
    last = {} if norm else {"lastbn": nn.BatchNorm1d(10, affine=False)}
    mean = {"pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten()}
    return named(**body, **mean, **{classifier: nn.Linear(channels, 10)}, **last)


class CifarBlock(nn.Module):
    """The authors' basic block of CIFAR."""

    def __init__(self, inputs, channels, stride, norm):
        super().__init__()
        first = [conv(inputs, channels, 3, stride, bias=not norm), *_norm(channels, norm), nn.ReLU()]
        second = [conv(channels, channels, 3, bias=not norm), *_norm(channels, norm)]
        self.residual_function = nn.Sequential(*first, *second)
        self.scale = None if norm else nn.Parameter(torch.ones(1))
        pointwise = [conv(inputs, channels, 1, stride, bias=not norm), *_norm(channels, norm)]
        self.shortcut = nn.Sequential(*pointwise if inputs != channels else [])

    def forward(self, x):
        y = self.residual_function(x)
        return relu((y if self.scale is None else y * self.scale) + self.shortcut(x))


class GatedBlock(nn.Module):
    """The authors' basic block of SE-ResNets."""

    def __init__(self, inputs, channels, stride, norm):
        super().__init__()
        first = [conv(inputs, channels, 3, stride, bias=True), *_norm(channels, norm), nn.ReLU()]
        second = [conv(channels, channels, 3, bias=True), *_norm_or_scale(channels, norm), nn.ReLU()]
        self.residual = nn.Sequential(*first, *second)
        pointwise = [conv(inputs, channels, 1, stride, bias=True), *_norm_or_scale(channels, norm)]
        self.shortcut = nn.Sequential(*pointwise if inputs != channels else [])
        narrow, wide = nn.Linear(channels, channels // 16), nn.Linear(channels // 16, channels)
        self.excitation = nn.Sequential(narrow, nn.ReLU(), wide, nn.Sigmoid())

    def forward(self, x):
        y = self.residual(x)
        return relu(y * self.excitation(y.mean((2, 3)))[:, :, None, None] + self.shortcut(x))


class DenseLayer(nn.Module):
    """The authors' layer of DenseNets: where no norm stands before it, the first ReLU rectifies the input itself."""

    def __init__(self, inputs, growth, norm):
        super().__init__()
        first = [_norm_or_place(inputs, norm), nn.ReLU(inplace=True), conv(inputs, 4 * growth, 1)]
        second = [_norm_or_place(4 * growth, norm), nn.ReLU(), conv(4 * growth, growth, 3)]
        self.bottle_neck = nn.Sequential(*first, *second)

    def forward(self, x):
        new = self.bottle_neck(x)
        return torch.cat([x, new], 1)


def cifar_resnet(norm):
    """A stem of 16 channels and two blocks, of 16 and 32."""
    stem = nn.Sequential(conv(3, 16, 3, bias=not norm), *_norm(16, norm), nn.ReLU())
    blocks = [nn.Sequential(CifarBlock(16, 16 * stride, stride, norm)) for stride in (1, 2)]
    return _classified("fc", 32, norm, conv1=stem, conv2_x=blocks[0], conv3_x=blocks[1])


def seresnet(norm):
    """A stem of 16 channels and two blocks, of 16 and 32."""
    stem = nn.Sequential(conv(3, 16, 3, bias=True), *_norm(16, norm), nn.ReLU())
    blocks = [nn.Sequential(GatedBlock(16, 16 * stride, stride, norm)) for stride in (1, 2)]
    return _classified("linear", 32, norm, pre=stem, stage1=blocks[0], stage2=blocks[1])


def densenet(norm):
    """Growth 8, two blocks of two layers."""

    def block(inputs):
        return named(**{f"bottle_neck_layer_{i}": DenseLayer(inputs + 8 * i, 8, norm) for i in (0, 1)})

    features = named(
        dense_block_layer_0=block(16),
        transition_layer_0=named(down_sample=nn.Sequential(_norm_or_place(32, norm), conv(32, 16, 1), nn.AvgPool2d(2))),
        dense_block1=block(16),
        bn=_norm_or_place(32, norm),
        relu=nn.ReLU(),
    )
    return _classified("linear", 32, norm, conv1=conv(3, 16, 3), features=features)


def vgg(norm):
    """Of a sixteenth of the width, for 64 x 64 pixels: the head flattens four."""
    layers, inputs = [], 3
    for channels, repeats in zip((4, 8, 16, 32, 32), (1, 1, 2, 2, 2), strict=True):
        for _ in range(repeats):
            layers += [conv(inputs, channels, 3, bias=True), *_norm(channels, norm), nn.ReLU()]
            inputs = channels
        layers.append(nn.MaxPool2d(2))
    head = [nn.Linear(4 * 32, 256), nn.ReLU(), nn.Dropout(), nn.Linear(256, 256), nn.ReLU(), nn.Dropout()]
    last = [] if norm else [nn.BatchNorm1d(10, affine=False)]
    classifier = nn.Sequential(*head, nn.Linear(256, 10), *last)
    return named(features=nn.Sequential(*layers), flatten=nn.Flatten(), classifier=classifier)
