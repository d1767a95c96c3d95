"""Warp kernels that blend the Gaussians of a strip of pixels, front to back.

A strip is ``lanes`` neighbouring pixels of one row of one tile: 16 on CPU, where the vectors below become SIMD
registers; 1 on CUDA, where a thread is a lane. The blending rule is that of 3D Gaussian Splatting (Kerbl et al. 2023).
"""

import types
import typing
from functools import lru_cache

import warp as wp

from lightning_modules.functional.kernels.projection import Projected

wp.set_module_options({"enable_backward": False})

# In C++, because Warp has no element-wise exp or comparison of vectors; plain loops that every compiler vectorises.
_ALPHAS = """
    wp::vec_t<LANES, float> alphas;
    const float a = -0.5f * g[2], dy = g[1] - y, slope = -g[3] * dy, rest = -0.5f * g[4] * dy * dy;
    for (int i = 0; i < LANES; ++i) {
        const float dx = g[0] - (x + (float)i);
        const float power = (a * dx + slope) * dx + rest;
        // exp(power) = 2^n 2^f with |f| <= 1/2, by the series of 2^f; below -16 alpha is zero anyway.
        const float t = 1.44269504f * (power > -16.0f ? power : -16.0f);
        const int n = (int)(t - 0.5f);
        const float f = t - (float)n;
        float e = 1.52527338e-5f;
        e = e * f + 1.54035304e-4f;
        e = e * f + 1.33335581e-3f;
        e = e * f + 9.61812911e-3f;
        e = e * f + 5.55041087e-2f;
        e = e * f + 2.40226507e-1f;
        e = e * f + 6.93147181e-1f;
        e = e * f + 1.0f;
        union { int bits; float value; } two_n;
        two_n.bits = (n + 127) << 23;
        const float raw = g[5] * (e * two_n.value);
        const float alpha = raw < 0.99f ? raw : 0.99f;
        alphas[i] = (power <= 0.0f && alpha >= 1.0f / 255.0f) ? alpha : 0.0f;
    }
    return alphas;
"""
_KEPT = """
    wp::vec_t<LANES, float> kept;
    for (int i = 0; i < LANES; ++i) kept[i] = remaining[i] >= 1e-4f ? 1.0f : 0.0f;
    return kept;
"""
_POSITIVE = """
    wp::vec_t<LANES, float> positive;
    for (int i = 0; i < LANES; ++i) positive[i] = v[i] > 0.0f ? 1.0f : 0.0f;
    return positive;
"""
_ANY = """
    int any = 0;
    for (int i = 0; i < LANES; ++i) any |= v[i] > 0.0f;
    return any != 0;
"""
_APPEND = """
    for (int i = 0; i < LANES; ++i)
        if (w[i] > 0.0f) {
            const auto k = cursors.data[rows.data[(size_t)s * LANES + i]]++;
            gaussian_ids.data[k] = gaussian;
            weights.data[k] = w[i];
        }
"""
# The accumulator of a strip is [channels, lanes], so that a coefficient is one vector; a lone lane adds to the output.
_CLEAR = """
    float* acc = LANES == 1 ? out.data + (size_t)rows.data[s] * out.shape[1] : scratch.data;
    for (int i = 0; i < out.shape[1] * LANES; ++i) acc[i] = 0.0f;
"""
_ACCUMULATE = """
    const int num = values.shape[1];
    const auto* id = channel_ids.data + (size_t)gaussian * num;
    const float* value = values.data + (size_t)gaussian * num;
    float* acc = LANES == 1 ? out.data + (size_t)rows.data[s] * out.shape[1] : scratch.data;
    for (int a = 0; a < num; ++a) {
        float* const at = acc + (int)id[a] * LANES;
        for (int i = 0; i < LANES; ++i) at[i] += value[a] * w[i];
    }
"""
_STORE = """
    if (LANES == 1) return;
    const int num = out.shape[1];
    const float* acc = scratch.data;
    int first = 0;
    for (; first + 16 <= num; first += 16)
        for (int i = 0; i < LANES; ++i) {
            const int row = rows.data[(size_t)s * LANES + i];
            if (row < 0) continue;
            float* o = out.data + (size_t)row * num + first;
            for (int c = 0; c < 16; ++c) o[c] = acc[(first + c) * LANES + i];
        }
    for (int i = 0; i < LANES; ++i) {
        const int row = rows.data[(size_t)s * LANES + i];
        if (row < 0) continue;
        float* o = out.data + (size_t)row * num;
        for (int c = first; c < num; ++c) o[c] = acc[c * LANES + i];
    }
"""


