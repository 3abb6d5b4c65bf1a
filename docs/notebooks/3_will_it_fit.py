# %% [markdown]
# # Will it fit? BatchNorm and MimicNorm on an H100 and a v5e
#
# XLA compiles for devices that are not there (extra `[plan]`, Linux on x86_64). What a compiled program allocates,
# and what it computes, is then known before anyone pays for the device. Here the gradient of a small ResNet is
# planned; `mimicnorm plan` does the same for whole training steps, finds the largest batch that fits, and says what
# would make a run fit.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import optax

from mimicnorm_jax import models
from mimicnorm_jax.planning import plan

BATCH = 1024
images = jax.ShapeDtypeStruct((BATCH, 32, 32, 3), jnp.bfloat16)
labels = jax.ShapeDtypeStruct((BATCH,), jnp.int32)


def gradient(method):
    """The gradient of a network's loss, and shapes of what it takes."""
    model = models.create("resnet8", method=method, num_classes=10, dtype=jnp.bfloat16)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)

    def loss_fn(params, stats, x, y):
        logits, _ = model.apply({"params": params, "batch_stats": stats}, x, train=True, mutable=["batch_stats"])
        return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), y).mean()

    return jax.grad(loss_fn), (variables["params"], variables["batch_stats"], images, labels)


# %%
plans = {}
for method in ("batchnorm", "mimicnorm"):
    function, shapes = gradient(method)
    for target in ("h100", "v5e"):
        plans[target, method] = plan(function, *shapes, target=target)

for (target, method), found in plans.items():
    print(
        f"{target:5} {method:10} peak {found.peak_bytes / 2**20:7.1f} MiB, moved {found.bytes_moved / 2**20:8.1f} MiB"
    )

# %%
figure, axes = plt.subplots(figsize=(6, 3.4))
for place, ((_, method), found) in enumerate(plans.items()):
    axes.barh(place, found.peak_bytes / 2**20, color=f"C{int(method == 'mimicnorm')}")
axes.set_yticks(range(len(plans)), [f"{method}, {target}" for target, method in plans])
axes.set(xlabel="planned peak (MiB)", title=f"gradient of resnet8, {BATCH} images of 32 x 32, bfloat16")
axes.invert_yaxis()
plt.show()

# %% [markdown]
# What holds the memory at the peak, by layer:

# %%
print(plans["h100", "mimicnorm"])

# %% [markdown]
# A plan knows no fragmentation, no workspaces of cuDNN, and no time but a lower bound. What a device said about such
# plans stands in the site's results.
