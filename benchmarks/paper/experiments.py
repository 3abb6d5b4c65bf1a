"""The paper's tables and figures as training runs, with the published numbers; and small forms for a CPU.

Everything trains on CIFAR-100 by the recipe of configs/cifar100.py, except for the fields that an arm names.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mimicnorm_jax.training import METHOD_FIELDS

Comparison = tuple[str, float | None]
"""Network and learning rate."""
RATES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


@dataclass(frozen=True)
class Accuracy:
    """Test accuracy in per cent: mean, and standard deviation over `runs` where it is known."""

    mean: float
    std: float | None = None
    runs: int = 1


@dataclass(frozen=True)
class Arm:
    """Runs that differ by their seed only.

    Attributes:
      net: network.
      method: what stands in for BatchNorm, with what else sets the arm apart.
      fields: of the config, besides the recipe's.
      published: the best one that the paper reports; None where it shows a curve or nothing.
      seeds: that it is run with where no others are asked for.
      stage: all that is of a lower one is run first.
      against: method of the arm from which this one differs in one field, to find out why that one does as it does;
        empty for arms that are compared with each other.
    """

    net: str
    method: str
    fields: Mapping[str, Any]
    published: Accuracy | None = None
    seeds: tuple[int, ...] = (0,)
    stage: int = 0
    against: str = ""

    @property
    def comparison(self) -> Comparison:
        """What arms have in common that are to be compared: network, and learning rate where that is varied."""
        return self.net, self.fields.get("learning_rate")


@dataclass(frozen=True)
class Experiment:
    """A table or figure.

    Attributes:
      summary: one line.
      arms: compared.
      epochs: of each run, but for arms whose fields say otherwise.
      small: fields that make its runs small enough for a CPU, `epochs` among them; empty if it has no such form.
      converged: whether networks are trained to the end: then their calibration is measured, and they are compared by
        seed.
    """

    summary: str
    arms: tuple[Arm, ...]
    epochs: int
    small: Mapping[str, Any] = field(default_factory=dict)
    converged: bool = False


def _arm(net: str, method: str, published: Accuracy | None = None, **fields: Any) -> Arm:
    name, _, init = method.partition(", ")
    if init:
        fields["init_scheme"] = init
    return Arm(net, method, {"model": net, "method": name, **METHOD_FIELDS.get(name, {}), **fields}, published)


def _three(mean: float, std: float) -> Accuracy:
    return Accuracy(mean, std, 3)


def _table1() -> tuple[Arm, ...]:
    rows: dict[str, dict[str, tuple[float, float]]] = {
        "vgg11": {"batchnorm": (67.90, 0.14), "mimicnorm": (67.87, 0.20), "none": (65.33, 0.08)},
        "vgg16": {"batchnorm": (72.28, 0.05), "mimicnorm": (72.47, 0.02), "none": (68.97, 0.36)},
        "resnet18": {"batchnorm": (74.72, 0.31), "mimicnorm": (74.96, 0.14), "fixup": (70.48, 0.18)},
        "squeezenet": {"batchnorm": (70.88, 0.08), "mimicnorm": (71.15, 0.10)},
        "shufflenetv2_x1": {"batchnorm": (71.10, 0.49), "mimicnorm": (70.93, 0.13)},
        "resnet50": {"batchnorm": (78.53, 0.26), "mimicnorm": (77.91, 0.20), "fixup": (72.81, 0.10)},
    }
    return tuple(
        _arm(net, method, _three(*numbers), batch_size=128 if net == "resnet50" else 256)
        for net, methods in rows.items()
        for method, numbers in methods.items()
    )


def _table2() -> tuple[Arm, ...]:
    columns = {
        "none": (22.12, 26.76, 25.63, 1.24, 1.77, 1.00, 1.00),
        "weightmean": (34.81, 43.07, 42.63, 36.49, 1.00, 1.00, 1.00),
        "mimicnorm": (38.39, 44.32, 49.53, 46.92, 39.41, 22.03, 9.83),
        "batchnorm": (37.82, 40.49, 37.97, 32.4, 25.5, 8.26, 3.93),
    }
    return tuple(
        _arm("vgg16", method, Accuracy(numbers[i]), learning_rate=rate)
        for i, rate in enumerate(RATES)
        for method, numbers in columns.items()
    )


BASELINES = ("nf", "ws_gn", "groupnorm", "dyt")
"""What a user would pick otherwise; `skipinit` and `fixup` besides."""


def _ablation(*nets: str) -> tuple[Arm, ...]:
    methods = ("batchnorm", "mimicnorm", "weightmean", "lastbn", "none", "none, he")
    return tuple(_arm(net, method) for net in nets for method in methods)


DROPS = (0.53, 0.73, 0.9)
"""Of a run: where the paper's schedule divides the learning rate by ten, after 80, 110 and 135 of 150 epochs."""


