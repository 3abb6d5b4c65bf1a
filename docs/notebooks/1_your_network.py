# %% [markdown]
# # MimicNorm in a network of your own
#
# A small linen network, once with BatchNorm and once under MimicNorm by one call, trained side by side on scikit-learn's digits.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import optax
from flax import linen as nn
from sklearn.datasets import load_digits

from mimicnorm_jax import interop


class Net(nn.Module):
    """Three convolutions, each with its BatchNorm."""

    @nn.compact
    def __call__(self, x, train):
        for features, strides in ((16, 1), (32, 2), (32, 2)):
            x = nn.Conv(features, (3, 3), strides=strides, use_bias=False)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        return nn.Dense(10)(x.mean((1, 2)))


digits = load_digits()
images, labels = jnp.asarray(digits.images[..., None] / 8 - 1, jnp.float32), jnp.asarray(digits.target)
train, test = slice(0, 1536), slice(1536, None)

# %% [markdown]
# `interop.mimic` centers the kernels that its rule takes, leaves the BatchNorms out, and puts one on the logits. What it did to each layer, it says:

# %%
networks = {"batchnorm": Net(), "mimicnorm": interop.mimic(Net())}
report = interop.layer_report(networks["mimicnorm"], images[:2], train=False)
print(report)

# %% [markdown]
# BatchNorm forgives any scale of a kernel, MimicNorm does not, so initial kernels get theirs from the report. The step is an ordinary one.


# %%
def fit(name, model, epochs=6, batch=128):
    variables = model.init(jax.random.key(0), images[:2], train=False)
    params, stats = variables["params"], variables["batch_stats"]
    if name == "mimicnorm":
        params = interop.rescale_init(params, report)
    optimizer = optax.sgd(optax.cosine_decay_schedule(0.1, epochs * 12), 0.9)

    def loss_fn(params, stats, x, y):
        logits, moved = model.apply({"params": params, "batch_stats": stats}, x, train=True, mutable=["batch_stats"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), moved["batch_stats"]

    @jax.jit
    def step(params, stats, state, x, y):
        (loss, stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, stats, x, y)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(params, updates), stats, state, loss

    @jax.jit
    def accuracy(params, stats):
        logits = model.apply({"params": params, "batch_stats": stats}, images[test], train=False)
        return (logits.argmax(-1) == labels[test]).mean()

    state, losses = optimizer.init(params), []
    for epoch in range(epochs):  # 12 steps each
        order = jax.random.permutation(jax.random.key(epoch), 1536).reshape(-1, batch)
        for chosen in order:
            params, stats, state, loss = step(params, stats, state, images[train][chosen], labels[train][chosen])
            losses.append(float(loss))
    return losses, float(accuracy(params, stats))


for name, model in networks.items():
    losses, reached = fit(name, model)
    plt.plot(losses, label=f"{name}, test accuracy {reached:.1%}")
plt.xlabel("step")
plt.ylabel("training loss")
plt.legend()
plt.show()

# %% [markdown]
# The last BatchNorm has no scale, so MimicNorm's logits keep variance 1 and its loss cannot come near 0: with ten classes of equal size it is at
# least 0.278, where every image's own logit is 3 and the others are -1/3. Accuracies can be compared, losses cannot. And one seed and a
# few epochs show how it is done, not which is better: for that see [the results](../results.md).
