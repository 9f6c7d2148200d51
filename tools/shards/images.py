"""One image: what it is, whether it can be trained on, and how it is rewritten when it cannot be stored unchanged."""

import io
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module

import numpy as np
from PIL import Image

from pipeline.shards.samples import PILLOW_FAULTS
from tools.shards.file_kinds import FORMATS, HEIC_IS_READ, JPEG_EXTENSIONS
from tools.shards.pixels import (
    END_OF_IMAGE,
    START_OF_SCAN,
    RejectedImageError,
    decoding,
    jpeg_segments,
    pixel_sums,
    scan_start,
    to_rgb,
    without_metadata,
)

Image.MAX_IMAGE_PIXELS = None  # our own limit is checked in the header, before anything is decoded

VERIFY_LEVELS = ("none", "header", "full")
JPEG_QUALITY = 95  # for images that must be written again
ORIENTATION_TAG = 0x0112
OTHER_FRAMES = frozenset(range(0xC3, 0xD0)) - {0xC4, 0xC8, 0xCC}  # lossless, hierarchical, arithmetic
# Not ImageOps.exif_transpose: it also rewrites the EXIF block, and fails on a damaged one although the pixels are sound.
TURNS = "FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_270", "TRANSVERSE", "ROTATE_90"
TRANSPOSE = {orientation: Image.Transpose[name] for orientation, name in enumerate(TURNS, 2)}


@dataclass(frozen=True)
class ImagePolicy:
    """What is accepted and how it is stored. `resize`: shorter side in pixels, 0 keeps the bytes as they are."""

    verify: str = "header"
    resize: int = 0
    quality: int = 90
    max_pixels: int = 50_000_000
    max_bytes: int = 64 << 20


@dataclass(frozen=True)
class CheckedImage:
    """An image that DALI and Pillow decode alike. `changes`: what had to be done to it, by kind.

    `sums`: its `pixel_sums`, of the images that the statistics are made of.
    """

    content: bytes
    extension: str
    height: int
    width: int
    changes: tuple[str, ...] = ()
    sums: np.ndarray | None = None


def check_image(content: bytes, name: str, policy: ImagePolicy, with_sums: bool = False) -> CheckedImage:
    """Raise ValueError with the reason when the image must be left out. With `with_sums` it is decoded in any case."""
    if not content:
        raise RejectedImageError("empty file")
    try:
        return _checked(content, name, policy, with_sums)
    except RejectedImageError:
        # Damaged metadata is no reason to lose an image: once more without it.
        if (plain := without_metadata(content)) == content:
            raise
        try:
            checked = _checked(plain, name, policy, with_sums=True)
        except RejectedImageError:
            checked = None
        if checked is None:
            raise
        return replace(checked, changes=(*checked.changes, "metadata"), sums=checked.sums if with_sums else None)


def _checked(content: bytes, name: str, policy: ImagePolicy, with_sums: bool) -> CheckedImage:
    size = _plain_jpeg_size(content)
    if size and size[0] * size[1] <= policy.max_pixels and (not policy.resize or min(size) <= policy.resize):
        misnamed = () if name.lower().endswith(JPEG_EXTENSIONS) or "." not in name else ("misnamed",)
        image = CheckedImage(content, "jpg", *size, misnamed)
    else:
        image = _check_with_pillow(content, name, policy)
    return replace(image, sums=pixel_sums(image.content)) if with_sums else image


def _check_with_pillow(content: bytes, name: str, policy: ImagePolicy) -> CheckedImage:
    with decoding():
        try:
            opened = Image.open(io.BytesIO(content), formats=_formats(content))
        except Image.UnidentifiedImageError:
            is_heic = not HEIC_IS_READ and _is_iso_media(content)
            hint = "; it may be HEIC: pip install pillow-heif adds support" if is_heic else ""
            raise RejectedImageError(f"not an image (allowed: {', '.join(_formats(content))}){hint}") from None
        with opened as image:
            width, height = image.size
            if width * height > policy.max_pixels:
                raise RejectedImageError(f"{width}x{height} pixels, allowed {policy.max_pixels:,} (--max-pixels)")
            changes = _needed_changes(image, content, name, policy)
            if set(changes) <= {"misnamed"}:
                return CheckedImage(content, "png" if image.format == "PNG" else "jpg", height, width, tuple(changes))
            return _rewrite(image, changes, policy)


def _is_iso_media(content: bytes) -> bool:
    """HEIC and AVIF use the box format of MP4 (ISO/IEC 14496-12)."""
    return content[4:8] == b"ftyp"


