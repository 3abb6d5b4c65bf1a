"""Diagnostics along a run, and networks taken from its checkpoints."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mimicnorm_jax import models, monitoring
from mimicnorm_jax.cli.diagnose import main
from mimicnorm_jax.data import datasets
from mimicnorm_jax.data.streaming import BadImages, Cut
from mimicnorm_jax.data.streaming.pipeline import Reader
from mimicnorm_jax.diagnostics import RegimeMeter, empirical_ntk
from mimicnorm_jax.errors import ConfigError, DataError, NonFiniteLossError, WorkdirError
from mimicnorm_jax.monitoring import networks
from mimicnorm_jax.training import build_spec, build_trainer, config, loop
from mimicnorm_jax.training.resilience import Checkpoints
from mimicnorm_jax.training.writers import MetricWriter
from tests.data.photographs import write_folder
from tests.training.runs import stopped_after_a_save

# Orbax leaves coroutines behind where it reads, and where a file that it reads is missing.
pytestmark = [
    pytest.mark.usefixtures("one_block"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

SMALL = {"model": "resnet8", "width_multiplier": 0.25, "batch_size": 256, "epochs": 2, "warmup_epochs": 1.0}


def _config(**overrides):
    return config.validate(config.base(**SMALL | overrides))


def _lines(folder):
    return [json.loads(line) for line in (folder / "diagnostics.jsonl").read_text().splitlines()]


def _final(fields, folder):
    with Checkpoints(folder / "checkpoints", 2) as checkpoints:
        return checkpoints.restore(checkpoints.latest, build_spec(fields).state_template())[0]


@pytest.fixture(scope="module")
def probed(one_block, tmp_path_factory):
    """A run with diagnostics, its folder and its config."""
    folder = tmp_path_factory.mktemp("probed")
    fields = _config(diagnostics_epochs=0.5)
    loop.run(fields, folder, make_hook=monitoring.make_hook(fields))
    return folder, fields


def test_a_line_before_training_and_at_the_step_that_completes_each_half_epoch(probed):
    folder, fields = probed
    lines = _lines(folder)
    # 1,437 images are 5 batches of 256 an epoch.
    assert [(line["epoch"], line["step"]) for line in lines] == [(0, 0), (0.6, 3), (1, 5), (1.6, 8), (2, 10)]
    assert lines[0]["last_bn_variance"] == 1.0
    variance = _final(fields, folder).batch_stats["last_bn"]["var"]
    np.testing.assert_allclose(lines[-1]["last_bn_variance"], np.mean(variance), rtol=1e-6)


def test_alignment_is_that_of_the_written_out_kernel_of_the_sum_of_logits(probed):
    folder, fields = probed
    final, dataset = _final(fields, folder), datasets.load("digits")
    x, labels = networks.images(fields, 32, "real", "float32"), dataset.test.labels[:32]
    model = models.create("resnet8", num_classes=10, width=0.25)
    neutral = {"last_bn": {"mean": jnp.zeros(10), "var": jnp.ones(10)}}
    total = jax.jacrev(lambda p: model.apply({"params": p, "batch_stats": neutral}, x).sum(1))(final.params)
    rows = np.concatenate([np.asarray(leaf, np.float64).reshape(32, -1) for leaf in jax.tree.leaves(total)], 1)
    line = _lines(folder)[-1]
    for name, middle in (("alignment", np.eye(32)), ("alignment_centered", np.eye(32) - 1 / 32)):
        kernel, same = middle @ rows @ rows.T @ middle, middle @ (np.eye(10)[labels] - 0.1)
        expected = (same * (kernel @ same)).sum() / np.linalg.norm(kernel) / np.linalg.norm(same.T @ same)
        # The kernel is in float32.
        np.testing.assert_allclose(line[name], expected, rtol=1e-4)


def test_a_network_that_diverges_or_is_dead_is_for_its_loss_to_end(tmp_path, capsys):
    """What cannot be measured is null; the reason is in the log, and the run's failure is that of its loss."""
    fields = _config(method="none", learning_rate=1e8, warmup_epochs=0.0, diagnostics_epochs=0.2)
    with pytest.raises(NonFiniteLossError):
        loop.run(fields, tmp_path, make_hook=monitoring.make_hook(fields))
    assert (tmp_path / "failure.json").exists()
    first, second = _lines(tmp_path)[:2]
    assert None not in first.values()
    assert second == {"epoch": 0.2, "step": 1, **dict.fromkeys(first.keys() - {"epoch", "step"})}
    assert "not measured: kappa, kappa_unit_diagonal, chi, growth: the kernel" in capsys.readouterr().out


def test_a_network_that_cannot_be_measured_at_all_is_refused_before_its_first_step(tmp_path, monkeypatch):
    def fail(*_):
        raise ValueError("its derivative has no forward mode")

    monkeypatch.setattr(RegimeMeter, "__call__", fail)
    fields = _config(diagnostics_epochs=1.0)
    with pytest.raises(ConfigError, match=r"config\.diagnostics_epochs cannot .* no forward mode\. Set it to 0"):
        loop.run(fields, tmp_path, make_hook=monitoring.make_hook(fields))
    assert not list((tmp_path / "checkpoints").glob("*"))


