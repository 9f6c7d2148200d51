"""Vectorised integer loops that the compiler does not find by itself: weighted sums, transposes, colours.

They are written as LLVM vector instructions of a fixed length, which LLVM lowers to what the processor has. Only integers are
used, so every processor gives the same bytes.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator
from functools import partialmethod
from typing import Any

from llvmlite import ir
from numba import njit
from numba.core import cgutils, types
from numba.extending import intrinsic

BLOCK = 16  # the length of a vector; rows and columns of a transposed block
LANES = 3 * BLOCK  # outputs of one `weigh`: a column of BLOCK pixels with three channels, or a piece of a row
# Fraction bits. A weight below 1 fills an int16; a grey level of 8 bits with 7 of fraction does too, between two passes.
WEIGHT_BITS, SHORT_BITS = 15, 7
BYTE, SHORT, WORD, LONG = (ir.IntType(bits) for bits in (8, 16, 32, 64))

# A check for division by zero would keep loops from being vectorised. Only `cpu_operator` caches machine code on disk.
compiled = njit(nogil=True, error_model="numpy")


class Value:
    """An LLVM integer, vector of integers or pointer, with Python's operators; an int operand is a constant of the same type."""

    def __init__(self, builder: ir.IRBuilder, raw: ir.Value) -> None:
        self.builder, self.raw = builder, raw

    def apply(self, instruction: str, other: "Value | int", *options: str) -> "Value":
        other = self.constant(other) if isinstance(other, int) else other
        return Value(self.builder, getattr(self.builder, instruction)(*options, self.raw, other.raw))

    __add__ = partialmethod(apply, "add")
    __mul__ = partialmethod(apply, "mul")
    __and__ = partialmethod(apply, "and_")
    __lshift__ = partialmethod(apply, "shl")
    __rshift__ = partialmethod(apply, "lshr")

    def constant(self, value: int) -> "Value":
        kind = self.raw.type
        return Value(self.builder, ir.Constant(kind, [value] * kind.count if isinstance(kind, ir.VectorType) else value))

    def bound(self, comparison: str, limit: "Value | int") -> "Value":
        """Return this where `this < limit` or `this > limit` holds, and `limit` elsewhere."""
        limit = self.constant(limit) if isinstance(limit, int) else limit
        holds = self.builder.icmp_signed(comparison, self.raw, limit.raw)
        return Value(self.builder, self.builder.select(holds, self.raw, limit.raw))

    def cast(self, kind: ir.IntType, signed: bool = False) -> "Value":
        """Truncate or extend to integers of another type."""
        old = self.raw.type
        new = ir.VectorType(kind, old.count) if isinstance(old, ir.VectorType) else kind
        wider = kind.width > getattr(old, "element", old).width
        instruction = ("sext" if signed else "zext") if wider else "trunc"
        return Value(self.builder, getattr(self.builder, instruction)(self.raw, new))

    def high_half(self, other: "Value", signed: bool = False) -> "Value":
        """`self * other >> 16` of vectors of int16, one instruction on most processors."""
        return (self.cast(WORD, signed) * other.cast(WORD, signed) >> 16).cast(SHORT)

    def shuffle(self, other: "Value", order: Iterable[int]) -> "Value":
        lanes = ir.Constant(ir.VectorType(WORD, BLOCK), list(order))
        return Value(self.builder, self.builder.shuffle_vector(self.raw, other.raw, lanes))

    def splat(self) -> "Value":
        """Return a vector of BLOCK copies."""
        empty = ir.Constant(ir.VectorType(self.raw.type, BLOCK), ir.Undefined)
        one = Value(self.builder, self.builder.insert_element(empty, self.raw, WORD(0)))
        return one.shuffle(one, [0] * BLOCK)

    def load(self, offset: "Value | None" = None, count: int = BLOCK) -> "Value":
        """Load a vector, `offset` elements after this pointer. `count=1`: a number."""
        return Value(self.builder, self.builder.load(self._vector(offset, count), align=1))

    def store(self, values: "Value", offset: "Value | None" = None) -> None:
        """Store a vector there, dropping the high bits that do not fit."""
        self.builder.store(values.cast(self.raw.type.pointee).raw, self._vector(offset, BLOCK), align=1)

    def _vector(self, offset: "Value | None", count: int) -> ir.Value:
        first = self.raw if offset is None else self.builder.gep(self.raw, [offset.raw])
        kind = self.raw.type.pointee if count == 1 else ir.VectorType(self.raw.type.pointee, count)
        return self.builder.bitcast(first, kind.as_pointer())


