"""The tangent kernel from layer inputs and cotangents: no derivative by a kernel is formed where factors are cheaper.

One backward sweep per output gives every layer's cotangents at once; with the layer's input they are its derivatives.
A kernel that is a parameter, scaled or centered (or neither), contributes through its patches, scaled or centered. A
scalar folded into a kernel contributes through the product with the kernel's derivative. Everything else (biases,
normalization parameters, layers of no known kind) is differentiated in the same sweep, example by example.

Structured derivatives in the words of Novak, Sohl-Dickstein & Schoenholz (2022), Fast Finite Width Neural Tangent
Kernel, who know each primitive's derivative by its operands; here a product's form and its kernel's are read from the
jaxpr, and the order of contractions follows from a layer's sizes.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mimicnorm_jax.diagnostics.ntk import kernel_derivatives
from mimicnorm_jax.diagnostics.ntk.features import FactoredJacobian, Feature, Jacobian, costs
from mimicnorm_jax.diagnostics.ntk.implementation import Counts, Implementation, Request
from mimicnorm_jax.diagnostics.ntk.matching import Kernel, match_kernels
from mimicnorm_jax.diagnostics.tracing.interpreter import LayerCall

_ByIndex = dict[int, jax.Array]


class StructuredDerivatives(Implementation):
    """Derivatives of layers as patches and cotangents, of all other parameters written out.

    Args:
      request: what is wanted.
      counts: groups in all.

    Attributes:
      kernels: of known form, whose derivatives may stay factored.
      general: layers whose kernels are any other function of parameters.
      dense: leaves that are differentiated example by example.
      factored: by layer of `kernels`, whether its derivatives stay factored.
    """

    def __init__(self, request: Request, counts: Counts) -> None:
        super().__init__(request, counts)
        self.network, self.weights = request.network, request.weights
        matched = match_kernels(self.network)
        self.kernels: list[Kernel] = []
        self.general: list[LayerCall] = []
        dense = {leaf for leaf in self.network.direct if self.weights[leaf]}
        for layer in self.network.layers:
            if not any(self.weights[leaf] for leaf in layer.leaves):
                continue
            if layer.index in matched:
                kernel = matched[layer.index]
                self.kernels.append(kernel)
                dense |= {scalar for scalar in kernel.scalars if self.weights[scalar]}
            else:
                self.general.append(layer)
                dense |= {leaf for leaf in layer.leaves if self.weights[leaf]}
        self.dense = tuple(sorted(dense))
        self._sizes = {leaf: int(np.prod(request.params[leaf].shape)) for leaf in self.dense}
        self.factored, self._contraction_macs = self._choose()
        self._folded = self._folded_biases()

    def _choose(self) -> tuple[dict[int, bool], float]:
        """By layer, whether its derivatives stay factored, which is what is cheaper; and the MACs of all layers."""
        request, factored, total = self.request, dict[int, bool](), 0.0
        groups, symmetric = (self.counts[0], self.counts[1] or self.counts[0]), self.counts[1] is None
        for kernel in self.kernels:
            sizes = kernel.layer.product.sizes
            cost = costs(sizes, groups, request.examples, request.outputs, request.output, symmetric)
            factored[kernel.layer.index] = cost["factored"] < cost["written"]
            total += min(cost.values())
        return factored, total

    def _folded_biases(self) -> set[int]:
        """Biases whose contribution goes with their kernel's: it is that of one more input, the constant 1."""
        if self.request.per_parameter:
            return set()
        return {
            kernel.bias
            for kernel in self.kernels
            if self.factored[kernel.layer.index] and kernel.bias is not None and self.weights[kernel.leaf]
        }

    @property
    def detail(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        factored, known = sum(self.factored.values()), len(self.kernels)
        return (
            f" ({factored} layers from inputs and cotangents, {known - factored} from their products, "
            f"{len(self.general)} through their kernel's derivative, {len(self.dense)} other parameters)"
        )

    @property
    def macs(self) -> float:
        request = self.request
        groups = self.counts[0] * (self.counts[1] or self.counts[0])
        pairs = groups * request.examples**2 * request.outputs * (request.outputs if request.output == "full" else 1)
        dense = pairs * sum(size for leaf, size in self._sizes.items() if leaf not in self._folded)
        return self._sides * request.forward_macs * (request.rows + 1) + (self._contraction_macs + dense)

    def bytes(self, left: int, right: int) -> int:
        rows = self.request.rows
        copies = 1 if self._is_whole(left, right) else 2  # a block's features are written, and put in order
        copies += 2 if self.request.output == "diagonal" else 0  # by output, on both sides
        group = copies * rows * sum(self._sizes.values()) + self.request.activations
        for layer in (*(kernel.layer for kernel in self.kernels), *self.general):
            s, g, f, c = layer.product.sizes
            group += 2 * s * g * f + rows * s * g * c
            if not self.factored.get(layer.index, False):
                group += copies * rows * g * f * c
        leaves = {kernel.leaf for kernel in self.kernels if self.weights[kernel.leaf]} | set(self.dense)
        return self._sum_of_bytes(left, right, group, len(leaves - self._folded))

    def features(self, params: Any, x: jax.Array, write: bool) -> dict[int, Feature]:
        """Derivatives of all examples, by leaf."""
        leaves, dtype = jax.tree.leaves(params), self.network.dtype
        scales = kernel_derivatives.squared_scales(self.network, self.kernels, leaves)
        tangents = kernel_derivatives.scalar_tangents(self.network, self.kernels, self.weights, leaves)
        patches, blocks, dense = jax.vmap(lambda group: self._sweep(leaves, group, scales, tangents))(x)
        features: dict[int, Feature] = {}
        for kernel in self.kernels:
            i = kernel.layer.index
            if not self.weights[kernel.leaf]:
                continue
            if self._written_in_sweep(self.factored[i]):
                features[kernel.leaf] = Jacobian(blocks[i])
                continue
            bias = 0.0 if kernel.bias is None or kernel.bias not in self._folded else self.weights[kernel.bias]
            feature = FactoredJacobian(patches[i], blocks[i], jnp.asarray(bias, dtype), self.factored[i])
            features[kernel.leaf] = feature.rows() if write and not self.factored[i] else feature
        for leaf, rows in dense.items():
            features[leaf] = Jacobian(rows * jnp.sqrt(jnp.asarray(self.weights[leaf], dtype)))
        return features

    def _written_in_sweep(self, factored: bool) -> bool:
        """Whether a layer's derivatives are written out within the sweep: where a sweep of a whole batch is large."""
        return not factored and self.request.examples > 1

    def _sweep(
        self,
        leaves: Sequence[jax.Array],
        x: jax.Array,
        scales: Mapping[int, jax.Array],
        tangents: Mapping[tuple[int, int], jax.Array],
    ) -> tuple[_ByIndex, _ByIndex, _ByIndex]:
        """One group of examples.

        Returns:
          By layer, patches, scaled and centered like the kernel; by layer, cotangents `(q, o, s, g, c)` or derivatives
          `(q, o, k)`; by leaf, derivatives `(q, o, k)`.
        """
        network = self.network
        watched = [*(kernel.layer for kernel in self.kernels), *self.general]
        perturbations = {layer.index: jnp.zeros(layer.shape, layer.dtype) for layer in watched}
        direct = {leaf: leaves[leaf] for leaf in self.dense if leaf in network.direct and leaf not in self._folded}

        def forward(direct: _ByIndex, perturbations: _ByIndex) -> Any:
            values = [direct.get(i, leaf) for i, leaf in enumerate(leaves)]
            outputs, evaluation = network.run(values, x, perturbations=perturbations, frozen_kernels=True)
            return outputs, evaluation.operands

        outputs, pull, operands = jax.vjp(forward, direct, perturbations, has_aux=True)
        wide = network.dtype
        raw = {layer.index: layer.product.patches(operands[layer.index]).astype(wide) for layer in watched}
        moved = {key: jnp.einsum("sgf,gfc->sgc", raw[key[1]], tangent) for key, tangent in tangents.items()}
        patches = {kernel.layer.index: self._like_kernel(kernel, raw, scales) for kernel in self.kernels}
        pull_kernels = kernel_derivatives.pullback(network, self.general, self.weights, leaves)

        def one(cotangent: jax.Array) -> tuple[_ByIndex, _ByIndex]:
            direct, by_layer = pull(cotangent)
            dense = {leaf: rows.astype(wide) for leaf, rows in direct.items()}
            blocks = {layer.index: layer.product.outputs(by_layer[layer.index]).astype(wide) for layer in watched}
            for (scalar, i), tangent in moved.items():
                dense[scalar] = dense.get(scalar, 0) + jnp.vdot(tangent, blocks[i]).reshape(leaves[scalar].shape)
            written = {
                layer.index: jnp.einsum("sgf,sgc->gfc", raw[layer.index], blocks[layer.index]) for layer in self.general
            }
            for leaf, rows in pull_kernels(written).items():
                dense[leaf] = dense.get(leaf, 0) + rows.astype(wide)
            kept = {
                i: jnp.einsum("sgf,sgc->gfc", patches[i], blocks[i]).reshape(-1)
                if self._written_in_sweep(factored)
                else blocks[i]
                for i, factored in self.factored.items()
            }
            return kept, {leaf: rows.reshape(-1) for leaf, rows in dense.items()}

        basis = self._basis(outputs)
        if outputs.shape[0] == 1:
            return patches, *jax.vmap(jax.vmap(one))(basis)
        rows = lax.map(one, basis.reshape(-1, *outputs.shape), batch_size=64)
        return patches, *jax.tree.map(lambda row: row.reshape(*basis.shape[:2], *row.shape[1:]), rows)

    def _like_kernel(self, kernel: Kernel, raw: Mapping[int, jax.Array], scales: Mapping[int, jax.Array]) -> jax.Array:
        patches = raw[kernel.layer.index]
        if kernel.centered:
            patches = patches - patches.mean(-1, keepdims=True)
        scale = jnp.sqrt(scales[kernel.layer.index] * self.weights[kernel.leaf])
        return patches * scale.astype(patches.dtype)

    def _basis(self, outputs: jax.Array) -> jax.Array:
        """Cotangents of the outputs, `(q, o, q', o')`."""
        q, o = outputs.shape
        basis = jnp.eye(q * o, dtype=outputs.dtype).reshape(q, o, q, o)
        selected = self.request.selected
        return basis if selected is None else basis[:, selected, None]
