"""The preview against what a real training loop hands to a real model."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.dataset import Normalization
from pipeline.shards.index import open_index
from tools.preview import main
from train.build import build_dataset, build_loader
from train.config.load import load_config
from train.config.schema import Config
from train.distributed import Ranks
from train.replay import replay_step
from train.trainer import Trainer

CONFIG = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
BATCH, STEPS_PER_EPOCH = 8, 12  # 103 samples: 7 are left out of each epoch


def settings(data_path: Path, *changes: str) -> list[str]:
    overrides = [
        "data.dataset=custom", f"data.data_path={data_path}", f"data.batch_size={BATCH}", "data.num_workers=1",
        "training.epochs=3", "data.augmentation.global_blur_prob=0.5", "data.augmentation.solarize_prob=0.5",
        "model.predictor_depth=1", "model.encoder_kwargs.depth=2", *changes,
    ]  # fmt: skip
    return list({override.partition("=")[0]: override for override in overrides}.values())


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def trained_on(config: Config, start: dict[str, int], count: int) -> list[tuple]:
    """Return the model's inputs for `count` batches of a training that continues from `start`: crops, boxes, flips, masks."""
    trainer, seen = Trainer(config), []
    loader, parts = trainer.loader, config.training.accumulation_steps
    trainer.model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[:4]))
    trainer.state.step = (start["epoch"] * len(loader) + start["position"] // loader.global_batch) // parts
    loader.load_state_dict(start)
    while len(seen) < count:
        trainer.train_step()
    return seen


@pytest.mark.parametrize(("strategy", "parts"), [("global_only", 1), ("cross_crop_prediction", 2)])
def test_the_preview_is_what_training_sees_there_bit_for_bit(strategy: str, parts: int, data_path: Path) -> None:
    changes = f"masking.strategy={strategy}", f"training.accumulation_steps={parts}"
    config = load_config(CONFIG, settings(data_path, *changes))
    # From the last steps of epoch 0, through the boundary, to the middle of epoch 1: batches 10 to 17.
    batches = trained_on(config, {"epoch": 0, "position": 10 * BATCH}, 8)
    for step in range(10 // parts + 1, 18 // parts + 1):
        again = replay_step(config, step, with_losses=False)
        normalize = Normalization(again.dataset.mean, again.dataset.std)  # training leaves it to the encoder
        assert len(again.images) == parts * BATCH
        for i, image in enumerate(again.images):
            batch, slot = divmod((step - 1) * parts * BATCH + i, BATCH)
            crops, boxes, flips, masks = batches[batch - 10]
            for ours, theirs in zip(image.batch.crops, crops, strict=True):
                assert torch.equal(ours[0], normalize(theirs[slot]))
            assert torch.equal(image.batch.boxes[0], boxes[slot])
            assert torch.equal(image.batch.flips[0], flips[slot])
            for ours, theirs in zip(mask_tensors(image.masks), mask_tensors(masks), strict=True):
                assert torch.equal(ours[0], theirs[slot])


def mask_tensors(plan: Any) -> list[torch.Tensor]:
    optional = [tensor for tensor in (plan.real, plan.partners) if tensor is not None]
    return [plan.context, *plan.queries, plan.sources, *optional]


def test_several_ranks_share_what_one_with_their_joined_batch_sees(data_path: Path) -> None:
    config, joined = (load_config(CONFIG, settings(data_path, *changes)) for changes in ([], [f"data.batch_size={2 * BATCH}"]))
    shared, alone = replay_step(config, 2, with_losses=False, world_size=2), replay_step(joined, 2, with_losses=False)
    second = next(iter(build_loader(config, build_dataset(config), BATCH, Ranks(1, 2))))
    assert second.positions[0] == BATCH
    assert [image.caption for image in shared.images] == [image.caption for image in alone.images]
    assert "position 24: " in shared.images[BATCH].caption
    assert torch.equal(shared.images[BATCH].masks.context, alone.images[BATCH].masks.context)


def test_the_command_names_each_sample_and_draws_it(data_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "sheet.png"
    arguments = [str(CONFIG), "--step", "17", "--out", str(out), *settings(data_path)]
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    index = open_index(data_path / "train")
    config = load_config(CONFIG, settings(data_path))
    rows = build_loader(config, build_dataset(config), BATCH).sequence.plan.rows(1, 32, 34)
    for i, row in enumerate(rows):
        sample = index.samples[row]
        assert lines[i] == (
            f"epoch 1, position {32 + i}: shard {index.shards[sample['shard']]}, {index.key(row)}, label {sample['label']}"
        )
    assert str(out) in lines[2]
    pixels = np.asarray(Image.open(out).convert("RGB"))
    assert pixels.shape[1] > 1000
    assert pixels.std() > 20


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--step", "0"], "--step 0: the run has 36 steps, counted from 1"),
        (["--step", "37"], "--step 37: the run has 36 steps"),
        (["--step", "6", "training.max_steps=5"], "--step 6: the run has 5 steps"),
        (["training.epoch=1"], "training.epoch"),
    ],
)
def test_a_place_that_training_never_reaches_is_one_clear_line(
    arguments: list[str], said: str, data_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "sheet.png"
    assert main([str(CONFIG), "--out", str(out), *arguments, *settings(data_path)]) == 2
    (error,) = (line for line in capsys.readouterr().err.splitlines() if not line.endswith(" ..."))
    assert said in error
    assert not out.exists()


def test_a_single_crop_without_locals_is_drawn_too(data_path: Path, tmp_path: Path) -> None:
    out = tmp_path / "sheet.png"
    arguments = settings(data_path, "data.use_multicrop=false", "loss.view_weight=0", "loss.sigreg_weight=0")
    assert main([str(CONFIG), "--count", "1", "--out", str(out), *arguments]) == 0
    assert out.exists()