def variable(start: Value) -> Value:
    """Return a pointer to a new variable, which loops can change, for a vector like `start`."""
    pointer = cgutils.alloca_once_value(start.builder, start.raw)
    return Value(start.builder, start.builder.bitcast(pointer, start.raw.type.element.as_pointer()))


def each(count: Value) -> Iterator[Value]:
    """`for i in each(count)` emits a loop over 0..count; Python runs its body once."""
    with cgutils.for_range(count.builder, count.raw) as loop:
        yield Value(count.builder, loop.index)


def vectorised(emit: Callable) -> Callable:
    """Make a function of compiled code from `emit`, which writes its instructions.

    `emit` gets a pointer for each array and an int64 for each number. It returns an int64, or None for 0.
    """

    def typing(_: Any, *kinds: Any) -> tuple[Any, Callable]:
        def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
            is_array = [isinstance(kind, types.Array) for kind in kinds]
            raw = [
                context.make_array(kind)(context, builder, value).data if array else value
                for array, kind, value in zip(is_array, signature.args, args, strict=True)
            ]
            result = emit(*(Value(builder, value) for value in raw))
            return LONG(0) if result is None else result.raw

        return types.int64(*[kind if isinstance(kind, types.Array) else types.intp for kind in kinds]), generate

    # Numba reads the signature to pass the arguments on, and cannot pass a variable number of them.
    context = inspect.Parameter("_", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(emit).parameters.values()
    typing.__signature__ = inspect.Signature([context, *parameters])  # type: ignore[attr-defined]
    return intrinsic(typing)


def weighing(exact: bool) -> Callable:
    """Build `weigh(out, at, source, first, step, weights, offset, taps)`, a weighted sum of vectors. For i in 0..LANES,

    `out[at + i]` = the sum over k in 0..taps of `source[first + k * step + i] * weights[offset + k]`.

    One of `source` and `out` holds bytes, the other int16 with SHORT_BITS more. `weights` are non-negative int16 in units of
    2 ** -WEIGHT_BITS, with a sum of at most 1. `exact`: sums in 32 bits, rounded once. Otherwise in 16 bits, which is faster:
    each product is rounded down to 1 / 256, half of which is added back, so the sum is right to taps / 512 of a grey level.
    """

    @vectorised
    def weigh(
        out: Value, at: Value, source: Value, first: Value, step: Value, weights: Value, offset: Value, taps: Value
    ) -> None:
        source_bits = 0 if source.raw.type.pointee == BYTE else SHORT_BITS
        shift = (WEIGHT_BITS + source_bits if exact else 8) - (SHORT_BITS - source_bits)
        half = taps.constant(1 << shift - 1) if exact else (taps >> 1) + (1 << shift - 1)
        sums = [variable(half.cast(WORD if exact else SHORT).splat()) for _ in range(0, LANES, BLOCK)]
        for k in each(taps):
            weight = weights.load(offset + k, 1)
            # Clearing the sign bit lets LLVM use the instruction that multiplies int16 and adds pairs.
            weight = (weight.cast(WORD) & (1 << WEIGHT_BITS) - 1 if exact else weight << 1).splat()
            for j, total in enumerate(sums):
                values = source.load(first + k * step + BLOCK * j)
                if exact:
                    product = values.cast(WORD, signed=source_bits > 0) * weight
                else:
                    product = (values.cast(SHORT) << 8 - source_bits).high_half(weight)
                total.store(total.load() + product)
        for j, total in enumerate(sums):
            out.store(total.load() >> shift, at + BLOCK * j)

    return weigh


weigh, weigh_fast = weighing(exact=True), weighing(exact=False)


@vectorised
def transpose(out: Value, at: Value, out_step: Value, source: Value, first: Value, step: Value) -> None:
    """Set `out[at + i * out_step + j] = source[first + j * step + i]` for j in 0..BLOCK, and i in 0..16 (bytes) or 0..8 (uint16).

    Pairs of 16-byte registers are interleaved until each holds the values of one column.
    """
    count = 128 // source.raw.type.pointee.width  # values in 16 bytes
    halves = BLOCK // count
    rows = [source.load(first + step * j, count) for j in range(BLOCK)]
    if halves == 2:
        rows = [rows[j].shuffle(rows[j + count], range(BLOCK)) for j in range(count)]
    starts = [half * count + i for half in range(halves) for i in range(count // 2)]
    low = [lane for i in starts for lane in (i, i + BLOCK)]
    high = [lane + count // 2 for lane in low]
    for _ in range(count.bit_length() - 1):
        pairs = zip(rows[: count // 2], rows[count // 2 :], strict=True)
        rows = [a.shuffle(b, order) for a, b in pairs for order in (low, high)]
    for i, row in enumerate(rows):
        out.store(row, at + out_step * i)


@vectorised
def brighten(pixels: Value, first: Value, blocks: Value, factor: Value, bits: Value) -> Value:
    """Multiply `blocks * BLOCK` bytes of `pixels` by `factor / 2 ** (8 + bits)` in place, clamp to 255, and return their sum.

    `factor` fits 16 bits. At most 256 blocks, or the sums, of 16 bits for each lane, would overflow.
    """
    factor, bits = factor.cast(SHORT).splat(), bits.cast(SHORT).splat()
    half = bits.constant(1) << bits >> 1
    total = variable(bits.constant(0))
    for k in each(blocks):
        offset = first + k * BLOCK
        value = (scaled_bytes(pixels, offset, factor) + half >> bits).bound("<", 255)
        pixels.store(value, offset)
        total.store(total.load() + value)
    lanes, result = total.load().cast(LONG), first.constant(0)
    for i in range(BLOCK):
        result += Value(lanes.builder, lanes.builder.extract_element(lanes.raw, WORD(i)))
    return result


@vectorised
def mix(
    flat: Value, first: Value, plane: Value, blocks: Value,
    factor: Value, shift: Value, top: Value, up: Value, matrix: Value, rounding: Value, down: Value,
) -> None:  # fmt: skip
    """Apply contrast, then a matrix over the channels, to `blocks * BLOCK` pixels of `flat` in place, planes `plane` bytes apart.

    All numbers fit int16. A byte p becomes x = p * factor >> 8, plus `shift`, clamped to 0..top and shifted left by `up`. A
    channel becomes the sum over its row of `matrix`, `[9] int16`, of x * weight >> 16, plus `rounding`, shifted right by `down`
    and clamped to 0..255.
    """
    numbers = (factor, shift, top, up, rounding, down)
    factor, shift, top, up, rounding, down = (number.cast(SHORT).splat() for number in numbers)
    weights = [matrix.load(first.constant(i), 1).splat() for i in range(9)]
    for k in each(blocks):
        offsets = [first + k * BLOCK + plane * c for c in range(3)]
        shifted = [scaled_bytes(flat, offset, factor) + shift for offset in offsets]
        channels = [value.bound(">", 0).bound("<", top) << up for value in shifted]
        for i, offset in enumerate(offsets):
            value = rounding
            for channel, weight in zip(channels, weights[3 * i : 3 * i + 3], strict=True):
                value += channel.high_half(weight, signed=True)
            flat.store(value.apply("ashr", down).bound(">", 0).bound("<", 255), offset)


def scaled_bytes(pixels: Value, offset: Value, factor: Value) -> Value:
    """Return `bytes * factor >> 8` of a block of `pixels`, int16."""
    return (pixels.load(offset).cast(SHORT) << 8).high_half(factor)
