"""Random convolutional networks that try what a tangent kernel may take for granted of positions and channels."""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mimicnorm_jax.functional import relu_save_mask

N, O = 2, 3


def _over(h, *axes):
    return (h - h.mean(axes, keepdims=True)) / jnp.sqrt(h.var(axes, keepdims=True) + 0.5)


def _pool(h, operation, start):
    return lax.reduce_window(h, start, operation, (1, 2, 2, 1), (1, 1, 1, 1), "SAME")


def _gate(h, logits):
    return h * jax.nn.sigmoid(logits)


@jax.custom_jvp
def _smooth(h):
    return jnp.tanh(h)


@_smooth.defjvp
def _(primals, tangents):
    return jnp.tanh(primals[0]), tangents[0] * 0.5


def _shuffled(h):
    return h[..., jnp.asarray(np.random.default_rng(0).permutation(h.shape[-1]))]


def _rows(h):
    return lax.scan(lambda c, row: (jnp.tanh(c + row),) * 2, jnp.zeros_like(h[:, 0]), h.swapaxes(0, 1))[1].swapaxes(
        0, 1
    )


def _mask(*shape):
    return jax.random.bernoulli(jax.random.key(3), 0.6, shape)


def _neighbours(h):
    pairs = h.reshape(*h.shape[:3], -1, 2) if h.shape[-1] % 2 == 0 else jnp.stack([h, h], -1)
    return pairs.max(-1).repeat(h.shape[-1] // pairs.shape[3], -1)


# Of activations (examples, rows, columns, channels) h and of what the layer read, x; the shape stays.
BY_CHANNEL = {
    "relu": lambda h, x: jax.nn.relu(h),
    "tanh": lambda h, x: jnp.tanh(h),
    "relu6": lambda h, x: jnp.clip(h, 0, 1),
    "square": lambda h, x: h * h,
    "smooth": lambda h, x: _smooth(h),
    "mask kept": lambda h, x: relu_save_mask(h),
    "factor without gradient": lambda h, x: h * lax.stop_gradient(jax.nn.softmax(h)),
    "rematerialized": lambda h, x: jax.checkpoint(jnp.sin)(h),
    "max pool": lambda h, x: _pool(h, lax.max, -jnp.inf),
    "average pool": lambda h, x: _pool(h, lax.add, 0.0) / 4,
    "over positions": lambda h, x: _over(h, 1, 2),
    "position softmax": lambda h, x: jax.nn.softmax(h, 1),
    "flipped": lambda h, x: h[:, ::-1],
    "rolled positions": lambda h, x: jnp.roll(h, 1, 2),
    "cumulative positions": lambda h, x: jnp.cumsum(h, 1),
    "sorted positions": lambda h, x: jnp.sort(h, 1),
    "rows": lambda h, x: _rows(h),
    "by example": lambda h, x: lax.map(lambda one: one - one.max((0, 1), keepdims=True), h),
    "turns": lambda h, x: lax.fori_loop(0, 2, lambda _, h: jnp.tanh(h), h),
    "position mask": lambda h, x: jnp.where(_mask(1, *h.shape[1:3], 1), h, 0),
    "mask": lambda h, x: jnp.where(_mask(1, *h.shape[1:]), h, 0),
    "table": lambda h, x: h * jnp.linspace(0.5, 1, h.shape[-1])[None, None, None],
    "other order": lambda h, x: jnp.tanh(h.transpose(0, 3, 1, 2)).transpose(0, 2, 3, 1),
    "flat positions": lambda h, x: jnp.sin(h.reshape(len(h), -1, h.shape[-1])).reshape(h.shape),
    "flat": lambda h, x: jnp.sin(h.reshape(-1)).reshape(h.shape),
    "padded": lambda h, x: jnp.pad(h, ((0, 0), (1, 0), (0, 0), (0, 0)))[:, :-1],
    "set": lambda h, x: h.at[:, 0].set(0.5),
    "gated by what it read": lambda h, x: _gate(h, x.mean((1, 2, 3), keepdims=True)),
    "plus what it read": lambda h, x: h + x.mean((1, 2, 3), keepdims=True),
    "gated by position": lambda h, x: _gate(h, x.mean((1, 2), keepdims=True).sum(-1, keepdims=True)),
    "one channel of what it read": lambda h, x: h + x.mean((1, 2), keepdims=True)[..., :1],
}
OPS = BY_CHANNEL | {
    # These bring channels together, or exchange them.
    "over channels": lambda h, x: _over(h, 3),
    "over all": lambda h, x: _over(h, 1, 2, 3),
    "softmax": lambda h, x: jax.nn.softmax(h),
    "reversed": lambda h, x: h[..., ::-1],
    "rolled": lambda h, x: jnp.roll(h, 1, -1),
    "shuffled": lambda h, x: _shuffled(h),
    "cumulative": lambda h, x: jnp.cumsum(h, -1),
    "sorted": lambda h, x: jnp.sort(h, -1),
    "gated by itself": lambda h, x: _gate(h, _shuffled(h.mean((1, 2), keepdims=True))),
    "gated by its sum": lambda h, x: _gate(h, h.sum((1, 2, 3), keepdims=True)),
    "gated by one channel": lambda h, x: _gate(h, h[..., :1]),
    "attention": lambda h, x: jnp.einsum("nijc,nijd->nijd", jax.nn.softmax(h), h),
    "neighbours": lambda h, x: _neighbours(h),
    "rows as channels": lambda h, x: h + h.transpose(0, 3, 2, 1).reshape(h.shape),
    "wrong reshape": lambda h, x: h + h.transpose(0, 3, 1, 2).reshape(h.shape),
    "stopped": lambda h, x: h - lax.stop_gradient(h.max(-1, keepdims=True)),
}

BATCH_OPS = {
    "batch norm": lambda h, x: _over(h, 0, 1, 2),
    "batch softmax": lambda h, x: jax.nn.softmax(h, 0),
    "batch rolled": lambda h, x: h + jnp.roll(h, 1, 0),
    "batch gate": lambda h, x: _gate(h, x.mean((0, 1, 2, 3), keepdims=True)),
}

# From activations to (examples, features).
POOLS_BY_CHANNEL = {
    "mean": lambda h: h.mean((1, 2)),
    "sum": lambda h: h.reshape(len(h), -1, h.shape[-1]).sum(1),
    "maximum": lambda h: h.max((1, 2)),
    "window": lambda h: lax.reduce_window(h, 0.0, lax.add, (1, *h.shape[1:3], 1), (1, 1, 1, 1), "VALID")[:, 0, 0],
    "corner": lambda h: h[:, 0, -1],
    "dot": lambda h: jnp.einsum("nijc,ij->nc", h, jnp.linspace(0, 1, h[0, :, :, 0].size).reshape(h.shape[1:3])),
    "logarithm": lambda h: jax.nn.logsumexp(h, (1, 2)),
    "power": lambda h: jnp.sqrt((h**2).mean((1, 2)) + 0.1),
}
POOLS = POOLS_BY_CHANNEL | {
    "flat": lambda h: h.reshape(len(h), -1),
    "both": lambda h: jnp.concatenate([h.mean((1, 2)), h.max((1, 2))], -1),
    "rows": lambda h: h.mean(2).reshape(len(h), -1),
    "attention": lambda h: jnp.einsum("nij,nijc->nc", jax.nn.softmax(h[..., 0], 2), h),
    "transposed": lambda h: h.mean((1, 2))[:, ::-1],
    "normalized": lambda h: _over(h.mean((1, 2)), 1),
}

KERNEL_OPS = {
    "": lambda w, p: w,
    "gain": lambda w, p: w * p["gain"],
    "centered": lambda w, p: w - w.mean((0, 1, 2), keepdims=True),
    "tanh": lambda w, p: jnp.tanh(w),
    "channels": lambda w, p: w * p["channels"][None, None, None, : w.shape[-1]],
    "standardized": lambda w, p: _over(w, 0, 1, 2),
}


@dataclass
class ConvProgram:
    """A random network of convolutions.

    Attributes:
      seed: of everything about it.
      steps: what it does, for messages.
      params: its parameters.
      x: inputs.
      output: what kernel to ask for.
      coupled: whether examples may influence one another.
    """

    seed: int
    steps: list[str] = field(default_factory=list)
    params: dict[str, Any] = field(default_factory=dict)
    x: Any = None

    def __post_init__(self) -> None:
        rng = self._rng = np.random.default_rng((self.seed, 7))
        self.x = self._draw(N, *rng.integers(2, 6, 2), int(rng.integers(1, 4)))
        self.params = {"gain": self._draw(), "channels": self._draw(18)}
        ops, pools = (BY_CHANNEL, POOLS_BY_CHANNEL) if rng.random() < 0.5 else (OPS, POOLS)
        before = int(rng.choice(3, p=(0.3, 0.5, 0.2)))
        self.layers = [*(self._layer(rng, list(OPS)) for _ in range(before)), self._layer(rng, list(ops))]
        self.pool, self.again = str(rng.choice(list(pools))), bool(rng.random() < 0.2)
        self.head = str(rng.choice(("dense", "two", "none", "scaled", "squared"), p=(0.5, 0.15, 0.15, 0.1, 0.1)))
        self.coupled = bool(rng.random() < 0.25)
        if self.coupled:
            self.layers[0]["ops"].append(str(rng.choice(list(BATCH_OPS))))
        self.output = (*("full", "diagonal", "trace"), 0)[rng.integers(4)]
        self._complete: dict[str, Any] | None = None
        self.x = jnp.asarray(self.x)
        shapes = jax.eval_shape(self, self.params, self.x)  # draws kernels as their shapes become known
        self._complete = self.params = jax.tree.map(jnp.asarray, self.params)
        self.steps = [f"x {self.x.shape}", *map(str, self.layers), f"{self.pool}, {self.head}, again {self.again}"]
        self.steps += [f"output {self.output} of {shapes.shape[1]}, coupled {self.coupled}"]

    def _draw(self, *shape: int) -> np.ndarray:
        return np.asarray(self._rng.standard_normal(shape) / np.sqrt(max(np.prod(shape[:-1]), 1)))

    def _param(self, params: Any, name: str, *shape: int) -> Any:
        if self._complete is None:
            self.params[name] = self._draw(*shape)
            return self.params[name]
        return params[name]

    @staticmethod
    def _layer(rng: np.random.Generator, known: list[str]) -> dict[str, Any]:
        ops = [str(op) for op in rng.choice(known, rng.choice(4, p=(0.15, 0.45, 0.3, 0.1)))]
        tall, wide = (int(size) for size in rng.integers(1, 4, 2))
        spread = tuple(int(d) for d in rng.choice((1, 2), 2, p=(0.9, 0.1)))
        named = spread == (1, 1) and rng.random() < 0.7
        paddings = ("SAME", "SAME", "SAME", "VALID") if named else (((1, 0), (0, 1)), ((1, 2), (2, 1)))
        return {
            "window": (tall, wide),
            "padding": paddings[rng.integers(len(paddings))],
            "strides": tuple(int(s) for s in rng.choice((1, 2), 2, p=(0.75, 0.25))),
            "dilation": tuple(int(d) for d in rng.choice((1, 2), 2, p=(0.85, 0.15))),
            "spread": spread,
            "channels": int(rng.choice((1, 2, 3, 4, 6))),
            "groups": int(rng.choice((1, 1, 2, 3))),
            "axes": str(rng.choice(("NHWC", "NCHW", "HWNC"), p=(0.7, 0.2, 0.1))),
            "bias": bool(rng.random() < 0.3),
            "kernel": str(rng.choice(list(KERNEL_OPS), p=(0.4, 0.1, 0.2, 0.1, 0.1, 0.1))),
            "ops": ops,
            "shortcut": bool(rng.random() < 0.2),
            "concatenated": bool(rng.random() < 0.15),
        }

    def _convolution(self, params: Any, i: int, x: jax.Array) -> jax.Array:
        layer, given = self.layers[i], x.shape[-1]
        groups = layer["groups"] if given % layer["groups"] == 0 else 1
        channels = layer["channels"] * groups
        w = self._param(params, f"kernel{i}", *layer["window"], given // groups, channels)
        w = KERNEL_OPS[layer["kernel"]](w, params)
        axes, order = layer["axes"], [layer["axes"].index(axis) for axis in "NHWC"]
        h = lax.conv_general_dilated(
            x.transpose(["NHWC".index(axis) for axis in axes]),
            w,
            layer["strides"],
            layer["padding"],
            layer["spread"],
            layer["dilation"],
            (axes, "HWIO", axes),
            groups,
        ).transpose(order)
        return h + self._param(params, f"bias{i}", channels)[None, None, None] if layer["bias"] else h

    def __call__(self, params: Any, x: jax.Array) -> jax.Array:
        h = x
        for i, layer in enumerate(self.layers):
            before = h
            h = self._convolution(params, i, h)
            if not h.size:
                return jnp.zeros((len(x), O))
            for op in layer["ops"]:
                h = (OPS | BATCH_OPS)[op](h, before)
            if layer["shortcut"] and h.shape == before.shape:
                h = h + before
            if layer["concatenated"] and h.shape[:3] == before.shape[:3]:
                h = jnp.concatenate([before, h], -1)
        pooled = POOLS[self.pool](h)
        wide = pooled.shape[-1]
        if self.head == "none":
            outputs = pooled
        elif self.head == "scaled":
            outputs = pooled * jnp.arange(1.0, 1 + wide)[None]
        elif self.head == "squared":
            outputs = pooled * pooled
        else:
            if self.head == "two":
                pooled = jnp.tanh(pooled @ self._param(params, "hidden", wide, 4))
            outputs = pooled @ self._param(params, "head", pooled.shape[-1], O)
        return outputs + (h**2).mean((1, 2, 3))[:, None] if self.again else outputs

    __hash__ = object.__hash__
    __eq__ = object.__eq__
