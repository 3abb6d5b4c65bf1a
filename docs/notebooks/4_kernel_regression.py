# %% [markdown]
# # Kernel regression with the tangent kernel
#
# A very wide network that is trained by gradient descent on the squared loss makes the predictions of kernel
# regression with its tangent kernel. So the kernel at initialization says what such training would learn, without
# training. Here on digits, for a network with centered kernels and one without.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import scipy.linalg
from sklearn.datasets import load_digits

from mimicnorm_jax.diagnostics import EmpiricalNTK, condition_number
from mimicnorm_jax.theory import KINDS

digits = load_digits()
order = np.random.default_rng(0).permutation(len(digits.target))[:700]
x = jnp.asarray(digits.data[order] / 16, jnp.float32)
x = (x - x.mean()) / x.std()
labels = digits.target[order]
targets = np.eye(10)[labels] - 0.1
train, test = slice(0, 400), slice(400, 700)

# %% [markdown]
# The kernel of one linear output, for all 700 images at once:

# %%
kernels = {}
for name in ("plain", "weight mean"):
    mlp = KINDS[name](64, 256, 6, 1)
    kernel = EmpiricalNTK(mlp.apply, output="trace", weights=mlp.init_variance)
    kernels[name] = np.asarray(kernel(mlp.init(jax.random.key(0)), x), np.float64)
    print(f"{name:12} condition number of the training images: {condition_number(kernels[name][train, train]):.3g}")


# %% [markdown]
# Ridge regression is one Cholesky factorization. The ridge is a share of the kernel's mean diagonal, the same for
# both.


# %%
def predict(kernel, count, ridge=1e-4):
    """Predictions of the test images from the first `count` training images."""
    gram = kernel[:count, :count]
    shift = ridge * np.trace(gram) / count * np.eye(count)
    return kernel[test, :count] @ scipy.linalg.cho_solve(scipy.linalg.cho_factor(gram + shift), targets[:count])


counts = [25, 50, 100, 200, 400]
for name, kernel in kernels.items():
    right = [(predict(kernel, count).argmax(1) == labels[test]).mean() for count in counts]
    plt.plot(counts, 100 * np.array(right), marker="o", label=name)
plt.xscale("log")
plt.xticks(counts, counts)
plt.minorticks_off()
plt.xlabel("training images")
plt.ylabel("test accuracy (%)")
plt.legend()
plt.show()

# %% [markdown]
# A small condition number makes training fast; it does not by itself make a kernel that generalizes. A kernel that
# has gone all the way to a multiple of the identity can be fitted at once and predicts nothing: compare greater
# depths by changing the 6 above.
