"""Starting weights: every kind of `model.weights` gives the features of its source bit for bit, or one clear line."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.test_arrows import MODULES, imports
from tests.train.test_run import ROOT, TINY_ENCODER, command
from tools.export import main as export
from train.adapt.weights import differences, fitted, read_start, start_from, starting_encoder
from train.build import build_model
from train.config.load import load_config
from train.config.schema import Config
from train.evaluate import main as evaluate
from train.evaluation.offline import find_checkpoint, load_models
from train.output.report import forgetting
from train.run import main as train

QUICKSTART, CPU = ROOT / "configs" / "quickstart.yaml", torch.device("cpu")
CROPS = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def sources(data_path: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run of three steps and its export."""
    folder = tmp_path_factory.mktemp("sources")
    changes = ["training.max_steps=3", "logging.run_name=first", "evaluation.linear_epochs=0"]
    assert train(command(QUICKSTART, data_path, folder, *changes)) == 0
    assert export([str(folder / "first"), "--out", str(folder / "exported"), "--license", "mit"]) == 0
    return folder / "first", folder / "exported"


def features(encoder: torch.nn.Module) -> Tensor:
    with torch.inference_mode():
        return encoder.eval()(CROPS)


def config_of(data_path: Path, *changes: str) -> Config:
    path, *settings = command(QUICKSTART, data_path, Path("runs"), *changes)
    return load_config(Path(path), settings)


def hub_cache(folder: Path, repository: str, exported: Path) -> Path:
    """Lay an export out as the hub does, and return its folder."""
    store = folder / f"models--{repository.replace('/', '--')}"
    snapshot = store / "snapshots" / ("0" * 40)
    (store / "refs").mkdir(parents=True)
    (store / "refs" / "main").write_text("0" * 40)
    shutil.copytree(exported, snapshot)
    return snapshot


def test_a_run_a_checkpoint_an_export_and_its_file_give_equal_features(sources: tuple[Path, Path], data_path: Path) -> None:
    run, exported = sources
    trained, _ = load_models(*find_checkpoint(run), CPU)
    wanted = features(trained.target.vit)
    assert torch.equal(wanted, features(timm.create_model(f"local-dir:{exported}", pretrained=True)))
    checkpoint = run / "checkpoints" / "step_00000003"
    for name in (run, checkpoint, exported, f"local-dir:{exported}", exported / "model.safetensors"):
        config = config_of(data_path, f"model.weights={name}")
        model = build_model(config, CPU)
        assert not torch.equal(wanted, features(model.encoder.vit))
        start_from(model, config)
        assert torch.equal(wanted, features(model.encoder.vit)), name  # the student
        assert torch.equal(wanted, features(model.target.vit)), name
        assert torch.equal(wanted, features(starting_encoder(config, CPU).vit)), name


