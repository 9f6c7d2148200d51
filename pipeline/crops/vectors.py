"""Vectorised integer loops that the compiler does not find by itself: weighted sums, transposes, colours.

They are written as LLVM vector instructions of a fixed length, which LLVM lowers to what the processor has. Only integers are
used, so every processor gives the same bytes.
"""

from collections.abc import Callable, Iterable
from typing import Any

from llvmlite import ir
from numba import njit
from numba.core import cgutils, types
from numba.extending import intrinsic

BLOCK = 16  # the length of a vector; rows and columns of a transposed block
LANES = 3 * BLOCK  # outputs of one `weigh`: a column of BLOCK pixels with three channels, or a piece of a row
# Fraction bits. A weight below 1 fills an int16; a grey level of 8 bits with 7 of fraction does too, between two passes.
WEIGHT_BITS, SHORT_BITS = 15, 7
SHORT, WORD = ir.IntType(16), ir.IntType(32)

# A check for division by zero would keep loops from being vectorised. Only `cpu_operator` caches machine code on disk.
compiled = njit(nogil=True, error_model="numpy")


def weighing(exact: bool) -> Callable:
    """Build `weigh(out, at, source, first, step, weights, offset, taps)`, a weighted sum of vectors. For i in 0..LANES,

    `out[at + i]` = the sum over k in 0..taps of `source[first + k * step + i] * weights[offset + k]`.

    One of `source` and `out` holds bytes, the other int16 with SHORT_BITS more. `weights` are non-negative int16 in units of
    2 ** -WEIGHT_BITS, with a sum of at most 1. `exact`: sums in 32 bits, rounded once. Otherwise in 16 bits, which is faster:
    each product is rounded down to 1 / 256, half of which is added back, so the sum is right to taps / 512 of a grey level.
    """

    @intrinsic
    def weigh(
        _: Any, out: Any, at: Any, source: Any, first: Any, step: Any, weights: Any, offset: Any, taps: Any
    ) -> tuple[Any, Callable]:
        of_bytes = source.dtype.bitwidth == 8
        shift = WEIGHT_BITS + (-SHORT_BITS if of_bytes else SHORT_BITS)
        if not exact:
            shift = 8 - SHORT_BITS if of_bytes else 8

        def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
            out_at, source_at, weights_at = (_pointer(context, builder, signature, args, i) for i in (0, 2, 5))
            _, at, _, first, step, _, offset, taps = args
            kind = WORD if exact else SHORT
            half = kind(1 << shift - 1)
            if not exact:
                half = builder.add(half, builder.trunc(builder.lshr(taps, taps.type(1)), SHORT))
            sums = [_variable(builder, _splat(builder, half)) for _ in range(0, LANES, BLOCK)]
            with cgutils.for_range(builder, taps) as loop:
                weight = builder.load(builder.gep(weights_at, [builder.add(offset, loop.index)]))
                weight = _splat(builder, _scaled_weight(builder, weight, exact))
                here = builder.add(first, builder.mul(loop.index, step))
                for j, total in enumerate(sums):
                    values = _load(builder, source_at, builder.add(here, here.type(BLOCK * j)), BLOCK)
                    product = _product(builder, values, weight, of_bytes, exact)
                    builder.store(builder.add(builder.load(total), product), total)
            for j, total in enumerate(sums):
                result = builder.lshr(builder.load(total), _constant(shift, kind))
                _store(builder, result, out_at, builder.add(at, at.type(BLOCK * j)))
            return context.get_dummy_value()

        index = types.intp
        return types.void(out, index, source, index, index, weights, index, index), generate

    return weigh


def _scaled_weight(builder: ir.IRBuilder, weight: ir.Value, exact: bool) -> ir.Value:
    if exact:  # clearing the sign bit lets LLVM use the instruction that multiplies int16 and adds pairs
        return builder.and_(builder.zext(weight, WORD), WORD((1 << WEIGHT_BITS) - 1))
    return builder.shl(weight, SHORT(1))


