"""An exported encoder against the one that was trained: bit for bit, through timm only."""

import json
import os
import sys
from base64 import b64decode
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, ClassVar

import numpy as np
import pytest
import timm
import torch

from tests.conftest import photographs
from tests.train.test_run import ROOT, command
from tools.export import main as export
from train.evaluation.features import pooled_features
from train.evaluation.offline import find_checkpoint, load_models
from train.run import main as train


@pytest.fixture(scope="module")
def run(data_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    mean = "data.augmentation.mean=[0.3, 0.4, 0.5]"
    changes = ["training.max_steps=3", "logging.run_name=short", mean, "evaluation.crop_ratio=0.8"]
    assert train(command(ROOT / "configs" / "quickstart.yaml", data_path, folder, *changes)) == 0
    return folder / "short"


def base(run: Path) -> list[str]:
    return [str(run), "--license", "mit"]


def test_timm_loads_an_encoder_with_the_same_features_bit_for_bit(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "encoder"
    assert export([*base(run), "--out", str(out)]) == 0
    loaded = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    trained, initial = load_models(*find_checkpoint(run), torch.device("cpu"))
    crops = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.equal(loaded(crops), trained.target.vit(crops))
        assert torch.equal(loaded.forward_features(crops), trained.target.vit.forward_features(crops))
        torch.testing.assert_close(loaded(crops), pooled_features(trained.target)(crops)["last"])
        assert not torch.equal(loaded(crops), initial.vit(crops))
    settings = timm.data.resolve_model_data_config(loaded)
    assert tuple(settings["input_size"]) == (3, 32, 32)
    assert tuple(settings["mean"]) == (0.3, 0.4, 0.5)
    assert tuple(settings["std"]) == (0.229, 0.224, 0.225)
    assert settings["crop_pct"] == 0.8


def test_the_model_card_holds_figures_settings_and_licence(run: Path, tmp_path: Path) -> None:
    figures = {
        "checkpoint": "step_3", "images": [4, 2], "data": ["a", "b"],
        "figures": [
            {"probe": "knn", "features": "trained", "setting": "k=20", "accuracy": 41.5, "spread": None, "repeats": 1}
        ],
    }  # fmt: skip
    (tmp_path / "figures.json").write_text(json.dumps(figures))
    arguments = [str(run), "--out", str(tmp_path / "encoder"), "--license", "cc-by-4.0"]
    assert export([*arguments, "--figures", str(tmp_path / "figures.json")]) == 0
    card = (tmp_path / "encoder" / "README.md").read_text()
    summary = json.loads((run / "summary.json").read_text())
    assert f"| k-NN, trained encoder | {summary['knn']['trained']:.1f} % |" in card
    assert "| knn | trained | k=20 | 41.5 |" in card
    assert "license: cc-by-4.0" in card
    assert (run / "config.yaml").read_text().rstrip() in card
    assert "after 3 steps" in card
    assert export(arguments) == 0  # its own files may be written again


def test_onnxruntime_gives_the_features_of_torch_for_any_number_of_images(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    out = tmp_path / "encoder"
    assert export([*base(run), "--out", str(out), "--onnx"]) == 0
    assert "model.onnx: features differ from torch's by " in capsys.readouterr().out
    session = runtime.InferenceSession(out / "model.onnx")
    loaded = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    for count in (1, 4):
        images = torch.randn(count, 3, 32, 32)
        features, tokens = session.run(None, {"images": images.numpy()})
        with torch.inference_mode():
            np.testing.assert_allclose(features, loaded(images).numpy(), atol=1e-5)
            np.testing.assert_allclose(tokens, loaded.forward_features(images)[:, loaded.num_prefix_tokens :].numpy(), atol=1e-5)
    code = (out / "README.md").read_text().split("## ONNX")[1].split("```python")[1].split("```")[0]
    given = {"images": images}
    exec(code.replace("PATH_OF_THIS_FOLDER", str(out)), given)
    np.testing.assert_array_equal(given["features"], features)
    assert export([*base(run), "--out", str(out)]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "config.json", "model.safetensors"]


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"num_reg_tokens": 0, "init_values": None, "rope_temperature": 50.0, "mlp_ratio": 3.0},
        {"qkv_bias": True, "swiglu_mlp": True, "swiglu_align_to": 8, "patch_size": 8},
    ],
)
def test_transformers_gives_the_tokens_of_timm(
    arguments: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    transformers = pytest.importorskip("transformers")
    from tools.exporting.formats import write_transformers

    shape = {"img_size": 32, "patch_size": 16, "embed_dim": 48, "depth": 2, "num_heads": 2, "init_values": 0.1}
    vit = timm.create_model("vit_small_patch16_dinov3", num_classes=0, **(shape | arguments)).eval()
    for parameter in vit.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    settings = {"input_size": [3, 32, 32], "crop_pct": 0.875, "mean": [0.3, 0.4, 0.5], "std": [0.2, 0.2, 0.2]}
    write_transformers(vit, settings, tmp_path)
    assert "transformers: features differ from torch's by " in capsys.readouterr().out
    loaded = transformers.AutoModel.from_pretrained(tmp_path / "transformers").eval()
    assert type(loaded) is transformers.DINOv3ViTModel
    images = torch.randn(2, 3, 64, 48)  # another size and shape than in training
    with torch.inference_mode():
        torch.testing.assert_close(loaded(images).last_hidden_state, vit.forward_features(images), atol=1e-4, rtol=0)


def test_the_card_computes_our_features_with_transformers(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    out = tmp_path / "encoder"
    assert export([*base(run), "--out", str(out), "--transformers"]) == 0
    assert {path.stat().st_mode & 0o777 for path in (out / "transformers").iterdir()} == {0o644}
    (picture,) = photographs(1)
    code = (out / "README.md").read_text().split("## transformers")[1].split("```python")[1].split("```")[0]
    given = {"pictures": [picture]}
    exec(code.replace("PATH_OF_THIS_FOLDER", str(out)), given)
    loaded = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    images = timm.data.create_transform(**timm.data.resolve_model_data_config(loaded))(picture)[None]
    torch.testing.assert_close(given["images"], images, atol=0.05, rtol=0)
    with torch.inference_mode():
        torch.testing.assert_close(given["features"], loaded(given["images"]), atol=1e-4, rtol=0)


def test_what_transformers_cannot_express_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from tools.exporting.formats import write_transformers

    settings = {"input_size": [3, 32, 32], "crop_pct": 1.0, "mean": [0.5] * 3, "std": [0.5] * 3}
    shape = {"img_size": 32, "embed_dim": 48, "depth": 1, "num_heads": 2}
    for arguments, reason in (
        ({"class_token": False, "num_reg_tokens": 0}, "no class token"),
        ({"swiglu_mlp": True, "swiglu_align_to": 0}, "size mismatch"),
        ({"scale_attn_inner": True}, "Unexpected key"),
        ({"rope_grid_indexing": "xy"}, "features differ"),
    ):
        vit = timm.create_model("vit_small_patch16_dinov3", num_classes=0, **shape, **arguments).eval()
        for parameter in vit.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        with pytest.raises(ValueError, match=f"{reason}.*possible are") as raised:
            write_transformers(vit, settings, tmp_path)
        assert "\n" not in str(raised.value)


def test_files_have_the_modes_of_the_umask_and_a_missing_package_is_named(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    previous = os.umask(0o027)
    try:
        assert export([*base(run), "--out", str(tmp_path / "encoder")]) == 0
    finally:
        os.umask(previous)
    assert (tmp_path / "encoder").stat().st_mode & 0o777 == 0o750
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "encoder").iterdir()} == {0o640}
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert export([*base(run), "--out", str(tmp_path / "other"), "--onnx"]) == 2
    assert "pip install -e '.[onnx]'" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["encoder"]


@pytest.mark.parametrize(
    ("answer", "licence"), [("\n", "apache-2.0"), ("cc-by-4.0\n", "cc-by-4.0"), ("own\n", "other"), ("\x04", None)]
)
def test_a_terminal_is_asked_for_the_licence(
    answer: str,
    licence: str | None,
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, (ours, theirs) = tmp_path / "encoder", os.openpty()
    os.write(ours, answer.encode())
    with os.fdopen(theirs) as terminal:
        monkeypatch.setattr(sys, "stdin", terminal)
        assert export([str(run), "--out", str(out)]) == (0 if licence else 2)
    os.close(ours)
    assert "licence of the exported weights [apache-2.0]: " in capsys.readouterr().err
    assert licence is None or f"license: {licence}\n" in (out / "README.md").read_text()
    assert licence != "other" or "license_name: own\n" in (out / "README.md").read_text()


class Hub(BaseHTTPRequestHandler):
    """The answers of a hub on which one repository is public; `asked` are the requests."""

    asked: ClassVar[list[tuple[str, str, bytes]]] = []

    def do_GET(self) -> None:
        self.do_POST()

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = self.path.partition("?")[0]
        self.asked.append((self.command, path, content))
        answer: Any = {}
        if path == "/api/repos/create":
            asked = json.loads(content)
            answer = {"url": f"http://{self.headers['Host']}/{asked['organization']}/{asked['name']}"}
        elif path.endswith("/preupload/main"):
            files = json.loads(content)["files"]
            answer = {"files": [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in files]}
        elif path.endswith("/commit/main"):
            answer = {"commitUrl": f"http://{self.headers['Host']}/someone/mine/commit/1", "commitOid": "1"}
        elif path.endswith("/tree/main"):
            answer = [{"type": "file", "path": "model.onnx", "size": 1, "oid": "1"}]
        elif path.startswith("/api/models/"):
            answer = {"id": "someone/mine", "private": "public" not in path, "sha": "1", "siblings": []}
        body = json.dumps(answer).encode()
        self.send_response(401 if "stranger" in str(content) else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None: ...


def test_an_export_is_uploaded_only_with_yes_and_into_a_private_repository(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    arguments = [*base(run), "--out", str(tmp_path / "encoder"), "--hub"]
    assert export([*arguments, "someone/mine"]) == 0
    said = capsys.readouterr().out
    assert "would upload to someone/mine, private, licence mit:" in said
    assert "model.safetensors" in said
    assert "nothing was uploaded; add --yes" in said
    assert Hub.asked == []
    assert export([*arguments, "someone/mine", "--yes"]) == 0
    assert "uploaded: " in capsys.readouterr().out
    made, *_, committed = [content for _, path, content in Hub.asked if path.endswith(("/create", "/commit/main"))]
    assert json.loads(made) == {"name": "mine", "organization": "someone", "visibility": "private"}
    lines = [json.loads(line) for line in committed.splitlines()]
    sent = {line["value"]["path"]: line["value"].get("content") for line in lines if line["key"] == "file"}
    assert {name: b64decode(content) for name, content in sent.items()} == {
        path.name: path.read_bytes() for path in (tmp_path / "encoder").iterdir()
    }
    assert [line["value"]["path"] for line in lines if line["key"] == "deletedFile"] == ["model.onnx"]
    assert 'timm.create_model("hf-hub:someone/mine"' in (tmp_path / "encoder" / "README.md").read_text()
    for name, message in (("someone/public", "is there already, and public"), ("stranger/mine", "401")):
        assert export([*arguments, name, "--yes"]) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]
    server.shutdown()
    server.server_close()
    assert export([*arguments, "someone/mine", "--yes"]) == 2
    assert "someone/mine: " in capsys.readouterr().err.splitlines()[-1]


def test_what_cannot_be_exported_is_one_clean_line(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    for arguments, message in (
        ([*base(run), "--out", str(tmp_path / "full")], "holds other files"),
        ([str(run), "--out", str(tmp_path / "new")], "add --license apache-2.0"),
        ([str(tmp_path), "--out", str(tmp_path / "new")], "neither a run's folder nor a checkpoint"),
        ([*base(run), "--out", str(tmp_path / "new"), "--figures", str(tmp_path / "none.json")], "none.json"),
    ):
        capsys.readouterr()
        assert export(arguments) == 2
        (error,) = (line for line in capsys.readouterr().err.splitlines() if not line.endswith(" ..."))
        assert message in error
    assert not (tmp_path / "new").exists()
