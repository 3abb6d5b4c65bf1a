"""Kernels on disk whose computation is killed: what is finished is not computed again, and no bit is another."""

import os
import random
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mimicnorm_jax.diagnostics import EmpiricalNTK
from mimicnorm_jax.diagnostics.ntk import targets
from tests.conftest import ROOT, in_processes


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

    def counted(self, place, values):
        if len(written) == stop_at:
            raise KeyboardInterrupt
        put(self, place, values)
        written.append((place[0].start, place[1].start))

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
    assert {path.name for path in tmp_path.iterdir()} == {"kernel.npy", "kernel.npy.job"}
    written.clear()
    np.testing.assert_array_equal(case()[0](params, *sides, out=out), whole)
    assert not written  # it is known whose result the file is, with these bytes
    out.write_bytes(out.read_bytes()[:-1] + b"?")
    np.testing.assert_array_equal(case()[0](params, *sides, out=out), whole)
    assert len(written) == count


def test_a_damaged_block_is_computed_again_and_another_job_begins_anew(tmp_path, monkeypatch):
    kernel, params, x = case()
    out, whole = tmp_path / "kernel.npy", np.asarray(kernel(params, x))
    _interrupt(kernel, params, x, out, 9)
    damaged, short, *_ = (path for path in (tmp_path / "kernel.npy.blocks").glob("*/*-*"))
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    short.write_bytes(short.read_bytes()[:3])
    with monkeypatch.context() as patch:
        written = _count(patch)
        np.testing.assert_array_equal(kernel(params, x, out=out), whole)
        assert len(written) == 21 - 9 + 2
    out.unlink()
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


def test_processes_do_their_own_rows_first_and_then_what_others_leave(tmp_path, monkeypatch):
    """Eleven examples are six rows, of 6, 5, ... 1 blocks."""
    kernel, params, x = case()
    out, whole = tmp_path / "kernel.npy", np.asarray(kernel(params, x))
    with monkeypatch.context() as patch:
        written = _count(patch, 12)
        with pytest.raises(KeyboardInterrupt):
            kernel(params, x, out=out, process=(0, 2))
    assert {row for row, _ in written} == {0, 4, 8}  # 6, 4 and 2 blocks
    written = _count(monkeypatch)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    np.testing.assert_array_equal(kernel(params, x, out=out), whole)
    assert {row for row, _ in written} == {2, 6, 10}
    assert len(written) == 9
    written.clear()
    kernel(params, x, out=out, process=(0, 2))  # started late
    assert not written


def test_a_process_whose_blocks_were_done_by_another_meanwhile_has_the_kernel_too(tmp_path, monkeypatch):
    kernel, params, x = case()
    out, whole = tmp_path / "kernel.npy", np.asarray(kernel(params, x))
    put, written, quick = targets.FileTarget.put, [], case()[0]

    def slow(self, place, values):
        put(self, place, values)
        written.append(place)
        if len(written) == 2:
            np.testing.assert_array_equal(quick(params, x, out=out, process=(1, 2)), whole)

    monkeypatch.setattr(targets.FileTarget, "put", slow)
    np.testing.assert_array_equal(kernel(params, x, out=out, process=(0, 2)), whole)
    # Three devices take the rows 0, 4 and 8: each has one block done and one on its way.
    assert 21 <= len(written) <= 21 + 2 * 3
    assert {path.name for path in tmp_path.iterdir()} == {"kernel.npy", "kernel.npy.job"}


def test_processes_that_compute_another_kernel_or_refuse_it_are_told(tmp_path, monkeypatch):
    kernel, params, x = case()
    out = tmp_path / "kernel.npy"
    _interrupt(kernel, params, x, out, 9)
    with pytest.raises(ValueError, match="holds blocks of another kernel"):
        kernel(params, x + 1, out=out, process=(1, 2))
    put, written = targets.FileTarget.put, []

    def refused(self, place, values):
        put(self, place, values)
        written.append(place)
        if len(written) == 2:  # as another process does that finds a block that is not finite
            targets.FileTarget.discard(self)

    monkeypatch.setattr(targets.FileTarget, "put", refused)
    with pytest.raises(ValueError, match="removed while they were computed"):
        kernel(params, x, out=out, process=(1, 2))
    assert not list(tmp_path.iterdir())
    for process in ((2, 2), (-1, 2), (0, 0)):
        with pytest.raises(ValueError, match=r"index from 0 to count - 1"):
            kernel(params, x, out=out, process=process)
    with pytest.raises(ValueError, match="give `out` too"):
        kernel(params, x, process=(0, 2))


def killed(out, seed, index, count):
    """Computes the kernel in a process that is killed at a random point of a random block, unless the seed is -1."""
    rng, put = random.Random(seed), targets.FileTarget.put
    last, point, written = rng.randrange(4, 9), rng.randrange(3), []

    def counted(self, place, values):
        if len(written) == last and seed >= 0:
            if point:
                self._file(place).with_suffix(".block").write_bytes(values[""].tobytes()[: 5 * point])
            os.kill(os.getpid(), signal.SIGKILL)
        put(self, place, values)
        written.append(place)
        print("block", place[0].start, place[1].start, flush=True)

    targets.FileTarget.put = counted
    kernel, params, x = case()
    kernel(params, x, out=out, process=(index, count))


def start(*arguments):
    """`killed` in a process of its own."""
    command = "import sys; from tests.diagnostics.ntk import test_resume as t; "
    command += "t.killed(sys.argv[1], *map(int, sys.argv[2:]))"
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    pipe = subprocess.PIPE
    every = [sys.executable, "-c", command, *map(str, arguments)]
    return subprocess.Popen(every, cwd=ROOT, stdout=pipe, stderr=pipe, text=True, env=env)


@in_processes
@pytest.mark.slow
def test_killed_at_random_points_the_result_of_two_processes_is_equal_to_the_bit_to_one(tmp_path):
    """Both are killed at first, then one, whose blocks the other does."""
    out, done, codes = tmp_path / "kernel.npy", [], []
    for seeds in ((0, 1), (-1, 2)):
        here = []
        for process in [start(out, seed, i, 2) for i, seed in enumerate(seeds)]:
            said, error = process.communicate(timeout=200)
            assert process.returncode in (0, -signal.SIGKILL), error
            here += [line for line in said.splitlines() if line.startswith("block")]
            codes.append(process.returncode)
        assert not set(here) & set(done)  # what was finished is not computed again
        done += here
    assert codes[:3] == [-signal.SIGKILL, -signal.SIGKILL, 0]
    assert len(set(done)) == 21
    # This process compiles with other options, which round otherwise.
    whole = start(tmp_path / "whole.npy", -1, 0, 1)
    _, error = whole.communicate(timeout=200)
    assert whole.returncode == 0, error
    np.testing.assert_array_equal(np.load(out), np.load(tmp_path / "whole.npy"))