def _formats(content: bytes) -> tuple[str, ...]:
    return (*FORMATS, _heic_format()) if HEIC_IS_READ and _is_iso_media(content) else FORMATS


@cache
def _heic_format() -> str:
    """Pillow's name for HEIC, once its opener is registered."""
    import_module("pillow_heif").register_heif_opener()
    return "HEIF"


def _plain_jpeg_size(content: bytes) -> tuple[int, int] | None:
    """(height, width) of a JPEG that needs no change, from its markers alone, which is faster than Pillow.

    None for everything else (EXIF, CMYK, 12 bits, arithmetic coding, no end marker, damage), which Pillow then checks.
    """
    if content[:3] != b"\xff\xd8\xff":
        return None
    size = None
    for kind, place, _ in jpeg_segments(content):
        if kind == START_OF_SCAN:
            return size if content.rfind(END_OF_IMAGE, place) >= 0 else None
        start = place + 4
        if kind in (0xC0, 0xC1, 0xC2):
            if start + 6 > len(content):
                return None
            precision, components = content[start], content[start + 5]
            height, width = content[start + 1] << 8 | content[start + 2], content[start + 3] << 8 | content[start + 4]
            if size or precision != 8 or components not in (1, 3) or not height * width:
                return None
            size = (height, width)
        elif kind in OTHER_FRAMES or (kind == 0xE1 and content[start : start + 4] == b"Exif"):
            return None
    return None


def _needed_changes(image: Image.Image, content: bytes, name: str, policy: ImagePolicy) -> list[str]:
    changes, extension = [], name.lower()
    is_jpeg, is_png = image.format in ("JPEG", "MPO"), image.format == "PNG"
    if (extension.endswith(JPEG_EXTENSIONS) and not is_jpeg) or (extension.endswith(".png") and not is_png):
        changes.append("misnamed")
    if not is_jpeg and not is_png:
        changes.append(str(image.format).lower())
    if image.mode not in ("RGB", "L"):
        changes.append(_mode_change(image))
    elif is_png and content[24] == 16:
        changes.append("16-bit")
    elif "transparency" in image.info:
        changes.append("alpha")
    if "exif" in image.info and _orientation(image) in TRANSPOSE:
        changes.append("orientation")
    end_marker = END_OF_IMAGE if is_jpeg else b"IEND" if is_png else b""
    if policy.verify != "none" and content.rfind(end_marker, scan_start(content)) < 0:
        changes.append("no end marker")
    if policy.resize and min(image.size) > policy.resize:
        changes.append("resized")
    return changes


def _orientation(image: Image.Image) -> int:
    """How the image is turned; damaged EXIF data say nothing, and the pixels are sound without them."""
    try:
        return int(image.getexif().get(ORIENTATION_TAG, 1))
    except PILLOW_FAULTS:
        return 1


def _mode_change(image: Image.Image) -> str:
    names = {
        "F": "float",
        "I": "32-bit",
        "CMYK": "cmyk",
        "P": "palette",
        "1": "1-bit",
        "RGBA": "alpha",
        "LA": "alpha",
        "PA": "alpha",
    }
    return names.get(image.mode, "16-bit" if image.mode.startswith("I") else image.mode.lower())


def _rewrite(image: Image.Image, changes: list[str], policy: ImagePolicy) -> CheckedImage:
    is_jpeg, resized = image.format in ("JPEG", "MPO"), "resized" in changes
    orientation = _orientation(image) if "orientation" in changes else 1
    if resized and is_jpeg:
        image.draft("RGB", (policy.resize, policy.resize))  # decodes at 1/2, 1/4 or 1/8: never below the target size
    pixels = to_rgb(image)
    if orientation in TRANSPOSE:
        pixels = pixels.transpose(TRANSPOSE[orientation])
    if resized:
        scale = policy.resize / min(pixels.size)
        size = (max(1, round(pixels.width * scale)), max(1, round(pixels.height * scale)))
        pixels = pixels.resize(size, Image.Resampling.BICUBIC)
    out, extension = io.BytesIO(), "jpg" if is_jpeg or resized else "png"
    if extension == "jpg":
        pixels.save(out, "JPEG", quality=policy.quality if resized else JPEG_QUALITY)
    else:
        pixels.save(out, "PNG", compress_level=6)
    return CheckedImage(out.getvalue(), extension, pixels.height, pixels.width, tuple(changes))


def encode_png(pixels: np.ndarray) -> bytes:
    """`[H, W]` or `[H, W, 3]` uint8 to PNG, losslessly and always to the same bytes."""
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG", compress_level=6)
    return out.getvalue()
