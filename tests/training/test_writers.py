"""What is written is what was measured, once, also after a resume."""

import pytest

from mimicnorm_jax.training import read_metrics
from mimicnorm_jax.training.writers import MetricWriter
from mimicnorm_jax.utils.console import progress


def _row(epoch, loss=1.0):
    return {
        "epoch": epoch,
        "step": 10 * epoch,
        "learning_rate": 0.1,
        "train_loss": loss,
        "train_accuracy": 0.5,
        "test_loss": loss / 2,
        "test_accuracy": 0.25,
        "seconds": 1.0,
    }


def _write(folder, resumed_step, *rows):
    writer = MetricWriter(folder, resumed_step)
    for row in rows:
        writer.epoch(row)
    writer.close()
    return writer


def test_resuming_drops_later_and_half_written_lines_and_prints_plain_lines(tmp_path, capsys):
    _write(tmp_path, 0, _row(1), _row(2), _row(3))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 4, "st')
    writer = _write(tmp_path, 20, _row(3, loss=2.0))
    assert read_metrics(tmp_path) == writer.rows == [_row(1), _row(2), _row(3, loss=2.0)]
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert "epoch   3  lr 0.1000  loss 2.000, test 1.000  acc 50.00%, test 25.00%  1.0 s" in lines[-1]
    assert len(lines[-1]) < 80


def test_event_files_hold_the_same_numbers(tmp_path):
    pytest.importorskip("tensorboardX")
    from tensorboardX.proto.event_pb2 import Event

    _write(tmp_path, 0, _row(1), _row(2, loss=3.0))
    (path,) = (tmp_path / "tensorboard").iterdir()
    content, seen = path.read_bytes(), {}
    while content:  # each record: length (8 bytes), its checksum (4), the event, its checksum (4)
        length = int.from_bytes(content[:8], "little")
        event = Event.FromString(content[12 : 12 + length])
        seen |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
        content = content[16 + length :]
    assert seen["train_loss", 10] == 1.0
    assert seen["train_loss", 20] == 3.0
    assert seen["test_loss", 20] == 1.5
    assert len(seen) == 2 * (len(_row(1)) - 2)


def test_without_a_terminal_there_is_no_bar_and_nothing_is_lost(capsys):
    assert list(progress(range(5), "epoch", 5)) == list(range(5))
    assert capsys.readouterr().err == ""
