"""Random networks that try what a tangent kernel may take for granted: of their kernels, and of their batch axis."""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

DTYPES = ("float64", "float32", "bfloat16", "float16")
N, D, H, O = 3, 4, 6, 2


@jax.custom_vjp
def straight_through(w):
    return jnp.sign(w)


straight_through.defvjp(lambda w: (jnp.sign(w), None), lambda _, g: (g,))


@jax.custom_jvp
def rounded(w):
    return jnp.round(4 * w) / 4


rounded.defjvp(lambda primals, tangents: (rounded(primals[0]), tangents[0]))


def centered(w, axis=0):
    return w - w.mean(axis, keepdims=True)


def as_matrix(w):
    wide = w.reshape(-1, w.shape[-1])
    return (wide - wide.mean(0, keepdims=True)).reshape(w.shape)


def _wide(w: jax.Array) -> jax.Array:
    """In a precision that has a Fourier transform."""
    return w.astype(jnp.promote_types(w.dtype, jnp.float32))


KERNEL_OPS = {
    # What a kernel may be known as, and near misses of it.
    "double": lambda w, p, c: 2 * w,
    "third": lambda w, p, c: w / 3,
    "negative": lambda w, p, c: -w,
    "gain": lambda w, p, c: p["gain"].astype(w.dtype) * w,
    "exp gain": lambda w, p, c: w * jnp.exp(p["gain"]).astype(w.dtype),
    "shared gain": lambda w, p, c: w * p["shared"].astype(w.dtype)[0],
    "center": lambda w, p, c: centered(w),
    "center as matrix": lambda w, p, c: as_matrix(w),
    "center twice": lambda w, p, c: centered(centered(w)),
    "center outputs": lambda w, p, c: centered(w, 1),
    "center all": lambda w, p, c: centered(w, (0, 1)),
    "center badly": lambda w, p, c: w - w.sum(0, keepdims=True) / (w.shape[0] + 1),
    "center another": lambda w, p, c: w - (2 * w).mean(0, keepdims=True),
    "add mean": lambda w, p, c: w + w.mean(0, keepdims=True),
    "transposed": lambda w, p, c: (2 * w.T).T,
    "reversed": lambda w, p, c: w[::-1],
    "rolled": lambda w, p, c: jnp.roll(w, 1, 0),
    "shuffled": lambda w, p, c: w[jnp.asarray(np.random.default_rng(0).permutation(w.shape[0]))],
    "plus constant": lambda w, p, c: w + c.astype(w.dtype),
    "plus gain": lambda w, p, c: w + p["gain"].astype(w.dtype),
    "masked": lambda w, p, c: w * (c > 0).astype(w.dtype),
    "where masked": lambda w, p, c: jnp.where(c > 0, w, 0),
    "by channel": lambda w, p, c: w * p["channels"][: w.shape[1]].astype(w.dtype)[None],
    "by a flag": lambda w, p, c: jnp.where(p["gain"] > 0, w, 3 * w),
    "bfloat16": lambda w, p, c: w.astype(jnp.bfloat16).astype(w.dtype),
    "float32": lambda w, p, c: w.astype(jnp.float32).astype(w.dtype),
    # Linear piece by piece.
    "relu": lambda w, p, c: jax.nn.relu(w),
    "leaky": lambda w, p, c: jnp.where(w > 0, w, w * 0.25),
    "abs": lambda w, p, c: jnp.abs(w),
    "clip": lambda w, p, c: jnp.clip(w, -0.5, 2.5),
    "soft threshold": lambda w, p, c: jnp.sign(w) * jnp.maximum(jnp.abs(w) - 0.125, 0),
    "pruned": lambda w, p, c: jnp.where(jnp.abs(w) > 0.25, w, 0),
    "gate": lambda w, p, c: w * jnp.clip(p["gain"], 0, 1).astype(w.dtype),
    "sorted": lambda w, p, c: jnp.sort(w, 0),
    "below maximum": lambda w, p, c: w - w.max(0, keepdims=True),
    "flag of itself": lambda w, p, c: jnp.where(w.sum() > 0.5, w, 2 * w),
    # Neither.
    "tanh": lambda w, p, c: jnp.tanh(w),
    "square": lambda w, p, c: w * w,
    "standardized": lambda w, p, c: centered(w) / jnp.sqrt((centered(w) ** 2).mean(0, keepdims=True) + 0.125),
    "normalized": lambda w, p, c: w / (0.5 + jnp.sqrt((w**2).sum())),
    "spectral norm": lambda w, p, c: w / (0.5 + jnp.abs(jnp.fft.fft2(_wide(w))).max()),
    "filtered": lambda w, p, c: w + jnp.fft.fft(_wide(w), axis=0).real,
    "fixed norm": lambda w, p, c: w / lax.stop_gradient(jnp.sqrt((w**2).sum())),
    "stopped": lambda w, p, c: 0.5 * w + lax.stop_gradient(w),
    "softmax": lambda w, p, c: jax.nn.softmax(w, 0),
    "straight through": lambda w, p, c: straight_through(w),
    "rounded": lambda w, p, c: rounded(w),
    # In programs of their own.
    "jit": lambda w, p, c: jax.jit(lambda w: centered(w) * 0.5)(w),
    "checkpoint": lambda w, p, c: jax.checkpoint(lambda w: centered(2 * w))(w),
    "scan": lambda w, p, c: lax.scan(lambda w, _: (w * 0.5 + 0.25 * jnp.tanh(w), None), w, None, length=2)[0],
    "cond": lambda w, p, c: lax.cond(p["gain"] > 0, lambda w: w, lambda w: 2 * w, w),
    "map": lambda w, p, c: lax.map(lambda row: row - row.mean(), w),
}


