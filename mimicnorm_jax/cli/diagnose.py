"""Diagnostics of networks at initialization or after training.

  python -m mimicnorm_jax diagnose verify                         # the theory of MLPs, checked numerically
  python -m mimicnorm_jax diagnose depth                          # how deep MLPs behave, by the theory
  python -m mimicnorm_jax diagnose ntk --model=resnet18 --method=mimicnorm --images=32
  python -m mimicnorm_jax diagnose jacobian --workdir=runs/DIR    # of a checkpoint of train.py
  python -m mimicnorm_jax diagnose updates --method=none          # what a large step does

Exit code: 0 when done, 1 if a check of `verify` fails, 2 for bad input."""

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mimicnorm_jax import plots
from mimicnorm_jax.cli import depth, updates
from mimicnorm_jax.cli.command import make_folder
from mimicnorm_jax.data import datasets
from mimicnorm_jax.diagnostics import (
    EmpiricalNTK,
    condition_number,
    curvature,
    jacobian,
    nngp,
    perturbation_growth,
    regime,
    unit_diagonal,
)
from mimicnorm_jax.diagnostics.ntk.plan import IMPLEMENTATIONS
from mimicnorm_jax.diagnostics.ntk.weighting import all_parameters, initial_variance
from mimicnorm_jax.diagnostics.regime import describe_condition
from mimicnorm_jax.diagnostics.tracing.layers import View
from mimicnorm_jax.diagnostics.updates import Batch
from mimicnorm_jax.errors import UserError
from mimicnorm_jax.init_schemes import SCHEMES
from mimicnorm_jax.methods import METHODS
from mimicnorm_jax.models import ARCHITECTURES
from mimicnorm_jax.monitoring import networks
from mimicnorm_jax.theory import verify
from mimicnorm_jax.theory.checks import as_table
from mimicnorm_jax.theory.observations import observe
from mimicnorm_jax.training import TrainConfig
from mimicnorm_jax.training import config as config_lib
from mimicnorm_jax.utils import environment
from mimicnorm_jax.utils.console import log_line, table
from mimicnorm_jax.utils.files import write_json


def _save(folder: Path | None, name: str, content: Any) -> None:
    if folder is not None:
        write_json(folder / f"{name}.json", {"machine": environment.describe(), **content})
        log_line(f"written: {folder / name}.json")


def run_verify(arguments: argparse.Namespace) -> int:
    """Runs every check for each base seed; draws the figures of the first."""
    failed = 0
    report: dict[str, Any] = {}
    for seed in arguments.seeds:
        found = verify.run(seed)
        log_line(f"base seed {seed}\n{as_table(found)}\n")
        failed += sum(not check.passed for check in found)
        report[f"seed {seed}"] = [dataclasses.asdict(check) | {"passed": check.passed} for check in found]
    observed = observe(arguments.seeds[0])
    log_line(f"printed, not asserted (seed {arguments.seeds[0]})\n{as_table(observed)}\n")
    log_line(verify.STATEMENT)
    _save(arguments.out, "verify", {**report, "observations": [dataclasses.asdict(o) for o in observed]})
    if arguments.out is not None and plots.available():
        for path in verify.draw_figures(arguments.out, arguments.seeds[0]):
            log_line(f"written: {path}")
    elif arguments.out is not None:
        log_line("no figures: pip install matplotlib to get them")
    log_line(f"{failed} checks failed" if failed else "every check passed")
    return 1 if failed else 0


def run_depth(arguments: argparse.Namespace) -> int:
    """Prints what the infinitely wide MLPs do with depth."""
    mlps = depth.report(arguments.inputs, arguments.rho, arguments.depths)
    _save(arguments.out, "depth", {"inputs": arguments.inputs, "rho": arguments.rho, "mlps": mlps})
    return 0


def _network(arguments: argparse.Namespace, *, training: bool = False) -> tuple[TrainConfig, networks.BoundModel]:
    if arguments.workdir is not None:
        for name in ("model", "method", "init", "width", "dataset"):
            if (value := getattr(arguments, name)) is not None:
                raise UserError(f"--{name}={value} and --workdir={arguments.workdir}: a run has its own; leave one out")
        folder, which, data_dir = arguments.workdir, arguments.checkpoint, arguments.data_dir or ""
        config, found = networks.from_checkpoint(folder, which, arguments.precision, data_dir, training=training)
        return config if arguments.seed is None else dataclasses.replace(config, seed=arguments.seed), found
    fields = {"init_scheme": arguments.init, "width_multiplier": arguments.width}
    fields |= {name: getattr(arguments, name) for name in ("model", "method", "seed", "dataset", "data_dir")}
    given = {name: value for name, value in fields.items() if value is not None}
    config = config_lib.validate(config_lib.base(**given))
    if arguments.inputs == "real":
        datasets.require_prepared(config.dataset, config.data_dir)
    return config, networks.initialized(config, arguments.precision, training=training)


