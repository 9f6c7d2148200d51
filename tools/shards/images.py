"""The image policy: which images are accepted, and how each is stored so that DALI and Pillow decode the same pixels from it."""

import io
import logging
import warnings
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageFile

from pipeline.shards.index_file import FAULTS
from tools.shards.decoding.markers import END_OF_IMAGE, LOSSLESS_FRAME, USUAL_FRAMES, read_jpeg, without_metadata
from tools.shards.decoding.pixels import RejectedImageError, encode, other_frames, pixel_changes, to_8_bit
from tools.shards.formats import EXTENSIONS, FORMATS, describe_foreign

Image.MAX_IMAGE_PIXELS = None  # ImagePolicy.max_pixels is checked in the header instead
warnings.filterwarnings("ignore", module=r"PIL\.")  # mostly about metadata; real damage becomes a reason to reject
logging.getLogger("PIL").propagate = False
logging.getLogger("PIL").addHandler(logging.NullHandler())

MAX_FLAT_BYTES = 2_000  # of the headers and tables of an image of one colour; its pixels take half a bit each or less
JPEG_QUALITY = 95  # of JPEGs that are encoded again at their own size
ORIENTATION_TAG = 0x0112
# Not ImageOps.exif_transpose: it rewrites the EXIF block too, and fails on a damaged one although the pixels are sound.
TURNS = "FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_270", "TRANSVERSE", "ROTATE_90"
TRANSPOSE = {orientation: Image.Transpose[name] for orientation, name in enumerate(TURNS, 2)}


@dataclass(frozen=True)
class ImagePolicy:
    """`verify`: "full" decodes every image. `resize`: the shorter side, 0 keeps every size; `quality`: of resized JPEGs."""

    verify: str = "header"
    resize: int = 0
    quality: int = 90
    max_pixels: int = 50_000_000
    max_bytes: int = 64 << 20


@dataclass
class CheckedImage:
    """An image as it is stored. `changes`: what was done to it, by kind. `other_frames`: pages or frames that were left out."""

    content: bytes
    extension: str
    height: int
    width: int
    changes: tuple[str, ...]
    other_frames: int = 0
    has_one_colour: bool = False


def check_image(content: bytes, name: str, policy: ImagePolicy) -> CheckedImage:
    """Apply the policy to one file. Raises RejectedImageError with the reason when the image must be left out."""
    if not content:
        raise RejectedImageError("empty file")
    try:
        return _check(content, name, policy)
    except RejectedImageError as rejection:
        # Damaged metadata is no reason to lose an image whose pixels decode without it.
        if (plain := without_metadata(content)) == content:
            raise
        try:
            checked = _check(plain, name, replace(policy, verify="full"))
        except RejectedImageError:
            raise rejection from None
        checked.changes += ("metadata",)
        return checked


def _check(content: bytes, name: str, policy: ImagePolicy) -> CheckedImage:
    """Apply the policy to one file. Every error that Pillow raises on damage becomes a RejectedImageError."""
    kind, precision, scan = read_jpeg(content)
    try:
        with Image.open(io.BytesIO(content), formats=tuple(FORMATS)) as image:
            width, height = image.size
            if width * height > policy.max_pixels:
                raise RejectedImageError(f"{width}x{height} pixels, allowed {policy.max_pixels:,} (--max-pixels)")
            changes, frames = _needed_changes(image, content, name, policy, kind, scan), other_frames(image)
            if set(changes) <= {"misnamed"}:
                checked = CheckedImage(content, "png" if image.format == "PNG" else "jpg", height, width, tuple(changes))
            else:
                checked = _rewrite(image, changes, policy)
        checked.other_frames = frames
        # An image of one colour takes few bytes, so that only small files need decoding for it.
        if policy.verify == "full" or len(checked.content) <= MAX_FLAT_BYTES + checked.height * checked.width // 16:
            with Image.open(io.BytesIO(checked.content)) as stored:
                ranges = np.reshape(stored.getextrema(), (-1, 2))  # of each channel
            checked.has_one_colour = bool((ranges[:, 0] == ranges[:, 1]).all())
        return checked
    except RejectedImageError:
        raise
    except Image.UnidentifiedImageError:
        if precision not in (0, 8):
            raise RejectedImageError(f"a JPEG of {precision} bits: store it with 8 bits, or as PNG") from None
        what = describe_foreign(content, name.rpartition("/")[2]) or f"not an image (allowed: {', '.join(FORMATS)})"
        raise RejectedImageError(what) from None
    except FAULTS as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RejectedImageError(f"does not decode: {reason}") from None


def _needed_changes(
    image: ImageFile.ImageFile, content: bytes, name: str, policy: ImagePolicy, kind: int, scan: int
) -> list[str]:
    """Return what keeps the file from being stored as it is; nothing but "misnamed" leaves its bytes alone."""
    changes, lower = [], name.lower()
    is_jpeg, is_png = image.format in ("JPEG", "MPO"), image.format == "PNG"
    if lower.endswith(EXTENSIONS) and not lower.endswith(FORMATS["JPEG" if is_jpeg else str(image.format)]):
        changes.append("misnamed")
    if not is_jpeg and not is_png:
        changes.append(str(image.format).lower())
    if is_jpeg and kind not in (0, *USUAL_FRAMES):
        changes.append("lossless" if kind == LOSSLESS_FRAME else "arithmetic")
    changes += pixel_changes(image)
    if "exif" in image.info and _orientation(image) in TRANSPOSE:
        changes.append("orientation")
    end_marker = END_OF_IMAGE if is_jpeg else b"IEND" if is_png else b""
    if content.rfind(end_marker, scan) < 0:
        changes.append("no end marker")
    if policy.resize and min(image.size) > policy.resize:
        changes.append("resized")
    return changes


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation; 1, which is upright, where the EXIF block is damaged."""
    try:
        return int(image.getexif().get(ORIENTATION_TAG, 1))
    except FAULTS:
        return 1


def _rewrite(image: ImageFile.ImageFile, changes: list[str], policy: ImagePolicy) -> CheckedImage:
    is_jpeg, resized = image.format in ("JPEG", "MPO"), "resized" in changes
    orientation = _orientation(image) if "orientation" in changes else 1
    if resized and is_jpeg:
        image.draft("RGB", (policy.resize, policy.resize))  # decodes at 1/2, 1/4 or 1/8, never below the target size
    pixels, depth = to_8_bit(image)
    changes = [f"{depth} bits in 16" if change == "16-bit" and depth < 16 else change for change in changes]
    if orientation in TRANSPOSE:
        pixels = pixels.transpose(TRANSPOSE[orientation])
    if resized:
        scale = policy.resize / min(pixels.size)
        size = (max(1, round(pixels.width * scale)), max(1, round(pixels.height * scale)))
        pixels = pixels.resize(size, Image.Resampling.BICUBIC)
    pixels.info.clear()  # a profile or an orientation that was applied must not be applied again
    quality = policy.quality if resized else JPEG_QUALITY if is_jpeg and "lossless" not in changes else 0
    return CheckedImage(encode(pixels, quality), "jpg" if quality else "png", pixels.height, pixels.width, tuple(changes))
