import os
from itertools import product
from pathlib import Path

import pytest
import torch

from pipeline.crops.device import DeviceError
from tests.train.test_run import QUICKSTART, command
from train import build
from train.config.load import load_config
from train.distributed import Ranks
from train.optim import Schedule
from train.output.folder import kept_crop_device

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("cores", "width", "threads"), [(1, 64, 1), (1, 384, 1), (2, 64, 1), (2, 128, 2), (3, 64, 2), (8, 64, 4), (8, 768, 4)]
)
def test_a_wide_encoder_gets_two_threads_where_there_are_two_cores(
    cores: int, width: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    settings = [f"model.encoder_kwargs.embed_dim={width}", "model.encoder_kwargs.num_heads=2"]
    assert build.torch_threads(load_config(ROOT / "configs" / "quickstart.yaml", settings)) == threads


@pytest.mark.skipif(torch.cuda.is_available(), reason="here the decoder of the GPU works")
def test_evaluation_decodes_on_the_cpu_where_the_gpu_cannot(data_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = load_config(
        ROOT / "configs" / "quickstart.yaml", [f"data.data_path={data_path}", "data.dataset=custom", "device=gpu"]
    )
    assert build.with_crop_device(config).data.crop_device == "cpu"
    assert "crops are made on the cpu, not on the gpu" in caplog.text
    for crop_device in ("dali", "cpu"):
        wanted = config.model_copy(update={"data": config.data.model_copy(update={"crop_device": crop_device})})
        assert build.with_crop_device(wanted) == wanted
        assert build.with_crop_device(config, kept=crop_device) == wanted
    wanted = config.model_copy(update={"data": config.data.model_copy(update={"crop_device": "gpu"})})
    for asked, kept in ((wanted, None), (wanted, "cpu"), (config, "gpu")):
        with pytest.raises(DeviceError, match=r"^data.crop_device: gpu: crops are made on the cpu.*data.crop_device=cpu works"):
            build.with_crop_device(asked, kept=kept)


def test_all_ranks_make_crops_where_each_of_them_can(data_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = [f"data.data_path={data_path}", "data.dataset=custom", "device=gpu"]
    config, order = load_config(QUICKSTART, settings), ("gpu", "dali", "cpu")

    class TwoRanks(Ranks):
        """This rank, and another one that can do `other`."""

        def all(self, flag: bool) -> bool:
            asked.append(flag)
            return flag and order.index(other) < len(asked)

    for mine, other in product(order, order):
        asked: list[bool] = []
        monkeypatch.setattr(build, "choose_crop_device", lambda *_, mine=mine: (mine, ""))
        assert build.with_crop_device(config, TwoRanks()).data.crop_device == max(mine, other, key=order.index)


def test_a_run_that_goes_on_keeps_its_way_to_make_crops(data_path: Path, tmp_path: Path) -> None:
    path, *settings = command(QUICKSTART, data_path, tmp_path)

    def kept(*changes: str) -> str | None:
        return kept_crop_device(load_config(Path(path), [*settings, *changes]))

    assert kept() is None
    run = tmp_path / "quickstart"
    (run / "checkpoints").mkdir(parents=True)
    assert kept() is None
    for written, expected in (("dali", "dali"), ("gpu", "gpu"), ("auto", "cpu")):
        (run / "config.yaml").write_text(f"data: {{crop_device: {written}}}\n")
        assert kept() == kept("data.crop_device=auto") == expected
        assert kept("checkpoint.resume=none") is None
        assert kept("logging.run_name=other") is None
        assert kept("logging.run_name=other", f"checkpoint.resume={run}/checkpoints/step_00000001") == expected


def test_without_prediction_there_is_no_predictor_and_every_trained_weight_has_a_gradient(data_path: Path) -> None:
    path, *settings = command(QUICKSTART, data_path, Path("runs"), "loss.prediction_weight=0")
    for strategy in ("global_only", "none"):
        config = load_config(Path(path), [*settings, f"masking.strategy={strategy}"])
        model = build.build_model(config, torch.device("cpu"))
        masks = build.build_masks(config, model, torch.device("cpu"))
        assert model.predictor is None
        assert [name for name in model.state_dict() if name.startswith("predictor")] == []
        batch = next(iter(build.build_training_loader(config, build.build_dataset(config))))
        plan = masks(len(batch.labels))
        assert (plan.context.shape[-1] == model.grid**2) == (strategy == "none")
        directions = torch.eye(config.model.projector_dim)
        model(batch.crops, batch.boxes, batch.flips, plan, directions)["loss"].backward()
        trained = [name for name, value in model.named_parameters() if value.requires_grad and value.grad is None]
        assert trained == []


@pytest.mark.parametrize("warmup", [0, 0.5, 1.0, 1.2, 20])
def test_a_warm_up_that_outlasts_max_steps_is_refused(warmup: float) -> None:
    def schedule(steps: object) -> Schedule:
        settings = [f"training.warmup_epochs={warmup}", f"training.max_steps={steps}"]
        return build.build_schedule(load_config(QUICKSTART, settings), batches_per_epoch=84)

    steps = round(84 * warmup)
    assert schedule("null").total_steps == 20 * 84
    assert schedule(max(steps, 1)).warmup_steps == steps
    if steps > 1:
        with pytest.raises(ValueError, match=rf"warmup_epochs: {warmup:g} epochs are .* steps here, more than max_steps"):
            schedule(steps - 1)
