"""Time of folded inference beside the unfolded and the BatchNorm network, and what exported files hold.

Every variant in every round, after one call to warm up, variables as arguments: medians and quartiles of a call, and of
its ratio to the network with Flax's BatchNorm in the same round. Then the folded MimicNorm network in files: their
sizes, and how far the logits of what is read back are from the unfolded network's, relative to the largest. ONNX needs
`mimicnorm_jax[export]`. Adds its records to results/folded_inference.jsonl in place of older ones of the same device,
then writes folded_inference.md.

  python -m benchmarks.folded_inference
  python -m benchmarks.folded_inference --nets resnet50 --batches 8
  python -m benchmarks.folded_inference --render
"""

import importlib
import importlib.util
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.export
import numpy as np
from flax import linen as nn
from tqdm import tqdm

from benchmarks import _results, baselines
from benchmarks._results import Record, Store
from mimicnorm_jax import interop

NETS = ("resnet18", "squeezenet")
SHAPE = (32, 32, 3)
REFERENCE = "batchnorm"
NAMES = {
    REFERENCE: "Flax's BatchNorm",
    "batchnorm folded": "BatchNorm, folded",
    "mimicnorm": "MimicNorm, kernels centered in the call",
    "mimicnorm folded": "MimicNorm, folded",
}
"""Every variant, as a table calls it."""


def _networks(net: str) -> dict[str, tuple[nn.Module, Any]]:
    """Every variant with its variables: as initialized, with running averages that are not 0 and 1."""
    found = {}
    for variant, method in ((REFERENCE, REFERENCE), ("mimicnorm", "ours:mimicnorm")):
        model = baselines.network(net, method, 100, np.float32)
        variables = jax.jit(model.init)(jax.random.key(0), np.zeros((1, *SHAPE), np.float32))
        stats = jax.tree_util.tree_map_with_path(partial(_drawn, np.random.default_rng(0)), variables["batch_stats"])
        found[variant] = model, {"params": variables["params"], "batch_stats": stats}
        found[f"{variant} folded"] = interop.fold(*found[variant])
    return found


def _drawn(rng: np.random.Generator, path: Any, leaf: jax.Array) -> np.ndarray:
    low, high = {"mean": (-0.1, 0.1), "var": (0.5, 2.0)}[path[-1].key]
    return rng.uniform(low, high, leaf.shape).astype(np.float32)


def measure(net: str, batch: int, rounds: int) -> list[Record]:
    """One record for each variant."""
    networks = _networks(net)
    images = np.random.default_rng(1).normal(size=(batch, *SHAPE)).astype(np.float32)
    calls, flops = {}, {}
    for variant, (model, variables) in networks.items():
        calls[variant] = jax.jit(model.apply).lower(variables, images).compile()
        flops[variant] = (calls[variant].cost_analysis() or {}).get("flops", 0.0)
        calls[variant](variables, images).block_until_ready()
    times: dict[str, list[float]] = {variant: [] for variant in networks}
    names = list(networks)
    for i in tqdm(range(rounds), f"{net} batch {batch}", leave=False):
        for variant in names[i % len(names) :] + names[: i % len(names)]:  # none always follows the same one
            started = time.perf_counter()
            calls[variant](networks[variant][1], images).block_until_ready()
            times[variant].append(time.perf_counter() - started)
    about = {"kind": "time", "net": net, "batch": batch, "machine": _results.machine()}
    return [about | {"variant": v, "seconds": times[v], "flops": flops[v]} for v in names]


def measure_exports(net: str) -> list[Record]:
    """One record for each format whose packages are installed."""
    networks = _networks(net)
    images = np.random.default_rng(1).normal(size=(4, *SHAPE)).astype(np.float32)
    model, variables = networks["mimicnorm"]
    expected = np.asarray(jax.jit(model.apply)(variables, images))
    parameters = sum(np.size(leaf) for leaf in jax.tree.leaves(networks["mimicnorm folded"][1]))
    records = []
    for form, packages in interop.FORMATS.items():
        if not all(importlib.util.find_spec(package) for package in packages):
            continue
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"network.{form}"
            interop.export(*networks["mimicnorm folded"], path, image_shape=SHAPE, format=form)
            logits, size = _read(path, images), path.stat().st_size
        apart = float(abs(logits - expected).max() / abs(expected).max())
        about = {"kind": "export", "net": net, "variant": form, "machine": _results.machine()}
        records.append(about | {"bytes": size, "parameters": parameters, "relative_difference": apart})
    return records