def _subject(arguments: argparse.Namespace) -> tuple[networks.BoundModel, jax.Array]:
    config, found = _network(arguments)
    return found, networks.images(config, arguments.images, arguments.inputs, arguments.precision, found.image_shape)


def _output(text: str) -> Any:
    return int(text) if text.lstrip("-").isdigit() else text


def run_ntk(arguments: argparse.Namespace) -> int:
    """The tangent kernel of a network, its condition and who contributes."""
    found, x = _subject(arguments)
    weights = initial_variance(found.params) if arguments.weights == "initial_variance" else all_parameters
    options: dict[str, Any] = {
        "output": arguments.output,
        "weights": weights,
        "implementation": arguments.implementation,
        "batch_coupled": found.batch_coupled,
        "memory": int(arguments.memory * 2**30),
        "check": arguments.check,
    }
    kernel_of = EmpiricalNTK(found.apply_fn, **options)
    log_line(f"{found.name}\n{kernel_of.plan(found.params, x)}")
    out = None
    if arguments.out is not None:
        out = arguments.out / "ntk.npy"
    process = None if arguments.process is None else tuple(arguments.process)
    kernel = np.asarray(kernel_of(found.params, x, out=out, process=process))
    square = kernel if kernel.ndim == 2 else np.einsum("nmoo->nm" if kernel.ndim == 4 else "nmo->nm", kernel)
    values = np.linalg.eigvalsh(square)
    shown = {
        "examples, outputs": f"{len(x)}, {arguments.output if kernel.ndim == 2 else f'trace of {kernel.shape[-1]}'}",
        "examples influence one another": "yes: BatchNorm over this batch" if found.batch_coupled else "no",
        "condition number": describe_condition(condition_number(square), square.dtype),
        "of the unit-diagonal kernel": describe_condition(condition_number(unit_diagonal(square)), square.dtype),
        "eigenvalues, least and largest": f"{values[0]:.4g}, {values[-1]:.4g}",
        "diagonal, mean and spread": f"{np.diagonal(square).mean():.4g} +- {np.diagonal(square).std():.2g}",
    }
    log_line(table(shown))
    if (process or (jax.process_index(),))[0] == 0:
        _save(arguments.out, "ntk", {"subject": found.name, **shown, "eigenvalues": values.tolist()})
    return 0


def run_jacobian(arguments: argparse.Namespace) -> int:
    """Moments and growth by layer, and the extremes of the Jacobian and of the curvature."""
    found, x = _subject(arguments)
    key = jax.random.key(arguments.seed or 0)
    log_line(found.name)
    view = View(batch_coupled=found.batch_coupled)
    moments = nngp.moments(found.apply_fn, found.params, x, view)
    grown = perturbation_growth(found.apply_fn, found.params, x, view, key=key)
    logs = grown.log_ratios.mean(0)
    log_line(f"{'layer':44}{'mean square':>13}{'correlation':>13}{'growth so far':>15}")
    layers = {}
    for name, log in zip(grown.names, logs - logs[0], strict=True):
        layer = moments[name]
        layers[name] = {**dataclasses.asdict(layer), "growth": float(np.exp(log))}
        log_line(f"{name:44}{layer.mean_square:>13.4g}{layer.correlation:>13.4f}{np.exp(log):>15.4g}")
    seen = regime.measured_layers(grown, found.batch_coupled)
    chi, error = grown.rate(grown.names[seen[0]], grown.names[seen[-1]])
    curved = curvature.gauss_newton_eigenvalues(found.apply_fn, found.params, x, key=key)
    shown = {"growth per layer (chi)": f"{chi:.4f} +- {error:.2g}"}
    if not found.batch_coupled:
        largest = np.asarray(jacobian.largest(found.apply_fn, found.params, x, key=key).values)
        square = np.asarray(jacobian.mean_square(found.apply_fn, found.params, x, key=key).mean)
        shown["largest squared singular value, mean over examples"] = f"{largest.mean():.4g}"
        shown["sum of squared singular values over outputs"] = f"{square.mean():.4g}"
    top = float(curved.values[0])
    plain, heavy_ball = (f"{curvature.largest_stable_rate(top, momentum):.3g}" for momentum in (0.0, 0.9))
    stable = f"{plain}, with momentum 0.9 {heavy_ball}"
    shown["largest eigenvalue of the Gauss-Newton matrix"] = f"{top:.4g} (stable below learning rate {stable})"
    log_line(table(shown))
    _save(arguments.out, "jacobian", {"subject": found.name, **shown, "layers": layers})
    return 0


