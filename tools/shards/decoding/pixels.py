"""From any file's pixels to the 8-bit gray or RGB that is stored, by the rule in docs/pipeline.md."""

import io
from functools import lru_cache

import numpy as np
from PIL import Image, ImageChops, ImageCms, ImageFile

from pipeline.shards.index_file import FAULTS

DEPTHS = (8, 10, 12, 14, 16)
NEARLY_WHITE = 224  # the mean of each channel
SRGB_TOLERANCE = 3  # gray levels by which a profile that is meant to be sRGB may differ
MODE_CHANGES = {"F": "float", "I": "32-bit", "P": "palette", "1": "1-bit"} | dict.fromkeys(("RGBA", "LA", "PA"), "alpha")
MIN_UPPER_BYTE = 65  # of the largest of 16-bit colours: with less, they have 14 bits, and their upper bytes are no picture
MAX_PAGES = 1_000  # of a TIFF that are counted
TIFF_BITS, TIFF_PHOTOMETRIC, TIFF_PLANES = 0x0102, 0x0106, 0x011C


class RejectedImageError(ValueError):
    """The reason why an image is left out."""


def pixel_changes(image: ImageFile.ImageFile) -> list[str]:
    """Return what the rule changes in an image whose header was read."""
    changes = ["16-bit"] if _is_wide(image) and image.mode not in ("I", "F") else []
    if image.mode not in ("RGB", "L") and not image.mode.startswith("I;"):
        changes.append(MODE_CHANGES.get(image.mode, image.mode.lower()))
    if "transparency" in image.info and "alpha" not in changes:
        changes.append("alpha")
    if to_srgb(image.info.get("icc_profile") or b"", _colour_mode(image)):
        changes.append("colour profile")
    return changes


def other_frames(image: ImageFile.ImageFile) -> int:
    """Return the number of pages or frames behind the first one; the previews and depth maps behind a JPEG do not count."""
    count = 0
    try:
        if image.format not in ("MPO", "TIFF"):
            return int(getattr(image, "n_frames", 1)) - 1
        while image.format == "TIFF" and count < MAX_PAGES:  # the time of its n_frames grows with the square of the pages
            image.seek(count + 1)
            count += 1
    except FAULTS:
        pass
    image.seek(0)
    return count


def to_8_bit(image: ImageFile.ImageFile) -> tuple[Image.Image, int]:
    """Decode the first frame to 8-bit RGB or gray; also return the depth of its values. Raises RejectedImageError."""
    profile, mode = image.info.get("icc_profile") or b"", _colour_mode(image)
    pixels, depth = _narrowed(image) if _is_wide(image) else (image, 8)
    alpha = None
    if pixels.mode in ("RGBA", "LA", "PA") or "transparency" in pixels.info:
        pixels = pixels.convert("LA" if mode == "L" else "RGBA")
        alpha = pixels.getchannel("A")
    pixels = pixels.convert(mode)
    if transform := to_srgb(profile, mode):
        pixels = transform.apply(pixels)
    pixels = pixels.convert("L" if mode == "L" else "RGB")
    if alpha is None:
        return pixels, depth
    counts = np.array(pixels.histogram(alpha)).reshape(-1, 256)  # of the pixels with an alpha above 0
    is_light = counts.any() and (counts @ np.arange(256) >= NEARLY_WHITE * counts.sum(1)).all()
    background = Image.new(pixels.mode, pixels.size, "black" if is_light else "white")
    background.paste(pixels, mask=alpha)
    return background, depth


def _colour_mode(image: Image.Image) -> str:
    """Return the mode that holds the image's colours without alpha: L, RGB or CMYK."""
    return "CMYK" if image.mode == "CMYK" else "L" if image.mode[0] in "1LIF" and image.mode != "LAB" else "RGB"


