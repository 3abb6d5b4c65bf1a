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

import jax
import numpy as np

from benchmarks import _results
from benchmarks._results import Record, Store
from mimicnorm_jax.data import DATASETS, Augmentation, Dataset, DatasetSpec, Split, get_spec, load
from mimicnorm_jax.training import Metrics, Trainer, base, build_spec, build_trainer, train_epoch, validate

NETS = ("resnet8", "resnet18")
STEPS_PER_CALL = (1, 4, 16)
SEED = 0
NAME = "beginning of cifar100"
"""Of the data set that is registered here."""
Arm = Callable[[Any], Any]


def dataset(data_dir: str, count: int) -> Dataset:
    """The first `count` training images of CIFAR-100, or random ones of its shape, as the data set `NAME`."""
    like = get_spec("cifar100")

    def read(spec: DatasetSpec, data_dir: str) -> tuple[Split, Split]:
        if data_dir:
            real = load("cifar100", data_dir)
            return Split(real.train.images[: spec.num_train], real.train.labels[: spec.num_train]), real.test
        rng = np.random.default_rng(SEED)
        images = rng.integers(0, 256, (spec.num_train, *spec.image_shape), np.uint8)
        split = Split(images, rng.integers(0, spec.num_classes, spec.num_train, np.int32))
        return split, split

    num_test = like.num_test if data_dir else count
    DATASETS[NAME] = DatasetSpec(NAME, like.image_shape, like.num_classes, count, num_test, read)
    return load(NAME, data_dir)


def make_trainer(net: str, arguments: argparse.Namespace) -> Trainer:
    """A run's trainer on the images of `dataset`, at a rate that lets no loss diverge."""
    fields = base(dataset=NAME, data_dir=arguments.data_dir, model=net, batch_size=arguments.batch_size)
    fields.width_multiplier = arguments.width
    fields.update(seed=SEED, learning_rate=1e-4, warmup_epochs=0.0, crop_padding=4, flip=True, rotation=15.0)
    return build_trainer(build_spec(validate(fields)))


def arms(trainer: Trainer, train: Split) -> dict[str, Arm]:
    """What is timed, by name: each does an epoch's steps on a state and returns the next state."""
    size, devices = trainer.config.batch_size, trainer.num_devices
    batch = trainer.data_parallel.replicate((train.images[:size].reshape(size, -1), train.labels[:size]))
    plain = dataclasses.replace(trainer.step_config, augmentation=Augmentation())
    bare = trainer.data_parallel.make_train_steps(plain, trainer.pipeline.make_batch)
    feeds = [feed for feed, _ in trainer.pipeline.train_feeds(0, 0)]
    there = feeds[0]._replace(index=np.arange(size, dtype=np.int32).reshape(devices, 1, -1))

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
        return lambda state: train_epoch(grouped, state, next(epochs), Metrics.empty())[0]

    return {"step": step, "augmented": augmented} | {f"loop, {k} a call": epoch(k) for k in STEPS_PER_CALL}


def measure(trainer: Trainer, train: Split, rounds: int) -> dict[str, list[float]]:
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
            seconds = measure(make_trainer(net, arguments), images.train, arguments.rounds)
            record = {"net": net, **setting, "seconds_per_step": seconds, "machine": _results.machine()}
            print(table([record]), flush=True)
            STORE.add(arguments.results, record | {"command": command})
    STORE.write_page(arguments.results, page)


if __name__ == "__main__":
    main()
