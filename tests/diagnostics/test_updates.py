"""Large steps and what gradients are made of, against steps and terms written out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mimicnorm_jax.diagnostics import from_linen, updates
from mimicnorm_jax.diagnostics.updates import Batch
from tests.diagnostics.networks import Convolutional, Normalized, draw, filled


def _cross_entropy(logits, labels):
    logits = logits - logits.max(1, keepdims=True)
    return -(logits - jnp.log(jnp.exp(logits).sum(1, keepdims=True)))[jnp.arange(len(labels)), labels].mean()


@pytest.fixture
def normalized(x64):
    """A foreign Flax network with BatchNorm in training mode, its parameters, and a batch."""
    x = draw(0, 6, 5)
    apply_fn, params = from_linen(Normalized(), filled(Normalized(), x), mutable=["batch_stats"])
    return apply_fn, params, Batch(x, jnp.array([0, 1, 1, 0, 1, 0]))


def test_losses_and_moments_along_the_gradient_are_those_of_steps_written_out(normalized):
    apply_fn, params, batch = normalized
    rates = [0.0, 0.3, 20.0]
    grads = jax.grad(lambda params: _cross_entropy(apply_fn(params, batch.x), batch.targets))(params)
    losses = []
    moments = updates.channel_moments(apply_fn, params, batch, rates)
    assert list(moments) == ["first", "head"]
    for i, rate in enumerate(rates):
        after = jax.tree.map(lambda p, g, rate=rate: p - rate * g, params, grads)
        losses.append(_cross_entropy(apply_fn(after, batch.x), batch.targets))
        z = batch.x @ after["first"]["kernel"]
        np.testing.assert_allclose(moments["first"].means[i], z.mean(0), rtol=1e-9)
        np.testing.assert_allclose(moments["first"].variances[i], z.var(0), rtol=1e-9)
        u = (z - z.mean(0)[None]) / jnp.sqrt(z.var(0) + 1e-5)[None]
        h = jax.nn.relu(u * after["norm"]["scale"][None] + after["norm"]["bias"][None])
        np.testing.assert_allclose(moments["head"].means[i], (h @ after["head"]["kernel"]).mean(0), rtol=1e-9)
    np.testing.assert_allclose(
        updates.relative_losses(apply_fn, params, batch, rates), np.array(losses) / losses[0], rtol=1e-9
    )


def test_a_step_that_overflows_is_infinite_and_not_hidden():
    """At rate 0.5 the weight is 1e30 and its square no float32; at rate 0 nothing has happened."""
    batch = Batch(jnp.ones((1, 1)), jnp.zeros((1, 1)), _scaled)
    losses = updates.relative_losses(lambda w, x: x * w, jnp.ones(()), batch, [0.0, 1e30])
    assert losses.tolist() == [1.0, np.inf]


def _scaled(outputs, targets):
    return ((outputs - targets) ** 2).sum()


def _terms(x, cotangent, centered):
    """Every image's and position's term of a 3x3 stride-2 kernel's gradient, by loops: `(S, 3, 3, c_in, c_out)`."""
    padded, terms = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))), []
    for n, a, b in np.ndindex(cotangent.shape[:3]):
        patch = padded[n, 2 * a : 2 * a + 3, 2 * b : 2 * b + 3]
        term = patch[..., None] * cotangent[n, a, b]
        terms.append(term - term.mean((0, 1, 2)) if centered else term)
    return np.stack(terms)


@pytest.mark.parametrize("centered", [False, True])
def test_cancellation_is_that_of_terms_written_out(x64, centered):
    """Of the kernel as it is, and of the parameter where the kernel is a centered one."""
    x, labels = draw(0, 3, 6, 6, 2), jnp.array([0, 2, 1])
    params = filled(Convolutional(), x)["params"]
    numbers = ("NHWC", "HWIO", "NHWC")

    def from_products(params, z):
        return jax.nn.relu(z).mean((1, 2)) @ params["head"]["kernel"]

    def products(params):
        kernel = params["first"]["kernel"]
        kernel = kernel - kernel.mean((0, 1, 2), keepdims=True) if centered else kernel
        return jax.lax.conv_general_dilated(x, kernel, (2, 2), [(1, 1), (1, 1)], dimension_numbers=numbers)

    def apply_fn(params, inputs):
        kernel = params["first"]["kernel"]
        kernel = kernel - kernel.mean((0, 1, 2), keepdims=True) if centered else kernel
        z = jax.lax.conv_general_dilated(inputs, kernel, (2, 2), [(1, 1), (1, 1)], dimension_numbers=numbers)
        return from_products(params, z)

    cotangent = jax.grad(lambda z: _cross_entropy(from_products(params, z), labels))(products(params))
    terms = _terms(np.asarray(x), np.asarray(cotangent), centered)
    gradient = jax.grad(lambda params: _cross_entropy(apply_fn(params, x), labels))(params)["first"]["kernel"]
    np.testing.assert_allclose(terms.sum(0), gradient, atol=1e-12)
    found = updates.cancellation(apply_fn, params, Batch(x, labels))
    np.testing.assert_allclose(found["first"], abs(terms).sum() / abs(terms.sum(0)).sum(), rtol=1e-9)
    assert found["first"] > 1
    assert list(found) == ["first", "head"]


