# %% [markdown]
# # Will it fit? BatchNorm and MimicNorm on an H100 and a v5e
#
# XLA compiles for devices that are not there (extra `[plan]`, Linux on x86_64). What a compiled program allocates, and what it
# computes, is then known before anyone pays for the device. Here the gradient of three convolutions is planned, with BatchNorm
# and under MimicNorm; `mimicnorm plan` does the same for whole training steps of whole networks, finds the largest batch that
# fits, and says what would make a run fit.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import optax
from flax import linen as nn

from mimicnorm_jax import CenteredConv, LastBatchNorm, relu
from mimicnorm_jax.planning import plan

BATCH = 1024
images = jax.ShapeDtypeStruct((BATCH, 32, 32, 64), jnp.bfloat16)
labels = jax.ShapeDtypeStruct((BATCH,), jnp.int32)


class Net(nn.Module):
    """Three convolutions and a classifier."""

    mimic: bool

    @nn.compact
    def __call__(self, x):
        for _ in range(3):
            if self.mimic:
                x = relu(CenteredConv(64, (3, 3), dtype=jnp.bfloat16)(x))
            else:
                x = nn.Conv(64, (3, 3), use_bias=False, dtype=jnp.bfloat16)(x)
                x = nn.relu(nn.BatchNorm(use_running_average=False, dtype=jnp.bfloat16)(x))
        logits = nn.Dense(10)(x.mean((1, 2)))
        return LastBatchNorm(use_running_average=False, axis_name=None)(logits) if self.mimic else logits


def gradient(model):
    """The gradient of a network's loss, and shapes of what it takes."""
    variables = jax.eval_shape(model.init, jax.random.key(0), images)

    def loss_fn(params, stats, x, y):
        logits, _ = model.apply({"params": params, "batch_stats": stats}, x, mutable=["batch_stats"])
        return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), y).mean()

    return jax.grad(loss_fn), (variables["params"], variables["batch_stats"], images, labels)


# %%
plans = {}
for name, model in {"BatchNorm": Net(mimic=False), "MimicNorm": Net(mimic=True)}.items():
    function, shapes = gradient(model)
    for target in ("h100", "v5e"):
        plans[target, name] = plan(function, *shapes, target=target)

for (target, name), found in plans.items():
    peak, moved = found.peak_bytes / 2**20, sum(found.bytes_moved.values()) / 2**20
    print(f"{target:5} {name:10} peak {peak:7.1f} MiB, moved {moved:8.1f} MiB")

# %%
figure, axes = plt.subplots(figsize=(6, 3.4))
for place, ((_, name), found) in enumerate(plans.items()):
    axes.barh(place, found.peak_bytes / 2**20, color=f"C{int(name == 'MimicNorm')}")
axes.set_yticks(range(len(plans)), [f"{name}, {target}" for target, name in plans])
axes.set(xlabel="planned peak (MiB)", title=f"gradient of three convolutions, {BATCH} maps of 32 x 32 x 64, bfloat16")
axes.invert_yaxis()
plt.show()

# %% [markdown]
# What holds the memory at the peak, what is computed and moved, and which convolutions carry their ReLU:

# %%
print(plans["h100", "MimicNorm"])

# %% [markdown]
# A plan knows no fragmentation, no workspaces of cuDNN, and no time but a lower bound. What a device said about such plans
# stands in [the results](../results.md#memory-and-time-of-a-step).
