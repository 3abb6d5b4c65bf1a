# %% [markdown]
# # Why it works: correlations, chi, tangent kernels
#
# A ReLU makes any two inputs more alike, since its outputs share a mean. Centering the next kernel takes the mean away. This notebook draws
# what follows, with and without centering: first in infinitely wide networks, then in networks of finite width.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from mimicnorm_jax.diagnostics import EmpiricalNTK, condition_number, nngp, perturbation_growth, unit_diagonal
from mimicnorm_jax.theory import KINDS, PLAIN, WEIGHT_MEAN

kinds = {"plain": PLAIN, "centered": WEIGHT_MEAN}
rho = jnp.linspace(-1, 1, 101)
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6))
for name, mlp in kinds.items():
    left.plot(rho, mlp.correlation_map(rho), label=f"{name}, slope at 1: {mlp.chi():.3f}")
    path = [0.9]
    for _ in range(15):
        path.append(float(mlp.correlation_map(path[-1])))
    right.plot(path, marker=".", label=name)
left.plot(rho, rho, ":", color="gray")
left.set(xlabel="correlation of two inputs", ylabel="after one layer", xticks=[-1, -0.5, 0, 0.5, 1])
right.set(xlabel="layer", ylabel="correlation that starts at 0.9", ylim=(0, 1))
left.legend()
right.legend()
plt.show()

# %% [markdown]
# ## Networks of finite width
#
# The same two as random MLPs, 12 layers of width 128, on inputs that have a correlation of 0.5 with one another. `nngp.correlations` follows pairs
# through the layers of any network, `perturbation_growth` measures the empirical chi.

# %%
gram = 0.5 * jnp.eye(16) + 0.5
x = jnp.linalg.cholesky(gram) * 4.0  # 16 inputs of 16 entries, whose Gram matrix over 16 is that
finite = {"plain": KINDS["plain"], "centered": KINDS["weight mean"]}
above = np.triu_indices(16, 1)
for name, build in finite.items():
    mlp = build(16, 128, 12, 1)
    params = mlp.init(jax.random.key(0))
    pairs = [np.asarray(layer)[above].mean() for layer in nngp.correlations(mlp.apply, params, x).values()]
    rate, error = perturbation_growth(mlp.apply, params, x, key=jax.random.key(1)).rate()
    plt.plot(
        pairs[:-1], marker=".", label=f"{name}; chi {rate:.2f} ± {error:.2f}, in the limit {kinds[name].chi():.2f}"
    )
plt.xlabel("layer")
plt.ylabel("mean correlation of pairs")
plt.legend()
plt.show()

# %% [markdown]
# ## The tangent kernel
#
# Its condition number says how much slower the slowest direction of the outputs is learned than the fastest. Depth makes the centered
# kernel a multiple of the identity, once it is scaled to a unit diagonal; the diagonal itself spreads at finite width.

# %%
depths = [2, 4, 8, 12]
figure, axes = plt.subplots(figsize=(6, 3.6))
for color, (name, mlp) in enumerate(kinds.items()):
    limits = [condition_number(np.asarray(mlp.kernels(gram, depth)[1])) for depth in depths]
    axes.plot(depths, limits, color=f"C{color}", label=f"{name}, infinite width")
    scaled, raw = [], []
    for depth in depths:
        net = finite[name](16, 128, depth, 1)
        kernel = EmpiricalNTK(net.apply, output="trace", weights=net.init_variance)(net.init(jax.random.key(depth)), x)
        raw.append(condition_number(kernel))
        scaled.append(condition_number(unit_diagonal(kernel)))
    axes.plot(depths, scaled, "o", color=f"C{color}", label=f"{name}, width 128, unit diagonal")
    axes.plot(depths, raw, "o", color=f"C{color}", fillstyle="none", label=f"{name}, width 128, as it is")
axes.set(xlabel="weight layers", ylabel="condition number", yscale="log")
axes.legend(fontsize=7)
plt.show()
