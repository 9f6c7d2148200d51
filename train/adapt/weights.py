"""Starting weights, `model.weights`: read from timm, the hub, a folder, a file or a run, and loaded into student and target.

Only safetensors are read: nothing is unpickled.
"""

import copy
import hashlib
import json
import logging
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import hf_hub_download
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models import load_model_config_from_hf, load_state_dict_from_hf
from timm.models.eva import checkpoint_filter_fn

from model.encoder import MultiCropEncoder
from model.hjepa import HJEPA
from model.teacher import StudentTeacher
from pipeline.shards.manifest import read_as_expected, read_object
from train.build import build_encoder
from train.checkpoint import MANIFEST
from train.config.schema import Config
from train.evaluation.offline import find_checkpoint, load_trained

KINDS = (
    "give a timm tag (vit_small_patch16_dinov3.lvd1689m), hf-hub:OWNER/NAME, an exported folder, a .safetensors file, or a run "
    "or checkpoint of this program"
)
PATCHES = "patch_embed.proj.weight"
# Arguments of timm.create_model that may differ between the weights and a run: the others change what the weights mean.
FREE_ARGUMENTS = {"img_size", "patch_size", "global_pool", "num_classes", "init_values", "in_chans", "dynamic_img_size"}
FREE_ARGUMENTS |= {"drop_path_rate", "proj_drop_rate", "attn_drop_rate", "pos_drop_rate", "drop_rate"}

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    """Weights under timm's names or a publisher's, and what is known of them: "", {} and None stand for unknown.

    `settings`: timm's `pretrained_cfg`, with mean, std and input_size. `arguments`: those of `timm.create_model`.
    """

    name: str
    state: dict[str, torch.Tensor]
    encoder: str = ""
    arguments: dict[str, Any] | None = None
    settings: dict[str, Any] | None = None
    licence: str | None = None

    @property
    def digest(self) -> str:
        """Sixteen hexadecimal digits that change with any weight."""
        digest = hashlib.sha256()
        for name, value in sorted(self.state.items()):
            digest.update(name.encode() + value.contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]


def start_from(model: StudentTeacher, config: Config) -> Start:
    """Load `model.weights` into student and target, and log what differs. Raises ValueError if they cannot be read or fit."""
    start = read_start(str(config.model.weights))
    state = fitted(start, config, model.encoder)
    for encoder in (model.encoder, model.target):
        encoder.vit.load_state_dict(state)
    if config.loss.anchor_weight > 0 and isinstance(model, HJEPA):
        model.start = (copy.deepcopy(model.target).eval(),)
    for line in differences(start, config):
        log.warning(f"model.weights: {line}")
    log.info(f"starting from {start.name} ({len(state)} tensors; licence: {start.licence or 'unknown'})")
    return start


def starting_encoder(config: Config, device: torch.device, start: Start | None = None) -> MultiCropEncoder:
    """Return the encoder with the untouched starting weights. Raises ValueError as `start_from` does."""
    encoder = build_encoder(config)
    encoder.vit.load_state_dict(fitted(start or read_start(str(config.model.weights)), config, encoder))
    return encoder.requires_grad_(False).eval().to(device)


def read_start(weights: str) -> Start:
    """Return the weights that `model.weights` names. Raises ValueError, in one line, if they cannot be read."""
    path = Path(weights.removeprefix("local-dir:"))
    try:
        if (path / MANIFEST).is_file() or (path / "checkpoints").is_dir():
            return _from_run(path)
        if path.is_dir():
            return _from_folder(path)
        if path.is_file():
            return Start(weights, load_file(path))
        if weights.startswith("hf-hub:"):
            return _from_hub(weights.removeprefix("hf-hub:"))
        if timm.is_model_pretrained(weights):
            return _from_hub(str(timm.get_pretrained_cfg(weights, allow_unregistered=False).hf_hub_id), weights)
        problem = "no such file or folder, and timm has no weights of this name"
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        problem = str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
        if not path.exists():
            problem += ". Without a network, fill the hub's cache (HF_HUB_CACHE), or download the file and name it here"
    raise ValueError(f"model.weights: {weights}: {problem}; {KINDS}")


def _from_run(path: Path) -> Start:
    checkpoint, config = find_checkpoint(path)
    state = load_trained(checkpoint, config, torch.device("cpu")).target.vit.state_dict()
    size, augmentation = config.data.multicrop.global_crop_size, config.data.augmentation
    settings = {"mean": augmentation.mean, "std": augmentation.std, "input_size": (3, size, size)}
    licence = run_licence(checkpoint.resolve().parent.parent, config)
    return Start(str(path), state, config.model.encoder, config.model.encoder_kwargs, settings, licence)


def run_licence(run: Path, config: Config) -> str | None:
    """Return the licence of the weights that a run started from, None if there are none or it is not known."""
    path = run / "environment.json"
    noted = read_object(path, "Give --license").get("weights") if config.model.weights and path.exists() else None
    return noted.get("licence") if isinstance(noted, dict) else None


def _from_folder(path: Path) -> Start:
    content = read_object(path / "config.json", "timm needs it next to model.safetensors")
    with read_as_expected(path / "config.json", "Export the encoder again"):
        settings = content.get("pretrained_cfg", content)
        encoder, arguments = str(content["architecture"]), dict(content.get("model_args") or {})
    licence = _licence_of_card(path / "README.md") or settings.get("license")
    return Start(str(path), load_file(path / "model.safetensors"), encoder, arguments, settings, licence)


