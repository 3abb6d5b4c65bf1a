"""How much of training is not the training step: seconds a step of the bare step, with augmentation, in the loop.

Measures CIFAR-100's shapes, random images unless --data_dir is given, and writes results/input_pipeline.jsonl and .md.

  python -m benchmarks.input_pipeline
"""

import argparse
import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import numpy as np

from benchmarks import _results
from benchmarks._results import Record, Store
from mimicnorm_jax.data import Augmentation, datasets
from mimicnorm_jax.data.pipeline import Selection
from mimicnorm_jax.training import Trainer, build_spec, build_trainer, config, loop
from mimicnorm_jax.training.metrics import Metrics

NETS = ("resnet8", "resnet18")
STEPS_PER_CALL = (1, 4, 16)
SEED = 0
Arm = Callable[[Any], Any]


def dataset(data_dir: str, count: int) -> datasets.Dataset:
    """The first `count` training images of CIFAR-100, or random ones of its shape."""
    if data_dir:
        real = datasets.load("cifar100", data_dir)
        train = datasets.Split(real.train.images[:count], real.train.labels[:count])
        return dataclasses.replace(real, train=train)
    rng = np.random.default_rng(SEED)
    images = rng.integers(0, 256, (count, *datasets.get_spec("cifar100").image_shape), np.uint8)
    split = datasets.Split(images, rng.integers(0, 100, count, np.int32))
    return datasets.Dataset(datasets.get_spec("cifar100"), split, split, (0.5,) * 3, (0.25,) * 3)


def make_trainer(net: str, arguments: argparse.Namespace, images: datasets.Dataset) -> Trainer:
    """A run's trainer on these images, at a rate that lets no loss diverge."""
    fields = config.base(dataset="cifar100", model=net, batch_size=arguments.batch_size)
    fields.width_multiplier = arguments.width
    fields.update(seed=SEED, learning_rate=1e-4, warmup_epochs=0.0, crop_padding=4, flip=True, rotation=15.0)
    with mock.patch.object(datasets, "load", return_value=images):
        return build_trainer(build_spec(config.validate(fields)))


def arms(trainer: Trainer, train: datasets.Split) -> dict[str, Arm]:
    """What is timed, by name: each does an epoch's steps on a state and returns the next state."""
    size, devices = trainer.config.batch_size, trainer.num_devices
    batch = trainer.data_parallel.replicate((train.images[:size].reshape(size, -1), train.labels[:size]))
    there = Selection(np.arange(size, dtype=np.int32).reshape(devices, 1, -1))
    plain = dataclasses.replace(trainer.step_config, augmentation=Augmentation())
    bare = trainer.data_parallel.make_train_steps(plain, trainer.pipeline.make_batch)
    feeds = [feed for feed, _ in trainer.pipeline.train_feeds(0, 0)]

    def step(state: Any) -> Any:
        for _ in range(trainer.steps_per_epoch):
            state, _ = bare(state, batch, there, 1)
        return state

    def augmented(state: Any) -> Any:
        for feed in feeds:
            state, _ = trainer.train_steps(state, trainer.pipeline.train, feed, 1)
        return state

    def epoch(steps: int) -> Arm:
        resident: Any = trainer.pipeline
        layout = dataclasses.replace(resident.layout, steps_per_call=steps)
        grouped = dataclasses.replace(trainer, pipeline=dataclasses.replace(resident, layout=layout))
        epochs = itertools.count()  # of an epoch that the state has done no step would be left
        return lambda state: loop.train_epoch(grouped, state, next(epochs), Metrics.empty())[0]

    return {"step": step, "augmented": augmented} | {f"loop, {k} a call": epoch(k) for k in STEPS_PER_CALL}


def measure(trainer: Trainer, train: datasets.Split, rounds: int) -> dict[str, list[float]]:
    """Seconds a step of each arm in each round; the arms take turns, after one round that compiles."""
    todo = arms(trainer, train)
    start_state = jax.device_get(trainer.spec.init_state())
    states = {name: trainer.data_parallel.replicate(start_state) for name in todo}
    seconds: dict[str, list[float]] = {name: [] for name in todo}
    for turn in range(rounds + 1):
        for name, arm in todo.items():
            started = time.perf_counter()
            states[name] = jax.block_until_ready(arm(states[name]))
            ended = time.perf_counter()
            if int(states[name].step) != (turn + 1) * trainer.steps_per_epoch:
                raise RuntimeError(f"{name} has not done the steps of an epoch in each round: its time says nothing")
            if turn:
                seconds[name].append((ended - started) / trainer.steps_per_epoch)
    return seconds


