"""What a layer's part of a tangent kernel costs, in the order of contractions that `features` carries out."""

from collections.abc import Sequence

from mimicnorm_jax.diagnostics.ntk.features import in_grams
from mimicnorm_jax.diagnostics.ntk.implementation import Counts, sides
from mimicnorm_jax.diagnostics.ntk.jacobians import Output

TURN, ENTRY = 40_000, 32
"""MACs of a large product in the time of one turn of the loops over pairs and outputs, and of multiplying and adding
up one entry of two Gram matrices, by their time on a CPU."""


def output_pairs(outputs: int, output: Output) -> int:
    """Pairs of outputs whose derivatives are multiplied, those of a trace included, which are added up.

    Args:
      outputs: of the network that are differentiated.
      output: which pairs of outputs.
    """
    return outputs * (outputs if output == "full" else 1)


def costs(sizes: Sequence[int], counts: Counts, examples: int, outputs: int, output: Output) -> dict[str, float]:
    """Multiply-accumulates that a layer's contribution takes with its derivatives written out, or left as factors.

    Of many positions, factors are multiplied pair by pair in a loop (`_chain`), whose turns count as well, or,
    where one number a pair is asked for, in large products whose entries are multiplied (`_grams`).

    Args:
      sizes: positions S, groups of channels G, fan-in F, output channels C.
      counts: groups of examples on each side.
      examples: in a group.
      outputs: of the network that are differentiated.
      output: which pairs of outputs.

    Returns:
      MACs with the derivatives `written` out and `factored`.
    """
    s, g, f, c = sizes
    n, m = sides(counts)
    symmetric = counts[1] is None
    rows = examples * outputs
    pairs = examples**2 * output_pairs(outputs, output)
    half = 0.5 if symmetric else 1.0
    written = (n if symmetric else n + m) * rows * s * g * f * c
    dense = written + half * n * m * pairs * g * f * c
    if s == 1:
        return {"written": dense, "factored": n * m * g * (f + half * pairs * c)}
    if in_grams(examples, output):
        return {"written": dense, "factored": half * n * m * g * s * s * (f + rows * c + ENTRY)}
    products = g * (s * s * f + s * s * rows * c + pairs * s * c)
    return {"written": dense, "factored": half * n * m * (products + TURN * (1 + rows))}


def pooled_cost(sizes: Sequence[int], counts: Counts, outputs: int, output: Output) -> float:
    """Likewise of a layer that reaches the outputs by one number a channel: a map for all outputs, and their columns.

    Args:
      sizes, counts, outputs, output: as above, of groups of one example.
    """
    s, _, f, c = sizes
    n, m = sides(counts)
    maps = (n if counts[1] is None else n + m) * s * f * c
    return maps + n * m * c * (f + output_pairs(outputs, output))
