"""Warp kernels that blend a tile of pixels front to back, and the gradients of what they blend.

On CPU a thread owns a tile: 16 blocks of 8x2 pixels, a block being one SIMD register. It walks the tile's list once,
and sums in registers what a Gaussian receives from the tile's 256 pixels, to write it once, to a row of its own: no
atomics, and the same bits on any number of threads. On CUDA a thread owns a pixel, and a warp adds its sum atomically.

The gradient walks front to back like the picture. With v = dL/dw of a pixel's weight w = alpha T, where T is the
transmittance in front, dL/dalpha = T v - rest / (1 - alpha). Here ``rest``, the sum of w v over what lies behind, is
what is left of the pixel's total: rgb . dL/drgb and the like, known from the picture.
"""

import types
import typing
from functools import lru_cache

import warp as wp

from lightning_modules.functional.kernels.projection import Projected

wp.set_module_options({"enable_backward": False})

# Lets the processor multiply and add at once; not where alphas and pictures are made: they are to equal blending.py's.
_FUSED = """
#ifdef __clang__
#pragma clang fp contract(fast)
#endif
"""
# What a Gaussian receives: dL/dcolour (3), dL/ddepth, and the sums of dL/dpower times 1, u, v, u u, u v, v v, where
# (u, v) is the conic times the offset from the pixel to the centre.
# A row of 16 floats is one line of the cache.
NUM_SUMS = 16

# A lone lane is a plain float; sixteen are one register.
_LANES = """
#if LANES == 1
    typedef float V;
    typedef int I;
    const auto to_int = [](V v) { return (I)v; };
    const auto to_float = [](I v) { return (V)v; };
    const auto bits = [](bool v) { return v ? 1u : 0u; };
    const auto at = [](V& v, int i) -> float& { return v; };
#else
    typedef float V __attribute__((vector_size(4 * LANES)));
    typedef int I __attribute__((vector_size(4 * LANES)));
    typedef bool B __attribute__((ext_vector_type(LANES)));
    const auto to_int = [](V v) { return __builtin_convertvector(v, I); };
    const auto to_float = [](I v) { return __builtin_convertvector(v, V); };
    const auto bits = [](I v) {
        union { B flags; unsigned short mask; } packed;
        packed.flags = __builtin_convertvector(v, B);
        return (unsigned)packed.mask;
    };
    const auto at = [](V& v, int i) -> float& { return reinterpret_cast<float*>(&v)[i]; };
#endif
    V column, line, block_x, block_y;
    for (int i = 0; i < LANES; ++i) {
        at(column, i) = (float)(i % WIDE);
        at(line, i) = (float)(i / WIDE);
        at(block_x, i) = (float)(i / (16 / TALL) * WIDE);
        at(block_y, i) = (float)(i % (16 / TALL) * TALL);
    }
    const V zero = column * 0.0f, one = zero + 1.0f, top = zero + 0.99f, least_power = zero - 16.0f;
    // As in blending.py, operation by operation, so that both skip the same Gaussians.
    const auto alpha_at = [&](const auto& g, V dx, V dy) {
        const V slope = -g[3] * dy, rest = -0.5f * g[4] * dy * dy;
        const V power = (-0.5f * g[2] * dx + slope) * dx + rest;
        const V t = 1.44269504f * (power > least_power ? power : least_power);
        const I n = to_int(t - 0.5f);
        const V f = t - to_float(n);
        V e = zero + 1.52527338e-5f;
        e = e * f + 1.54035304e-4f;
        e = e * f + 1.33335581e-3f;
        e = e * f + 9.61812911e-3f;
        e = e * f + 5.55041087e-2f;
        e = e * f + 2.40226507e-1f;
        e = e * f + 6.93147181e-1f;
        e = e * f + 1.0f;
        union { I exponent; V value; } two_n;
        two_n.exponent = (n + 127) << 23;
        const V raw = g[5] * (e * two_n.value);
        const V alpha = raw < top ? raw : top;
        return ((power <= zero) & (alpha >= 1.0f / 255.0f)) ? alpha : zero;
    };
    const int tiles_x = (width + 15) / 16, parts = 256 / (LANES * LANES);
    const int tile = thread / parts, part = thread % parts;
    const int left = tile % tiles_x * 16 + part % 16, above = tile / tiles_x * 16 + part / 16;
    const float x = (float)left, y = (float)above;
    // One bit for each block on which alpha is 1/255 or more somewhere: on a line the power is concave in x.
    const auto reached_blocks = [&](const auto& g) {
        FUSED
        const V low = g[0] - (x + block_x) - (WIDE - 1.0f), high = g[0] - (x + block_x);
        const float lean = -g[3] / g[2];
        unsigned reached = 0;
        for (int i = 0; i < TALL; ++i) {
            const V dy = g[1] - (y + block_y) - (float)i;
            V dx = lean * dy;
            dx = dx > low ? dx : low;
            dx = dx < high ? dx : high;
            reached |= bits(-0.5f * (g[2] * dx * dx + g[4] * dy * dy) - g[3] * dx * dy >= g[7]);
        }
        return reached;
    };
    const auto pixel_of = [&](int b, int i) {
        const int px = left + (int)at(block_x, b) + i % WIDE, py = above + (int)at(block_y, b) + i / WIDE;
        return px < width && py < height ? py * width + px : -1;
    };
    const auto next_block = [](unsigned todo) {
#if LANES == 1
        return 0;
#else
        return __builtin_ctz(todo);
#endif
    };
    V live[LANES], pixel_x[LANES], pixel_y[LANES];
    unsigned alive = 0;
    for (int b = 0; b < LANES; ++b) {
        pixel_x[b] = x + at(block_x, b) + column;
        pixel_y[b] = y + at(block_y, b) + line;
        for (int i = 0; i < LANES; ++i) at(live[b], i) = pixel_of(b, i) >= 0 ? 1.0f : 0.0f;
        alive |= bits(live[b] > zero) ? 1u << b : 0u;
    }
    const int begin = tile_offsets.data[tile], end = tile_offsets.data[tile + 1];
    const auto prefetch = [&](int i) {
#ifndef __CUDA_ARCH__
        const int row = tile_rows.data[i < end ? i : end - 1];
        __builtin_prefetch(projected.data + row);
        __builtin_prefetch(colors.data + (size_t)row * 3);
#endif
    };
"""