def _converged(net: str, methods: Sequence[str], *, rate: float = 0.05, **about: Any) -> tuple[Arm, ...]:
    """Arms trained to the end of a schedule of the paper's shape; 0.05 at batch 128 is its 0.1 at batch 256."""
    epochs = about.pop("epochs", 30)
    fields = {"epochs": epochs, "warmup_epochs": 1.0, "batch_size": 128, "learning_rate": rate}
    fields |= {"decay_epochs": tuple(round(share * epochs) for share in DROPS)}
    return tuple(replace(_arm(net, method, **fields), **about) for method in methods)


WHY: tuple[tuple[str, str, Any, int], ...] = (
    ("mimicnorm", "logit_scale", 2.0, 3),
    ("mimicnorm", "logit_scale", 3.0, 1),
    ("nf", "adaptive_clip", 0.01, 1),
    ("mimicnorm", "warmup_epochs", 5.0, 1),
    ("mimicnorm", "init_scheme", "exact", 1),
    ("mimicnorm", "init_scheme", "text", 1),
    ("mimicnorm", "decay_scalars", False, 1),
    ("mimicnorm", "scalar_rate", 0.1, 1),
)
"""What might be the reason where a method is behind: the method, a field, another value of it, and how many seeds try
it; what evaluation tells is in `last_norm`."""


def _why() -> tuple[Arm, ...]:
    arms = []
    for method, name, value, count in WHY:
        (home,) = _converged("resnet8", (method,), seeds=tuple(range(count)), stage=5, against=method)
        arms.append(replace(home, method=f"{method}, {name}={value}", fields={**home.fields, name: value}))
    return tuple(arms)


def _convergence() -> tuple[Arm, ...]:
    pair, three = ("batchnorm", "mimicnorm"), (0, 1, 2)
    others = ("weightmean", "lastbn", "skipinit", "fixup", "nf", "ws_gn")
    return (
        *_converged("resnet8", (*pair, "none"), seeds=three),
        *_converged("resnet8", ("none, he",)),
        *_converged("resnet8", others, seeds=three, stage=1),
        *(arm for rate in (0.02, 0.1, 0.2) for arm in _converged("resnet8", pair, rate=rate, stage=2)),
        *_converged("squeezenet", pair, epochs=20, seeds=(0, 1), stage=3),
        *_converged("resnet8", ("groupnorm", "dyt"), stage=4),
        *_why(),
    )


_SMALL = {"width_multiplier": 0.25, "batch_size": 128, "schedule": "cosine"}

EXPERIMENTS: dict[str, Experiment] = {
    "table1": Experiment("best test accuracy of six networks", _table1(), 150),
    "table2": Experiment(
        "VGG-16, best test accuracy in 10 epochs by learning rate",
        _table2(),
        10,
        _SMALL | {"epochs": 1, "warmup_epochs": 0.2, "model": "vgg11"},
    ),
    "figure6": Experiment(
        "ablation on VGG-16",
        _ablation("vgg16"),
        150,
        _SMALL | {"epochs": 3, "warmup_epochs": 0.5, "learning_rate": 0.05, "model": "vgg11"},
    ),
    "figure7": Experiment("ablation on ResNet-18 and ResNet-50", _ablation("resnet18", "resnet50"), 150),
    "appendix_b2": Experiment(
        "running variance of the last BatchNorm in the first two epochs",
        tuple(_arm(net, "mimicnorm", diagnostics_epochs=0.05) for net in ("vgg11", "resnet18")),
        2,
        {"width_multiplier": 0.25, "batch_size": 128},
    ),
    "baselines": Experiment(
        "ResNet-18 under what a user would pick otherwise, one recipe",
        tuple(_arm("resnet18", method) for method in ("batchnorm", "mimicnorm", *BASELINES, "skipinit", "fixup")),
        150,
        _SMALL
        | {"epochs": 3, "warmup_epochs": 0.5, "learning_rate": 0.05, "model": "resnet8", "width_multiplier": 1.0},
    ),
    "convergence": Experiment("small networks trained to the end", _convergence(), 30, converged=True),
}
"""Every experiment by name."""


def small_form(experiment: Experiment) -> Experiment:
    """The form of an experiment for a CPU; no published number is for it.

    Raises:
      ValueError: if it has none.
    """
    if not experiment.small:
        raise ValueError("it has no small form")
    own = dict(experiment.small)
    epochs = own.pop("epochs", experiment.epochs)
    arms = tuple(
        replace(arm, net=own.get("model", arm.net), fields={**arm.fields, **own}, published=None)
        for arm in experiment.arms
    )
    return replace(experiment, summary=f"a small form of: {experiment.summary}", arms=arms, epochs=epochs)