def test_logit_gradient_and_what_a_last_norm_takes_of_it(x64):
    """Softmax's gradient is p minus one-hot; before a last BatchNorm it has no mean and no part along the logits."""
    x, labels = draw(0, 8, 5), jnp.arange(8) % 3
    params = {"head": draw(1, 5, 3)}

    def logits(params, x):
        return x @ params["head"]

    def normalized(params, x):
        z = logits(params, x)
        return (z - z.mean(0, keepdims=True)) / jnp.sqrt(z.var(0, keepdims=True))

    batch = Batch(x, labels)
    plain = updates.logit_gradient(logits, params, batch)
    np.testing.assert_allclose(plain, (jax.nn.softmax(logits(params, x)) - jax.nn.one_hot(labels, 3)) / 8, atol=1e-15)
    np.testing.assert_array_equal(plain, updates.logit_gradient(logits, params, batch, before_last_norm=True))
    before = updates.logit_gradient(normalized, params, batch, before_last_norm=True)
    np.testing.assert_allclose(before.sum(0), 0, atol=1e-14)
    np.testing.assert_allclose((before * logits(params, x)).sum(0), 0, atol=1e-14)
    assert abs(updates.logit_gradient(normalized, params, batch).sum(0)).max() > 1e-3


def test_the_gradient_before_a_norm_is_by_image_and_class_however_the_last_layer_is_written(x64):
    """Without a norm it is that by the logits, of a kernel on the left and of a convolution before an average too."""
    x, labels, w = draw(0, 8, 4, 3, 5), jnp.arange(8) % 3, draw(1, 5, 3)
    written = {
        "kernel first": lambda w, x: (w.T @ x.mean((1, 2)).T).T,
        "convolution": lambda w, x: jax.lax.conv_general_dilated(
            x, w[None, None], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        ).mean((1, 2)),
        "every position": lambda w, x: jnp.einsum("nijc,co->oijn", x, w).mean((1, 2)).T,
    }
    for name, apply_fn in written.items():
        plain, before = (
            updates.logit_gradient(apply_fn, w, Batch(x, labels), before_last_norm=before) for before in (False, True)
        )
        np.testing.assert_allclose(before, plain, atol=1e-15, err_msg=name)
    four = Batch(x[:4], labels[:4])
    with pytest.raises(ValueError, match="which axis counts the 4 examples is not clear, of axes"):
        updates.logit_gradient(written["every position"], w, four, before_last_norm=True)


def test_what_cannot_be_measured_is_refused_by_name():
    x, params = jnp.ones((2, 3)), {"w": jnp.ones((3, 2))}

    def apply_fn(params, x):
        return x @ params["w"]

    for targets, message in [
        (jnp.array([0, 2]), "whole numbers from 0 to 1; got int32 of shape .2,., up to 2"),
        (jnp.array([0.0, 1.0]), "got float32"),
        (jnp.array([0]), r"targets have shape \(1,\) for 2 inputs"),
    ]:
        with pytest.raises(ValueError, match=message):
            updates.cancellation(apply_fn, params, Batch(x, targets))
    good = Batch(x, jnp.array([0, 1]))
    with pytest.raises(ValueError, match=r"rates are \[-1.0\]"):
        updates.relative_losses(apply_fn, params, good, [-1.0])
    with pytest.raises(ValueError, match="layer 'v'"):
        updates.channel_moments(apply_fn, params, good, [0.0], layers=["v"])
    with pytest.raises(ValueError, match="infinite outputs or NaN"):
        updates.relative_losses(apply_fn, params, Batch(x * jnp.inf, good.targets), [0.0])


def test_the_dominant_class_of_many_bfloat16_images():
    """Sums of bfloat16 stand still at 256."""
    labels = jnp.where(jnp.arange(4096) % 10 < 7, 0, jnp.arange(4096) % 10)
    batch = Batch(draw(0, 4096, 8), labels)
    found, expected = (
        updates.dominance(
            updates.logit_gradient(lambda p, x, k=kind: x.astype(k) @ p.astype(k), jnp.zeros((8, 10)), batch)
        )
        for kind in (jnp.bfloat16, jnp.float32)
    )
    assert found == pytest.approx(expected, rel=1e-2)  # roundings of bfloat16