_BLEND = """
    V red[LANES], green[LANES], blue[LANES], depth[LANES], total[LANES];
    for (int b = 0; b < LANES; ++b) red[b] = green[b] = blue[b] = depth[b] = total[b] = zero;
    for (int i = begin; i < end && alive; ++i) {
        const int row = tile_rows.data[i];
        prefetch(i + 8);
        const auto& g = projected.data[row];
        const float* color = colors.data + (size_t)row * 3;
        for (unsigned todo = reached_blocks(g) & alive; todo; todo &= todo - 1) {
            const int b = next_block(todo);
            const V alpha = alpha_at(g, g[0] - pixel_x[b], g[1] - pixel_y[b]);
            const V behind = live[b] * (1.0f - alpha);
            const auto is_kept = behind >= 1e-4f;
            const V w = is_kept ? alpha * live[b] : zero;
            live[b] = is_kept ? behind : zero;
            red[b] += color[0] * w;
            green[b] += color[1] * w;
            blue[b] += color[2] * w;
            depth[b] += g[6] * w;
            total[b] += w;
            if (!bits(is_kept)) alive &= ~(1u << b);
        }
    }
    for (int b = 0; b < LANES; ++b)
        for (int i = 0; i < LANES; ++i) {
            const int p = pixel_of(b, i);
            if (p < 0) continue;
            const float weight = at(total[b], i), left_over = 1.0f - weight;
            rgb.data[(size_t)p * 3] = at(red[b], i) + left_over * background.data[0];
            rgb.data[(size_t)p * 3 + 1] = at(green[b], i) + left_over * background.data[1];
            rgb.data[(size_t)p * 3 + 2] = at(blue[b], i) + left_over * background.data[2];
            depths.data[p] = weight > 0.0f ? at(depth[b], i) / weight : 0.0f;
            alphas.data[p] = weight;
        }
"""