def _is_wide(image: ImageFile.ImageFile) -> bool:
    """Return True if the file holds more than 8 bits per value. Pillow scales a PPM by its maximum, unless that is 65535."""
    is_wide_tiff = getattr(image, "tag_v2", {}).get(TIFF_BITS, (8,))[0] > 8
    is_wide_tile = any(";16" in str(tile.args) or tile.args == ("RGB", 65535) for tile in image.tile)
    return image.mode[0] in "IF" or is_wide_tiff or is_wide_tile


def _narrowed(image: ImageFile.ImageFile) -> tuple[Image.Image, int]:
    """Return an image of wide values as one of 8 bits, with its alpha, and the depth of the values."""
    if image.mode[0] not in "IF":  # of several channels, whose upper bytes Pillow keeps
        if getattr(image, "tag_v2", {}).get(TIFF_PLANES) == 2:
            raise RejectedImageError("a TIFF of 16 bits with separate channels: store it with interleaved channels")
        colours = np.reshape(image.getextrema(), (-1, 2))[:, 1].tolist()
        alpha = colours.pop() if image.mode.endswith("A") else 255
        if max(colours) < MIN_UPPER_BYTE or alpha < MIN_UPPER_BYTE:
            raise RejectedImageError("colours or alpha of 14 bits or less in 16: scale them to 16 bits, or to 8")
        if isinstance(transparent := image.info.get("transparency"), tuple):
            image.info["transparency"] = tuple(value >> 8 for value in transparent)
        return image, 16
    is_scaled = image.mode == "I" and image.tile[0].codec_name.startswith("ppm")  # to 16 bits, from the declared maximum
    values, transparent = np.asarray(image), image.info.get("transparency")
    narrow, depth = _scaled(values, 16 if is_scaled else 8)
    pixels = Image.fromarray(narrow)
    if getattr(image, "tag_v2", {}).get(TIFF_PHOTOMETRIC) == 0:  # white is zero; Pillow inverts only narrower values
        pixels = ImageChops.invert(pixels)
    if transparent is not None:
        pixels.putalpha(Image.fromarray(np.where(values == transparent, np.uint8(0), np.uint8(255))))
    return pixels, depth


def _scaled(values: np.ndarray, min_depth: int) -> tuple[np.ndarray, int]:
    """Convert integers or floats to uint8; also return their depth."""
    low, high = values.min(), values.max()
    if values.dtype.kind == "f":
        if not (low >= 0 and high <= 255):  # rejects NaN too
            raise RejectedImageError(f"float values of {low:g}..{high:g}, allowed are 0..1 and 0..255: scale them")
        return np.rint(values * (255 if high <= 1 else 1)).astype(np.uint8), 32
    if not 0 <= low <= high <= 0xFFFF:
        raise RejectedImageError(f"integers of {low}..{high}, allowed are 0..65535: scale them to 8 or 16 bits first")
    depth = next(depth for depth in DEPTHS if depth >= min_depth and int(high) >> depth == 0)
    top = (1 << depth) - 1
    return ((values.astype(np.uint32) * 255 + top // 2) // top).astype(np.uint8), depth


@lru_cache(maxsize=32)
def to_srgb(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Return the conversion of pixels of a mode to sRGB; None if there is no need or no way: no profile, a damaged one, sRGB."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    except (OSError, ImageCms.PyCMSError):
        return None
    if mode == "CMYK":
        return transform
    levels = np.arange(0, 256, 15).astype(np.uint8)
    tried = Image.fromarray(np.stack(np.meshgrid(levels, levels, levels), -1).reshape(1, -1, 3)).convert(mode)
    errors = ImageChops.difference(transform.apply(tried), tried.convert("RGB")).getextrema()
    return transform if np.max(errors) > SRGB_TOLERANCE else None


def encode(pixels: Image.Image, quality: int = 0) -> bytes:
    """Encode as JPEG of a quality, or losslessly as PNG; the same pixels always give the same bytes."""
    out = io.BytesIO()
    options = {"quality": quality} if quality else {"compress_level": 6}
    pixels.save(out, "JPEG" if quality else "PNG", **options)
    return out.getvalue()