def _attention(h):
    tokens = h.reshape(h.shape[0], 2, -1)
    scores = jax.nn.softmax(jnp.einsum("nsf,ntf->nst", tokens, tokens), -1)
    return jnp.einsum("nst,ntf->nsf", scores, tokens).reshape(h.shape)


def _mask(*shape):
    return jax.random.bernoulli(jax.random.key(3), 0.5, shape)


def _turns(h):
    return lax.fori_loop(0, 3, lambda _, h: jnp.tanh(h), h)


def _own_branch(h):
    return jax.vmap(lambda row: lax.cond(row.sum() > 0, jnp.tanh, lambda row: 2 * row, row))(h)


def _common_branch(h):
    return lax.cond(h.sum() > 0, jnp.tanh, lambda h: 2 * h, h)


def _second_alone(h):
    return jnp.concatenate([h[:1], h[1:] + h[1:].mean(0, keepdims=True)]) if len(h) > 1 else h


BATCH_OPS = {
    "layer norm": lambda h: centered(h, 1) / jnp.sqrt((centered(h, 1) ** 2).mean(1, keepdims=True) + 0.125),
    "cumulative": lambda h: jnp.cumsum(h, 1),
    "sorted": lambda h: jnp.sort(h, 1),
    "largest": lambda h: lax.top_k(h, h.shape[1])[0],
    "softmax": lambda h: jax.nn.softmax(h, 1),
    "rolled": lambda h: jnp.roll(h, 1, 1),
    "flat": lambda h: jnp.tanh(h.reshape(-1)).reshape(h.shape),
    "tokens": lambda h: (h.reshape(-1, 2) @ jnp.ones((2, 2), h.dtype)).reshape(h.shape),
    "attention": _attention,
    "time-major": lambda h: lax.scan(lambda c, x: (jnp.tanh(c + x),) * 2, jnp.zeros(len(h), h.dtype), h.T)[1].T,
    "by example": lambda h: lax.map(lambda row: row - row.max(), h),
    "vmapped": lambda h: jax.vmap(lambda row: row[jnp.argsort(row)])(h),
    "along": lambda h: jnp.take_along_axis(h, jnp.argmax(h, 1)[:, None], 1) + h,
    "indexed": lambda h: h[jnp.arange(len(h)), jnp.argmax(h, 1)][:, None] + h,
    "one mask": lambda h: jnp.where(_mask(1, h.shape[1]), h, 0),
    "turns": _turns,
    "own branch": _own_branch,
    "padded": lambda h: jnp.pad(h, ((0, 0), (1, 0)))[:, :-1],
    "scattered": lambda h: h.at[:, 0].set(0),
    "table": lambda h: h + jnp.linspace(0, 1, h.shape[1]).astype(h.dtype)[None],
    # These bring examples together, or depend on the place or the size.
    "batch norm": lambda h: centered(h) / jnp.sqrt((centered(h) ** 2).mean(0, keepdims=True) + 0.125),
    "batch cumulative": lambda h: jnp.cumsum(h, 0),
    "batch sorted": lambda h: jnp.sort(h, 0),
    "batch softmax": lambda h: jax.nn.softmax(h, 0),
    "batch rolled": lambda h: jnp.roll(h, 1, 0),
    "batch reversed": lambda h: h[::-1],
    "batch scan": lambda h: lax.scan(lambda c, x: (jnp.tanh(c + x),) * 2, jnp.zeros(h.shape[1], h.dtype), h)[1],
    "batch gram": lambda h: (h @ h.T) @ h,
    "wrong reshape": lambda h: h.T.reshape(h.shape) + h,
    "over size": lambda h: h / len(h),
    "place": lambda h: h * jnp.arange(1, len(h) + 1).astype(h.dtype)[:, None],
    "mask each": lambda h: jnp.where(_mask(*h.shape), h, 0),
    "common branch": _common_branch,
    "after the first": _second_alone,
    "batch maximum": lambda h: h - lax.stop_gradient(h.max()),
}


