"""Floating point operations of convolutions and matrix products, counted in a compiled program's instructions."""

import itertools
import math
import re
from dataclasses import dataclass

from mimicnorm_jax.planning.hlo import Array, Computation, Instruction

_CUDNN = re.compile(r"__cudnn\$conv(\w+)")
_MATMUL = re.compile(r"__cublas\$(?:gemm|lt)|__onednn\$matmul|__triton_gemm|__cutlass")


@dataclass(frozen=True)
class Geometry:
    """A convolution as its forward pass sees it, whichever of its three arrays is the result.

    Attributes:
      inputs, kernel, outputs: the three arrays.
      labels: their dimensions as XLA writes them, `b01f_01io->b01f`.
      window: one (stride, low padding, input dilation, kernel dilation) for each spatial dimension.
      groups: of the batch, in a depthwise convolution's gradient; feature groups show in the kernel's shape.
    """

    inputs: Array
    kernel: Array
    outputs: Array
    labels: str
    window: tuple[tuple[int, int, int, int], ...]
    groups: int = 1

    def flops(self) -> int:
        """Two for each multiplication of a kernel's element with an image's; padding and holes do not count.

        A convolution and its gradients multiply the same pairs, so they count the same. So does XLA's own analysis.
        Zeros that the compiler wrote into an array before are numbers like others, as the kernel multiplies them:
        those around and between the gradient of a depthwise convolution with a stride on CUDA, for one.
        """
        images, kernel, outputs = re.split("_|->", self.labels)
        pairs = 1
        for i, (stride, low, image_dilation, kernel_dilation) in enumerate(self.window):
            size = self.inputs.dims[images.index(str(i))]
            taps = self.kernel.dims[kernel.index(str(i))]
            places = self.outputs.dims[outputs.index(str(i))]
            reach = (size - 1) * image_dilation
            seen = (o * stride + k * kernel_dilation - low for o, k in itertools.product(range(places), range(taps)))
            pairs *= sum(0 <= place <= reach and place % image_dilation == 0 for place in seen)
        batch = self.inputs.dims[images.index("b")] // self.groups
        features = self.kernel.dims[kernel.index("i")] * self.kernel.dims[kernel.index("o")]
        return 2 * batch * pairs * features


def _window(text: str, spatial: int) -> tuple[tuple[int, int, int, int], ...]:
    fields = dict(part.split("=") for part in text.split() if "=" in part)

    def numbers(name: str, default: str) -> list[int]:
        parts = fields[name].split("x") if name in fields else [default] * spatial
        return [int(part.split("_")[0]) for part in parts]

    names = {"stride": "1", "pad": "0_0", "lhs_dilate": "1", "rhs_dilate": "1"}
    return tuple(zip(*(numbers(name, default) for name, default in names.items()), strict=True))


def convolution_kind(instruction: Instruction) -> str:
    """`forward`, `input gradient` or `kernel gradient` of a cuDNN call; empty for any other instruction."""
    found = _CUDNN.match(instruction.target) if instruction.opcode == "custom-call" else None
    if not found:
        return ""
    return {"BackwardInput": "input gradient", "BackwardFilter": "kernel gradient"}.get(found[1], "forward")


def _geometry(computation: Computation, instruction: Instruction) -> Geometry:
    first, second = (computation.operand(instruction, i).arrays[0] for i in (0, 1))
    result = instruction.arrays[0]  # a cuDNN call returns a workspace beside it
    places = {
        "input gradient": (result, second, first),
        "kernel gradient": (first, result, second),
    }
    inputs, kernel, outputs = places.get(convolution_kind(instruction), (first, second, result))
    labels = instruction.attribute("dim_labels")
    window = _window(instruction.attribute("window"), len(re.findall(r"\d", labels.split("_")[0])))
    return Geometry(inputs, kernel, outputs, labels, window, int(instruction.attribute("batch_group_count") or 1))


def _product(computation: Computation, instruction: Instruction) -> int:
    left = computation.operand(instruction, 0).arrays[0]
    found = re.search(r'lhs_contracting_dim(?:s|ensions"):\s*\[([^\]]*)\]', instruction.attributes)
    text = found[1] if found else instruction.attribute("lhs_contracting_dims")
    contracted = math.prod(left.dims[int(number)] for number in re.findall(r"\d+", text))
    return 2 * instruction.arrays[0].size * contracted


def multiplies(instruction: Instruction) -> bool:
    """Whether it is a convolution or a matrix product."""
    if instruction.opcode == "custom-call":
        return bool(convolution_kind(instruction) or _MATMUL.match(instruction.target))
    return instruction.opcode in ("convolution", "dot", "ragged-dot")


def flops(computation: Computation, instruction: Instruction) -> int:
    """Operations of one convolution or matrix product that stands in `computation`; 0 of any other instruction."""
    if not multiplies(instruction):
        return 0
    if instruction.opcode == "convolution" or convolution_kind(instruction):
        return _geometry(computation, instruction).flops()
    return _product(computation, instruction)