def _from_hub(repository: str, tag: str = "") -> Start:
    """Read `OWNER/NAME`, where timm keeps the weights of `tag`, or else of what its own config.json says."""
    if tag:
        settings, encoder, arguments = timm.get_pretrained_cfg(tag, allow_unregistered=False).to_dict(), tag, {}
    else:
        settings, encoder, arguments = load_model_config_from_hf(repository)
    state = load_state_dict_from_hf(repository, "model.safetensors")
    licence = settings.get("license")
    with suppress(OSError):  # a hub without a card, or a cache of the weights alone
        licence = licence or _licence_of_card(Path(hf_hub_download(repository, "README.md")))
    return Start(tag or f"hf-hub:{repository}", state, encoder, arguments or {}, settings, licence)


def _licence_of_card(path: Path) -> str | None:
    """Return the licence in the front matter of a model card: its name, where the hub knows it only as `other`."""
    text = path.read_text(errors="replace") if path.is_file() else ""
    front = text.split("\n---", 1)[0] if text.startswith("---") else ""
    found = dict(re.findall(r"^(license|license_name):[ \t]*(\S.*?)[ \t]*$", front, re.MULTILINE))
    return found.get("license_name") or found.get("license")


def fitted(start: Start, config: Config, encoder: MultiCropEncoder) -> dict[str, torch.Tensor]:
    """Return the state dict of `encoder.vit` with the weights: converted names, patches resampled to the encoder's size.

    A class head is left out. Raises ValueError for another architecture and for channels other than 3; one is spread over
    three.
    """
    own, head = encoder.vit.state_dict(), {name for name in start.state if name.startswith("head.")}
    if head:
        log.info(f"model.weights: the class head is left out ({', '.join(sorted(head))})")
    # With a mask token but no other name of the publisher's, timm would take the final norm for that of a class head.
    left_out = head if "storage_tokens" in start.state else {"mask_token", *head}
    state = {name: value for name, value in start.state.items() if name not in left_out}
    patches = state.get(PATCHES)
    if patches is not None and (patches.ndim != 4 or patches.shape[1] not in (1, 3)):
        shape = tuple(patches.shape)
        raise ValueError(f"model.weights: {start.name}: a patch embedding of {shape}, but images have 3 channels, or 1 as gray")
    if patches is not None and patches.shape[1] == 1:
        log.info("model.weights: the patch embedding of gray images is spread over three channels")
        state[PATCHES] = patches.repeat(1, 3, 1, 1) / 3
    state = checkpoint_filter_fn(state, encoder.vit)
    problems = list(_other_arguments(start, config))
    problems += [f"{name} is not in the weights" for name in own if name not in state]
    for name, value in state.items():
        if name not in own:
            problems.append(f"{name} has no place in the encoder")
        elif value.shape != own[name].shape:
            problems.append(f"{name} is {tuple(value.shape)}, in the encoder {tuple(own[name].shape)}")
    if problems:
        more = f" and {len(problems) - 1} more" if len(problems) > 1 else ""
        arguments = {key: value for key, value in (start.arguments or {}).items() if key not in ("global_pool", "num_classes")}
        remedy = "set model.encoder and model.encoder_kwargs to those of the weights"
        if start.encoder:
            remedy = f"write model.encoder={base_name(start.encoder)} 'model.encoder_kwargs={json.dumps(arguments)}'"
        raise ValueError(f"model.weights: {start.name}: of another architecture ({problems[0]}{more}); {remedy}")
    return {name: state[name].to(own[name].dtype) for name in own}


def base_name(encoder: str) -> str:
    return encoder.partition(".")[0]


def _other_arguments(start: Start, config: Config) -> Iterator[str]:
    """Yield what differs, also without changing any shape, such as the number of heads; nothing if it is not known."""
    theirs, ours = start.arguments or {}, config.model.encoder_kwargs
    if start.encoder and base_name(start.encoder) != base_name(config.model.encoder):
        yield f"they are of {start.encoder}, model.encoder is {config.model.encoder}"
    for key in sorted((theirs.keys() | ours.keys()) - FREE_ARGUMENTS) if start.encoder else ():
        if theirs.get(key) != ours.get(key):
            yield f"{key} is {theirs.get(key, 'the default')}, here {ours.get(key, 'the default')}"


def differences(start: Start, config: Config) -> Iterator[str]:
    """Yield one line for each setting of the weights that the run does not share, and one for weights not free for all use."""
    settings, augmentation, size = start.settings or {}, config.data.augmentation, config.data.multicrop.global_crop_size
    for key, ours in (("mean", augmentation.mean), ("std", augmentation.std)):
        theirs = settings.get(key)
        if theirs is not None and [round(float(value), 4) for value in theirs] != [round(value, 4) for value in ours]:
            yield f"trained with pixels of {key} {list(theirs)}, here {list(ours)}: set data.augmentation.{key}={list(theirs)}"
    patches, patch = start.state.get(PATCHES), config.model.patch_size
    if patches is not None and patch and patches.shape[-1] != patch:
        yield f"trained with patches of {patches.shape[-1]} px, resampled to the {patch} px of this run"
    theirs = settings.get("input_size")
    if theirs is not None and theirs[-1] != size:
        yield f"trained with crops of {theirs[-1]} px, here {size} px"
    if "eupe" in f"{start.name} {start.encoder} {settings.get('tag', '')}".lower():
        yield "EUPE weights have a non-commercial licence (FAIR), and so has all that is trained from them"
