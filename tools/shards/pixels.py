"""Pixels of any image as 8 bits, and whatever Pillow raises on the way as one reason to leave the image out."""

import io
import logging
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image

from pipeline.shards.samples import PILLOW_FAULTS

warnings.filterwarnings("ignore", module=r"PIL\.")  # on metadata mostly; what matters becomes a reason
logging.getLogger("PIL").propagate = False
logging.getLogger("PIL").addHandler(logging.NullHandler())

CRITICAL_CHUNKS = frozenset({b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"})
END_OF_IMAGE, START_OF_SCAN = b"\xff\xd9", 0xDA
JFIF, ADOBE, COMMENT = 0xE0, 0xEE, 0xFE  # the segments of JFIF and Adobe say how colours are stored


class RejectedImageError(ValueError):
    """Why an image is left out."""


@contextmanager
def decoding() -> Iterator[None]:
    """Turn whatever Pillow raises on damage into a RejectedImageError with the reason."""
    try:
        yield
    except RejectedImageError:
        raise
    except PILLOW_FAULTS as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RejectedImageError(f"does not decode: {reason}") from None


def to_rgb(image: Image.Image) -> Image.Image:
    """Decode the first frame to RGB or gray of 8 bits: alpha is dropped; wider values by the rule of `to_8_bits`."""
    image.load()
    if image.mode.startswith("I") or image.mode == "F":
        return Image.fromarray(to_8_bits(np.asarray(image)))
    if image.mode in ("1", "LA"):
        return image.convert("L")
    return image if image.mode in ("RGB", "L") else image.convert("RGB")


def to_8_bits(values: np.ndarray) -> np.ndarray:
    """`[H, W]` integers or floats to uint8, by one rule for all images.

    Integers of 0..65535 keep their upper 8 bits, floats of 0..1 are times 255, floats of 0..255 are rounded. Raises
    RejectedImageError for other values, and for 16 bits of which the upper 8 are all zero.
    """
    low, high = values.min(), values.max()
    if values.dtype.kind == "f":
        if not (low >= 0 and high <= 255):  # not a number is neither
            raise RejectedImageError(
                f"float values of {low:g}..{high:g}, allowed are 0..1 and 0..255: scale them first"
            )
        return np.rint(values * (255 if high <= 1 else 1)).astype(np.uint8)
    if not 0 <= low <= high <= 0xFFFF:
        raise RejectedImageError(f"integers of {low}..{high}, allowed are 0..65535: scale them to 8 or 16 bits first")
    if 0 < high < 256:
        raise RejectedImageError(f"16-bit values of {low}..{high}: the upper 8 bits are all zero. Store it with 8 bits")
    return (values >> 8).astype(np.uint8)


def pixel_sums(content: bytes) -> np.ndarray:
    """`[7] int64`: the number of pixels; per RGB channel their sum; per RGB channel the sum of their squares.

    Raises RejectedImageError when the image does not decode.
    """
    with decoding(), Image.open(io.BytesIO(content)) as image:
        histogram = np.array(image.convert("RGB").histogram(), np.int64).reshape(3, 256)
    values = np.arange(256)
    return np.concatenate([histogram[0].sum(keepdims=True), histogram @ values, histogram @ values**2])


def without_metadata(content: bytes) -> bytes:
    """A JPEG or PNG without the segments and chunks that its pixels do not need; the same bytes where there are none."""
    if content.startswith(b"\x89PNG\r\n\x1a\n"):
        return b"".join([content[:8], *_critical_chunks(content)])
    if scan := scan_start(content):
        kept = [content[start:stop] for kind, start, stop in jpeg_segments(content) if _is_needed(kind)]
        return b"".join([content[:2], *kept, content[scan:]])
    return content


def _critical_chunks(content: bytes) -> Iterator[bytes]:
    place = 8
    while place + 12 <= len(content):
        (size,) = struct.unpack_from(">I", content, place)
        if content[place + 4 : place + 8] in CRITICAL_CHUNKS:
            yield content[place : place + 12 + size]
        place += 12 + size


def _is_needed(kind: int) -> bool:
    return kind in (JFIF, ADOBE) or not (0xE0 <= kind <= 0xEF or kind == COMMENT)


def jpeg_segments(content: bytes) -> Iterator[tuple[int, int, int]]:
    """`(kind, start, stop)` of each segment before the first scan; the scan's own header comes last.

    ITU T.81, annex B: each marker segment is FF, its kind, a length and the payload.
    """
    place = 2
    while place + 4 <= len(content) and content[place] == 0xFF:
        kind, stop = content[place + 1], place + 2 + (content[place + 2] << 8 | content[place + 3])
        yield kind, place, stop
        if kind == START_OF_SCAN:
            return
        place = stop


def scan_start(content: bytes) -> int:
    """Where the pixels of a JPEG begin: thumbnails, which have end markers of their own, lie before. 0 where that is unknown."""
    if content[:3] != b"\xff\xd8\xff":
        return 0
    return next((start for kind, start, _ in jpeg_segments(content) if kind == START_OF_SCAN), 0)
