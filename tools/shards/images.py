"""The image policy: which files are read as images, which images are accepted, and how each one is stored.

There is one rule, and it makes DALI and Pillow decode the same pixels from every stored image:

- Formats: JPEG, PNG, GIF, WebP, BMP, TIFF and PPM; AVIF and HEIC where Pillow supports them. Only the first frame counts.
- A sound gray or RGB JPEG or PNG of 8 bits keeps its bytes. Any other JPEG is encoded again as JPEG, any other format as PNG.
- Depth: 16-bit integers keep their upper 8 bits, floats of 0..1 are multiplied by 255, floats of 0..255 are rounded. Other
  ranges reject the image.
- Colour: alpha is dropped; CMYK and palettes become RGB, bilevel images become gray.
- EXIF: the orientation is applied. Damaged metadata is removed, because the pixels are sound without it.
- Size: `max_bytes` and `max_pixels` are checked before anything is decoded. `resize` reduces the shorter side and stores JPEG.
"""

import io
import logging
import struct
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.util import find_spec

import numpy as np
from PIL import Image, features

from pipeline.shards.samples import PILLOW_FAULTS

Image.MAX_IMAGE_PIXELS = None  # ImagePolicy.max_pixels is checked in the header instead
warnings.filterwarnings("ignore", module=r"PIL\.")  # mostly about metadata; real damage becomes a reason to reject
logging.getLogger("PIL").propagate = False
logging.getLogger("PIL").addHandler(logging.NullHandler())

HEIC_IS_READ = find_spec("pillow_heif") is not None
if HEIC_IS_READ:
    import_module("pillow_heif").register_heif_opener()
AVIF_IS_READ = "avif" in features.modules and bool(features.check("avif"))  # Pillow 11.3 and later, in most builds
# Pillow's name of each format that is read, and its extensions. The first one stands for the format in messages.
FORMATS = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),
    "PNG": (".png",),
    "GIF": (".gif",),
    "WEBP": (".webp",),
    "BMP": (".bmp",),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm", ".pgm"),
    **({"AVIF": (".avif",)} if AVIF_IS_READ else {}),
    **({"HEIF": (".heic", ".heif")} if HEIC_IS_READ else {}),
}
EXTENSIONS = tuple(extension for extensions in FORMATS.values() for extension in extensions)

VERIFY_LEVELS = ("none", "header", "full")
JPEG_QUALITY = 95  # of JPEGs that are encoded again at their own size
ORIENTATION_TAG = 0x0112
# Not ImageOps.exif_transpose: it rewrites the EXIF block too, and fails on a damaged one although the pixels are sound.
TURNS = "FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_270", "TRANSVERSE", "ROTATE_90"
TRANSPOSE = {orientation: Image.Transpose[name] for orientation, name in enumerate(TURNS, 2)}
MODE_CHANGES = {"F": "float", "I": "32-bit", "P": "palette", "1": "1-bit"} | dict.fromkeys(("RGBA", "LA", "PA"), "alpha")

