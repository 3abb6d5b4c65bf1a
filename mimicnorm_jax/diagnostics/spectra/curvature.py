r"""Largest eigenvalues of a network's tangent kernel and of its Gauss-Newton matrix, from products with vectors alone.

With J the Jacobian of all N O outputs by all parameters, the tangent kernel is $\Theta = J J^\top$. The Gauss-Newton
matrix of a loss that is a mean over examples is $G = J^\top H J / N$, H the loss's second derivative by the outputs. It
has the nonzero eigenvalues of $B^\top J J^\top B / N$ with $B B^\top = H$, of which Lanczos' method is asked, so that
the vectors are as long as the outputs and not the parameters.

The whole batch is differentiated at once: right for a network that normalizes by its batch, and of the memory of one
training step's backward pass.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp

from mimicnorm_jax.diagnostics.spectra.lanczos import LARGEST, Eigenvalues, Search, largest
from mimicnorm_jax.diagnostics.tracing.layers import forward_mode, prepared
from mimicnorm_jax.diagnostics.tracing.outputs import check_finite, check_outputs
from mimicnorm_jax.diagnostics.tracing.parameters import ApplyFn, Split
from mimicnorm_jax.errors import unknown

Loss = Literal["softmax", "squared"]
"""Softmax cross entropy of logits, or half the squared distance of the outputs to targets."""
_Root = Callable[[jax.Array, jax.Array], jax.Array]


def _plain(_: jax.Array, u: jax.Array) -> jax.Array:
    return u


def _squared(outputs: jax.Array, u: jax.Array) -> jax.Array:
    return u / jnp.sqrt(jnp.asarray(len(outputs), u.dtype))


def _softmax(outputs: jax.Array, u: jax.Array) -> jax.Array:
    r"""$B = diag(\sqrt p) - p \sqrt p^\top$: then $B B^\top = diag(p) - p p^\top$, for p sums to 1."""
    p = jax.nn.softmax(outputs)
    v = jnp.sqrt(p) * u
    return _squared(outputs, v - p * v.sum(1, keepdims=True))


_ROOTS: dict[str, _Root] = {"softmax": _softmax, "squared": _squared}


@partial(jax.jit, static_argnames=("apply_fn", "root", "search"))
def _largest(
    apply_fn: ApplyFn, params: Any, x: jax.Array, key: jax.Array, root: _Root, search: Search
) -> tuple[Eigenvalues, jax.Array]:
    split = Split.of(params)
    outputs, linear = jax.linearize(lambda arrays: apply_fn(split.join(arrays), x), split.arrays)
    check_outputs(outputs, x.shape)
    backward = jax.linear_transpose(linear, split.arrays)
    dtype = jnp.promote_types(outputs.dtype, jnp.float32)
    wide = outputs.astype(dtype)
    into = partial(root, wide)
    out_of = jax.linear_transpose(into, wide)

    def matvec(v: jax.Array) -> jax.Array:
        cotangent = into(v.reshape(outputs.shape)).astype(outputs.dtype)
        return out_of(linear(*backward(cotangent)).astype(dtype))[0].ravel()

    search.check(outputs.size)
    return largest(matvec, jax.random.normal(key, (outputs.size,), dtype), search), outputs


def ntk_eigenvalues(
    apply_fn: ApplyFn,
    params: Any,
    x: jax.Array,
    *,
    key: jax.Array,
    search: Search = LARGEST,
) -> Eigenvalues:
    r"""Largest eigenvalues of the empirical tangent kernel $\Theta = J J^\top$, `(N O, N O)`, of all outputs.

    They are the largest squared singular values of the Jacobian by all parameters. With equal eigenvalues only one is
    sure to be found: see `Eigenvalues`.

    Args:
      apply_fn: the network; its examples may influence one another.
      params: its parameters; leaves that are not floating-point arrays are held fixed.
      x: inputs, `(N, ...)`.
      key: for the start vector.
      search: how many eigenvalues, and when to stop; each product is a forward and a backward pass.

    Raises:
      ValueError: unless `1 <= count <= N O` and `num_matvecs >= count`, or if outputs are not finite.
    """
    return _checked(apply_fn, params, x, key, _plain, search)


def _checked(apply_fn: ApplyFn, params: Any, x: jax.Array, key: jax.Array, root: _Root, search: Search) -> Eigenvalues:
    apply_fn, params, x = prepared(apply_fn, params, x)
    with forward_mode("an eigenvalue of curvature"):
        found, outputs = _largest(apply_fn, params, x, key, root, search)
    check_finite(outputs)
    return found


def gauss_newton_eigenvalues(
    apply_fn: ApplyFn,
    params: Any,
    x: jax.Array,
    *,
    key: jax.Array,
    loss: Loss = "softmax",
    search: Search = LARGEST,
) -> Eigenvalues:
    r"""Largest eigenvalues of the Gauss-Newton matrix $G = J^\top H J / N$ of the mean loss over the N examples.

    H is $diag(p) - p p^\top$ of each example for softmax cross entropy, where G is the Fisher information as well, and
    the identity for half the squared distance; neither depends on labels. Gradient descent on the model that is linear
    in the parameters diverges above the learning rate $2 / \lambda_{max}$.

    Args:
      apply_fn: the network; its examples may influence one another.
      params: its parameters; leaves that are not floating-point arrays are held fixed.
      x: inputs, `(N, ...)`.
      key: for the start vector.
      loss: of the outputs.
      search: how many eigenvalues, and when to stop; each product is a forward and a backward pass.

    Raises:
      ValueError: for an unknown loss, unless `1 <= count <= N O` and `num_matvecs >= count`, or if outputs are not
        finite.

    Example:
      >>> x = jnp.array([[1.0, 0.0], [0.0, 2.0]])
      >>> def apply_fn(params, x):
      ...     return x @ params["kernel"]
      >>> params = {"kernel": jnp.zeros((2, 1))}
      >>> found = gauss_newton_eigenvalues(apply_fn, params, x, key=jax.random.key(0), loss="squared")
      >>> found.values.round(4).tolist()  # of diag(1, 4) / 2
      [2.0]
    """
    if loss not in _ROOTS:
        raise ValueError(unknown("loss", loss, _ROOTS))
    return _checked(apply_fn, params, x, key, _ROOTS[loss], search)


def largest_stable_rate(eigenvalue: float, momentum: float = 0.0) -> float:
    r"""$\eta^* = 2 (1 + \mu) / \lambda_{max}$, above which heavy-ball gradient descent diverges on a quadratic.

    On a network it is that of the model that is linear in the parameters, at the parameters where the eigenvalue was
    taken, for a full batch.

    Raises:
      ValueError: unless the eigenvalue is positive and `0 <= momentum < 1`.

    Example:
      >>> largest_stable_rate(10.0), largest_stable_rate(10.0, momentum=0.9)
      (0.2, 0.38)
    """
    if not eigenvalue > 0:
        raise ValueError(f"eigenvalue is {eigenvalue}: the largest of a curvature matrix is above 0")
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum is {momentum}: it is at least 0 and below 1")
    return 2 * (1 + momentum) / eigenvalue