_GRADIENTS = """
    // Of each pixel: dL/drgb, dL/d(w depth), dL/dw of anything, and the sum of w dL/dw over what is still to come.
    V red[LANES], green[LANES], blue[LANES], far[LANES], any[LANES], rest[LANES];
    for (int b = 0; b < LANES; ++b) {
        red[b] = green[b] = blue[b] = far[b] = any[b] = rest[b] = zero;
        for (int i = 0; i < LANES; ++i) {
            const int p = pixel_of(b, i);
            if (p < 0) continue;
            const float alpha = alphas.data[p];
            const float* grad = grad_rgb.data + (size_t)p * 3;
            const float* seen = rgb.data + (size_t)p * 3;
            const float* behind = background.data;
            at(red[b], i) = grad[0];
            at(green[b], i) = grad[1];
            at(blue[b], i) = grad[2];
            at(far[b], i) = alpha > 0.0f ? grad_depths.data[p] / alpha : 0.0f;
            const float through = grad[0] * behind[0] + grad[1] * behind[1] + grad[2] * behind[2];
            at(any[b], i) = grad_alphas.data[p] - through - at(far[b], i) * depths.data[p];
            at(rest[b], i) =
                grad[0] * seen[0] + grad[1] * seen[1] + grad[2] * seen[2] - through + grad_alphas.data[p] * alpha;
        }
    }
    for (int i = begin; i < end; ++i) {
        const int row = tile_rows.data[i];
        prefetch(i + 8);
        const auto& g = projected.data[row];
        const float* color = colors.data + (size_t)row * 3;
        V sum[10];
        for (int k = 0; k < 10; ++k) sum[k] = zero;
        const unsigned reached = reached_blocks(g) & alive;
        for (unsigned todo = reached; todo; todo &= todo - 1) {
            FUSED
            const int b = next_block(todo);
            const V dx = g[0] - pixel_x[b], dy = g[1] - pixel_y[b];
            const V alpha = alpha_at(g, dx, dy);
            const V left_over = 1.0f - alpha, behind = live[b] * left_over;
            const auto is_kept = behind >= 1e-4f;
            const V w = is_kept ? alpha * live[b] : zero;
            const V per_weight = color[0] * red[b] + color[1] * green[b] + color[2] * blue[b] + g[6] * far[b] + any[b];
            rest[b] -= w * per_weight;
            const V per_alpha = live[b] * per_weight - rest[b] / left_over;
            const V per_power = ((w > zero) & (alpha < top)) ? per_alpha * alpha : zero;
            live[b] = is_kept ? behind : zero;
            // Not of dx and dy, to be turned afterwards: a thin Gaussian's conic would cancel nearly all of their sums.
            const V turned_x = g[2] * dx + g[3] * dy, turned_y = g[3] * dx + g[4] * dy;
            const V by_x = per_power * turned_x, by_y = per_power * turned_y;
            sum[0] += w * red[b];
            sum[1] += w * green[b];
            sum[2] += w * blue[b];
            sum[3] += w * far[b];
            sum[4] += per_power;
            sum[5] += by_x;
            sum[6] += by_y;
            sum[7] += by_x * turned_x;
            sum[8] += by_x * turned_y;
            sum[9] += by_y * turned_y;
            if (!bits(is_kept)) alive &= ~(1u << b);
        }
STORE
    }
"""
# Adds the lanes of ten registers together: each step joins two registers in one, of half the lanes each.
_STORE_ROW = """
        const auto halves = [](V a, V b) {
            return __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
                   __builtin_shufflevector(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
        };
        const auto quarters = [](V a, V b) {
            return __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
                   __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
        };
        const auto eighths = [](V a, V b) {
            return __builtin_shufflevector(a, b, 0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29) +
                   __builtin_shufflevector(a, b, 2, 3, 6, 7, 10, 11, 14, 15, 18, 19, 22, 23, 26, 27, 30, 31);
        };
        const auto lanes = [](V a, V b) {
            return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +
                   __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
        };
        V row_of_sums = zero;
        if (reached) {
            const V a = quarters(halves(sum[0], sum[1]), halves(sum[2], sum[3]));
            const V b = quarters(halves(sum[4], sum[5]), halves(sum[6], sum[7]));
            const V c = quarters(halves(sum[8], sum[9]), zero);
            row_of_sums = lanes(eighths(a, b), eighths(c, zero));
        }
        *reinterpret_cast<V*>(sums.data + (size_t)entries.data[i] * NUM_SUMS) = row_of_sums;
"""
_ADD_TO_ROW = """
        float* row_of_sums = sums.data + (size_t)entries.data[i] * NUM_SUMS;
#ifdef __CUDA_ARCH__
        if (__any_sync(0xffffffffu, reached))
            for (int k = 0; k < 10; ++k) {
                for (int other = 16; other > 0; other /= 2) sum[k] += __shfl_xor_sync(0xffffffffu, sum[k], other);
                if (threadIdx.x % 32 == 0) atomicAdd(row_of_sums + k, sum[k]);
            }
        if (!__any_sync(0xffffffffu, alive)) break;
#else
        for (int k = 0; k < 10; ++k) row_of_sums[k] += sum[k];
#endif
"""