@dataclass
class Program:
    """A random network.

    Attributes:
      seed: of everything about it.
      steps: what it does, for messages.
      params: its parameters.
      x: inputs.
    """

    seed: int
    steps: list[str] = field(default_factory=list)
    params: dict[str, Any] = field(default_factory=dict)
    x: Any = None

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        self.dtype = DTYPES[rng.choice(4, p=(0.4, 0.2, 0.2, 0.2))]
        leaf = self.dtype if rng.random() < 0.6 else DTYPES[rng.integers(4)]

        def draw(*shape: int) -> jax.Array:
            return jnp.asarray(rng.standard_normal(shape) / np.sqrt(max(shape[:1] or (1,))), leaf)

        self.params = {"first": draw(D, H), "second": draw(H, H), "last": draw(H, O), "bias": draw(H)}
        self.params |= {"gain": jnp.asarray(1.5 * rng.standard_normal(), leaf), "shared": draw(1), "channels": draw(H)}
        self.constants = {name: jnp.asarray(rng.standard_normal(p.shape)) for name, p in self.params.items()}
        self.x = jnp.asarray(rng.standard_normal((N, D)), self.dtype)
        names, p = list(KERNEL_OPS), rng.random
        self.chains = {n: [names[i] for i in rng.integers(len(names), size=rng.choice(4, p=(0.3, 0.4, 0.2, 0.1)))]
                       for n in ("first", "second", "last")}  # fmt: skip
        self.chains["bias"] = [b for b in rng.choice(["relu", "double", "abs", "tanh", "negative"], 1) if p() < 0.3]
        self.tied, self.loop, self.left, self.twice = (p() < 0.15 for _ in range(4))
        names = list(BATCH_OPS)
        self.batch = [names[rng.integers(len(names))] for _ in range(rng.choice(3, p=(0.5, 0.35, 0.15)))]
        self.where = int(rng.integers(2))
        more = np.random.default_rng((self.seed, 1))
        self.stacked = str(
            more.choice(("", "centered outside", "centered inside", "standardized", "reversed", "twice"))
        )
        if more.random() < 0.5:
            self.stacked = ""
        self.params["stack"] = jnp.asarray(more.standard_normal((2, H, H)) / np.sqrt(H), leaf)
        self.steps = [self.dtype, f"leaves {leaf}", str(self.chains), f"tied {self.tied} loop {self.loop}"]
        self.steps += [f"stacked {self.stacked}"]
        self.steps += [f"left {self.left} twice {self.twice}", f"batch {self.batch} after {self.where}"]

    def kernel(self, params: Any, name: str) -> jax.Array:
        w = params[name]
        for op in self.chains[name]:
            w = KERNEL_OPS[op](w, params, self.constants[name]).astype(w.dtype)
        return w.astype(self.dtype)

    def coupled_step(self, h: jax.Array, place: int) -> jax.Array:
        for op in self.batch if place == self.where else ():
            h = BATCH_OPS[op](h).astype(h.dtype)
        return h

    def layers(self, params: Any, h: jax.Array) -> jax.Array:
        """A scan over stacked kernels."""
        stack, gain = params["stack"].astype(self.dtype), params["gain"].astype(self.dtype)
        if self.stacked == "centered outside":
            stack = jax.vmap(centered)(stack)

        def layer(h: jax.Array, w: jax.Array) -> tuple[jax.Array, jax.Array]:
            if self.stacked == "centered inside":
                w = centered(gain * w)
            if self.stacked == "standardized":
                w = KERNEL_OPS["standardized"](w, params, None)
            h = jnp.tanh(h @ w)
            return h, h.sum(1)

        h, sums = lax.scan(layer, h, stack, reverse=self.stacked == "reversed")
        return lax.scan(layer, h, stack)[0] if self.stacked == "twice" else h + sums[0][:, None]

    def __call__(self, params: Any, x: jax.Array) -> jax.Array:
        first, second, last = (self.kernel(params, name) for name in ("first", "second", "last"))
        bias = params["bias"]
        for op in self.chains["bias"]:
            bias = KERNEL_OPS[op](bias, params, None)
        h = (first.T @ x.T).T if self.left else x @ first
        h = self.coupled_step(jnp.tanh(h + bias.astype(self.dtype)[None]), 0)
        if self.loop:
            h = lax.scan(lambda h, _: (jnp.tanh(h @ second), None), h, None, length=2)[0]
        else:
            h = jax.nn.silu(h @ second)
        if self.tied:
            h = jnp.tanh(h @ second.T)
        if self.stacked:
            h = self.layers(params, h).astype(h.dtype)
        y = self.coupled_step(h, 1) @ last
        if self.twice:
            y = y + params["last"].astype(self.dtype).sum() + 0.5 * y
        return y

    __hash__ = object.__hash__
    __eq__ = object.__eq__
