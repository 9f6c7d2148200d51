"""What the command answers before and instead of training: its settings, a dry run, and settings that fit the memory."""

from pathlib import Path

import pytest
import torch

from model.hjepa import HJEPA
from tests.train.test_run import ROOT, command
from train.build import build_masks, build_model
from train.config.load import load_config, load_config_with_origins
from train.config.rules import DATASETS
from train.config.schema import Config
from train.memory import StepMemory, measure_step, remedies, storages_kept
from train.run import main

QUICKSTART = ROOT / "configs" / "quickstart.yaml"


def test_the_printed_settings_name_their_origins_and_read_back_equal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = [
        "--config",
        str(QUICKSTART),
        "--epochs",
        "3",
        "--dataset=cifar10",
        "--resume",
        "none",
        "training.lr=1e-3",
    ]
    assert main([*overrides, "--print-config"]) == 0
    printed = capsys.readouterr().out
    (tmp_path / "again.yaml").write_text(printed)
    settings = ["training.epochs=3", "data.dataset=cifar10", "checkpoint.resume=none", "training.lr=1e-3"]
    config, origins = load_config_with_origins(QUICKSTART, settings)
    assert load_config(tmp_path / "again.yaml") == config
    lines = [line.split("#") for line in printed.splitlines()]
    assert [line[1].strip() for line in lines if len(line) == 2] == list(origins.values())
    assert origins["data.augmentation.mean"] == "default of cifar10"
    assert origins["data.multicrop.global_crop_size"].startswith(str(QUICKSTART))


@pytest.mark.parametrize("name", ["imagenet", *DATASETS])
def test_a_file_that_names_its_data_set_alone_makes_a_model_and_masks_for_it(name: str, tmp_path: Path) -> None:
    path = tmp_path / "least.yaml"
    path.write_text(f"data: {{dataset: {name}, data_path: here}}\nlogging: {{run_name: least}}\n")
    changes = [] if name == "imagenet" else ["model.encoder_kwargs={img_size: 32, patch_size: 4, depth: 2}"]
    config = load_config(path, ["model.predictor_depth=1", *changes])
    assert (config.data.multicrop.global_crop_size == 32) == (name != "imagenet")
    if name != "imagenet":
        model = build_model(config, torch.device("cpu"))
        assert build_masks(config, model, torch.device("cpu"))(2).context.shape[0] == 2


def test_a_dry_run_tries_data_and_model_and_writes_nothing(
    data_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command(QUICKSTART, data_path, tmp_path / "runs"), "--dry-run", "training.epochs=26"]) == 0
    said = capsys.readouterr().out
    assert "data: 103 images (103 labelled) in 3 shards" in said
    assert "4x4 tokens in a global crop, 3 levels" in said
    assert "run: 312 steps of 8 images on 1 rank(s), 12 steps an epoch" in said
    assert "memory: about 0.0" in said
    assert not (tmp_path / "runs").exists()
    assert main([*command(QUICKSTART, data_path, tmp_path / "runs"), "--dry-run", "model.encoder=resnet18"]) == 2


@pytest.fixture
def config(data_path: Path, tmp_path: Path) -> Config:
    path, *overrides = command(QUICKSTART, data_path, tmp_path)
    return load_config(Path(path), overrides)


def test_the_estimate_equals_what_a_larger_batch_with_other_local_crops_keeps(config: Config) -> None:
    memory = measure_step(config, amp=False)
    for batch, num_local in ((8, 6), (16, 2)):
        multicrop = config.data.multicrop.model_copy(update={"num_local_crops": num_local})
        changed = config.model_copy(update={"data": config.data.model_copy(update={"multicrop": multicrop})})
        model = build_model(changed, torch.device("cpu"))
        crops = [torch.rand(batch, 3, 32, 32)] * 2 + [torch.rand(batch, 3, 16, 16)] * num_local
        boxes = torch.tensor([0.0, 0.0, 1.0, 1.0]).expand(batch, 2 + num_local, 4)
        plan = build_masks(changed, model, torch.device("cpu"))(batch)
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        with storages_kept() as kept:
            losses = model(crops, boxes, torch.zeros(boxes.shape[:2], dtype=torch.bool), plan, torch.randn(8, 8))
            seen = sum(size for place, size in kept.items() if place not in weights)
        assert losses["loss"].isfinite()
        assert memory.total(batch, num_local) - memory.fixed == pytest.approx(seen, rel=0.05)


def test_each_remedy_is_the_largest_value_that_fits(config: Config) -> None:
    memory = StepMemory(fixed=100.0, per_image=10.0, per_local=5.0)  # a step of 8 images and 6 local crops: 420
    assert remedies(config, memory, 330.0) == [
        "data.multicrop.num_local_crops=2 (now 6)",  # 100 + 8 * (10 + 2 * 5) = 260 of 297
        "data.batch_size=4 (now 8)",  # 100 + 4 * 40 = 260
        "data.multicrop.local_crop_size=8 (now 16)",  # 100 + 8 * (10 + 6 * 5 / 4) = 240
    ]
    assert remedies(config, memory, 180.0)[0] == "data.multicrop.num_local_crops alone cannot lower it enough"
    assert remedies(config, memory, 180.0)[1] == "data.batch_size=1 (now 8)"
    # It did not fit, whatever the estimate says.
    assert remedies(config, memory, 1000.0)[1] == "data.batch_size=6 (now 8)"


def test_out_of_memory_is_answered_with_settings_that_would_fit(
    data_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def forward(*_: object) -> None:
        torch.empty(2**50, dtype=torch.uint8)

    with monkeypatch.context() as context:
        context.setattr(HJEPA, "forward", forward)
        code = main(command(QUICKSTART, data_path, tmp_path))
    error = capsys.readouterr().err
    assert code == 2
    assert error.count("\n") == 1
    assert "out of memory" in error
    for key in ("num_local_crops", "batch_size", "local_crop_size"):
        assert key in error
