"""The rate of an arm is chosen without its test images, and differences are by seed at each arm's own rate."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks import fixed_norm
from benchmarks.neighbors import NOT_RUN, neighbors_table

CASE = ("mimicnorm", "adam", 512)


def _record(arm, seed, held_out, losses, test):
    about = dict(zip(fixed_norm.NAMES, (*CASE, arm, seed), strict=True))
    about |= {"rates": [0.1, 0.2, 0.3], "held_out_accuracy": held_out, "held_out_loss": losses}
    return about | {"test_accuracy": test, "ended": ""}


RECORDS = [
    _record("none", 0, [0.5, 0.75, 0.25], [1.0, None, 3.0], [0.9, 0.5, 0.95]),
    _record("none", 1, [0.75, 0.5, 0.75], [1.0, 0.1, 3.0], [0.9, 0.25, 0.95]),
    _record("lawn", 0, [0.25, 0.5, 0.75], [1.0, 1.0, 1.0], [0.0, 1.0, 0.625]),
    _record("lawn", 1, [0.25, 0.5, 0.75], [1.0, 1.0, 1.0], [0.0, 1.0, 0.75]),
]


def test_rates_are_chosen_on_held_out_images_and_differences_are_by_seed(tmp_path):
    """Of equals the rate of the least loss, and a loss that is not finite is the worst; never the best tested."""
    assert [fixed_norm.chosen(RECORDS[:2]), fixed_norm.chosen(RECORDS[2:])] == [0, 2]
    found = fixed_norm.differences(RECORDS)[CASE]["lawn"]
    assert found.by_seed == pytest.approx({0: -27.5, 1: -15.0})
    fixed_norm.STORE.add(tmp_path, *RECORDS)
    row = neighbors_table(tmp_path).splitlines()[2]
    assert "lawn: adam, batch 512 -21.25; intervals above 0 in 0 of 1 cases, below in 0]" in row
    assert NOT_RUN not in row


def test_no_image_is_both_chosen_by_and_tested_on():
    count = len(fixed_norm.digits().labels)
    places = [set(range(count)[part]) for part in fixed_norm.PARTS.values()]
    assert sum(map(len, places)) == count == len(set.union(*places)) == 1797


@pytest.mark.parametrize("arm", fixed_norm.ARMS)
def test_what_an_arm_holds(arm, x64):
    """Norms from the start under Hyperball, after the free phase under LAWN, never else; a bias is free in all."""
    tx = fixed_norm.make_optimizer("adam", arm, 0.1, steps=10)
    rng, params = np.random.default_rng(0), {"layer": {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)}}
    state, norms = tx.init(params), [float(jnp.linalg.norm(params["layer"]["kernel"]))]
    for _ in range(10):
        grads = {"layer": {"kernel": jnp.asarray(rng.normal(size=(4, 3))), "bias": jnp.ones(3)}}
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        norms.append(float(jnp.linalg.norm(params["layer"]["kernel"])))
    moved = abs(np.diff(norms)) > 1e-12
    # The first rate is 0, that of the warm-up, and the cosine ends just above it.
    free = 10 * fixed_norm.FREE_EPOCHS // fixed_norm.EPOCHS
    expected = {"lawn": range(1, free), "hyperball": range(0)}.get(arm, range(1, 10))
    assert set(np.flatnonzero(moved)) == set(expected)
    assert params["layer"]["bias"][0] < 0.9
