import logging
import os
from pathlib import Path

import pytest
import torch

from pipeline.tuning import ReaderSettings
from train import build
from train.config.load import load_config

ROOT = Path(__file__).parents[2]


def test_reader_settings_are_measured_and_the_choice_is_logged(
    data_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """On a GPU the run does this at its start; here with the CPU's loaders."""
    config = load_config(
        ROOT / "configs" / "quickstart.yaml", [f"data.data_path={data_path}", "data.dataset=custom", "device=cpu"]
    )
    caplog.set_level(logging.INFO)
    dataset, device = build.build_dataset(config), torch.device("cpu")
    model = build.build_model(config, device)
    masks = build.build_masks(config, model, device)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert build.tuned_reader(config, dataset, model, masks) == config
    settings = [ReaderSettings(threads, 0.5, "cpu") for threads in (1, 2)]
    number = build._fastest_reader(config, dataset, settings, model, masks)
    (chosen,) = [text for text in caplog.messages if "DALI threads" in text]
    assert f"crops on the cpu, {settings[number].num_threads} DALI threads" in chosen
    tuned = build._with_reader(config, settings[number])
    loader = build.build_loader(tuned, dataset, 8, normalized=False)
    assert loader.reader.num_threads == settings[number].num_threads
    assert loader.reader.crop_device == "cpu"
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("cores", "width", "threads"),
    [(1, 64, 1), (1, 384, 1), (2, 64, 1), (2, 128, 2), (3, 64, 2), (8, 64, 4), (8, 768, 4)],
)
def test_a_wide_encoder_gets_two_threads_where_there_are_two_cores(
    cores: int, width: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    settings = [f"model.encoder_kwargs.embed_dim={width}", "model.encoder_kwargs.num_heads=2"]
    assert build.torch_threads(load_config(ROOT / "configs" / "quickstart.yaml", settings)) == threads


def test_the_encoder_load_is_a_pass_through_student_and_target_without_the_other_parts(data_path: Path) -> None:
    config = load_config(
        ROOT / "configs" / "quickstart.yaml", [f"data.data_path={data_path}", "data.dataset=custom", "device=cpu"]
    )
    model = build.build_model(config, torch.device("cpu"))
    masks = build.build_masks(config, model, torch.device("cpu"))
    batch = next(iter(build.build_training_loader(config, build.build_dataset(config))))
    model.encoder_load(batch.crops, masks(len(batch.labels))).backward()
    without = [name for name, value in model.encoder.named_parameters() if value.grad is None]
    assert without == []
    assert all(value.grad is None for value in model.predictor.parameters())


@pytest.mark.skipif(torch.cuda.is_available(), reason="here the decoder of the GPU works")
def test_evaluation_decodes_on_the_cpu_where_the_gpu_cannot(data_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = load_config(
        ROOT / "configs" / "quickstart.yaml", [f"data.data_path={data_path}", "data.dataset=custom", "device=gpu"]
    )
    assert build.decoding_reader(config).data.crop_device == "cpu"
    assert "crops are made on the cpu, not on the gpu" in caplog.text
    wanted = config.model_copy(update={"data": config.data.model_copy(update={"crop_device": "gpu"})})
    assert build.decoding_reader(wanted) == wanted


def test_without_prediction_there_is_no_predictor_and_every_trained_weight_has_a_gradient(data_path: Path) -> None:
    settings = [f"data.data_path={data_path}", "data.dataset=custom", "device=cpu", "loss.prediction_weight=0"]
    for strategy in ("global_only", "none"):
        config = load_config(ROOT / "configs" / "quickstart.yaml", [*settings, f"masking.strategy={strategy}"])
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
