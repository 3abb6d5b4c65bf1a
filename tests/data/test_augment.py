"""The one-gather augmentation against a slow path that does one operation after the other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mimicnorm_jax import data
from mimicnorm_jax.data import Augmentation, normalize

augment = jax.jit(data.augment, static_argnums=2)


def _keys(count, seed=0):
    return jax.random.split(jax.random.key(seed), count)


def _images(count, height=6, width=5):
    return np.random.default_rng(0).integers(1, 256, (count, height, width, 3)).astype(np.uint8)


def _crops(image, pad):
    padded = np.pad(image, ((pad, pad), (pad, pad), (0, 0)))
    height, width, _ = image.shape
    return {(i, j): padded[i : i + height, j : j + width] for i in range(2 * pad + 1) for j in range(2 * pad + 1)}


@pytest.mark.parametrize("flip", [False, True])
def test_crop_and_flip_give_each_possible_result_about_equally_often(flip):
    image, pad, count = _images(1)[0], 1, 3600
    results = np.asarray(augment(_keys(count), jnp.tile(image, (count, 1, 1, 1)), Augmentation(pad, flip)))
    possible = [crop[:, ::s] for crop in _crops(image, pad).values() for s in ((1, -1) if flip else (1,))]
    seen = np.array([(results == candidate).all((1, 2, 3)).sum() for candidate in possible])
    assert seen.sum() == count
    expected = count / len(possible)
    assert abs(seen - expected).max() < 5 * np.sqrt(expected)  # binomial


def _rotate(image, angle):
    height, width, _ = image.shape
    out = np.zeros_like(image)
    for i in range(height):
        for j in range(width):
            y, x = i - (height - 1) / 2, j - (width - 1) / 2
            row = round(np.cos(angle) * y - np.sin(angle) * x + (height - 1) / 2)
            column = round(np.sin(angle) * y + np.cos(angle) * x + (width - 1) / 2)
            if 0 <= row < height and 0 <= column < width:
                out[i, j] = image[row, column]
    return out


def test_rotation_is_one_of_the_angles_and_uses_the_whole_range():
    image, count = _images(1, 9, 9)[0], 200
    results = np.asarray(augment(_keys(count), jnp.tile(image, (count, 1, 1, 1)), Augmentation(rotation=15.0)))
    angles = np.deg2rad(np.linspace(-15, 15, 601))
    candidates = np.stack([_rotate(image, angle) for angle in angles])
    used = [angles[(candidates == result).all((1, 2, 3)).argmax()] for result in results]
    assert all((candidates == result).all((1, 2, 3)).any() for result in results)
    assert min(used) < -0.15
    assert max(used) > 0.15


def test_crop_padding_stays_black_when_a_rotation_follows():
    """A rotation must not bring back what the crop cut off: pixels beyond the crop's window are black."""
    images = jnp.full((400, 7, 7, 1), 255, jnp.uint8)
    results = np.asarray(augment(_keys(400), images, Augmentation(crop_padding=2, rotation=15.0)))[..., 0]
    places = np.arange(1, 50).reshape(7, 7, 1)  # where a pixel comes from; 0 is nowhere
    rotations = np.unique([_rotate(places, a)[..., 0] for a in np.deg2rad(np.linspace(-15, 15, 601))], axis=0)
    crops = _crops(np.full((7, 7, 1), 255, np.uint8), 2).values()
    candidates = {np.append(np.uint8(0), crop)[rotation].tobytes() for crop in crops for rotation in rotations}
    assert all(result.tobytes() in candidates for result in results)


def test_the_same_key_gives_the_same_result_at_any_place_in_any_batch():
    keys, images, everything = _keys(8), jnp.asarray(_images(8)), Augmentation(2, True, 15.0)
    together = augment(keys, images, everything)
    np.testing.assert_array_equal(augment(keys[5:], images[5:], everything), together[5:])
    assert (augment(_keys(8, seed=1), images, everything) != together).any()


def test_no_augmentation_changes_nothing():
    images = jnp.asarray(_images(4))
    np.testing.assert_array_equal(augment(_keys(4), images, Augmentation()), images)
    np.testing.assert_array_equal(augment(_keys(4), images, Augmentation(rotation=1e-9)), images)


def test_normalize_gives_mean_zero_and_variance_one():
    images = _images(500, 8, 8)
    mean, std = (images / 255).mean((0, 1, 2)), (images / 255).std((0, 1, 2))
    out = np.asarray(normalize(jnp.asarray(images), tuple(mean), tuple(std)))
    np.testing.assert_allclose(out.mean((0, 1, 2)), 0, atol=1e-4)
    np.testing.assert_allclose(out.std((0, 1, 2)), 1, atol=1e-4)
