"""The tangent kernel from layer inputs and cotangents: no derivative by a kernel is formed where factors are cheaper.

One backward sweep per output gives every layer's cotangents at once; with the layer's input they are its derivatives.
A kernel that is a parameter, scaled or centered (or neither), contributes through its patches, scaled or centered; one
with a factor by channel, such as a standardized one, also through two numbers a channel (`channel_scales`). A scalar
folded into a kernel contributes through the product with the kernel's derivative. A layer that reaches the outputs by
one number a channel needs one map for all outputs, and a column of each (`tracing.pooled`). Everything else (biases,
normalization parameters, layers of no known kind) is differentiated in the same sweep, example by example.

Structured derivatives in the words of Novak, Sohl-Dickstein & Schoenholz (2022), Fast Finite Width Neural Tangent
Kernel, who know each primitive's derivative by its operands; here a product's form and its kernel's are read from the
jaxpr, and the order of contractions follows from a layer's sizes.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mimicnorm_jax.diagnostics.ntk import kernel_derivatives, pullbacks
from mimicnorm_jax.diagnostics.ntk.channel_scales import ChannelScales, others
from mimicnorm_jax.diagnostics.ntk.costs import costs, output_pairs, pooled_cost
from mimicnorm_jax.diagnostics.ntk.features import (
    PIECE,
    Features,
    contract_by_parameter,
    in_grams,
)
from mimicnorm_jax.diagnostics.ntk.implementation import Counts, Implementation, Request, sides
from mimicnorm_jax.diagnostics.ntk.jacobians import FactoredJacobian, Jacobian, PooledJacobian
from mimicnorm_jax.diagnostics.ntk.matching import MatchedKernel, match_kernels, shared
from mimicnorm_jax.diagnostics.tracing.network import LayerCall, TracedNetwork
from mimicnorm_jax.diagnostics.tracing.pooled import pooled_layers

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
      pooled: layers of `kernels` whose derivatives are a map for all outputs and their columns.
    """

    def __init__(self, request: Request, counts: Counts) -> None:
        super().__init__(request, counts)
        unrolled = request.network.unrolled()
        self._long_loops = unrolled.kept_loops
        self._read(unrolled)
        if self.network.looped and not any(self.factored[i] for i in self.network.looped if i in self.factored):
            self._read(request.network)  # laid open, the loop would cost as much

    def _read(self, network: TracedNetwork) -> None:
        """Decides how each parameter is differentiated."""
        self.request = replace(self.request, network=network)
        self.network, self.weights = network, self.request.weights
        matched = match_kernels(self.network)
        self.kernels: list[MatchedKernel] = []
        self.general: list[LayerCall] = []
        dense = {leaf for leaf in self.network.direct if self.weights[leaf]}
        for layer in self.network.layers:
            if not any(self.weights[leaf] for leaf in layer.leaves):
                continue
            kernel = matched.get(layer.index)
            if kernel is not None and (not kernel.by_channel or self._price((kernel,))[0]):
                self.kernels.append(kernel)
                rest = (*kernel.scalars, *others(kernel))
                dense |= {leaf for leaf in rest if self.weights[leaf]}
            else:
                self.general.append(layer)
                dense |= {leaf for leaf in layer.leaves if self.weights[leaf]}
        self.dense = tuple(sorted(dense))
        self.shared = shared(self.kernels)
        self._sizes = {leaf: int(np.prod(self.request.params[leaf].shape)) for leaf in self.dense}
        self.factored, self.pooled, self._contraction_macs = self._choose()
        self._folded = self._folded_biases()

    def _choose(self) -> tuple[dict[int, bool], set[int], float]:
        """What is cheaper: by layer, whether its derivatives stay factored; pooled layers; and the MACs of all."""
        factored, macs, by_columns = dict[int, bool](), dict[int, float](), dict[int, float]()
        for kernels in self.shared:
            first = kernels[0].layer.index
            cheaper, macs[first] = self._price(kernels)
            factored |= {kernel.layer.index: cheaper for kernel in kernels}
            if len(kernels) == self.request.examples == 1 and not kernels[0].by_channel:
                sizes = kernels[0].layer.product.sizes
                by_columns[first] = pooled_cost(sizes, self.counts, self.request.outputs, self.request.output)
        cheap = [self.network.layers[i] for i in sorted(by_columns) if by_columns[i] < macs[i]]
        found = pooled_layers(self.network, self.request.x, cheap)
        macs |= {i: by_columns[i] for i in found}
        return factored | dict.fromkeys(found, False), found, sum(macs.values())

    def _price(self, kernels: Sequence[MatchedKernel]) -> tuple[bool, float]:
        """Whether derivatives are cheaper as factors than written out, and the MACs of what is cheaper."""
        request, (_, g, f, c) = self.request, kernels[0].layer.product.sizes
        s = sum(kernel.layer.product.sizes[0] for kernel in kernels)
        cost = costs((s, g, f, c), self.counts, request.examples, request.outputs, request.output)
        if kernels[0].by_channel:  # two more numbers a channel
            pairs = request.rows * (request.rows if request.output == "full" else request.examples)
            sweep = self._sides * 3 * s * g * c * (f + request.rows)
            cost["factored"] += sweep + self._pairs * pairs * 2 * g * c
        return cost["factored"] < cost["written"], min(cost.values())

    def _folded_biases(self) -> set[int]:
        """Biases whose contribution goes with their kernel's: it is that of one more input, the constant 1."""
        if self.request.per_parameter:
            return set()
        return {
            kernel.bias
            for kernel, *others in self.shared
            if not others
            and self.factored[kernel.layer.index]
            and kernel.bias is not None
            and self.weights[kernel.leaf]
        }

    @property
    def detail(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        factored, known = sum(self.factored.values()), len(self.kernels)
        by_channel = sum(kernel.by_channel for kernel in self.kernels)
        columns = f", {len(self.pooled)} of the layers by a column an output" if self.pooled else ""
        scales = f", {by_channel} of the layers with a factor by channel" if by_channel else ""
        loops = f", {len(self.network.looped)} of the layers in unrolled loops" if self.network.looped else ""
        kept = f", loops differentiated by example: {'; '.join(self._long_loops)}" if self._long_loops else ""
        return (
            f" ({factored} layers from inputs and cotangents, {known - factored} from their products, "
            f"{len(self.general)} through their kernel's derivative, {len(self.dense)} other parameters"
            f"{columns}{scales}{loops}{kept})"
        )

    @property
    def macs(self) -> float:
        request = self.request
        examples = math.prod(sides(self.counts)) * request.examples**2
        pairs = examples * output_pairs(request.outputs, request.output)
        dense = pairs * sum(size for leaf, size in self._sizes.items() if leaf not in self._folded)
        return self._sides * request.forward_macs * (request.rows + 1) + (self._contraction_macs + dense)

    def bytes(self, left: int, right: int) -> int:
        rows = self.request.rows
        copies = 1 if self._is_whole(left, right) else 2  # a block's features are written, and put in order
        copies += 2 if self.request.output == "diagonal" else 0  # by output, on both sides
        group, entries = copies * rows * sum(self._sizes.values()) + self.request.activations, 0
        for layers in (
            *([kernel.layer for kernel in kernels] for kernels in self.shared),
            *([layer] for layer in self.general),
        ):
            s, (_, g, f, c) = sum(layer.product.sizes[0] for layer in layers), layers[0].product.sizes
            if layers[0].index in self.pooled:
                group += 2 * s * f + s * c + f * c + rows * c
                row = right * rows * c
                entries = max(entries, 2 * left * right * c + 2 * row * min(left, max(1, PIECE // row)))
                continue
            group += 2 * s * g * f + rows * s * g * c
            if not self.factored.get(layers[0].index, False):  # written, and cut for the upper blocks of a product
                group += max(copies, 2) * rows * g * f * c
            elif s > 1 and in_grams(self.request.examples, self.request.output):  # in another order, and two products
                group += rows * s * g * c
                row = g * s * s * right
                entries = max(entries, 2 * row * min(left, max(1, PIECE // row)))
        by_channel = [kernel.layer for kernel in self.kernels if kernel.by_channel]
        group += sum(int(np.prod(layer.shape)) * 3 for layer in by_channel)
        parts = sum(bool(self.weights[kernels[0].leaf]) for kernels in self.shared)
        terms = parts + len(set(self.dense) - self._folded) + len(by_channel)  # theirs come with both signs
        return self._sum_of_bytes(left, right, group, terms) + self.request.itemsize * entries

    def features(self, params: Any, x: jax.Array, write: bool) -> Features:
        """Derivatives of all examples."""
        leaves, dtype = jax.tree.leaves(params), self.network.dtype
        scales = kernel_derivatives.squared_scales(self.network, self.kernels, leaves)
        tangents = kernel_derivatives.scalar_tangents(self.network, self.kernels, self.weights, leaves)
        channels = ChannelScales(self.network, self.kernels, self.weights, leaves)
        patches, blocks, dense = jax.vmap(lambda group: self._sweep(leaves, group, scales, tangents, channels))(x)
        features: Features = {}
        for part, kernels in enumerate(self.shared):
            layers, kernel = [each.layer.index for each in kernels], kernels[0]
            factored, key = self.factored[layers[0]], (kernel.leaf, part, 1)
            if not self.weights[kernel.leaf]:
                continue
            if self._written_in_sweep(factored):
                features[key] = Jacobian(functools.reduce(jnp.add, [blocks[i] for i in layers]))
                continue
            if layers[0] in self.pooled:
                features[key] = PooledJacobian(patches[layers[0]], blocks[layers[0]][:, 0])
                continue
            bias = 0.0 if kernel.bias is None or kernel.bias not in self._folded else self.weights[kernel.bias]
            # The derivative by a kernel of several uses is the sum over the positions of all of them.
            inputs = jnp.concatenate([patches[i] for i in layers], 1)
            cotangents = jnp.concatenate([blocks[i] for i in layers], 3)
            feature = FactoredJacobian(inputs, cotangents, jnp.asarray(bias, dtype), factored)
            features[key] = feature.rows() if write and not factored else feature
        for (leaf, sign), rows in dense.items():
            features[leaf, len(self.shared), sign] = Jacobian(rows * jnp.sqrt(jnp.asarray(self.weights[leaf], dtype)))
        return features

    def contract(self, params: Any, left: Any, right: Any, symmetric: bool) -> dict[str, jax.Array]:
        return contract_by_parameter(left, right, self.network.titles, self.request.output, symmetric)

    def _written_in_sweep(self, factored: bool) -> bool:
        """Whether a layer's derivatives are written out within the sweep: where a sweep of a whole batch is large."""
        return not factored and self.request.examples > 1

    def _sweep(
        self,
        leaves: Sequence[jax.Array],
        x: jax.Array,
        scales: Mapping[int, jax.Array],
        tangents: Mapping[tuple[int, int], jax.Array],
        channels: ChannelScales,
    ) -> tuple[_ByIndex, _ByIndex, dict[tuple[int, int], jax.Array]]:
        """One group of examples.

        Returns:
          By layer, patches, scaled and centered like the kernel, or of a pooled layer its map `(f, c)`; by layer,
          cotangents `(q, o, s, g, c)`, derivatives `(q, o, k)` or columns `(q, o, c)`; by leaf and sign, derivatives
          `(q, o, k)`.
        """
        network = self.network
        watched = [*(kernel.layer for kernel in self.kernels), *self.general]
        perturbations = {layer.index: jnp.zeros(layer.shape, layer.dtype) for layer in watched}
        direct = {i: leaves[i] for i in self.dense if i in network.direct and i not in self._folded}
        outputs, pull, operands = pullbacks.linearized(network, leaves, x, direct, perturbations, bool(self.pooled))
        wide = network.dtype
        raw = {layer.index: layer.product.patches(operands[layer.index]).astype(wide) for layer in watched}
        moved = {key: jnp.einsum("sgf,gfc->sgc", raw[key[1]], tangent) for key, tangent in tangents.items()}
        patches = {kernel.layer.index: self._like_kernel(kernel, raw, scales) for kernel in self.kernels}
        patches |= pullbacks.maps(network, leaves, x, {i: patches[i] for i in sorted(self.pooled)})
        by_channel = channels.moved(raw)
        pull_kernels = kernel_derivatives.pullback(network, self.general, self.weights, leaves)

        def one(cotangent: jax.Array) -> tuple[_ByIndex, dict[tuple[int, int], jax.Array]]:
            direct, by_layer, column = pull(cotangent)
            dense = {leaf: rows.astype(wide) for leaf, rows in direct.items()}
            blocks = {layer.index: layer.product.outputs(by_layer[layer.index]).astype(wide) for layer in watched}
            for (scalar, i), tangent in moved.items():
                dense[scalar] = dense.get(scalar, 0) + jnp.vdot(tangent, blocks[i]).reshape(leaves[scalar].shape)
            written = {
                layer.index: jnp.einsum("sgf,sgc->gfc", raw[layer.index], blocks[layer.index]) for layer in self.general
            }
            for leaf, rows in pull_kernels(written).items():
                dense[leaf] = dense.get(leaf, 0) + rows.astype(wide)
            of_factors, signed = channels.rows(by_channel, blocks)
            for leaf, rows in of_factors.items():
                dense[leaf] = dense.get(leaf, 0) + rows.astype(wide)
            blocks |= {i: blocks[i] * factors.factor[None] for i, factors in channels.factors.items()}
            kept = self._kept(patches, blocks) | dict.fromkeys(self.pooled, column.astype(wide))
            return kept, signed | {(leaf, 1): rows.reshape(-1) for leaf, rows in dense.items()}

        basis = self._basis(outputs)
        if outputs.shape[0] == 1:
            return patches, *jax.vmap(jax.vmap(one))(basis)
        rows = lax.map(one, basis.reshape(-1, *outputs.shape), batch_size=64)
        return patches, *jax.tree.map(lambda row: row.reshape(*basis.shape[:2], *row.shape[1:]), rows)

    def _kept(self, patches: _ByIndex, blocks: _ByIndex) -> _ByIndex:
        """By layer of known form, cotangents, or derivatives where these are written out in the sweep."""
        return {
            i: jnp.einsum("sgf,sgc->gfc", patches[i], blocks[i]).reshape(-1)
            if self._written_in_sweep(factored)
            else blocks[i]
            for i, factored in self.factored.items()
        }

    def _like_kernel(
        self, kernel: MatchedKernel, raw: Mapping[int, jax.Array], scales: Mapping[int, jax.Array]
    ) -> jax.Array:
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