@pytest.mark.slow
def test_measuring_changes_nothing_of_the_training_and_survives_an_interruption(probed, tmp_path, monkeypatch):
    folder, fields = probed
    plain = dataclasses.replace(fields, diagnostics_epochs=0.0)
    loop.run(plain, tmp_path / "plain")
    for a, b in zip(
        jax.tree.leaves(_final(fields, folder)), jax.tree.leaves(_final(plain, tmp_path / "plain")), strict=True
    ):
        np.testing.assert_array_equal(a, b)
    assert not (tmp_path / "plain" / "diagnostics.jsonl").exists()

    with stopped_after_a_save(monkeypatch):
        loop.run(fields, tmp_path / "resumed", make_hook=monitoring.make_hook(fields))
    loop.run(fields, tmp_path / "resumed", make_hook=monitoring.make_hook(fields))
    assert _lines(tmp_path / "resumed") == _lines(folder)


def test_a_bound_model_is_the_network_that_evaluation_sees_and_restored_without_the_data(probed, monkeypatch):
    folder, fields = probed
    with monkeypatch.context() as patch:
        patch.setattr(datasets, "load", lambda *_: pytest.fail("read the data set"))
        read, found = networks.from_checkpoint(folder, "latest", "float32")
    digits = datasets.load("digits")
    assert read == dataclasses.replace(fields, mean=digits.mean, std=digits.std)
    x = networks.images(fields, 4, "real", "float32")
    by_hand = (digits.test.images[:4] / 255 - digits.mean) / digits.std
    np.testing.assert_allclose(x, by_hand, atol=1e-5)
    model = models.create("resnet8", num_classes=10, width=0.25)
    expected = model.apply(_final(fields, folder).eval_variables, x)
    np.testing.assert_allclose(found.apply_fn(found.params, x), expected, rtol=1e-6, atol=1e-6)


def test_batch_norm_is_taken_over_the_batch():
    found = networks.initialized(_config(method="batchnorm", width_multiplier=0.125), "float32")
    assert found.batch_coupled
    x = networks.images(_config(), 6, "random", "float32")
    hidden = found.apply_fn(found.params, x)
    # Every BatchNorm removes a common factor of its inputs, up to its epsilon.
    scaled = jax.tree.map(lambda leaf: leaf, found.params)
    scaled["stem"]["conv"]["kernel"] = 3 * scaled["stem"]["conv"]["kernel"]
    np.testing.assert_allclose(found.apply_fn(scaled, x), hidden, atol=1e-3 * float(jnp.abs(hidden).max()))


@pytest.mark.parametrize("training", [False, True])
def test_a_scale_of_logits_is_that_of_the_measured_network(training):
    x = networks.images(_config(), 4, "random", "float32")
    plain, surer = (
        networks.initialized(_config(width_multiplier=0.125, logit_scale=scale), "float32", training=training)
        for scale in (1.0, 2.0)
    )
    np.testing.assert_array_equal(surer.apply_fn(surer.params, x), 2 * plain.apply_fn(plain.params, x))


def test_what_cannot_be_measured_is_named(tmp_path):
    with pytest.raises(DataError, match=r"361 images .* 360"):
        networks.images(_config(), 361, "real", "float32")
    with pytest.raises(ConfigError, match="at least 32 x 32"):
        networks.initialized(_config(model="vgg11"), "float32")
    with pytest.raises(WorkdirError, match="holds no run"):
        networks.from_checkpoint(tmp_path, "latest", "float32")


def test_bad_images_count_to_the_bound_of_the_run(tmp_path):
    """Those that the hook meets are named with the run's own; a run's config bounds those of `diagnose` too."""
    root = write_folder(tmp_path / "data", 2, 4, 3)
    for path in ("train/class01/000.jpg", "val/class00/000.jpg"):
        (root / path).write_bytes(b"")
    fields = _config(dataset=f"folder:{root}", image_size=8, batch_size=4, max_bad_images=2, diagnostics_epochs=1.0)
    trainer = build_trainer(build_spec(fields))
    monitoring.make_hook(fields)(trainer, tmp_path, MetricWriter(tmp_path, 0), 0)
    assert [name.removeprefix(f"{root}/") for name in trainer.bad_images.found] == [
        "train/class01/000.jpg",
        "val/class00/000.jpg",
    ]
    shown = networks.images(fields, 5, "real", "float32")
    reader = Reader(trainer.dataset.test, Cut(8), BadImages(0))
    by_hand = np.stack([reader.read(place)[0] for place in range(1, 6)]) / 255
    np.testing.assert_allclose(shown, (by_hand - trainer.dataset.mean) / trainer.dataset.std, atol=1e-5)
    with pytest.raises(DataError, match="6 images were asked for, and only 5 of folder:"):
        networks.images(fields, 6, "real", "float32")
    with pytest.raises(DataError, match=r"config.max_bad_images is 1"):
        networks.images(dataclasses.replace(fields, max_bad_images=1), 5, "real", "float32")


