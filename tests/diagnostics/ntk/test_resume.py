"""Kernels on disk whose computation is killed: what is finished is not computed again, and no bit is another."""

import os
import random
import signal
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from mimicnorm_jax.diagnostics import EmpiricalNTK
from mimicnorm_jax.diagnostics.ntk import targets
from tests.conftest import ROOT


def network(params, x):
    return jnp.tanh(x @ params["first"]) @ params["last"]


def case():
    """Eleven examples in blocks of two: 21 blocks on and above the diagonal, the last ones short."""
    rng = np.random.default_rng(0)
    arrays = (rng.standard_normal(shape).astype(np.float32) for shape in ((5, 7), (7, 2), (11, 5)))
    first, last, x = map(jnp.asarray, arrays)
    params = {"first": first, "last": last}
    enough = EmpiricalNTK(network, output="trace", implementation="structured_derivatives")
    memory = enough.plan(params, x[:2], x[2:4]).bytes
    return EmpiricalNTK(network, output="trace", implementation="structured_derivatives", memory=memory), params, x


def _count(monkeypatch, stop_at=None):
    """Counts blocks that are written; the process is interrupted when it is about to write that one."""
    written, put = [], targets.FileTarget.put

    def counted(self, place, value, mirrored):
        if len(written) == stop_at:
            raise KeyboardInterrupt
        put(self, place, value, mirrored)
        written.append(place)

    monkeypatch.setattr(targets.FileTarget, "put", counted)
    return written


def _interrupt(kernel, params, x, out, stop_at):
    with pytest.MonkeyPatch.context() as patch:
        _count(patch, stop_at)
        with pytest.raises(KeyboardInterrupt):
            kernel(params, x, out=out)


@pytest.mark.parametrize("second", [False, True])
def test_an_interrupted_kernel_goes_on_where_it_stopped(second, tmp_path, monkeypatch):
    kernel, params, x = case()
    out, sides = tmp_path / "kernel.npy", (x, x[:7] + 1) if second else (x,)
    whole = np.asarray(kernel(params, *sides))
    count = 24 if second else 21
    with monkeypatch.context() as patch:
        _count(patch, 9)
        with pytest.raises(KeyboardInterrupt):
            kernel(params, *sides, out=out)
    assert not out.exists()
    # Another object of the same network, as after a restart.
    written = _count(monkeypatch)
    found = case()[0](params, *sides, out=out)
    assert len(written) == count - 9
    np.testing.assert_array_equal(found, whole)
    assert [path.name for path in tmp_path.iterdir()] == ["kernel.npy"]


def test_a_damaged_block_is_computed_again_and_another_job_begins_anew(tmp_path, monkeypatch):
    kernel, params, x = case()
    out, whole = tmp_path / "kernel.npy", np.asarray(kernel(params, x))
    _interrupt(kernel, params, x, out, 9)
    partial = np.lib.format.open_memmap(tmp_path / "kernel.npy.partial", "r+")
    partial[0, 1] += 1.0
    partial.flush()
    with monkeypatch.context() as patch:
        written = _count(patch)
        np.testing.assert_array_equal(kernel(params, x, out=out), whole)
        assert len(written) == 21 - 9 + 1
    _interrupt(kernel, params, x, out, 9)
    other = {**params, "last": params["last"] * 2}
    for changed in ((other, x), (params, x.at[0, 0].add(1.0))):
        _interrupt(kernel, params, x, out, 9)
        with monkeypatch.context() as patch:
            written = _count(patch)
            found = kernel(*changed, out=out)
            assert len(written) == 21
        np.testing.assert_array_equal(found, kernel(*changed))


def test_a_network_that_closes_over_other_numbers_is_another_job(tmp_path, monkeypatch):
    _, params, x = case()
    memory = case()[0].memory

    def scaled(factors):
        return EmpiricalNTK(lambda p, x: network(p, x) * factors, output="trace", memory=memory)

    one, two = jnp.ones((1, 2)), jnp.array([[1.0, 2.0]])
    out = tmp_path / "kernel.npy"
    _interrupt(scaled(one), params, x, out, 3)
    written = _count(monkeypatch)
    found = scaled(two)(params, x, out=out)
    assert len(written) > 21 - 3
    np.testing.assert_array_equal(found, scaled(two)(params, x))


def killed(out, seed):
    """Computes the kernel in a process that is killed at a random point of a random block, unless the seed is -1."""
    rng, put = random.Random(seed), targets.FileTarget.put
    last, point, written = rng.randrange(4, 12), rng.randrange(3), []

    def counted(self, place, value, mirrored):
        if len(written) == last and seed >= 0:
            if point:
                self.kernel[place] = value * (0 if point == 1 else 1)
            if point == 2:
                with self.journal.open("a") as file:
                    file.write("[0, 2, 0")
            os.kill(os.getpid(), signal.SIGKILL)
        put(self, place, value, mirrored)
        written.append(place)
        print("block", flush=True)

    targets.FileTarget.put = counted
    kernel, params, x = case()
    kernel(params, x, out=out)


@pytest.mark.slow
def test_killed_at_random_points_the_result_is_equal_to_the_bit(tmp_path):
    out, blocks, kills = tmp_path / "kernel.npy", 0, 0
    command = "import sys; from tests.diagnostics.ntk import test_resume as t; t.killed(sys.argv[1], int(sys.argv[2]))"

    def compute(out, seed):
        arguments = [sys.executable, "-c", command, str(out), str(seed)]
        env = os.environ | {"PYTHONPATH": str(ROOT)}
        return subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, env=env)

    for turn in range(25):
        done = compute(out, turn)
        blocks += done.stdout.count("block")
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL, done.stderr
        kills += 1
    # This process compiles with other options, which round otherwise.
    assert compute(tmp_path / "whole.npy", -1).returncode == 0
    np.testing.assert_array_equal(np.load(out), np.load(tmp_path / "whole.npy"))
    assert kills >= 2
    assert blocks == 21