def _product(builder: ir.IRBuilder, values: ir.Value, weight: ir.Value, of_bytes: bool, exact: bool) -> ir.Value:
    if values.type != weight.type:
        values = (builder.zext if of_bytes else builder.sext)(values, weight.type)
    if exact:
        return builder.mul(values, weight)
    values = builder.shl(values, _constant(8 if of_bytes else 8 - SHORT_BITS, SHORT))
    return _high_half(builder, builder.zext, values, weight)


weigh, weigh_fast = weighing(exact=True), weighing(exact=False)


@intrinsic
def transpose(_: Any, out: Any, at: Any, out_step: Any, source: Any, first: Any, step: Any) -> tuple[Any, Callable]:
    """Set `out[at + i * out_step + j] = source[first + j * step + i]` for j in 0..BLOCK, and i in 0..16 (bytes) or 0..8 (uint16).

    Pairs of 16-byte registers are interleaved until each holds the values of one column.
    """
    count = 128 // source.dtype.bitwidth  # values in 16 bytes
    halves = BLOCK // count

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        out_at, source_at = (_pointer(context, builder, signature, args, i) for i in (0, 3))
        _, at, out_step, _, first, step = args
        rows = [_load(builder, source_at, _offset(builder, first, step, j), count) for j in range(BLOCK)]
        if halves == 2:
            rows = [_shuffle(builder, rows[j], rows[j + count], range(BLOCK)) for j in range(count)]
        starts = [half * count + i for half in range(halves) for i in range(count // 2)]
        low = [lane for i in starts for lane in (i, i + BLOCK)]
        high = [lane + count // 2 for lane in low]
        for _ in range(count.bit_length() - 1):
            pairs = zip(rows[: count // 2], rows[count // 2 :], strict=True)
            rows = [_shuffle(builder, a, b, order) for a, b in pairs for order in (low, high)]
        for i, row in enumerate(rows):
            _store(builder, row, out_at, _offset(builder, at, out_step, i))
        return context.get_dummy_value()

    index = types.intp
    return types.void(out, index, index, source, index, index), generate


@intrinsic
def brighten(_: Any, line: Any, first: Any, blocks: Any, factor: Any, bits: Any) -> tuple[Any, Callable]:
    """Multiply `blocks * BLOCK` bytes of `line` by `factor / 2 ** (8 + bits)` in place, clamp to 255, and return their sum.

    `factor` fits 16 bits. At most 256 blocks, or the sums, of 16 bits for each lane, would overflow.
    """

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        pointer = _pointer(context, builder, signature, args, 0)
        _, first, blocks, factor, bits = args
        total = _variable(builder, _constant(0, SHORT))
        factor, bits = (_splat(builder, builder.trunc(value, SHORT)) for value in (factor, bits))
        half = builder.lshr(builder.shl(_constant(1, SHORT), bits), _constant(1, SHORT))
        with cgutils.for_range(builder, blocks) as loop:
            offset = _offset(builder, first, loop.index, BLOCK)
            value = builder.lshr(builder.add(_scaled_bytes(builder, pointer, offset, factor), half), bits)
            value = _min(builder, value, _constant(255, SHORT))
            _store(builder, value, pointer, offset)
            builder.store(builder.add(builder.load(total), value), total)
        values = builder.zext(builder.load(total), ir.VectorType(WORD, BLOCK))
        result = WORD(0)
        for i in range(BLOCK):
            result = builder.add(result, builder.extract_element(values, WORD(i)))
        return builder.zext(result, ir.IntType(64))

    return types.int64(line, *[types.intp] * 4), generate


# Indices into the `numbers` of `mix`.
FACTOR, SHIFT, TOP, RAISE, ROUNDING, LOWER, MATRIX = range(7)


@intrinsic
def mix(_: Any, flat: Any, first: Any, plane: Any, blocks: Any, numbers: Any) -> tuple[Any, Callable]:
    """Apply contrast, then a matrix over the channels, to `blocks * BLOCK` pixels of `flat` in place, planes `plane` bytes apart.

    `numbers` are int16. A byte p becomes x = p * FACTOR >> 8, plus SHIFT, clamped to 0..TOP and shifted left by RAISE. A channel
    becomes the sum over its row of MATRIX of x * weight >> 16, plus ROUNDING, shifted right by LOWER and clamped to 0..255.
    """

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        pointer, numbers_at = (_pointer(context, builder, signature, args, i) for i in (0, 4))
        _, first, plane, blocks, _ = args

        def number(i: int) -> ir.Value:
            return _splat(builder, builder.load(builder.gep(numbers_at, [ir.IntType(64)(i)])))

        factor, shift, top, up, rounding, down = (number(i) for i in range(MATRIX))
        matrix = [[number(MATRIX + 3 * i + j) for j in range(3)] for i in range(3)]
        zero = _constant(0, SHORT)
        with cgutils.for_range(builder, blocks) as loop:
            offset = _offset(builder, first, loop.index, BLOCK)
            offsets = [_offset(builder, offset, plane, c) for c in range(3)]
            channels = []
            for here in offsets:
                value = builder.add(_scaled_bytes(builder, pointer, here, factor), shift)
                value = _min(builder, _max(builder, value, zero), top)
                channels.append(builder.shl(value, up))
            for here, row in zip(offsets, matrix, strict=True):
                value = rounding
                for channel, weight in zip(channels, row, strict=True):
                    value = builder.add(value, _high_half(builder, builder.sext, channel, weight))
                value = _max(builder, builder.ashr(value, down), zero)
                _store(builder, _min(builder, value, _constant(255, SHORT)), pointer, here)
        return context.get_dummy_value()

    return types.void(flat, types.intp, types.intp, types.intp, numbers), generate


def _pointer(context: Any, builder: ir.IRBuilder, signature: Any, args: Any, i: int) -> ir.Value:
    return context.make_array(signature.args[i])(context, builder, args[i]).data


def _offset(builder: ir.IRBuilder, first: ir.Value, step: ir.Value, count: int) -> ir.Value:
    return builder.add(first, builder.mul(step, step.type(count)))


def _scaled_bytes(builder: ir.IRBuilder, pointer: ir.Value, offset: ir.Value, factor: ir.Value) -> ir.Value:
    """`bytes * factor >> 8`, int16."""
    values = builder.zext(_load(builder, pointer, offset, BLOCK), factor.type)
    return _high_half(builder, builder.zext, builder.shl(values, _constant(8, SHORT)), factor)


def _constant(value: int, kind: ir.IntType) -> ir.Constant:
    return ir.Constant(ir.VectorType(kind, BLOCK), [value] * BLOCK)


def _variable(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    variable = cgutils.alloca_once(builder, value.type)
    builder.store(value, variable)
    return variable


def _load(builder: ir.IRBuilder, pointer: ir.Value, offset: ir.Value, count: int) -> ir.Value:
    vector = ir.VectorType(pointer.type.pointee, count)
    return builder.load(builder.bitcast(builder.gep(pointer, [offset]), vector.as_pointer()), align=1)


def _store(builder: ir.IRBuilder, values: ir.Value, pointer: ir.Value, offset: ir.Value) -> None:
    """Store a vector of BLOCK values, dropping the high bits that do not fit."""
    vector = ir.VectorType(pointer.type.pointee, BLOCK)
    if values.type != vector:
        values = builder.trunc(values, vector)
    builder.store(values, builder.bitcast(builder.gep(pointer, [offset]), vector.as_pointer()), align=1)


def _splat(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    one = builder.insert_element(ir.Constant(ir.VectorType(value.type, BLOCK), ir.Undefined), value, WORD(0))
    return _shuffle(builder, one, one, [0] * BLOCK)


def _shuffle(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, order: Iterable[int]) -> ir.Value:
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(WORD, BLOCK), list(order)))


def _high_half(builder: ir.IRBuilder, extend: Callable, a: ir.Value, b: ir.Value) -> ir.Value:
    """`a * b >> 16` of int16, one instruction on most processors."""
    wide = ir.VectorType(WORD, BLOCK)
    product = builder.mul(extend(a, wide), extend(b, wide))
    return builder.trunc(builder.lshr(product, _constant(16, WORD)), a.type)


def _min(builder: ir.IRBuilder, a: ir.Value, b: ir.Value) -> ir.Value:
    return builder.select(builder.icmp_signed("<", a, b), a, b)


def _max(builder: ir.IRBuilder, a: ir.Value, b: ir.Value) -> ir.Value:
    return builder.select(builder.icmp_signed(">", a, b), a, b)