def test_ntk_and_jacobian_commands_on_a_checkpoint(probed, tmp_path, capsys):
    folder, _ = probed
    assert main(["ntk", f"--workdir={folder}", "--images=4", "--output=1", f"--out={tmp_path}"]) == 0
    kernel = np.load(tmp_path / "ntk.npy")
    values = np.linalg.eigvalsh(kernel)
    printed = capsys.readouterr().out
    assert "structured_derivatives" in printed
    (tmp_path / "ntk.json").unlink()
    shared = ["ntk", f"--workdir={folder}", "--images=4", "--output=1", f"--out={tmp_path}", "--process", "1", "2"]
    assert main(shared) == 0  # of the same kernel, whose report is the first process's
    assert not (tmp_path / "ntk.json").exists()
    assert f"{values[-1] / values[0]:.4g}" in printed
    assert main(["jacobian", f"--workdir={folder}", "--images=2", f"--out={tmp_path}"]) == 0
    layers = json.loads((tmp_path / "jacobian.json").read_text())["layers"]
    assert len(layers) == 4
    assert capsys.readouterr().out.count("/conv ") == 3


def test_a_seed_draws_other_noise_for_the_same_checkpoint(probed, tmp_path):
    folder, fields = probed
    _, found = networks.from_checkpoint(folder, "latest", "float32")
    noise = ["ntk", f"--workdir={folder}", "--images=3", "--inputs=random", "--output=1", f"--out={tmp_path}"]
    for arguments, seed in ((["--seed=1"], 1), ([], fields.seed)):
        assert main([*noise, *arguments]) == 0
        x = networks.images(dataclasses.replace(fields, seed=seed), 3, "random", "float32")
        kernel = np.load(tmp_path / "ntk.npy")
        # float32: sums of some ten thousand products in another order.
        np.testing.assert_allclose(kernel, empirical_ntk(found.apply_fn, found.params, x, output=1), rtol=1e-4)


def test_depth_command(tmp_path, capsys):
    assert main(["depth", "--depths", "4", "13", f"--out={tmp_path}"]) == 0
    found = json.loads((tmp_path / "depth.json").read_text())["mlps"]["weight mean"]["kappa"]
    np.testing.assert_allclose([found["4"], found["13"]], [7.9603, 1.0447], rtol=1e-4)
    assert "7.960" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method=fixup", "--model=vgg11"], "has none"),
        (["--model=vgg11"], "at least 32 x 32"),
        (["--dataset=cifar100", "--data_dir=nowhere"], "cifar100 is not prepared under nowhere"),
        (["--workdir=nowhere"], "nowhere holds no run"),
        (["--workdir=nowhere", "--dataset=cifar100"], "--dataset=cifar100 and --workdir=nowhere"),
        (["--images=361"], "361 images"),
        (["--memory=1e-6", "--width=0.25"], "raise memory"),
        (["--output=ful", "--width=0.25"], "did you mean full"),
        (["--output=10", "--width=0.25"], "numbered from 0"),
        (["--images=-1"], "--images is -1: it must be at least 1"),
        (["--out=/dev/null/here"], "cannot write to --out=/dev/null/here"),
    ],
)
def test_bad_input_to_a_command(arguments, message, capsys):
    assert main(["ntk", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--inputs=0"], "--inputs is 0: it must be at least 2"),
        (["--rho=2"], "--rho is 2: 32 inputs have correlations from -1/31 to 1"),
        (["--inputs=3", "--rho=-0.6"], "from -1/2 to 1"),
        (["--rho=nan"], "--rho is nan"),
    ],
)
def test_correlations_that_no_inputs_have_are_refused(arguments, message, capsys):
    assert main(["depth", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_large_steps_of_a_last_batch_norm_are_those_of_training(capsys, tmp_path):
    """By the batch, not by running averages: only so the gradient before the norm has no mean over the batch."""
    fields = _config()
    found = networks.initialized(fields, "float32", training=True)
    x, labels = networks.training_batch(fields, 16, "real", "float32")
    assert found.batch_coupled
    outputs = found.apply_fn(found.params, x)
    np.testing.assert_allclose(outputs.mean(0), 0, atol=1e-5)
    data = datasets.load("digits", "")
    # The labels are those of the very images.
    distances = abs(networks.normalize(data.train.images, data.mean, data.std) - x[3][None]).max((1, 2, 3))
    assert distances.min() < 1e-5
    assert data.train.labels[distances.argmin()] == labels[3]
    assert main(["updates", "--width=0.25", "--images=16", "--rates", "0.01", "100", f"--out={tmp_path}"]) == 0
    written = json.loads((tmp_path / "updates.json").read_text())
    assert written["relative_losses"][0] < 1
    assert (written["steps"][0], written["steps"][2]) == (0.0, 100.0)
    assert "cancellation" in capsys.readouterr().out
    assert main(["updates", "--images=5000"]) == 2
    assert "digits has 1437 to train on" in capsys.readouterr().err
