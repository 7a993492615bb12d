"""Products of Q4_0 weights in integers, for CPUs with AVX2 and without VNNI.

OpenVINO multiplies 8-bit activations by 4-bit weights where the CPU has VNNI; elsewhere it turns all weights into f32
in each step and multiplies these. Here activations are rounded to 8 bits in groups as long as a block of weights, as
there, and multiplied by VPMADDUBSW, which adds the products of two neighbours in 16 bits.

Weights lie in tiles (`layout.py`), which a product reads once, from front to back.

A nibble is its weight plus 8. The 32 products of a block that are added in one 16-bit lane need more than 16 bits with
nibbles, but not with weights: at most 32 * 8 * 127. So a sum starts at minus 8 times that of the activations, and wraps
around as often as it likes: its last value is the right one.
"""

from __future__ import annotations

from itertools import chain
from typing import Any

from llvmlite import ir

from cluster.artifacts.ggml import BLOCK_WEIGHTS
from deployments.engines.products.jit import F16, F32, I8, I16, I32, VOID, Code, constant, i64, vector
from deployments.engines.products.layout import LANES, QUADS, SCALES, TILE_BYTES, TILE_ROWS

# Rows of activations that a tile of weights is multiplied with at once: two sums each, in 16 registers.
STRIPE = 4
AHEAD = 8 * TILE_BYTES  # of the weights that are multiplied with, others are fetched into the cache

FLOATS, INTEGERS, SHORTS, BYTES = vector(F32, LANES), vector(I32, LANES), vector(I16, 16), vector(I8, 32)


def emit_quantize(module: Any) -> Any:
    """quantize(activations, values, scales, starts, blocks, begin, end): of rows begin to end, each of so many blocks,
    the f32 `activations` as i8 `values` times f32 `scales`, one a block; `starts` are where the sums of products begin,
    two i16 a block. A block that is not finite has a scale that is not a number."""
    b = Code(module, "quantize", 4, 3)
    activations, values, scales, starts, blocks, begin, end = b.arguments
    with b.loop(b.mul(begin, blocks), b.mul(end, blocks)) as block:
        source, target = b.offset(activations, block, 4 * BLOCK_WEIGHTS), b.offset(values, block, BLOCK_WEIGHTS)
        parts = [b.read(b.offset(source, 4 * start), FLOATS, 4) for start in range(0, BLOCK_WEIGHTS, LANES)]
        largest = nothing = constant(FLOATS, 0.0)  # nothing: 0, or not a number where a part is not finite
        for part in parts:
            magnitude = b.intrinsic("llvm.fabs.v8f32", FLOATS, part)
            largest = b.intrinsic("llvm.maxnum.v8f32", FLOATS, largest, magnitude)
            nothing = b.fadd(nothing, b.fmul(part, constant(FLOATS, 0.0)))
        most = b.intrinsic("llvm.vector.reduce.fmax.v8f32", F32, largest)
        spoilt = b.intrinsic("llvm.vector.reduce.fadd.v8f32", F32, constant(F32, -0.0), nothing)
        b.write(b.fadd(b.fdiv(most, constant(F32, 127.0)), spoilt), b.offset(scales, block, 4), 4)
        is_zero = b.fcmp_ordered("==", most, constant(F32, 0.0))
        inverse = b.select(is_zero, constant(F32, 0.0), b.fdiv(constant(F32, 127.0), most))
        factor, total = b.spread(inverse, LANES), constant(INTEGERS, 0)
        for index, part in enumerate(parts):
            rounded = b.intrinsic("llvm.x86.avx.cvt.ps2dq.256", INTEGERS, b.fmul(part, factor))
            total = b.add(total, rounded)
            b.write(b.trunc(rounded, vector(I8, LANES)), b.offset(target, LANES * index), 8)
        first, second = (_sum(b, [b.lane(total, lane) for lane in lanes]) for lanes in ((0, 1, 4, 5), (2, 3, 6, 7)))
        first, second = (b.mul(number, constant(I32, -8)) for number in (first, second))
        both = b.or_(b.and_(first, constant(I32, 0xFFFF)), b.shl(second, constant(I32, 16)))
        b.write(both, b.offset(starts, block, 4), 4)
    b.ret_void()
    return b.function


