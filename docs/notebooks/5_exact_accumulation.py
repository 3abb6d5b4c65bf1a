# %% [markdown]
# # Exact gradient accumulation
#
# With BatchNorm between the layers, a batch in four parts is another network: each part is normalized by itself.
# Under MimicNorm only the last BatchNorm couples the examples, and it acts on the logits, which are small. So the
# gradient of the whole batch can be computed with the activations of a part in memory at a time, exactly. This
# notebook does it by hand; `--config.microbatches=4` does it in training.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import linen as nn

from mimicnorm_jax import CenteredConv, relu

jax.config.update("jax_enable_x64", True)
PARTS = 4


class Body(nn.Module):
    """A network up to its logits, with or without BatchNorms."""

    normalize: bool = False

    @nn.compact
    def __call__(self, x):
        for features in (16, 32):
            x = CenteredConv(features, (3, 3), strides=2, param_dtype=jnp.float64)(x)
            x = nn.BatchNorm(use_running_average=False, param_dtype=jnp.float64)(x) if self.normalize else x
            x = relu(x)
        return nn.Dense(10, param_dtype=jnp.float64)(x.mean((1, 2)))


def head(logits, labels):
    """The last BatchNorm over the batch, and the loss."""
    centered = logits - logits.mean(0)
    normalized = centered / jnp.sqrt((centered**2).mean(0) + 1e-5)
    return optax.softmax_cross_entropy_with_integer_labels(normalized, labels).mean()


x = jax.random.normal(jax.random.key(1), (64, 16, 16, 3), jnp.float64)
labels = jax.random.randint(jax.random.key(2), (64,), 0, 10)


def apply(body, params, x):
    return body.apply({"params": params}, x, mutable=["batch_stats"])[0]


# %% [markdown]
# Two passes. The first computes the logits of all parts and keeps nothing else. The head's gradient by the logits
# couples the examples. The second pass computes each part again and pulls its rows of that gradient back.


# %%
def whole(body, params):
    return jax.grad(lambda p: head(apply(body, p, x), labels))(params)


def in_parts(body, params):
    parts = x.reshape(PARTS, -1, *x.shape[1:])
    logits = jnp.concatenate([apply(body, params, part) for part in parts])
    cotangents = jax.grad(head)(logits, labels).reshape(PARTS, -1, 10)
    total = jax.tree.map(jnp.zeros_like, params)
    for part, cotangent in zip(parts, cotangents, strict=True):
        _, pull_back = jax.vjp(lambda p, part=part: apply(body, p, part), params)
        total = jax.tree.map(jnp.add, total, pull_back(cotangent)[0])
    return total


def difference(body):
    """Relative difference of the two gradients, over all parameters."""
    params = body.init(jax.random.key(0), x)["params"]
    a, b = (np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(f(body, params))]) for f in (whole, in_parts))
    return np.linalg.norm(a - b) / np.linalg.norm(a)


found = {"MimicNorm": difference(Body()), "BatchNorm between the layers": difference(Body(normalize=True))}
for name, value in found.items():
    print(f"{name}: relative difference to the gradient of the whole batch {value:.1e}")

# %%
figure, axes = plt.subplots(figsize=(6, 2))
axes.barh(list(found), list(found.values()), color=["C1", "C0"])
axes.set(xscale="log", xlim=(1e-17, 10), xlabel="relative difference of gradients, float64")
plt.show()