def test_hub_names_and_timm_tags_load_from_the_hub_s_cache_without_a_network(
    sources: tuple[Path, Path], data_path: Path, tmp_path: Path
) -> None:
    _, exported = sources
    (hub_cache(tmp_path, "someone/tiny", exported) / "README.md").write_text("---\nlicense: other\nlicense_name: own\n---\n# x\n")
    tag = "vit_small_patch16_dinov3.lvd1689m"
    vit = timm.create_model("vit_small_patch16_dinov3", num_classes=0)
    (tmp_path / "real").mkdir()
    save_file(vit.state_dict(), tmp_path / "real" / "model.safetensors")
    hub_cache(tmp_path, f"timm/{tag}", tmp_path / "real")
    script = f"""
import sys, timm, torch
from pathlib import Path
from tests.train.adapt.test_weights import CPU, config_of, features, starting_encoder
from train.adapt.weights import read_start
small = "model.encoder_kwargs={{}}", "data.multicrop.local_crop_size=16"
for name, changes in (("hf-hub:someone/tiny", ()), ("{tag}", small)):
    config = config_of(Path({str(data_path)!r}), f"model.weights={{name}}", *changes)
    assert torch.equal(features(timm.create_model(name, pretrained=True)), features(starting_encoder(config, CPU).vit))
    print(name, read_start(name).licence)
try:
    read_start("hf-hub:someone/missing")
except ValueError as error:
    print(error)
"""
    variables = {**os.environ, "HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    hub, timm_tag, missing = done.stdout.splitlines()
    assert hub == "hf-hub:someone/tiny own"
    assert timm_tag == f"{tag} dinov3-license"
    assert missing.startswith("model.weights: hf-hub:someone/missing: ")
    assert "HF_HUB_CACHE" in missing


def test_weights_fit_but_for_what_is_named(
    sources: tuple[Path, Path], data_path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    state = load_file(sources[1] / "model.safetensors")
    extra = {"head.weight": torch.zeros(5, 16), "head.bias": torch.zeros(5), "mask_token": torch.zeros(1, 1, 16)}
    save_file(state | extra, tmp_path / "head.safetensors")
    config = config_of(data_path, f"model.weights={tmp_path / 'head.safetensors'}")
    plain = features(starting_encoder(config_of(data_path, f"model.weights={sources[1]}"), CPU).vit)
    assert torch.equal(features(starting_encoder(config, CPU).vit), plain)
    assert "the class head is left out (head.bias, head.weight)" in caplog.text
    weight = state["patch_embed.proj.weight"]
    save_file(state | {"patch_embed.proj.weight": weight.sum(1, keepdim=True)}, tmp_path / "gray.safetensors")
    gray = starting_encoder(config_of(data_path, f"model.weights={tmp_path / 'gray.safetensors'}"), CPU)
    ours = starting_encoder(config_of(data_path, f"model.weights={sources[1]}"), CPU)
    images = CROPS.mean(1, keepdim=True).expand(-1, 3, -1, -1)
    with torch.inference_mode():
        torch.testing.assert_close(gray.vit(images), ours.vit(images))  # gray images look the same to both
    smaller = TINY_ENCODER.replace("patch_size: 8", "patch_size: 4")
    config = config_of(data_path, f"model.weights={sources[0]}", f"model.encoder_kwargs={smaller}")
    assert starting_encoder(config, CPU).vit.patch_embed.proj.weight.shape[-1] == 4
    eupe = dataclasses.replace(read_start(str(sources[0])), name="vit_small_patch16_dinov3_qkvb.eupe_lvd1689m")
    assert any("non-commercial" in line for line in differences(eupe, config))
    assert any("patches of 8 px, resampled to the 4 px" in line for line in differences(read_start(str(sources[0])), config))


REFUSED: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = {
    "four": (lambda state: state | {"patch_embed.proj.weight": torch.zeros(16, 4, 8, 8)}, "a patch embedding of (16, 4, 8, 8)"),
    "flat": (lambda state: state | {"patch_embed.proj.weight": torch.zeros(16, 192)}, "a patch embedding of (16, 192)"),
    "other": (lambda state: {key: value for key, value in state.items() if "blocks.1" not in key}, "is not in the weights"),
    "wide": (lambda state: state | {"norm.weight": torch.zeros(32)}, "norm.weight is (32,), in the encoder (16,)"),
    "more": (lambda state: state | {"neck.weight": torch.zeros(3)}, "neck.weight has no place"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_weights_that_do_not_fit_are_refused(
    kind: str, sources: tuple[Path, Path], data_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, message = REFUSED[kind]
    save_file(change(load_file(sources[1] / "model.safetensors")), tmp_path / "w.safetensors")
    assert train(command(QUICKSTART, data_path, tmp_path, f"model.weights={tmp_path / 'w.safetensors'}")) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (tmp_path / "quickstart").exists()


def test_what_cannot_be_read_is_one_line(
    sources: tuple[Path, Path], data_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "broken.safetensors").write_bytes(b"not tensors")
    (tmp_path / "empty").mkdir()
    heads = TINY_ENCODER.replace("num_heads: 2", "num_heads: 4")
    for change, message in (
        (f"model.weights={tmp_path / 'none.safetensors'}", "no such file or folder"),
        (f"model.weights={tmp_path / 'broken.safetensors'}", "broken.safetensors"),
        (f"model.weights={tmp_path / 'empty'}", "config.json"),
        (f"model.encoder_kwargs={TINY_ENCODER[:-1]}, checkpoint_path: x}}", "model.weights names"),
        (f"model.encoder_kwargs={TINY_ENCODER[:-1]}, in_chans: 1}}", "crops have 3 channels"),
    ):
        assert train(command(QUICKSTART, data_path, tmp_path, change)) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line
    config = config_of(data_path, f"model.encoder_kwargs={heads}")
    with pytest.raises(ValueError, match=r"num_heads is 2, here 4\); write model.encoder=vit_small_patch16_dinov3 '"):
        fitted(read_start(str(sources[1])), config, build_model(config, CPU).encoder)


def test_a_continued_run_says_what_differs_and_shows_its_start_everywhere(
    sources: tuple[Path, Path], data_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "weights"
    assert export([str(sources[0]), "--out", str(out), "--license", "cc-by-nc-4.0"]) == 0
    settings = [f"model.weights={out}", "training.max_steps=2", "data.augmentation.std=[0.5, 0.5, 0.5]"]
    changes = [*settings, "data.multicrop.global_crop_size=48"]
    assert train(command(QUICKSTART, data_path, tmp_path, *changes)) == 0
    said = capsys.readouterr().out
    assert "set data.augmentation.std=[0.229, 0.224, 0.225]" in said
    assert "trained with crops of 32 px, here 48 px" in said
    assert "k-NN, starting weights, untouched" in said
    run = tmp_path / "quickstart"
    summary, page = json.loads((run / "summary.json").read_text()), (run / "report.html").read_text()
    assert list(summary["knn"]) == ["pixels", "colour_histogram", "random_init", "start", "trained", "mixed"]
    assert page.count("k-NN, starting weights, untouched") == 2
    assert train(command(QUICKSTART, data_path, tmp_path, *changes)) == 0  # a complete run, from its files
    capsys.readouterr()
    assert evaluate([str(run), "--probe", "knn"]) == 0
    assert "| knn | starting weights, untouched |" in capsys.readouterr().out
    assert export([str(run), "--out", str(tmp_path / "next")]) == 0
    card = (tmp_path / "next" / "README.md").read_text()
    assert "license: cc-by-nc-4.0" in card
    assert "whose licence also binds these" in card


def test_falling_below_the_start_names_what_to_change(data_path: Path) -> None:
    config = config_of(data_path)
    knn = {"random_init": 20.0, "start": 60.0, "trained": 59.0}
    assert "Lower training.lr (now" in str(forgetting(config, knn))
    assert forgetting(config, knn | {"trained": 60.0}) is None
    assert forgetting(config, {"random_init": 20.0, "trained": 10.0}) is None


def test_a_run_from_nothing_imports_nothing_of_this() -> None:
    for module, path in MODULES.items():
        if module.startswith("train.") and not module.startswith("train.adapt"):
            assert not {name for name in imports(path, always=True) if name.startswith("train.adapt")}, module