def emit_product(module: Any) -> Any:
    """product(weights, values, scales, starts, result, blocks, rows, width, begin, end): of the tiles of rows of
    weights from begin to end, their columns of result [rows, width], f32."""
    stripes = {count: _emit_stripe(module, count) for count in range(1, STRIPE + 1)}
    b = Code(module, "product", 5, 5)
    weights, values, scales, starts, result, blocks, rows, width, begin, end = b.arguments
    beyond = b.alloca(ir.ArrayType(F32, STRIPE * TILE_ROWS))  # where a tile of fewer rows goes first
    spare = b.bitcast(beyond, values.type)
    whole = b.mul(b.sdiv(rows, i64(STRIPE)), i64(STRIPE))
    with b.loop(begin, end) as tile:
        tile_weights, column = b.offset(weights, tile, blocks, TILE_BYTES), b.mul(tile, i64(TILE_ROWS))
        left = b.sub(width, column)
        fits = b.icmp_signed(">=", left, i64(TILE_ROWS))
        stride = b.select(fits, width, i64(TILE_ROWS))

        def stripe(count: int, row: Any) -> None:
            place = b.offset(result, b.add(b.mul(row, width), column), 4)
            target = b.select(fits, place, spare)
            of_row = [b.offset(base, row, blocks, size) for base, size in ((values, 64), (scales, 4), (starts, 4))]
            b.call(stripes[count], [tile_weights, *of_row, target, blocks, stride])
            with b.if_then(b.not_(fits)):
                for index in range(count):
                    with b.loop(i64(0), left) as lane:
                        number = b.read(b.offset(spare, b.add(lane, i64(index * TILE_ROWS)), 4), F32, 4)
                        b.write(number, b.offset(place, b.add(b.mul(width, i64(index)), lane), 4), 4)

        with b.loop(i64(0), whole, STRIPE) as row:
            stripe(STRIPE, row)
        done = b.append_basic_block("done")
        remaining = b.switch(b.sub(rows, whole), done)
        for count in range(1, STRIPE):
            remaining.add_case(i64(count), block := b.append_basic_block("rest"))
            b.position_at_end(block)
            stripe(count, whole)
            b.branch(done)
        b.position_at_end(done)
    b.ret_void()
    return b.function


def _emit_stripe(module: Any, count: int) -> Any:
    """stripe(weights, values, scales, starts, result, blocks, stride): `count` rows of activations by one tile's rows
    of weights, all columns; the result's rows are `stride` numbers apart."""
    b = Code(module, f"stripe{count}", 5, 2, inline=False)
    weights, values, scales, starts, result, blocks, stride = b.arguments
    ones, nibble, four = constant(SHORTS, 1), constant(BYTES, 15), constant(SHORTS, 4)
    results = [[b.alloca(FLOATS) for _ in range(2)] for _ in range(count)]
    for place in chain.from_iterable(results):
        place.align = 32
        b.store(constant(FLOATS, 0.0), place, align=32)
    rows = [
        [b.offset(base, blocks, n * size) for base, size in ((values, 64), (scales, 4), (starts, 4))]
        for n in range(count)
    ]
    with b.loop(i64(0), blocks) as block:
        tile = b.offset(weights, block, TILE_BYTES)
        for line in range(AHEAD, AHEAD + TILE_BYTES, 64):
            to_read, to_all_caches, data = (constant(I32, number) for number in (0, 3, 1))
            b.intrinsic("llvm.prefetch.p0", VOID, b.offset(tile, line), to_read, to_all_caches, data)
        sums = []
        for _, _, starts_of_row in rows:
            start = b.read(b.offset(starts_of_row, block, 4), I32, 4)
            sums.append([b.bitcast(b.spread(start, LANES), SHORTS)] * 2)
        quads = [b.offset(values_of_row, block, BLOCK_WEIGHTS) for values_of_row, _, _ in rows]
        for quad in range(QUADS):
            pairs = b.read(b.offset(tile, 32 * quad), BYTES, 32)
            high = b.bitcast(b.lshr(b.bitcast(pairs, SHORTS), four), BYTES)
            halves = [b.and_(pairs, nibble), b.and_(high, nibble)]
            for row in range(count):
                four_values = b.read(b.offset(quads[row], 4 * quad), I32, 4)
                spread = b.bitcast(b.spread(four_values, LANES), BYTES)
                for half in range(2):
                    products = b.intrinsic("llvm.x86.avx2.pmadd.ub.sw", SHORTS, halves[half], spread)
                    sums[row][half] = _add_in_order(b, sums[row][half], products)
        tile_scales = [
            b.fpext(b.read(b.offset(tile, SCALES + 2 * LANES * half), vector(F16, LANES), 16), FLOATS)
            for half in range(2)
        ]
        for row, (_, scales_of_row, _) in enumerate(rows):
            scale = b.spread(b.read(b.offset(scales_of_row, block, 4), F32, 4), LANES)
            for half in range(2):
                whole = b.intrinsic("llvm.x86.avx2.pmadd.wd", INTEGERS, sums[row][half], ones)
                place = results[row][half]
                factors = b.sitofp(whole, FLOATS), b.fmul(tile_scales[half], scale)
                b.store(b.intrinsic("llvm.fma.v8f32", FLOATS, *factors, b.load(place, align=32)), place, align=32)
    for row in range(count):
        for half in range(2):
            target = b.offset(result, b.add(b.mul(stride, i64(row)), i64(LANES * half)), 4)
            b.write(b.load(results[row][half], align=32), target, 4)
    b.ret_void()
    return b.function


def _add_in_order(b: Code, total: Any, products: Any) -> Any:
    """VPADDW as it stands here: LLVM would add products in pairs first, in more registers than there are."""
    kind = ir.FunctionType(SHORTS, [SHORTS, SHORTS])
    return b.asm(kind, "vpaddw $2, $1, $0", "=x,x,x", [total, products], side_effect=False)


def _sum(b: Code, numbers: list[Any]) -> Any:
    total, *rest = numbers
    for number in rest:
        total = b.add(total, number)
    return total
