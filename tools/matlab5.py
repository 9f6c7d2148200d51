"""Just enough of MATLAB's version 5 files to read the ImageNet devkit's `meta.mat` without SciPy.

Format: "MAT-File Format", MathWorks, chapter 1 (level 5): a 128-byte header, then tagged elements padded to 8 bytes.
"""

import struct
import zlib
from typing import NamedTuple

import numpy as np

MAX_BYTES = 64 << 20
MATRIX, COMPRESSED = 14, 15
NUMBERS = {
    1: "i1",
    2: "u1",
    3: "i2",
    4: "u2",
    5: "i4",
    6: "u4",
    7: "f4",
    9: "f8",
    12: "i8",
    13: "u8",
    16: "u1",
    17: "u2",
}
STRUCT_CLASS, CHAR_CLASS, CELL_CLASS = 2, 4, 1
HEADER_BYTES = 128
Value = str | np.ndarray | list[dict[str, "Value"]] | None


class Element(NamedTuple):
    kind: int
    data: bytes


def read_struct(content: bytes, variable: str) -> list[dict[str, Value]]:
    """The elements of one struct array, each as a dictionary. Raises ValueError when it is not there."""
    try:
        for element in _elements(content[HEADER_BYTES:]):
            if element.kind == COMPRESSED:
                element = _elements(zlib.decompressobj().decompress(element.data, MAX_BYTES))[0]
            if element.kind == MATRIX:
                name, value = _matrix(element.data)
                if name == variable and isinstance(value, list):
                    return value
    except (struct.error, zlib.error, IndexError, KeyError) as error:
        raise ValueError(f"not a MATLAB 5 file ({error})") from None
    raise ValueError(f"no struct {variable!r} in this MATLAB file")


def _elements(data: bytes) -> list[Element]:
    elements, start = [], 0
    while start + 8 <= len(data):
        kind, size = struct.unpack_from("<II", data, start)
        if kind >> 16:  # small element: size and type share four bytes, the data are the next four
            elements.append(Element(kind & 0xFFFF, data[start + 4 : start + 4 + (kind >> 16)]))
            start += 8
        else:
            elements.append(Element(kind, data[start + 8 : start + 8 + size]))
            start += 8 + size + (-size % 8 if kind != COMPRESSED else 0)
    return elements


def _matrix(data: bytes) -> tuple[str, Value]:
    if not data:
        return "", None
    parts = _elements(data)
    array_class = _numbers(parts[0])[0] & 0xFF
    name = parts[2].data.decode("latin-1")
    if array_class == STRUCT_CLASS:
        return name, _struct(parts)
    if array_class == CHAR_CLASS:
        return name, parts[3].data.decode("utf-16-le" if parts[3].kind in (4, 17) else "utf-8")
    if array_class == CELL_CLASS or len(parts) < 4:
        return name, None
    return name, _numbers(parts[3])


def _struct(parts: list[Element]) -> list[dict[str, Value]]:
    width = int(_numbers(parts[3])[0])
    block = parts[4].data
    fields = [block[i : i + width].split(b"\0")[0].decode("latin-1") for i in range(0, len(block), width)]
    values = [_matrix(part.data)[1] for part in parts[5:]]
    return [dict(zip(fields, values[i : i + len(fields)], strict=True)) for i in range(0, len(values), len(fields))]


def _numbers(element: Element) -> np.ndarray:
    return np.frombuffer(element.data, f"<{NUMBERS[element.kind]}")