@lru_cache(maxsize=2)
@typing.no_type_check
def tile_blending_kernels(lanes: int) -> types.SimpleNamespace:
    """Builds ``blend`` and ``blend_gradients`` for blocks of ``lanes`` pixels: 16 on CPU, 1 on CUDA.

    Their first argument is the first thread of the block, of ``threads_per_tile`` for each tile. ``blend_gradients``
    writes what entry i of the tiles' lists receives to row ``entries[i]`` of ``sums``; with one lane it adds it.
    """
    wide, tall = (8, 2) if lanes > 1 else (1, 1)

    def source(code: str) -> str:
        code = _LANES + code.replace("STORE", _STORE_ROW if lanes > 1 else _ADD_TO_ROW)
        code = code.replace("FUSED", _FUSED)
        for name, value in {"LANES": lanes, "WIDE": wide, "TALL": tall, "NUM_SUMS": NUM_SUMS}.items():
            code = code.replace(name, str(value))
        # A module is compiled whole for each device that uses a kernel of it, and CUDA has no registers of 16 floats.
        return code if lanes == 1 else f"#ifndef __CUDACC__\n{code}\n#endif\n"

    @wp.func_native(source(_BLEND))
    def blend_thread(
        thread: int,
        width: int,
        height: int,
        projected: wp.array(dtype=Projected),
        tile_offsets: wp.array(dtype=wp.int32),
        tile_rows: wp.array(dtype=wp.int32),
        colors: wp.array2d(dtype=float),
        background: wp.array(dtype=float),
        rgb: wp.array2d(dtype=float),
        depths: wp.array(dtype=float),
        alphas: wp.array(dtype=float),
    ): ...

    @wp.func_native(source(_GRADIENTS))
    def blend_thread_gradients(
        thread: int,
        width: int,
        height: int,
        projected: wp.array(dtype=Projected),
        tile_offsets: wp.array(dtype=wp.int32),
        tile_rows: wp.array(dtype=wp.int32),
        colors: wp.array2d(dtype=float),
        background: wp.array(dtype=float),
        rgb: wp.array2d(dtype=float),
        depths: wp.array(dtype=float),
        alphas: wp.array(dtype=float),
        grad_rgb: wp.array2d(dtype=float),
        grad_depths: wp.array(dtype=float),
        grad_alphas: wp.array(dtype=float),
        entries: wp.array(dtype=wp.int64),
        sums: wp.array2d(dtype=float),
    ): ...

    @wp.kernel
    def blend(
        start: int,
        width: int,
        height: int,
        projected: wp.array(dtype=Projected),
        tile_offsets: wp.array(dtype=wp.int32),
        tile_rows: wp.array(dtype=wp.int32),
        colors: wp.array2d(dtype=float),
        background: wp.array(dtype=float),
        rgb: wp.array2d(dtype=float),
        depths: wp.array(dtype=float),
        alphas: wp.array(dtype=float),
    ):
        thread = start + wp.tid()
        blend_thread(thread, width, height, projected, tile_offsets, tile_rows, colors, background, rgb, depths, alphas)

    @wp.kernel
    def blend_gradients(
        start: int,
        width: int,
        height: int,
        projected: wp.array(dtype=Projected),
        tile_offsets: wp.array(dtype=wp.int32),
        tile_rows: wp.array(dtype=wp.int32),
        colors: wp.array2d(dtype=float),
        background: wp.array(dtype=float),
        rgb: wp.array2d(dtype=float),
        depths: wp.array(dtype=float),
        alphas: wp.array(dtype=float),
        grad_rgb: wp.array2d(dtype=float),
        grad_depths: wp.array(dtype=float),
        grad_alphas: wp.array(dtype=float),
        entries: wp.array(dtype=wp.int64),
        sums: wp.array2d(dtype=float),
    ):
        thread = start + wp.tid()
        blend_thread_gradients(
            thread, width, height, projected, tile_offsets, tile_rows, colors, background, rgb, depths, alphas,
            grad_rgb, grad_depths, grad_alphas, entries, sums,
        )  # fmt: skip

    return types.SimpleNamespace(
        blend=blend,
        blend_gradients=blend_gradients,
        threads_per_tile=256 // (lanes * lanes),
        lanes=lanes,
        num_sums=NUM_SUMS,
    )
