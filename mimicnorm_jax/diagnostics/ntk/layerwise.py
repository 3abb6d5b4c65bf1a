"""The layerwise tangent kernel: no derivative by a kernel is formed per example where its factors are cheaper.

One backward sweep per output gives every layer's cotangents at once; with the layer's input they are its derivatives.
A kernel that is a parameter, scaled or centered (or neither), contributes through its patches, scaled or centered. A
scalar folded into a kernel contributes through the product with the kernel's derivative. Everything else (biases,
normalization parameters, layers of no known kind) is differentiated in the same sweep, example by example.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mimicnorm_jax.diagnostics.ntk.features import FactoredJacobian, Feature, Jacobian, Output, costs
from mimicnorm_jax.diagnostics.ntk.matching import Kernel, match_kernels
from mimicnorm_jax.diagnostics.tracing.interpreter import LayerCall, TracedNetwork


class Layerwise:
    """Features of examples under the layerwise method.

    Args:
      network: traced for one group of examples.
      params: leaves of the parameters, arrays or shapes.
      weights: by leaf; 0 leaves a parameter out.
      selected: the output that is differentiated, or None for all.
      fold_biases: whether a bias may be counted with its kernel.

    Attributes:
      kernels: the sites whose derivatives may stay factored.
      general: sites whose kernels are any other function of parameters.
      dense: leaves that are differentiated example by example.
    """

    def __init__(
        self,
        network: TracedNetwork,
        params: Sequence[Any],
        weights: Sequence[float],
        selected: int | None,
        fold_biases: bool = True,
    ) -> None:
        self.network, self.weights, self.selected, self.fold_biases = network, weights, selected, fold_biases
        recognized = match_kernels(network)
        self.kernels: list[Kernel] = []
        self.general: list[LayerCall] = []
        dense = {leaf for leaf in network.direct if weights[leaf]}
        for site in network.sites:
            if not any(weights[leaf] for leaf in site.leaves):
                continue
            if site.index in recognized:
                kernel = recognized[site.index]
                self.kernels.append(kernel)
                dense |= {scalar for scalar in kernel.scalars if weights[scalar]}
            else:
                self.general.append(site)
                dense |= {leaf for leaf in site.leaves if weights[leaf]}
        self.dense = tuple(sorted(dense))
        self.sizes = {leaf: int(np.prod(params[leaf].shape)) for leaf in self.dense}

    @property
    def rows(self) -> int:
        """Backward sweeps per example."""
        return 1 if self.selected is not None else self.network.outputs.shape[1]

    def features(self, params: Any, x: jax.Array, as_pair: Mapping[int, bool], write: bool) -> dict[int, Feature]:
        """Derivatives of all examples, by leaf.

        Args:
          params: the parameters' tree.
          x: groups of examples, `(n, q, ...)`.
          as_pair: by site, whether its derivatives stay factored.
          write: whether to write out the others at once, for features that are used more than once.
        """
        leaves = jax.tree.leaves(params)
        factors, slopes = self._factors(leaves), self._slopes(leaves)
        folded = self._folded(as_pair)
        patches, blocks, dense = jax.vmap(lambda group: self._sweep(leaves, group, factors, slopes, as_pair))(x)
        features: dict[int, Feature] = {}
        for kernel in self.kernels:
            i = kernel.site.index
            if not self.weights[kernel.leaf]:
                continue
            if self._at_once(as_pair[i]):
                features[kernel.leaf] = Jacobian(blocks[i])
                continue
            bias = 0.0 if kernel.bias is None or kernel.bias not in folded else self.weights[kernel.bias]
            pair = FactoredJacobian(patches[i], blocks[i], jnp.asarray(bias, self.network.dtype), as_pair[i])
            features[kernel.leaf] = pair.rows() if write and not as_pair[i] else pair
        for leaf, rows in dense.items():
            features[leaf] = Jacobian(rows * jnp.sqrt(jnp.asarray(self.weights[leaf], self.network.dtype)))
        return features

    def _folded(self, as_pair: Mapping[int, bool]) -> set[int | None]:
        """Biases whose contribution goes with their kernel's: it is that of one more input, the constant 1."""
        if not self.fold_biases:
            return set()
        return {
            kernel.bias
            for kernel in self.kernels
            if as_pair[kernel.site.index] and kernel.bias is not None and self.weights[kernel.leaf]
        }

    def _kernels_of(self, leaves: Sequence[Any], chosen: Mapping[int, Any], sites: Sequence[int]) -> Any:
        values = list(leaves)
        for leaf, value in chosen.items():
            values[leaf] = value
        kernels = self.network.kernels(values)
        return [kernels[i] for i in sites]

    def _factors(self, leaves: Sequence[jax.Array]) -> dict[int, Any]:
        """By site, the a in `T T^T = a (identity or centering)`: the squared norm of T^T's image of one entry."""
        scaled = [kernel for kernel in self.kernels if kernel.scaled]
        factors: dict[int, Any] = {kernel.site.index: jnp.ones((), self.network.dtype) for kernel in self.kernels}
        if not scaled:
            return factors
        sites = [kernel.site.index for kernel in scaled]
        chosen = {kernel.leaf: leaves[kernel.leaf] for kernel in scaled}
        kernels, pull = jax.vjp(lambda chosen: self._kernels_of(leaves, chosen, sites), chosen)
        entries = [jnp.zeros_like(k).at[(0,) * k.ndim].set(1) for k in kernels]
        pulled = pull(entries)[0]
        for kernel in scaled:
            fan_in = kernel.site.product.sizes[2]
            share = 1 - 1 / fan_in if kernel.centered else 1.0
            factors[kernel.site.index] = jnp.sum(pulled[kernel.leaf].astype(self.network.dtype) ** 2) / share
        return factors

    def _slopes(self, leaves: Sequence[jax.Array]) -> dict[tuple[int, int], jax.Array]:
        """By scalar and site, the kernel's derivative by the scalar."""
        slopes: dict[tuple[int, int], jax.Array] = {}
        sites = {kernel.site.index: kernel for kernel in self.kernels if kernel.scalars}
        for scalar in sorted({s for kernel in sites.values() for s in kernel.scalars if self.weights[s]}):
            touched = [i for i, kernel in sites.items() if scalar in kernel.scalars]
            function = lambda value, s=scalar, t=touched: self._kernels_of(leaves, {s: value}, t)  # noqa: E731
            tangents = _tangents(function, leaves[scalar])
            for i, tangent in zip(touched, tangents, strict=True):
                slopes[scalar, i] = sites[i].site.product.kernel(tangent).astype(self.network.dtype)
        return slopes

    def _at_once(self, as_pair: bool) -> bool:
        """Whether a site's derivatives are written out within the sweep: where a sweep of a whole batch is large."""
        return not as_pair and self.network.outputs.shape[0] > 1

    def _sweep(
        self,
        leaves: Sequence[jax.Array],
        x: jax.Array,
        factors: Mapping[int, jax.Array],
        slopes: Mapping[tuple[int, int], jax.Array],
        as_pair: Mapping[int, bool],
    ) -> tuple[dict[int, jax.Array], dict[int, jax.Array], dict[int, jax.Array]]:
        """One group of examples.

        Returns:
          By site, patches, scaled and centered like the kernel; by site, cotangents `(q, o, s, g, c)` or derivatives
          `(q, o, k)`; by leaf, derivatives `(q, o, k)`.
        """
        network, folded = self.network, self._folded(as_pair)
        watched = [*(kernel.site for kernel in self.kernels), *self.general]
        shifts = {site.index: jnp.zeros(site.shape, site.dtype) for site in watched}
        direct = {leaf: leaves[leaf] for leaf in self.dense if leaf in network.direct and leaf not in folded}

        def forward(direct: dict[int, jax.Array], shifts: dict[int, jax.Array]) -> Any:
            values = [direct.get(i, leaf) for i, leaf in enumerate(leaves)]
            outputs, record = network.run(values, x, shifts=shifts, frozen_kernels=True)
            return outputs, record.operands

        outputs, pull, operands = jax.vjp(forward, direct, shifts, has_aux=True)
        wide = network.dtype
        raw = {site.index: site.product.patches(operands[site.index]).astype(wide) for site in watched}
        moved = {key: jnp.einsum("sgf,gfc->sgc", raw[key[1]], slope) for key, slope in slopes.items()}
        patches = {kernel.site.index: self._like_kernel(kernel, raw, factors) for kernel in self.kernels}
        general = self._general(leaves, raw)

        def one(cotangent: jax.Array) -> tuple[dict[int, jax.Array], dict[int, jax.Array]]:
            direct, by_site = pull(cotangent)
            dense = {leaf: rows.astype(wide) for leaf, rows in direct.items()}
            blocks = {site.index: site.product.outputs(by_site[site.index]).astype(wide) for site in watched}
            for (scalar, i), slope in moved.items():
                dense[scalar] = dense.get(scalar, 0) + jnp.vdot(slope, blocks[i]).reshape(leaves[scalar].shape)
            for leaf, rows in general(blocks).items():
                dense[leaf] = dense.get(leaf, 0) + rows.astype(wide)
            kept = {
                i: jnp.einsum("sgf,sgc->gfc", patches[i], blocks[i]).reshape(-1) if self._at_once(pair) else blocks[i]
                for i, pair in as_pair.items()
            }
            return kept, {leaf: rows.reshape(-1) for leaf, rows in dense.items()}

        basis = self._basis(outputs)
        if outputs.shape[0] == 1:
            return patches, *jax.vmap(jax.vmap(one))(basis)
        rows = lax.map(one, basis.reshape(-1, *outputs.shape), batch_size=64)
        return patches, *jax.tree.map(lambda row: row.reshape(*basis.shape[:2], *row.shape[1:]), rows)

    def _like_kernel(self, kernel: Kernel, raw: Mapping[int, jax.Array], factors: Mapping[int, jax.Array]) -> jax.Array:
        patches = raw[kernel.site.index]
        if kernel.centered:
            patches = patches - patches.mean(-1, keepdims=True)
        scale = jnp.sqrt(factors[kernel.site.index] * self.weights[kernel.leaf])
        return patches * scale.astype(patches.dtype)

    def _basis(self, outputs: jax.Array) -> jax.Array:
        """Cotangents of the outputs, `(q, o, q', o')`."""
        q, o = outputs.shape
        basis = jnp.eye(q * o, dtype=outputs.dtype).reshape(q, o, q, o)
        return basis if self.selected is None else basis[:, self.selected, None]

    def _general(
        self, leaves: Sequence[jax.Array], patches: Mapping[int, jax.Array]
    ) -> Callable[[Mapping[int, jax.Array]], dict[int, jax.Array]]:
        """Derivatives by the parameters of kernels of no known form: through the kernel's own derivative."""
        if not self.general:
            return lambda blocks: {}
        sites = [site.index for site in self.general]
        chosen = {leaf: leaves[leaf] for site in self.general for leaf in site.leaves if self.weights[leaf]}
        kernels, pull = jax.vjp(lambda chosen: self._kernels_of(leaves, chosen, sites), chosen)
        dtypes = [kernel.dtype for kernel in kernels]

        def back(blocks: Mapping[int, jax.Array]) -> dict[int, jax.Array]:
            by_kernel = [jnp.einsum("sgf,sgc->gfc", patches[i], blocks[i]) for i in sites]
            # In the kernel's own type, like a backward pass: the kernel may be a function of casts.
            zipped = zip(self.general, by_kernel, dtypes, strict=True)
            return pull([site.product.unkernel(d).astype(dtype) for site, d, dtype in zipped])[0]

        return back

    def choose(
        self, groups: tuple[int, int], examples: int, output: Output, symmetric: bool
    ) -> tuple[dict[int, bool], float]:
        """The cheaper kind of feature for each site, and the multiplications of all contributions."""
        as_pair: dict[int, bool] = {}
        total = 0.0
        for kernel in self.kernels:
            cost = costs(kernel.site.product.sizes, groups, examples, self.rows, output, symmetric)
            as_pair[kernel.site.index] = cost["pair"] < cost["matrix"]
            total += min(cost.values())
        pairs = groups[0] * groups[1] * examples**2 * self.rows * (self.rows if output == "full" else 1)
        folded = self._folded(as_pair)
        return as_pair, total + pairs * sum(size for leaf, size in self.sizes.items() if leaf not in folded)


def _tangents(function: Callable[[jax.Array], list[jax.Array]], at: jax.Array) -> list[jax.Array]:
    """The derivative by a single number, by reverse mode alone, which hand-written derivatives have too."""
    values, pull = jax.vjp(function, at)
    return jax.vjp(pull, [jnp.zeros_like(value) for value in values])[1]((jnp.ones_like(at),))[0]
