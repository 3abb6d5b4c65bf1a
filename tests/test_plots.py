"""What the curves show, read back from the figure."""

import numpy as np
import pytest

plt = pytest.importorskip("matplotlib.pyplot")


def test_curves_show_the_mean_over_seeds_in_per_cent(tmp_path, monkeypatch):
    from mimicnorm_jax import plots

    def rows(offset, epochs):
        return [
            {
                "epoch": e,
                "train_loss": 2.0,
                "test_loss": 1.0 + offset,
                "train_accuracy": 0.1,
                "test_accuracy": 0.2 + offset,
            }
            for e in range(1, epochs + 1)
        ]

    figures = []
    monkeypatch.setattr(plt, "close", figures.append)
    plots.curves({"a": [rows(0.0, 3), rows(0.2, 2)], "b": [rows(0.5, 2)]}, tmp_path / "curves.png")
    axes = figures[0].axes[1]
    test_lines = {line.get_label(): line.get_xydata() for line in axes.lines if line.get_linestyle() == "-"}
    np.testing.assert_allclose(test_lines["a"], [[1, 30], [2, 30]])
    np.testing.assert_allclose(test_lines["b"], [[1, 70], [2, 70]])
    assert [path.name for path in tmp_path.iterdir()] == ["curves.png"]
