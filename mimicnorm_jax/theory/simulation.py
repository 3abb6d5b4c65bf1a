"""What random MLPs of finite width do: one function a quantity, one sample a random network.

`verify` holds the samples to the theory, `figures` makes pictures' data of them.
"""

from collections.abc import Callable, Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from mimicnorm_jax.diagnostics import EmpiricalNTK, condition_number, curvature
from mimicnorm_jax.theory import random_mlp
from mimicnorm_jax.theory.random_mlp import Params, RandomMLP
from mimicnorm_jax.theory.stack import Stack

Measure = Callable[[RandomMLP, Params], jax.Array]


def sample(measure: Measure, mlp: RandomMLP, key: jax.Array, draws: int) -> np.ndarray:
    """`measure` of `draws` networks with independent kernels, `(draws, *shape of one)`.

    Args:
      measure: of a network and its kernels.
      mlp: the network.
      key: of the kernels.
      draws: of networks.
    """
    compiled = jax.jit(lambda params: measure(mlp, params))
    return np.stack([np.asarray(compiled(params)) for params in _networks(mlp, key, draws)])


def _networks(mlp: RandomMLP, key: jax.Array, draws: int) -> Iterator[Params]:
    return (mlp.init(jax.random.fold_in(key, i)) for i in range(draws))


def inputs_of(gram: jax.Array) -> jax.Array:
    """`N` inputs of dimension `N` whose inner products over that dimension are `gram`, `(N, N)`."""
    return jnp.linalg.cholesky(gram) * len(gram) ** 0.5


def equicorrelated(count: int, rho: float) -> jax.Array:
    """The Gram matrix `(count, count)` with 1 on the diagonal and `rho` off it."""
    return (1 - rho) * jnp.eye(count) + rho


def energy_ratio(mlp: RandomMLP, params: Params) -> jax.Array:
    """Last over first layer's mean square, the mean over as many orthogonal inputs as the MLP has dimensions.

    Args:
      mlp: the network.
      params: its kernels.

    Returns:
      A scalar array.
    """
    layers = mlp.preactivations(params, inputs_of(jnp.eye(mlp.inputs)))
    return ((layers[-1] ** 2).mean(1) / (layers[0] ** 2).mean(1)).mean()


def tangent_growth(mlp: RandomMLP, params: Params) -> jax.Array:
    """Growth per layer of a tangent's sum of squares over the whole batch, `(depth - 1,)`.

    Inputs are orthogonal to each other and to the tangents, half of the input dimensions each.

    Args:
      mlp: the network.
      params: its kernels.
    """
    x, tangent = jnp.split(inputs_of(jnp.eye(mlp.inputs)), 2)
    _, tangents = jax.jvp(lambda x: mlp.preactivations(params, x), (x,), (tangent,))
    energy = jnp.stack([(each**2).sum() for each in tangents])
    return energy[1:] / energy[:-1]


def cosines(x: jax.Array) -> Measure:
    """Measures the cosines of all pairs of inputs `(N, n_0)` by layer, `(depth, N, N)`."""

    def measure(mlp: RandomMLP, params: Params) -> jax.Array:
        layers = [z / jnp.linalg.norm(z, axis=1, keepdims=True) for z in mlp.preactivations(params, x)]
        return jnp.stack([z @ z.T for z in layers])

    return measure


def jacobian(mlp: RandomMLP, params: Params) -> jax.Array:
    """Jacobian `(outputs, width)` of the outputs by the first pre-activations, at a random input.

    Args:
      mlp: the network.
      params: its kernels.
    """
    first = mlp.preactivations(params, inputs_of(jnp.eye(mlp.inputs)))[0][0]
    return jax.jacrev(lambda z: mlp.onwards(params, z[None])[-1][0])(first)


