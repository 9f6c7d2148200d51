"""The page about several runs."""

import html
import json
import re
from pathlib import Path

import pytest

from tools.compare_runs import main


def write_log(folder: Path, level: float) -> Path:
    folder.mkdir(parents=True)
    lines = [{"step": step, "loss": level / step, "view": 0.1} for step in range(10, 50, 10)]
    lines.insert(2, {"step": 25, "knn": 40 * level})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_measurements_of_other_images_are_marked_and_a_run_has_its_place_in_every_panel(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [write_log(tmp_path / name, 1.0) for name in "abcd"]
    for run, val in zip(runs, ("x", "x", "y"), strict=False):  # d has measured nothing
        key = {"train": "t", "val": val, "knn_k": 20, "crop_ratio": 1.0}
        (run / "baselines.json").write_text(json.dumps({"measured_on": key, "knn": {}}))
    for run in runs:
        (run / "config.yaml").write_text("seed: 0\n")
    (runs[1] / "metrics.jsonl").write_text('{"step": 10, "loss": 1.0}\n')
    page = tmp_path / "page.html"
    assert main([*map(str, runs[:2]), "--html", str(page)]) == 0
    assert "do not compare" not in capsys.readouterr().out + page.read_text()
    assert main([*map(str, runs), "--html", str(page)]) == 0
    assert "Accuracies of [A] and [B] do not compare" in capsys.readouterr().out
    text = html.unescape(page.read_text())
    assert "Accuracies of [A] and [B] do not compare" in text
    panels = [list(json.loads(data)) for data in re.findall(r'data-lines="([^>]*)"></figure>', text)]
    assert panels == [["a [A]", "b [A]", "c [B]", "d"]] * 3


def test_a_folder_without_a_log_is_one_clean_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "no metrics.jsonl with a line in it" in error
    assert error.count("\n") == 1
