"""Networks with all that stands around their convolutions folded into kernels and biases."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from mimicnorm_jax.errors import FoldError, unknown
from mimicnorm_jax.interop.affine import Affine, Network, Path, Shape, image_shape_of, read_affine
from mimicnorm_jax.methods import METHODS, BatchNorm, Method
from mimicnorm_jax.methods.folding import folded
from mimicnorm_jax.models import LayerFactory

TOLERANCE = 1e-3
"""How far logits may be from the network's own, relative to the largest: far above rounding, far below a mistake.

Or ten times the rounding of kernels in less than float32."""
KERNEL_TOLERANCE = 1e-5
"""How far a transform may move a kernel that it is meant to leave alone, relative to its largest entry."""
_NEUTRAL = {"scale": 1.0, "bias": 0.0, "mean": 0.0, "var": 1 - 1e-5}
"""Of parameters that do nothing then, and of the running averages of a last BatchNorm of epsilon 1e-5."""


def fold(
    model: nn.Module, variables: Mapping[str, Any], *, image_shape: Shape | None = None
) -> tuple[nn.Module, dict[str, Any]]:
    """The same function in evaluation, as a network of plain convolutions and dense layers.

    Centering and standardization, scalars, BatchNorms with their running averages and the last BatchNorm become part of
    kernels and biases. What stays, and costs no product: see `methods.folded`.

    Args:
      model: from `models.create`, under any method whose norms use running averages.
      variables: of it, trained: `params` and, where there are norms, `batch_stats`.
      image_shape: that it takes, `(H, W, C)`; by default 32 x 32 or 224 x 224 pixels in 3 channels or 1, as fits.

    Returns:
      A network of the same class and names whose convolutions all have biases, under the record `methods.folded`, and
      its variables `{"params": ...}`, in the model's `param_dtype`.

    Raises:
      FoldError: names what cannot be folded: GroupNorms, dynamic tanh, a BatchNorm in front of a ReLU (DenseNet) or in
        training mode, a foreign module.

    Example:
      >>> from mimicnorm_jax import models
      >>> model = models.create("resnet8", method="mimicnorm", num_classes=10, width=0.125)
      >>> shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.ones((1, 8, 8, 3)))
      >>> variables = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), shapes)
      >>> plain, plain_variables = fold(model, variables, image_shape=(8, 8, 3))
      >>> sorted(plain_variables["params"]["stem"]["conv"]), "last_bn" in plain_variables.get("batch_stats", {})
      (['bias', 'kernel'], False)
    """
    variables, shape = _checked(model, variables, image_shape)
    network = read_affine(model, variables, shape)
    method = folded(_factory(model).method, relu6=network.relu6)
    return _rebuilt(model, variables, network, method, shape)


def absorb_batchnorm(
    model: nn.Module,
    variables: Mapping[str, Any],
    *,
    method: str = "none",
    image_shape: Shape | None = None,
) -> tuple[nn.Module, dict[str, Any]]:
    """The same function in evaluation, as a network without norms between its layers: to fine-tune without BatchNorm.

    Each BatchNorm with its running averages becomes part of the kernel and bias before it, and the scalars of the
    method start at 1.

    Args:
      model: from `models.create`, under a method with BatchNorms between layers.
      variables: of it, trained: `params` and `batch_stats`.
      method: that the network goes on under: `none` or, with a last BatchNorm that starts as the identity, `lastbn`;
        `mimicnorm` and `weightmean` if its kernels are centered already: the mean of a kernel times the sum of the
        inputs below it is no bias, and centering would lose it.
      image_shape: as in `fold`.

    Returns:
      A network of the same class and names under `method`, and its variables. Where the network has convolutions
      without biases or ReLU6 under BatchNorm alone (MobileNetV2, bottlenecks of CIFAR ResNets), under `method` with
      `conv_biases` and `relu6` set, named so.

    Raises:
      FoldError: as `fold`, and where there is no BatchNorm or `method` changes the function.
    """
    if method not in METHODS:
        raise FoldError(unknown("method", method, METHODS))
    target = METHODS[method]
    own = _factory(model).method
    if not isinstance(own.norm, BatchNorm):
        raise FoldError(
            f"method={own.name!r} has no BatchNorm between layers to absorb; interop.fold folds what it has"
        )
    if target.norm is not None:
        raise FoldError(
            f"method={method!r} has norms between layers itself: choose none, lastbn, weightmean or mimicnorm"
        )
    variables, shape = _checked(model, variables, image_shape)
    network = read_affine(model, variables, shape)
    if network.relu6 or not _has_biases(_under(model, target), network, shape):
        target = replace(target, name=f"{method}_absorbed", conv_biases=True, relu6=network.relu6)
    return _rebuilt(model, variables, network, target, shape)


def _factory(model: Any) -> LayerFactory:
    factory = getattr(model, "factory", None)
    if not isinstance(factory, LayerFactory):
        raise FoldError(
            f"a {type(model).__name__} is no network of models.create: only those, whose layers come from a "
            "LayerFactory, say which norm belongs to which convolution"
        )
    return factory


def _checked(model: nn.Module, variables: Any, image_shape: Shape | None) -> tuple[dict[str, Any], Shape]:
    _factory(model)
    if not isinstance(variables, Mapping) or "params" not in variables:
        raise FoldError("variables are a mapping with params and, where there are norms, batch_stats")
    unboxed: dict[str, Any] = nn.meta.unbox(dict(variables))
    return unboxed, image_shape_of(model, unboxed, image_shape)


def _under(model: Any, method: Method) -> Any:
    return model.clone(factory=replace(model.factory, method=method, center_in_call=True))


def _template(model: nn.Module, image_shape: Shape) -> dict[Path, Any]:
    image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    return flatten_dict(nn.meta.unbox(jax.eval_shape(model.init, jax.random.key(0), image)))


def _has_biases(model: nn.Module, network: Network, image_shape: Shape) -> bool:
    template = _template(model, image_shape)
    return all(("params", *path, "bias") in template for path in network.layers)


def _rebuilt(
    model: Any, variables: Mapping[str, Any], network: Network, method: Method, image_shape: Shape
) -> tuple[nn.Module, dict[str, Any]]:
    """The network under another method that computes these layers, proven to be the same function."""
    target = _under(model, method)
    given: dict[Path, Any] = flatten_dict(dict(variables))
    leaves: dict[Path, Any] = {}
    for path, leaf in _template(target, image_shape).items():
        *owner, name = path[1:]
        layer = network.layers.get(tuple(owner))
        if layer is not None and name in Affine._fields:
            value = getattr(layer, name)
        elif path in given and not (name == "scale" and method.residual.folded):
            value = given[path]
        elif path in given:
            value = jnp.sign(given[path])
        else:
            value = jnp.full(leaf.shape, _NEUTRAL[name])
        leaves[path] = jnp.asarray(value, leaf.dtype)
    rebuilt = unflatten_dict(leaves)
    if method.kernel_transform.function is not None:
        _require_layers(network, read_affine(target, rebuilt, image_shape), method)
    _require_same_logits(model, variables, target, rebuilt, image_shape)
    return target, rebuilt


def _require_layers(wanted: Network, found: Network, method: Method) -> None:
    """Raises FoldError if the method changes a layer, as centering changes a kernel that has a mean."""
    lost = {}
    for path, layer in wanted.layers.items():
        size = float(abs(layer.kernel).max())
        lost[path] = float(abs(layer.kernel - found.layers[path].kernel).max()) / (size or 1.0)
    worst = max(lost, key=lambda path: lost[path])
    changed = [path for path in lost if lost[path] > KERNEL_TOLERANCE]
    if changed:
        raise FoldError(
            f"method={method.name!r} changes {len(changed)} of {len(lost)} kernels, {'/'.join(worst)} by "
            f"{lost[worst]:.2g} of its largest entry: what it takes away depends on the input, and no bias carries it. "
            "Use method='none'"
        )


def _require_same_logits(model: Any, variables: Any, target: Any, rebuilt: Any, image_shape: Shape) -> None:
    """Raises FoldError if the two differ on random images: the network then does more than its layers say."""
    images = np.random.default_rng(0).normal(size=(2, *image_shape)).astype(np.float32)

    @jax.jit
    def both(variables: Any, rebuilt: Any) -> tuple[jax.Array, jax.Array]:
        nets = (net.clone(factory=replace(net.factory, dtype=None, remat="none")) for net in (model, target))
        with jax.default_matmul_precision("highest"):
            return tuple(net.apply(v, images) for net, v in zip(nets, (variables, rebuilt), strict=True))

    ours, theirs = (np.asarray(logits, np.float64) for logits in both(variables, rebuilt))
    apart = abs(ours - theirs).max()
    rounding = max(float(jnp.finfo(leaf.dtype).eps) for leaf in jax.tree.leaves(rebuilt))
    if not apart <= max(TOLERANCE, 10 * rounding) * abs(ours).max():
        raise FoldError(
            f"the folded {type(model).__name__} gives logits {apart:.2g} away from the network's own, at most "
            f"{abs(ours).max():.2g}: it does something between its layers that only its own code knows"
            + ("" if np.isfinite(ours).all() else "; the network's logits are not finite")
        )