def tangent_kernels(mlp: RandomMLP, x: jax.Array, key: jax.Array, draws: int) -> np.ndarray:
    """Empirical tangent kernels of `draws` networks on inputs `(N, n_0)`, `(draws, N, N)`: the mean over outputs.

    In the theory's parametrization, every layer weighted by its kernel's initial variance. With BatchNorm it is the
    whole batch's.

    Args:
      mlp: the network.
      x: inputs, `(N, n_0)`.
      key: of the kernels.
      draws: of networks.
    """
    compiled = _kernel(mlp)
    return np.stack([compiled(params, x) for params in _networks(mlp, key, draws)]) / mlp.outputs


def layer_shares(mlp: RandomMLP, x: jax.Array, key: jax.Array, draws: int) -> np.ndarray:
    """Each layer's share of the tangent kernel's trace over inputs `(N, n_0)`, `(draws, depth)`.

    Args:
      mlp: the network.
      x: inputs, `(N, n_0)`.
      key: of the kernels.
      draws: of networks.
    """
    compiled = _kernel(mlp, per_parameter=True)
    kernels = [compiled(params, x) for params in _networks(mlp, key, draws)]
    traces = np.array([[np.trace(kernel[f"layer{i + 1}"]) for i in range(mlp.depth)] for kernel in kernels])
    return traces / traces.sum(1, keepdims=True)


def _kernel(mlp: RandomMLP, *, per_parameter: bool = False) -> EmpiricalNTK:
    batch_coupled = mlp.normalized or mlp.last_norm
    return EmpiricalNTK(
        mlp.apply, output="trace", weights=mlp.init_variance, batch_coupled=batch_coupled, per_parameter=per_parameter
    )


def deep_kernels(key: jax.Array) -> dict[str, np.ndarray]:
    """By kind, tangent kernels of 6 networks, n = 256, L = 16, on 32 inputs on the sphere: `(6, 32, 32)`."""
    kernel_key, input_key = jax.random.split(key)
    x = on_the_sphere(input_key, 32, 256)
    return {
        kind: tangent_kernels(make(inputs=256, width=256, depth=16, outputs=1), x, kernel_key, 6)
        for kind, make in random_mlp.KINDS.items()
    }


def sharpness(stack: Stack, key: jax.Array, samples: int, draws: int) -> np.ndarray:
    """The squared mean gradient by each kernel `(depth,)`, and the Fisher information's largest eigenvalue.

    Of `draws` networks on as many batches of `samples` standard normal inputs, `(draws, depth + 1)`. The mean gradient
    is that of the mean output.

    Args:
      stack: the network.
      key: of kernels and inputs.
      samples: of a batch.
      draws: of networks.
    """

    @jax.jit
    def mean_gradient(params: Params, x: jax.Array) -> jax.Array:
        gradient = jax.grad(lambda params: stack.apply(params, x).mean())(params)
        return jnp.stack([(gradient[f"layer{i + 1}"] ** 2).sum() for i in range(stack.depth)])

    found = []
    for draw in range(draws):
        params_key, input_key = jax.random.split(jax.random.fold_in(key, draw))
        params = stack.init(params_key)
        x = jax.random.normal(input_key, (samples, stack.side, stack.side, stack.channels[0]))
        top = curvature.gauss_newton_eigenvalues(stack.apply, params, x, key=input_key, loss="squared")
        found.append(np.append(mean_gradient(params, x), top.values))
    return np.stack(found)


def condition_numbers(kernels: Iterable[ArrayLike]) -> np.ndarray:
    """`condition_number` of each kernel `(N, N)`."""
    return np.array([condition_number(kernel) for kernel in kernels])


def on_the_sphere(key: jax.Array, count: int, dimension: int) -> jax.Array:
    """Uniform inputs `(count, dimension)` of mean square 1.

    Args:
      key: of the draw.
      count: of inputs.
      dimension: of each.
    """
    x = jax.random.normal(key, (count, dimension))
    return x * dimension**0.5 / jnp.linalg.norm(x, axis=1, keepdims=True)
