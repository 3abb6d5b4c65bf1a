"""What the backward pass of a network without BatchNorms keeps: one activation a convolution, and no kernel."""

import jax
import jax.numpy as jnp
import pytest

from mimicnorm_jax import models
from mimicnorm_jax.diagnostics import nbytes, saved_for_backward
from tests.conftest import also

BATCH = 8
# Feature maps kept in the dtype of activations, and packed: the inputs of all convolutions (two that read one map
# share it), 2 bits for each output of a max-pool (4 where windows are 3 x 3) and 1 of a ReLU that no convolution reads.
NETWORKS = {
    "vgg16": (13, 5),
    "resnet18": (17, 0),
    "resnet50": (49, 0),
    "seresnet18": (17 + 8, 0),  # a gate needs what it multiplies
    "densenet121": (119, 1),  # concatenated anew
    "squeezenet": (17, 5 + 16),
    "shufflenetv2_x1": (52, 16 + 4),
    "mobilenetv2": (53, 1),
}


def _kept(name, method, dtype=jnp.float32):
    model = models.create(name, method=method, num_classes=10, dtype=dtype)
    images = jnp.zeros((BATCH, 32, 32, 3))
    params = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    stats = {"batch_stats": {"last_bn": {"mean": jnp.zeros(10), "var": jnp.ones(10)}}}

    def logits(params):
        rngs = {"dropout": jax.random.key(1)}
        return model.apply({"params": params, **stats}, images, train=True, mutable=["batch_stats"], rngs=rngs)[0]

    return saved_for_backward(logits, params)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("dtype", [also(jnp.float32), jnp.bfloat16])
def test_one_activation_a_convolution_is_kept_and_neither_kernels_nor_masks(name, dtype):
    kept = _kept(name, "mimicnorm", dtype)
    maps = [array for array in kept if array.ndim == 4]
    assert all(array.shape[0] == BATCH for array in maps)
    in_full = [array for array in maps if array.dtype == dtype]
    assert (len(in_full), len(maps) - len(in_full)) == NETWORKS[name]
    assert nbytes(maps) - nbytes(in_full) == sum(array.size for array in maps if array not in in_full)
    # Besides: inputs of dense layers and logits, but neither dropout's masks nor cast kernels.
    others = [array for array in kept if array.ndim in (2, 3) and array.size > 100]
    assert all(array.shape[0] == BATCH and array.dtype != jnp.bool_ for array in others)


def test_centering_and_scalars_cost_no_activation_memory():
    with_both, without = (nbytes(_kept("resnet18", method)) for method in ("mimicnorm", "none"))
    # Only the last BatchNorm's few numbers a logit.
    assert 0 <= with_both - without < 8 * 4 * BATCH * 10
