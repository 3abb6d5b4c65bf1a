"""The page that compares runs: what it says, that it needs nothing else, and that a browser shows it."""

import html.parser
import json
import re
import shutil
import subprocess

import pytest

from mimicnorm_jax.cli.report import main
from mimicnorm_jax.monitoring.run_folders import labels, read_runs
from mimicnorm_jax.training import base, validate
from mimicnorm_jax.training.workdir import as_json

pytest.importorskip("matplotlib", reason="the page's curves are drawn by matplotlib (extra [plots])")
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def _run(folder, epochs=3, diagnostics=0, **fields):
    """A run's folder, as training leaves it; its accuracies are functions of seed and epoch."""
    folder.mkdir()
    config = validate(base(epochs=3, warmup_epochs=0.0, **fields))
    rows = [
        {
            "epoch": e,
            "step": 10 * e,
            "learning_rate": 0.1,
            "seconds": 30.0,
            "images_per_second": 1000.0,
            "train_loss": 2.0 / e,
            "test_loss": 2.5 / e,
            "train_accuracy": 0.2 * e,
            "test_accuracy": 0.1 * e + 0.01 * config.seed + 0.0012,
        }
        for e in range(1, epochs + 1)
    ]
    (folder / "config.json").write_text(json.dumps(as_json(config)))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = [{"epoch": e, "step": 10 * e, "kappa": 5.0, "kappa_unit_diagonal": 4.0} for e in range(diagnostics)]
    (folder / "diagnostics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if epochs == 3:
        (folder / "summary.json").write_text(json.dumps({"machine": {"device": "<TPU & co>"}}))
    return folder


@pytest.fixture
def four_runs(tmp_path):
    """Two seeds of one method, another method with diagnostics, and one that has not ended."""
    return [
        _run(tmp_path / "a0", seed=0),
        _run(tmp_path / "a1", seed=1),
        _run(tmp_path / "b", method="batchnorm", diagnostics=3),
        _run(tmp_path / "c", epochs=2, method="lastbn", learning_rate=0.2),
    ]


class _Reader(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.addresses, self.images, self.cells = [], [], []

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.addresses += [found[name] for name in ("src", "href", "srcset", "data") if name in found]
        self.images += [found["src"]] if tag == "img" else []

    def handle_data(self, data):
        self.cells.append(data)


def test_the_page_says_what_the_runs_logged_and_needs_no_other_file(four_runs, tmp_path, capsys):
    out = tmp_path / "page.html"
    assert main([*map(str, four_runs), "--out", str(out)]) == 0
    assert "4 runs" in capsys.readouterr().out
    text = out.read_text()
    reader = _Reader()
    reader.feed(text)
    assert all(address.startswith("data:image/svg+xml;base64,") for address in reader.addresses)
    assert "@import" not in text
    assert "url(" not in text
    assert len(reader.images) == 2  # curves of all, diagnostics of one
    for said in ("30.12%", "31.12%", "20.12% (epoch 2)", "2 of 3", "1.5", "<TPU & co>"):  # tags in values are text
        assert said in reader.cells


def test_runs_are_named_by_what_tells_them_apart_and_seeds_share_a_name(four_runs):
    assert labels(read_runs(four_runs)) == [
        "mimicnorm, learning_rate 0.1",
        "mimicnorm, learning_rate 0.1",
        "batchnorm, learning_rate 0.1",
        "lastbn, learning_rate 0.2",
    ]
    assert labels(read_runs(four_runs[:2])) == ["resnet8, mimicnorm"] * 2


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: shutil.rmtree(folder), "holds no run"),
        (lambda folder: (folder / "metrics.jsonl").write_text('{"epoch": 1, "st'), "no epoch in metrics.jsonl yet"),
        (lambda folder: (folder / "summary.json").write_text("[]"), "summary.json is damaged"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json is damaged"),
    ],
)
def test_bad_runs_are_named_and_nothing_is_written(damage, message, four_runs, tmp_path, capsys):
    damage(four_runs[1])
    assert main([*map(str, four_runs), "--out", str(tmp_path / "page.html")]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert str(four_runs[1]) in said
    assert not (tmp_path / "page.html").exists()


def test_bad_addresses_and_a_run_named_twice_are_refused(four_runs, tmp_path, capsys):
    run = str(four_runs[0])
    for arguments, message in (
        ([run, run + "/", "--out", str(tmp_path / "x.html")], "is given twice"),
        ([run, "--out", str(tmp_path / "none" / "x.html")], "there is no folder"),
        ([run, "--out", str(tmp_path)], "ends in .html"),
    ):
        assert main(arguments) == 2
        assert message in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("width", [500, 1400])  # Chromium's windows are at least 500 wide
def test_a_browser_shows_every_figure_and_nothing_beside_the_window(width, four_runs, tmp_path):
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is here")
    out = tmp_path / "page.html"
    assert main([*map(str, four_runs), "--out", str(out)]) == 0
    measured = """<script>addEventListener("load", () => { document.title = JSON.stringify({
      images: [...document.images].map(image => image.complete && image.naturalWidth > 0),
      wide: document.documentElement.scrollWidth - innerWidth}) })</script></body>"""
    out.write_text(out.read_text().replace("</body>", measured))
    options = ("--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}")
    shown = subprocess.run(
        [browser, *options, f"--window-size={width},900", "--dump-dom", out.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    found = json.loads(html.unescape(re.search("<title>(.*?)</title>", shown.stdout)[1]))
    assert found["images"] == [True, True]
    assert found["wide"] <= 0