def _read(path: Path, images: np.ndarray) -> np.ndarray:
    if path.suffix == ".onnx":
        session = importlib.import_module("onnxruntime").InferenceSession(path)
        return session.run(["logits"], {"images": images})[0]
    return np.asarray(jax.export.deserialize(bytearray(path.read_bytes())).call(images))


def key(record: Record) -> _results.Key:
    return record["machine"]["device"], record["kind"], record["net"], record.get("batch"), record["variant"]


STORE = Store("folded_inference", key)


def times_table(records: list[Record]) -> str:
    """Time by network, batch and variant."""
    rows = []
    for (net, batch), block in _results.grouped(records, lambda record: (record["net"], record["batch"])).items():
        reference = next(record for record in block if record["variant"] == REFERENCE)
        for record in block:
            ratios = [a / b for a, b in zip(record["seconds"], reference["seconds"], strict=True)]
            low, median, high = statistics.quantiles(ratios, n=4)
            ratio = f"{median:.3f} [{low:.3f}, {high:.3f}]" if record is not reference else "1"
            milliseconds = _results.milliseconds(record["seconds"], 1)
            rows.append((net, batch, NAMES[record["variant"]], milliseconds, ratio, f"{record['flops'] / 1e9:.3f}"))
    return _results.table(["net", "batch", "network", "ms", "ratio to BatchNorm", "GFLOP"], rows)


def exports_table(records: list[Record]) -> str:
    """Size and equality by network and format."""
    rows = [
        (
            record["net"],
            {"stablehlo": "StableHLO", "onnx": "ONNX"}[record["variant"]],
            f"{record['bytes'] / 2**20:.2f}",
            f"{4 * record['parameters'] / 2**20:.2f}",
            f"{record['relative_difference']:.1e}",
        )
        for record in records
    ]
    return _results.table(["net", "file", "MiB", "MiB of its parameters", "relative difference of logits"], rows)


def tables(records: list[Record], level: str = "##") -> str:
    """Both tables, for each device."""
    text = []
    for device, block in _results.grouped(records, lambda record: record["machine"]["device"]).items():
        kinds = _results.grouped(block, lambda record: record["kind"])
        about = block[0]["machine"]
        where = f"{device}, {about['cores']} cores, jax {about['jax']}"
        if "time" in kinds:
            rounds = min(len(record["seconds"]) for record in kinds["time"])
            text += [f"{level} Time of a call ({where}; {rounds} rounds)", times_table(kinds["time"])]
        if "export" in kinds:
            text += [f"{level} Exported MimicNorm networks, folded", exports_table(kinds["export"])]
    return "\n\n".join(text)


def page(records: list[Record]) -> str:
    """The page of results."""
    return f"""# Folded inference and exports

`python -m benchmarks.folded_inference`. Images of 32 x 32, 100 classes, float32. Medians of interleaved rounds,
quartiles in brackets; ratio: to the network with Flax's BatchNorm in the same round. GFLOP as the compiler counts them.
Relative difference: of the file's logits from those of the unfolded network, over the largest.

{tables(records)}
"""


def main() -> None:
    parser = _results.make_parser("folded_inference", __doc__)
    parser.add_argument("--nets", nargs="+", default=NETS, metavar="NET")
    parser.add_argument("--batches", nargs="+", type=int, default=(1, 32))
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    for net in () if arguments.render else arguments.nets:
        for batch in arguments.batches:
            STORE.add(arguments.results, *measure(net, batch, arguments.rounds))
        STORE.add(arguments.results, *measure_exports(net))
    STORE.write_page(arguments.results, page)


if __name__ == "__main__":
    main()