def run_updates(arguments: argparse.Namespace) -> int:
    """What a large step along the gradient does, in training mode."""
    config, found = _network(arguments, training=True)
    x, labels = networks.training_batch(config, arguments.images, arguments.inputs, arguments.precision)
    content = updates.report(found, Batch(x, labels), arguments.rates)
    _save(arguments.out, "updates", {"subject": found.name, **content})
    return 0


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mimicnorm diagnose",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="verify|depth|ntk|jacobian|updates")

    def command(name: str, run: Any, about: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=about, description=about)
        added.set_defaults(run=run)
        added.add_argument("--out", type=Path, help="folder for JSON, kernels and figures; default: print only")
        return added

    verifying = command("verify", run_verify, "hold the theory of MLPs to finite networks, in float64")
    verifying.add_argument("--seeds", type=int, nargs="+", default=[0], help="base seeds (default: 0)")
    by_depth = command("depth", run_depth, "correlations and NTK condition numbers of infinitely wide MLPs by depth")
    by_depth.add_argument("--inputs", type=int, default=32, help="number of inputs (default: 32)")
    by_depth.add_argument("--rho", type=float, default=0.5, help="their correlation (default: 0.5)")
    by_depth.add_argument("--depths", type=int, nargs="+", default=[4, 8, 13, 20, 50], help="(default: 4 8 13 20 50)")
    for name, run, about in (
        ("ntk", run_ntk, "the empirical tangent kernel of one of our networks"),
        ("jacobian", run_jacobian, "moments, growth of perturbations and curvature of one of our networks"),
        ("updates", run_updates, "what a large step does to one of our networks, and what its gradient is made of"),
    ):
        _add_subject(command(name, run, about))
    rates = ", ".join(f"{rate:.3g}" for rate in updates.RATES)
    commands.choices["updates"].add_argument(
        "--rates", type=float, nargs="+", default=updates.RATES, help=f"learning rates of one step (default: {rates})"
    )
    ntk = commands.choices["ntk"]
    ntk.add_argument(
        "--output", type=_output, default="trace", help="full, diagonal, trace or a number (default: trace)"
    )
    ntk.add_argument(
        "--weights", choices=("all", "initial_variance"), default="all", help="of parameters (default: all)"
    )
    ntk.add_argument("--implementation", default="auto", help=f"auto, {', '.join(IMPLEMENTATIONS)} (default: auto)")
    ntk.add_argument(
        "--check",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compare one random pair of examples with a direct product of gradients (default: yes)",
    )
    ntk.add_argument("--memory", type=float, default=4.0, help="GiB for a pair of blocks (default: 4)")
    ntk.add_argument(
        "--process",
        type=int,
        nargs=2,
        metavar=("I", "K"),
        help="this is I of K processes, from 0, that compute the kernel in --out together (default: alone)",
    )
    return parser


def _add_subject(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", choices=ARCHITECTURES, metavar="NAME", help="default: resnet8")
    parser.add_argument("--method", choices=METHODS, help="default: mimicnorm")
    parser.add_argument("--init", choices=SCHEMES, help="default: published")
    parser.add_argument("--width", type=float, help="factor on the channels (default: 1)")
    parser.add_argument(
        "--seed", type=int, help="of parameters and images that are drawn (default: 0, or that of --workdir)"
    )
    parser.add_argument("--workdir", type=Path, help="a run of train.py instead, at its newest checkpoint")
    parser.add_argument("--checkpoint", choices=("latest", "best"), default="latest", help="of --workdir")
    parser.add_argument("--dataset", choices=datasets.DATASETS, help="default: digits")
    parser.add_argument("--data_dir", help="folder of TFDS datasets")
    parser.add_argument("--images", type=int, default=32, help="test images; of updates training images (default: 32)")
    parser.add_argument("--inputs", choices=("real", "random"), default="real", help="or standard normal noise")
    parser.add_argument("--precision", choices=("float32", "float64"), default="float32", help="(default: float32)")


def _check(arguments: argparse.Namespace) -> None:
    """Refuses what cannot be measured; makes the folder of --out before anything is."""
    if (images := getattr(arguments, "images", 1)) < 1:
        raise UserError(f"--images is {images}: it must be at least 1")
    if arguments.out is not None:
        make_folder(arguments.out)


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    arguments = make_parser().parse_args(argv)
    try:
        _check(arguments)
        with jax.enable_x64(getattr(arguments, "precision", "") == "float64"):
            return arguments.run(arguments)
    except (UserError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