PNG_SIGNATURE, PNG_DEPTH_BYTE = b"\x89PNG\r\n\x1a\n", 24
CRITICAL_CHUNKS = frozenset({b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"})
JPEG_SIGNATURE, END_OF_IMAGE, START_OF_SCAN = b"\xff\xd8\xff", b"\xff\xd9", 0xDA
BASELINE_FRAMES = (0xC0, 0xC1, 0xC2)
OTHER_FRAMES = frozenset(range(0xC3, 0xD0)) - {0xC4, 0xC8, 0xCC}  # lossless, hierarchical, arithmetic
JFIF, EXIF, ADOBE, COMMENT = 0xE0, 0xE1, 0xEE, 0xFE
METADATA = frozenset({*range(0xE0, 0xF0), COMMENT}) - {JFIF, ADOBE}  # those two say how colours are stored


class RejectedImageError(ValueError):
    """The reason why an image is left out."""


@dataclass(frozen=True)
class ImagePolicy:
    """The options of the policy. `resize`: the shorter side in pixels; 0 keeps every size. `quality`: of resized JPEGs."""

    verify: str = "header"
    resize: int = 0
    quality: int = 90
    max_pixels: int = 50_000_000
    max_bytes: int = 64 << 20


@dataclass(frozen=True)
class CheckedImage:
    """An image as it is stored. `changes`: what was done to it, by kind. `sums`: its `pixel_sums`, where requested."""

    content: bytes
    extension: str
    height: int
    width: int
    changes: tuple[str, ...] = ()
    sums: np.ndarray | None = None


def is_image(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS)


def check_image(content: bytes, name: str, policy: ImagePolicy, with_sums: bool = False) -> CheckedImage:
    """Apply the policy to one file. `with_sums` decodes it in any case.

    Raises RejectedImageError with the reason when the image must be left out.
    """
    if not content:
        raise RejectedImageError("empty file")
    try:
        return _check(content, name, policy, with_sums)
    except RejectedImageError as rejection:
        # Damaged metadata is no reason to lose an image whose pixels decode without it.
        if (plain := _without_metadata(content)) == content:
            raise
        try:
            checked = _check(plain, name, policy, with_sums=True)
        except RejectedImageError:
            raise rejection from None
        return replace(checked, changes=(*checked.changes, "metadata"), sums=checked.sums if with_sums else None)


def _check(content: bytes, name: str, policy: ImagePolicy, with_sums: bool) -> CheckedImage:
    """Apply the policy to one file. Every error that Pillow raises on damage becomes a RejectedImageError."""
    size = _plain_jpeg_size(content)
    try:
        if size and size[0] * size[1] <= policy.max_pixels and (not policy.resize or min(size) <= policy.resize):
            misnamed = () if name.lower().endswith(FORMATS["JPEG"]) or "." not in name else ("misnamed",)
            image = CheckedImage(content, "jpg", *size, misnamed)
        else:
            image = _check_with_pillow(content, name, policy)
        return replace(image, sums=pixel_sums(image.content)) if with_sums else image
    except RejectedImageError:
        raise
    except Image.UnidentifiedImageError:
        is_iso_media = content[4:8] == b"ftyp"  # HEIC and AVIF use the box format of MP4 (ISO/IEC 14496-12)
        hint = "; it may be HEIC: pip install pillow-heif adds support" if is_iso_media and not HEIC_IS_READ else ""
        raise RejectedImageError(f"not an image (allowed: {', '.join(FORMATS)}){hint}") from None
    except PILLOW_FAULTS as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RejectedImageError(f"does not decode: {reason}") from None


def _check_with_pillow(content: bytes, name: str, policy: ImagePolicy) -> CheckedImage:
    with Image.open(io.BytesIO(content), formats=tuple(FORMATS)) as image:
        width, height = image.size
        if width * height > policy.max_pixels:
            raise RejectedImageError(f"{width}x{height} pixels, allowed {policy.max_pixels:,} (--max-pixels)")
        changes = _needed_changes(image, content, name, policy)
        if set(changes) <= {"misnamed"}:
            return CheckedImage(content, "png" if image.format == "PNG" else "jpg", height, width, tuple(changes))
        return _rewrite(image, changes, policy)


def _needed_changes(image: Image.Image, content: bytes, name: str, policy: ImagePolicy) -> list[str]:
    """Return what keeps the file from being stored as it is; nothing but "misnamed" leaves its bytes alone."""
    changes, lower = [], name.lower()
    is_jpeg, is_png = image.format in ("JPEG", "MPO"), image.format == "PNG"
    if (lower.endswith(FORMATS["JPEG"]) and not is_jpeg) or (lower.endswith(".png") and not is_png):
        changes.append("misnamed")
    if not is_jpeg and not is_png:
        changes.append(str(image.format).lower())
    if image.mode not in ("RGB", "L"):
        changes.append(MODE_CHANGES.get(image.mode, "16-bit" if image.mode.startswith("I") else image.mode.lower()))
    elif is_png and content[PNG_DEPTH_BYTE] == 16:
        changes.append("16-bit")
    elif "transparency" in image.info:
        changes.append("alpha")
    if "exif" in image.info and _orientation(image) in TRANSPOSE:
        changes.append("orientation")
    end_marker = END_OF_IMAGE if is_jpeg else b"IEND" if is_png else b""
    if policy.verify != "none" and content.rfind(end_marker, _scan_start(content)) < 0:
        changes.append("no end marker")
    if policy.resize and min(image.size) > policy.resize:
        changes.append("resized")
    return changes


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation; 1, which is upright, where the EXIF block is damaged."""
    try:
        return int(image.getexif().get(ORIENTATION_TAG, 1))
    except PILLOW_FAULTS:
        return 1


def _rewrite(image: Image.Image, changes: list[str], policy: ImagePolicy) -> CheckedImage:
    is_jpeg, resized = image.format in ("JPEG", "MPO"), "resized" in changes
    orientation = _orientation(image) if "orientation" in changes else 1
    if resized and is_jpeg:
        image.draft("RGB", (policy.resize, policy.resize))  # decodes at 1/2, 1/4 or 1/8, never below the target size
    pixels = _to_rgb(image)
    if orientation in TRANSPOSE:
        pixels = pixels.transpose(TRANSPOSE[orientation])
    if resized:
        scale = policy.resize / min(pixels.size)
        size = (max(1, round(pixels.width * scale)), max(1, round(pixels.height * scale)))
        pixels = pixels.resize(size, Image.Resampling.BICUBIC)
    if is_jpeg or resized:
        out = io.BytesIO()
        pixels.save(out, "JPEG", quality=policy.quality if resized else JPEG_QUALITY)
        return CheckedImage(out.getvalue(), "jpg", pixels.height, pixels.width, tuple(changes))
    return CheckedImage(encode_png(pixels), "png", pixels.height, pixels.width, tuple(changes))


def encode_png(pixels: Image.Image) -> bytes:
    """Encode losslessly; the same pixels always give the same bytes."""
    out = io.BytesIO()
    pixels.save(out, "PNG", compress_level=6)
    return out.getvalue()


def _to_rgb(image: Image.Image) -> Image.Image:
    """Decode the first frame to 8-bit RGB or gray."""
    image.load()
    if image.mode.startswith("I") or image.mode == "F":
        return Image.fromarray(_to_8_bits(np.asarray(image)))
    if image.mode in ("1", "LA"):
        return image.convert("L")
    return image if image.mode in ("RGB", "L") else image.convert("RGB")


def _to_8_bits(values: np.ndarray) -> np.ndarray:
    """Convert `[H, W]` integers or floats to uint8. Raises RejectedImageError for ranges that would lose the picture."""
    low, high = values.min(), values.max()
    if values.dtype.kind == "f":
        if not (low >= 0 and high <= 255):  # rejects NaN too
            raise RejectedImageError(f"float values of {low:g}..{high:g}, allowed are 0..1 and 0..255: scale them")
        return np.rint(values * (255 if high <= 1 else 1)).astype(np.uint8)
    if not 0 <= low <= high <= 0xFFFF:
        raise RejectedImageError(f"integers of {low}..{high}, allowed are 0..65535: scale them to 8 or 16 bits first")
    if 0 < high < 256:
        raise RejectedImageError(f"16-bit values of {low}..{high}: the upper 8 bits are all zero. Store it with 8 bits")
    return (values >> 8).astype(np.uint8)


def pixel_sums(content: bytes) -> np.ndarray:
    """Return `[7] int64`: the number of pixels, the sum of each RGB channel, the sum of each channel's squares.

    Raises one of PILLOW_FAULTS when the image does not decode.
    """
    with Image.open(io.BytesIO(content)) as image:
        histogram = np.array(image.convert("RGB").histogram(), np.int64).reshape(3, 256)
    values = np.arange(256)
    return np.concatenate([histogram[0].sum(keepdims=True), histogram @ values, histogram @ values**2])


def _plain_jpeg_size(content: bytes) -> tuple[int, int] | None:
    """Return (height, width) of a JPEG that is stored as it is, from its markers only, which is faster than Pillow.

    None for everything else, which Pillow then checks: EXIF, CMYK, 12 bits, arithmetic coding, no end marker, damage.
    """
    size = None
    for kind, start, _ in _jpeg_segments(content):
        if kind == START_OF_SCAN:
            return size if content.rfind(END_OF_IMAGE, start) >= 0 else None
        if kind in BASELINE_FRAMES:
            if start + 10 > len(content):
                return None
            precision, height, width, components = struct.unpack_from(">BHHB", content, start + 4)
            if size or precision != 8 or components not in (1, 3) or not height * width:
                return None
            size = (height, width)
        elif kind in OTHER_FRAMES or (kind == EXIF and content[start + 4 : start + 8] == b"Exif"):
            return None
    return None


def _without_metadata(content: bytes) -> bytes:
    """Remove the JPEG segments or PNG chunks that the pixels do not need."""
    if content.startswith(PNG_SIGNATURE):
        kept, start = [PNG_SIGNATURE], len(PNG_SIGNATURE)
        while start + 12 <= len(content):  # length, kind, data, checksum
            size, kind = struct.unpack_from(">I4s", content, start)
            if kind in CRITICAL_CHUNKS:
                kept.append(content[start : start + 12 + size])
            start += 12 + size
        return b"".join(kept)
    if scan := _scan_start(content):
        kept = [content[start:stop] for kind, start, stop in _jpeg_segments(content) if kind not in METADATA]
        return b"".join([content[:2], *kept, content[scan:]])
    return content


def _jpeg_segments(content: bytes) -> Iterator[tuple[int, int, int]]:
    """Yield `(kind, start, stop)` of each segment up to the first scan's header. Source: ITU T.81, annex B."""
    start = 2 if content.startswith(JPEG_SIGNATURE) else len(content)
    while start + 4 <= len(content) and content[start] == 0xFF:
        kind, stop = content[start + 1], start + 2 + (content[start + 2] << 8 | content[start + 3])
        yield kind, start, stop
        if kind == START_OF_SCAN:
            return
        start = stop


def _scan_start(content: bytes) -> int:
    """Return where the pixels of a JPEG begin, behind the thumbnails with end markers of their own; 0 where unknown."""
    return next((start for kind, start, _ in _jpeg_segments(content) if kind == START_OF_SCAN), 0)
