"""Reads the markers of JPEGs (ITU T.81, annex B) and the chunks of PNGs, for what Pillow does not say of them."""

import struct
from collections.abc import Iterator

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
CRITICAL_CHUNKS = frozenset({b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"})
JPEG_SIGNATURE, END_OF_IMAGE, START_OF_SCAN = b"\xff\xd8\xff", b"\xff\xd9", 0xDA
FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
USUAL_FRAMES, LOSSLESS_FRAME = (0xC0, 0xC1, 0xC2), 0xC3  # baseline, extended and progressive are read by every decoder
JFIF, ADOBE, COMMENT = 0xE0, 0xEE, 0xFE
METADATA = frozenset({*range(0xE0, 0xF0), COMMENT}) - {JFIF, ADOBE}  # those two say how colours are stored


def read_jpeg(content: bytes) -> tuple[int, int, int]:
    """Return a JPEG's frame marker (0 for none or several), bits per value, and where its scan begins; zeros for other files."""
    segments = list(_segments(content))
    frames = [(kind, content[start + 4]) for kind, start, _ in segments if kind in FRAMES and start + 10 <= len(content)]
    kind, precision = frames[-1] if frames else (0, 0)
    scan = next((start for kind, start, _ in segments if kind == START_OF_SCAN), 0)
    return kind if len(frames) == 1 else 0, precision, scan


def without_metadata(content: bytes) -> bytes:
    """Remove the JPEG segments or PNG chunks that the pixels do not need."""
    if content.startswith(PNG_SIGNATURE):
        kept, start = [PNG_SIGNATURE], len(PNG_SIGNATURE)
        while start + 12 <= len(content):  # length, kind, data, checksum
            size, kind = struct.unpack_from(">I4s", content, start)
            if kind in CRITICAL_CHUNKS:
                kept.append(content[start : start + 12 + size])
            start += 12 + size
        return b"".join(kept)
    if scan := read_jpeg(content)[2]:
        kept = [content[start:stop] for kind, start, stop in _segments(content) if kind not in METADATA]
        return b"".join([content[:2], *kept, content[scan:]])
    return content


def _segments(content: bytes) -> Iterator[tuple[int, int, int]]:
    """Yield `(kind, start, stop)` of each segment up to the first scan's header."""
    start = 2 if content.startswith(JPEG_SIGNATURE) else len(content)
    while start + 4 <= len(content) and content[start] == 0xFF:
        if content[start + 1] == 0xFF:  # any number of these may precede a marker
            start += 1
            continue
        kind, stop = content[start + 1], start + 2 + (content[start + 2] << 8 | content[start + 3])
        yield kind, start, stop
        if kind == START_OF_SCAN:
            return
        start = stop