SETTING = ("images", "batch_size", "width", "steps", "rounds", "seed")
"""Fields of a record that its page tells of all networks at once."""


def key(record: Record) -> _results.Key:
    return record["machine"]["device"], *(record[name] for name in SETTING), record["net"]


STORE = Store("input_pipeline", key)


def table(records: list[Record]) -> str:
    """Medians and ranges over rounds; ratios are medians of those within a round."""
    rows = []
    for record in records:
        arms_seconds = record["seconds_per_step"]
        for name, values in arms_seconds.items():
            ratios = [value / step for value, step in zip(values, arms_seconds["step"], strict=True)]
            shares = [1 - 1 / ratio for ratio in ratios]
            rows.append(
                (
                    record["net"],
                    name,
                    f"{1e3 * statistics.median(values):.2f}",
                    f"{1e3 * min(values):.2f} to {1e3 * max(values):.2f}",
                    f"{statistics.median(ratios):.3f}",
                    f"{statistics.median(shares):.1%}",
                )
            )
    return _results.table(["network", "measured", "ms a step", "range", "ratio to the step", "not in the step"], rows)


def page(records: list[Record]) -> str:
    """The tables, one for each setting."""
    text = "# What training costs besides the training step\n"
    for block in _results.grouped(records, lambda record: key(record)[:-1]).values():
        about = block[0]
        commands = "; ".join(dict.fromkeys(f"`{record['command']}`" for record in block))
        text += f"""
{table(block)}

`step`: the training step on one batch that lies on the device, without augmentation. `augmented`: the step that
gathers its batch from all training images on the device and augments it (crop, flip, rotation). `loop`: `train_epoch`
as a run calls it, with its order of images and the metrics' way to the host, at 1, 4 or 16 steps a call; above 1
the step stands in a compiled loop, whose convolutions are slow on a CPU, and that counts as not in the step. Medians
over {about["rounds"]} rounds in which all take turns, ratios within a round; {about["steps"]} steps a measurement,
batches of {about["batch_size"]}, width {about["width"]:g}, {about["images"]} images, seed {about["seed"]}, MimicNorm.

Command: {commands}. Machine: {_results.machines(block)}.
"""
    return text


def main() -> None:
    parser = _results.make_parser("input_pipeline", __doc__)
    parser.add_argument("--data_dir", default="", help="folder of TFDS datasets; default: random images")
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--width", type=float, default=0.25, help="factor on the networks' channels")
    parser.add_argument("--steps", type=int, default=40, help="steps in a measurement: the epoch's length")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--nets", nargs="+", default=NETS)
    arguments = parser.parse_args()
    if not arguments.render:
        images = dataset(arguments.data_dir, arguments.steps * arguments.batch_size)
        setting = {name: getattr(arguments, name) for name in ("batch_size", "width", "steps", "rounds")}
        setting |= {"images": "CIFAR-100" if arguments.data_dir else "random", "seed": SEED}
        flags = {name: value for name, value in vars(arguments).items() if value != parser.get_default(name)}
        flags.pop("results", None)
        # The folder's own name says nothing about the result.
        flags |= {"data_dir": "DIR"} if arguments.data_dir else {}
        given = [f"--{name} {' '.join(value) if name == 'nets' else value}" for name, value in flags.items()]
        command = " ".join(["python -m benchmarks.input_pipeline", *given])
        for net in arguments.nets:
            seconds = measure(make_trainer(net, arguments, images), images.train, arguments.rounds)
            record = {"net": net, **setting, "seconds_per_step": seconds, "machine": _results.machine()}
            print(table([record]), flush=True)
            STORE.add(arguments.results, record | {"command": command})
    STORE.write_page(arguments.results, page)


if __name__ == "__main__":
    main()
