"""Steps taken again, against what the run itself has logged."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.train.test_run import QUICKSTART, command
from tools.preview import main
from train.config.load import load_config
from train.output.log import read_metrics
from train.replay import replay_step
from train.run import main as train


@pytest.fixture(scope="module")
def run(data_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run of 14 steps in two parts, the last ones of the second epoch, with checkpoints after 4, 8, 12 and 14."""
    threads, runs = torch.get_num_threads(), tmp_path_factory.mktemp("runs")
    torch.set_num_threads(1)
    settings = ["training.max_steps=14", "checkpoint.save_frequency=4", "checkpoint.keep_last_n=9", "logging.log_frequency=1"]
    settings += ["training.accumulation_steps=2", "data.batch_size=4", "evaluation.linear_epochs=0", "loss.whiten_targets=true"]
    assert train(command(QUICKSTART, data_path, runs, *settings)) == 0
    yield runs / "quickstart"
    torch.set_num_threads(threads)


def test_a_step_taken_again_has_the_logged_losses_and_those_of_its_images_add_up_to_them(run: Path) -> None:
    logged, config = {line["step"]: line for line in read_metrics(run) if "loss" in line}, load_config(run / "config.yaml")
    for step, exact in ((1, False), (7, True), (13, False)):
        again = replay_step(config, step, with_losses=True, exact=exact)
        assert again.weights_step == step - 1
        assert {name: logged[step][name] for name in again.losses} == pytest.approx(again.losses, rel=1e-6)
        assert len(again.images) == 8
        means = {name: np.mean([image.losses[name] for image in again.images]) for name in again.images[0].losses}
        assert means == pytest.approx({name: again.losses[name] for name in means}, rel=1e-4)
        score = again.losses["loss"] - config.loss.sigreg_weight * again.losses["sigreg"]
        assert np.mean([image.score for image in again.images]) == pytest.approx(score, rel=1e-4)


def test_with_older_weights_and_as_if_on_other_ranks_a_step_has_the_same_images_and_masks(run: Path) -> None:
    config, halves = (
        load_config(run / "config.yaml", changes) for changes in ([], ["data.batch_size=2", "data.crop_device=gpu"])
    )
    exact, near = (replay_step(config, 14, with_losses=True, exact=exact) for exact in (True, False))
    shared, drawn = replay_step(halves, 14, with_losses=True), replay_step(config, 14, with_losses=False)
    assert near.weights_step == 12
    for image, *others in zip(exact.images, near.images, shared.images, drawn.images, strict=True):
        for other in others:
            assert image.caption == other.caption
            assert torch.equal(image.masks.context, other.masks.context)
    assert near.losses != exact.losses
    assert shared.losses == near.losses  # its two ranks are seen in the count of images


def test_the_command_names_and_draws_the_images_with_the_largest_losses_and_refuses_what_it_cannot_take(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, file = tmp_path / "worst.png", tmp_path / "losses.json"
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    capsys.readouterr()
    assert main([str(run), "--step", "9", "--count", "2", "--out", str(out), "--json", str(file)]) == 0
    said = capsys.readouterr().out
    report = json.loads(file.read_text())
    assert "step 9 of 8 images, with the weights after step 8" in said
    assert f"logged {next(line for line in read_metrics(run) if line['step'] == 9)['loss']:.6g}" in said
    losses = [image["loss"] for image in report["images"]]
    assert losses == sorted(losses, reverse=True)
    assert [image["image"] in said for image in report["images"]] == [True] * 2 + [False] * 6
    assert np.asarray(Image.open(out).convert("RGB")).std() > 20
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    for arguments, error in (
        (["--step", "0"], "--step 0: the run has 14 steps, counted from 1"),
        (["--step", "15"], "--step 15: the run has 14 steps"),
        (["--step", "2", "data.data_path=nowhere"], "nowhere"),
    ):
        assert main([str(run), *arguments]) == 2
        assert error in capsys.readouterr().err.splitlines()[-1]
    assert main([str(tmp_path), "--step", "1"]) == 2
    assert str(tmp_path / "config.yaml") in capsys.readouterr().err
