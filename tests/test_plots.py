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


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were drawn, still open to questions."""
    figures = []
    monkeypatch.setattr(plt, "close", figures.append)
    yield figures
    monkeypatch.undo()
    plt.close("all")


def test_nothing_is_left_of_a_picture_that_fails(tmp_path):
    from mimicnorm_jax import plots

    before = plt.get_fignums()
    line = {"a": plots.Series(np.zeros(2), np.zeros(2))}
    with pytest.raises(KeyError):
        plots.transition_maps(line, {}, tmp_path / "map.png", "")
    assert list(tmp_path.iterdir()) == []
    assert plt.get_fignums() == before


def test_transition_maps_put_points_on_their_lines(tmp_path, drawn):
    from mimicnorm_jax import plots

    rho = np.linspace(-1, 1, 5)
    lines = {"a": plots.Series(rho, rho / 2), "b": plots.Series(rho, rho**2)}
    points = {name: plots.Series(line.x, line.y, np.full(5, 0.1)) for name, line in lines.items()}
    plots.transition_maps(lines, points, tmp_path / "map.png", "a title")
    (axes,) = drawn[0].axes
    for name, bars in zip(lines, axes.containers, strict=True):
        (line,) = (each for each in axes.lines if each.get_label() == name)
        np.testing.assert_allclose(bars.lines[0].get_xydata(), line.get_xydata())
        assert bars.lines[0].get_color() == line.get_color()
        np.testing.assert_allclose([np.ptp(bar[:, 1]) for bar in bars.lines[2][0].get_segments()], 0.2)
    assert axes.get_title() == "a title"


def test_condition_numbers_show_raw_kernels_hollow_on_a_log_scale(tmp_path, drawn):
    from mimicnorm_jax import plots

    depths, error = np.array([2, 4]), np.array([0.1, 0.1])
    scaled = {name: plots.Series(depths, np.array([3.0, 2.0]), error) for name in ("plain", "BatchNorm")}
    raw = {name: plots.Series(depths, np.array([30.0, 20.0]), error) for name in scaled}
    plots.condition_numbers({"plain": plots.Series(depths, depths)}, scaled, raw, tmp_path / "kappa.png", "")
    (axes,) = drawn[0].axes
    assert axes.get_yscale() == "log"
    for bars in axes.containers:
        hollow = bars.lines[0].get_markerfacecolor() == "none"
        assert hollow == bars.get_label().endswith("as it is")
        assert bars.lines[0].get_ydata()[0] == (30 if hollow else 3)
    assert [line.get_label() for line in axes.lines if line.get_linestyle() == "-"] == ["plain, infinite width"]


def test_histograms_by_layer_are_shares_of_the_layer(tmp_path, drawn):
    from mimicnorm_jax import plots

    correlations = np.array([[0.51, 0.51, 0.51, 0.91], [0.01, 0.01, 0.01, 0.01]])
    plots.correlations_by_depth({"a": correlations}, tmp_path / "correlations.png", "")
    mesh = drawn[0].axes[0].collections[0]
    edges, shares = mesh.get_coordinates()[:, 0, 1], np.asarray(mesh.get_array())
    np.testing.assert_allclose(shares.sum(0), 100)
    for layer, value, share in ((0, 0.51, 75), (0, 0.91, 25), (1, 0.01, 100)):
        assert shares[np.searchsorted(edges, value) - 1, layer] == share
    layers = mesh.get_coordinates()[0, :, 0]
    np.testing.assert_allclose((layers[1:] + layers[:-1]) / 2, [1, 2])


def test_activations_show_one_unit_below_all_units(tmp_path, drawn):
    from mimicnorm_jax import plots

    values = np.zeros((3, 10, 4))
    values[:, :, 0] = 1.05
    plots.activations_by_layer({"a": values}, tmp_path / "activations.png", "")
    every, one = (np.asarray(axes.collections[0].get_array()) for axes in drawn[0].axes[:2])
    np.testing.assert_allclose(every.max(0), 75)
    np.testing.assert_allclose(one.max(0), 100)
    assert one.argmax(0).tolist() != every.argmax(0).tolist()


def test_spectra_are_densities(tmp_path, drawn):
    from mimicnorm_jax import plots

    values = np.random.default_rng(0).uniform(0.5, 1.5, 1000)
    plots.spectra({1: values, 4: values**4}, lambda x: 0 * x, tmp_path / "spectra.png", "")
    left, right = drawn[0].axes
    np.testing.assert_allclose(sum(bar.get_width() * bar.get_height() for bar in left.patches), 1)
    assert [text.get_text() for text in right.get_legend().get_texts()] == ["1 layer", "4 layers"]
    one, four = (np.asarray(patch.get_xy()) for patch in right.patches)
    # Steps up and down: every level twice. Four times the logarithm is four times as wide.
    assert np.ptp(one[one[:, 1] > 0, 0]) < np.ptp(four[four[:, 1] > 0, 0]) / 3


def test_bars_are_means_and_points_are_seeds(tmp_path, drawn):
    from mimicnorm_jax import plots

    groups = {
        ("a", "x"): {"kappa": [1.0, 3.0]},
        ("b", "x"): {"kappa": [10.0]},
        ("b", "y"): {"kappa": [4.0, 6.0]},
    }
    plots.bars(groups, {"kappa": "condition"}, tmp_path / "bars.png", "")
    (axes,) = drawn[0].axes
    heights = {bars.get_label(): [bar.get_height() for bar in bars] for bars in axes.containers}
    assert heights == {"x": [2.0, 10.0], "y": [5.0]}
    assert sorted(value for line in axes.lines for value in line.get_ydata()) == [1.0, 3.0, 4.0, 6.0, 10.0]
    # A method's bar stands on its own side of its network.
    centers = {bars.get_label(): [bar.get_x() + bar.get_width() / 2 for bar in bars] for bars in axes.containers}
    assert centers["x"][1] < 1 < centers["y"][0]


def test_intervals_are_about_the_mean_and_left_out_where_there_is_none(tmp_path, drawn):
    from mimicnorm_jax import plots

    plots.intervals({"a": ([1.0, 3.0], 0.5), "b": ([-2.0], None)}, tmp_path / "intervals.png", "", "points")
    (axes,) = drawn[0].axes
    segments = {name: bars.lines[2] for name, bars in zip("ab", axes.containers, strict=True)}
    np.testing.assert_allclose(segments["a"][0].get_segments()[0], [[1.5, 0], [2.5, 0]])
    assert segments["b"] == ()
    assert [bars.lines[0].get_xydata().tolist() for bars in axes.containers] == [[[2.0, 0.0]], [[-2.0, 1.0]]]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b"]


def test_diagnostics_along_a_run_leave_out_what_was_not_measured(tmp_path, drawn):
    from mimicnorm_jax import plots

    rows = [
        {"epoch": 0, "kappa": 2.0, "kappa_unit_diagonal": 1.5, "chi": 1.1},
        {"epoch": 5, "kappa": None, "kappa_unit_diagonal": 1.2, "chi": 0.9},
    ]
    assert plots.along_run(rows, tmp_path / "diagnostics.png", "")
    nothing = [{"epoch": 0, "kappa": None}]
    assert not plots.along_run(nothing, tmp_path / "nothing.png", "")
    assert not (tmp_path / "nothing.png").exists()
    kappa, chi = drawn[0].axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in kappa.lines}
    assert lines == {"kappa": [[0, 2.0]], "kappa unit diagonal": [[0, 1.5], [5, 1.2]]}
    assert chi.lines[0].get_xydata().tolist() == [[0, 1.1], [5, 0.9]]


def test_stacked_bars_end_at_the_sum_of_their_parts(tmp_path, drawn):
    from mimicnorm_jax import plots

    panels = {
        "h100": {"a": {"state": 1.0, "maps": 5.0}, "b": {"state": 1.0, "copies": 2.0}},
        "v5e": {"a": {"maps": 4.0}},
    }
    plots.stacked_bars(panels, tmp_path / "plan.png", "a title", "MiB")
    left, right = drawn[0].axes
    tops = {
        bar.get_x(): max(b.get_y() + b.get_height() for b in left.patches if b.get_x() == bar.get_x())
        for bar in left.patches
    }
    assert list(tops.values()) == [6.0, 3.0]
    assert max(bar.get_y() + bar.get_height() for bar in right.patches) == 4.0
    names = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert names == ["state", "maps", "copies"]
    # A part has one color in all panels.
    assert left.containers[1].patches[0].get_facecolor() == right.containers[1].patches[0].get_facecolor()