@typing.no_type_check
@wp.func
def reaches(g: Projected, x0: float, x1: float, y: float) -> bool:
    """Whether alpha is 1/255 or more anywhere between x0 and x1 on row y: the power is concave in x."""
    dy = g[1] - y
    dx = wp.clamp(-g[3] / g[2] * dy, g[0] - x1, g[0] - x0)
    return -0.5 * (g[2] * dx * dx + g[4] * dy * dy) - g[3] * dx * dy >= g[7]


@lru_cache(maxsize=2)
@typing.no_type_check
def blending_kernels(lanes: int) -> types.SimpleNamespace:
    """Builds ``blend_weights`` and ``blend_codes`` for strips of ``lanes`` pixels.

    All take the strips as ``strip_pixels`` [S], the flat pixel id of lane 0, and ``rows`` [S, lanes], the output row of
    each lane or -1. Their first argument is the first strip of the block.
    """
    lane_vector = wp.types.vector(length=lanes, dtype=wp.float32)

    @wp.func_native(_ALPHAS.replace("LANES", str(lanes)))
    def alphas_at(g: Projected, x: float, y: float) -> lane_vector: ...

    @wp.func_native(_KEPT.replace("LANES", str(lanes)))
    def kept_lanes(remaining: lane_vector) -> lane_vector: ...

    @wp.func_native(_POSITIVE.replace("LANES", str(lanes)))
    def positive_lanes(v: lane_vector) -> lane_vector: ...

    @wp.func_native(_ANY.replace("LANES", str(lanes)))
    def any_positive(v: lane_vector) -> bool: ...

    @wp.func_native(_APPEND.replace("LANES", str(lanes)))
    def append(
        s: int,
        gaussian: int,
        w: lane_vector,
        rows: wp.array2d(dtype=wp.int32),
        cursors: wp.array(dtype=wp.int64),
        gaussian_ids: wp.array(dtype=wp.int32),
        weights: wp.array(dtype=float),
    ): ...

    @wp.func_native(_CLEAR.replace("LANES", str(lanes)))
    def clear(
        s: int, rows: wp.array2d(dtype=wp.int32), scratch: wp.array2d(dtype=float), out: wp.array2d(dtype=float)
    ): ...

    @wp.func_native(_ACCUMULATE.replace("LANES", str(lanes)))
    def accumulate(
        s: int,
        gaussian: int,
        w: lane_vector,
        rows: wp.array2d(dtype=wp.int32),
        channel_ids: wp.array2d(dtype=wp.int16),
        values: wp.array2d(dtype=float),
        scratch: wp.array2d(dtype=float),
        out: wp.array2d(dtype=float),
    ): ...

    @wp.func_native(_STORE.replace("LANES", str(lanes)))
    def store(
        s: int, rows: wp.array2d(dtype=wp.int32), scratch: wp.array2d(dtype=float), out: wp.array2d(dtype=float)
    ): ...

    @wp.func
    def tile_of(pixel: int, width: int) -> int:
        return (pixel // width // 16) * ((width + 15) // 16) + (pixel % width) // 16

    @wp.func
    def lanes_in_use(s: int, rows: wp.array2d(dtype=wp.int32)) -> lane_vector:
        live = lane_vector()
        for i in range(lanes):
            if rows[s, i] >= 0:
                live[i] = 1.0
        return live

    @wp.func
    def ends(live: lane_vector) -> wp.vec2:
        first = float(lanes)
        last = float(0.0)  # noqa: UP018 - a literal would be a constant to Warp
        for i in range(lanes):
            if live[i] > 0.0:
                first = wp.min(first, float(i))
                last = float(i)
        return wp.vec2(first, last)

    @wp.func
    def blend(g: Projected, x: float, y: float, live: lane_vector):
        """Returns each lane's weight, and its transmittance behind the Gaussian: 0 once the lane has stopped."""
        alphas = alphas_at(g, x, y)
        remaining = wp.cw_mul(live, lane_vector(1.0) - alphas)
        kept = kept_lanes(remaining)
        return wp.cw_mul(wp.cw_mul(alphas, live), kept), wp.cw_mul(remaining, kept)

    @wp.kernel
    def blend_weights(
        start: int,
        strip_pixels: wp.array(dtype=wp.int32),
        rows: wp.array2d(dtype=wp.int32),
        width: int,
        projected: wp.array(dtype=Projected),
        row_gaussians: wp.array(dtype=wp.int32),
        tile_offsets: wp.array(dtype=wp.int32),
        tile_rows: wp.array(dtype=wp.int32),
        is_counting: wp.bool,
        counts: wp.array(dtype=wp.int32),
        cursors: wp.array(dtype=wp.int64),
        gaussian_ids: wp.array(dtype=wp.int32),
        weights: wp.array(dtype=float),
    ):
        s = start + wp.tid()
        pixel = strip_pixels[s]
        tile = tile_of(pixel, width)
        x = float(pixel % width)
        y = float(pixel // width)
        live = lanes_in_use(s, rows)
        reach = ends(live)
        count = lane_vector()
        for i in range(tile_offsets[tile], tile_offsets[tile + 1]):
            row = tile_rows[i]
            g = projected[row]
            if reaches(g, x + reach[0], x + reach[1], y):
                w, live = blend(g, x, y, live)
                if is_counting:
                    count += positive_lanes(w)
                else:
                    append(s, row_gaussians[row], w, rows, cursors, gaussian_ids, weights)
                if not any_positive(live):
                    break
        if is_counting:
            for i in range(lanes):
                if rows[s, i] >= 0:
                    counts[rows[s, i]] = int(count[i])

    @wp.kernel
    def blend_codes(
        start: int,
        scratch: wp.array2d(dtype=float),
        strip_pixels: wp.array(dtype=wp.int32),
        rows: wp.array2d(dtype=wp.int32),
        width: int,
        projected: wp.array(dtype=Projected),
        row_gaussians: wp.array(dtype=wp.int32),
        tile_offsets: wp.array(dtype=wp.int32),
        tile_rows: wp.array(dtype=wp.int32),
        channel_ids: wp.array2d(dtype=wp.int16),
        values: wp.array2d(dtype=float),
        out: wp.array2d(dtype=float),
        alphas_out: wp.array(dtype=float),
    ):
        s = start + wp.tid()
        pixel = strip_pixels[s]
        tile = tile_of(pixel, width)
        x = float(pixel % width)
        y = float(pixel // width)
        live = lanes_in_use(s, rows)
        reach = ends(live)
        total = lane_vector()
        clear(s, rows, scratch, out)
        for i in range(tile_offsets[tile], tile_offsets[tile + 1]):
            row = tile_rows[i]
            g = projected[row]
            if reaches(g, x + reach[0], x + reach[1], y):
                w, live = blend(g, x, y, live)
                total += w
                accumulate(s, row_gaussians[row], w, rows, channel_ids, values, scratch, out)
                if not any_positive(live):
                    break
        store(s, rows, scratch, out)
        for i in range(lanes):
            if rows[s, i] >= 0:
                alphas_out[rows[s, i]] = total[i]

    return types.SimpleNamespace(blend_weights=blend_weights, blend_codes=blend_codes)
