"""report.html: what it shows is what the run wrote, it needs nothing else, and a browser agrees."""

import base64
import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tools.compare_runs import write_comparison
from train.output.report import MAX_POINTS, thin_out, write_page

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = [
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--enable-logging=stderr", "--dump-dom",
    "--virtual-time-budget=2000",
]  # fmt: skip


def run_folder(folder: Path, steps: int = 40, labelled: bool = True) -> Path:
    """The files that a run leaves, with names that HTML must escape."""
    (folder / "figures").mkdir(parents=True)
    Image.new("RGB", (30, 20), "teal").save(folder / "figures" / "crops.png")
    lines = [
        {"step": step, "loss": 1 / step, "level_0": 0.5, "level_1": 0.2, "view": 0.1, "sigreg": 2.0, "rankme": 8.0}
        for step in range(1, steps + 1)
    ]
    lines.append({"step": steps, "knn": 71.5, "linear": 80.25, "placement": 41.5})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "config.yaml").write_text(f"logging: {{run_name: {folder.name}}}\nmasking: {{strategy: global_only}}\n")
    (folder / "environment.json").write_text(
        '{"gpus": ["<none> & co"], "commit": "abc123-dirty", "command": "python -m x a<b"}\n'
    )
    knn = {"pixels": 36.9, "colour_histogram": 72.6, "random_init": 44.3, "trained": 71.5} if labelled else None
    summary = {
        "run_name": f"{folder.name} <b>&", "finished": "2026-11-29 07:07 UTC", "device": "CPU, 2 cores", "train_s": 83.4,
        "steps": steps, "images": 32 * steps, "images_per_s": 512.3,
        "data_wait_percent": 3.25, "loss_first": 1.0, "loss_last": 1 / steps, "rankme": 8.0, "width": 64,
        "placement": {"chance": 6.25, "pixels": 30.0, "random_init": 20.5, "trained": 41.5, "level_0": 40.0},
        "validation_images": 720, "knn": knn, "linear": 80.25 if labelled else None, "bad_samples": 0,
        "skipped_steps": 0, "collapse_alarms": [], "collapsed": False,
    }  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def lines_of(page: str, title: str) -> dict[str, list[list[float]]]:
    data = re.search(rf"""title="{re.escape(title)}" data-lines="([^"]*)\"""", page)
    assert data, title
    return json.loads(html.unescape(data[1]))


def test_the_page_holds_every_logged_value_and_the_pictures_to_the_byte(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "one")
    page = write_page(folder, ["try <this> & that"]).read_text()
    assert lines_of(page, "Loss")["loss"] == [[step, float(f"{1 / step:.5g}")] for step in range(1, 41)]
    assert set(lines_of(page, "Prediction loss by level")) == {"level_0", "level_1"}
    (picture,) = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert base64.b64decode(picture) == (folder / "figures" / "crops.png").read_bytes()
    assert "2026-11-29 07:07 UTC · 40 steps, 1,280 images · 0:01:23 on CPU, 2 cores · commit abc123-dirty" in page
    assert "<code>python -m x a&lt;b</code>" in page
    assert lines_of(page, "k-NN and linear probe during the run, %") == {"knn": [[0, 44.3], [40, 71.5]], "linear": [[40, 80.25]]}
    assert lines_of(page, "Placement accuracy during the run, %") == {"placement": [[0, 20.5], [40, 41.5]]}
    assert "try &lt;this&gt; &amp; that" in page
    assert "one &lt;b&gt;&amp;" in page
    assert "&lt;none&gt; &amp; co" in page
    assert not re.findall(r"""(?:src|href)=(?!"data:)|https?://|url\(|@import""", page)
    assert [float(value) for value in re.findall(r"<b>([0-9.]+) %</b></?[sd]", page)][:1] == [71.5]


def test_a_run_without_labels_or_pictures_has_a_page_too(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "plain", labelled=False)
    shutil.rmtree(folder / "figures")
    page = write_page(folder).read_text()
    assert "k-NN, trained" not in page
    assert "<span>placement, trained encoder</span>" in page
    assert "What to try next" not in page


def test_a_comparison_shows_each_metric_of_all_runs_and_the_settings_that_differ(tmp_path: Path) -> None:
    first, second = run_folder(tmp_path / "first"), run_folder(tmp_path / "second", steps=30)
    settings = second / "config.yaml"
    settings.write_text(settings.read_text().replace("global_only", "cross_crop_prediction"))
    page = write_comparison({"first": first, "second": second}, tmp_path / "both.html").read_text()
    assert {name: len(points) for name, points in lines_of(page, "Loss").items()} == {"first": 40, "second": 30}
    assert set(lines_of(page, "Prediction loss by level: level_1")) == {"first", "second"}
    assert "masking.strategy" in page
    assert "cross_crop_prediction" in page


@pytest.mark.parametrize("count", [0, 1, 2, MAX_POINTS, MAX_POINTS + 1, 10_000])
def test_thinned_lines_keep_their_mean_and_their_range_of_steps(count: int) -> None:
    points = np.column_stack([np.arange(count), np.random.default_rng(0).normal(size=count)])
    kept = np.array(thin_out(points.tolist())).reshape(-1, 2)
    assert len(kept) == min(count, MAX_POINTS)
    if count and count % MAX_POINTS == 0:
        np.testing.assert_allclose(kept.mean(axis=0), points.mean(axis=0), rtol=1e-3)  # five digits are kept
    assert (np.diff(kept[:, 0]) > 0).all()


def test_a_chart_leaves_out_what_is_no_number_and_is_absent_without_points(tmp_path: Path) -> None:
    assert thin_out([(1, 2.0), (2, float("inf")), (3, float("nan")), (4, 2.0)]) == [[1, 2], [4, 2]]
    folder = run_folder(tmp_path / "one")
    lines = [{"step": 1, "loss": float("nan"), "view": 0.5}, {"step": 2, "loss": float("inf")}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = write_page(folder).read_text()
    assert lines_of(page, "View term") == {"view": [[1, 0.5]]}
    assert 'title="Loss"' not in page


@pytest.mark.skipif(BROWSER is None, reason="needs chromium: apt-get install chromium")
def test_a_browser_opens_the_pages_without_an_error_and_asks_for_nothing_else(tmp_path: Path) -> None:
    """The page's policy refuses every request, and a refusal is an error in the console."""
    folder = run_folder(tmp_path / "shown")
    pages = [write_page(folder), write_comparison({"a": folder, "b": run_folder(tmp_path / "other")}, tmp_path / "both.html")]
    spoiled = tmp_path / "spoiled.html"
    spoiled.write_text(pages[0].read_text().replace("</main>", '<img src="http://127.0.0.1:9/a.png"></main>'))
    for page, sound in [(pages[0], True), (pages[1], True), (spoiled, False)]:
        line = [str(BROWSER), *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", page.as_uri()]
        done = subprocess.run(line, capture_output=True, text=True, timeout=120, check=True)
        assert "<polyline" in done.stdout
        assert ("CONSOLE" not in done.stderr) is sound, done.stderr
