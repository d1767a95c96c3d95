"""Warp kernels that multiply stored blending weights with what Gaussians carry, and the transposed products.

A row owns its sums and adds in the order of the list, so results are the same bits on any number of threads.
"""

import typing

import warp as wp

wp.set_module_options({"enable_backward": False})

# In C++ for raw pointers: Warp's strided element access costs more than the multiplication, and does not vectorise.
_SPLAT_CODES = """
    const int num_channels = out.shape[1], num = values.shape[1];
    float* row = out.data + (size_t)p * num_channels;
    for (int c = 0; c < num_channels; ++c) row[c] = 0.0f;
    const auto stop = offsets.data[p + 1];
    for (auto i = offsets.data[p]; i < stop; ++i) {
#ifndef __CUDACC__
        const size_t ahead = (size_t)columns.data[i + 8 < stop ? i + 8 : i] * num;
        __builtin_prefetch(channel_ids.data + ahead);
        __builtin_prefetch(values.data + ahead);
#endif
        const size_t at = (size_t)columns.data[i] * num;
        const auto* id = channel_ids.data + at;
        const float* value = values.data + at;
        const float w = weights.data[i];
        for (int a = 0; a < num; ++a) row[id[a]] += value[a] * w;
    }
"""
_GATHER_CODES = """
    const int num = out.shape[1], num_channels = maps.shape[1];
    const auto* id = channel_ids.data + (size_t)n * num;
    float* total = out.data + (size_t)n * num;
    for (int a = first; a < stop; ++a) total[a] = 0.0f;
    for (auto i = offsets.data[n]; i < offsets.data[n + 1]; ++i) {
        const float* map = maps.data + (size_t)columns.data[i] * num_channels;
        const float w = weights.data[i];
        for (int a = first; a < stop; ++a) total[a] += w * map[id[a]];
    }
"""
# Blocks of channels whose sums stay in registers while the list is walked.
_MULTIPLY_BLOCK = """
    for (; first + WIDTH <= stop; first += WIDTH) {
        float sums[WIDTH];
        for (int c = 0; c < WIDTH; ++c) sums[c] = 0.0f;
        for (auto i = offsets.data[p]; i < end; ++i) {
            const float* value = values.data + (size_t)columns.data[i] * num + first;
            const float w = weights.data[i];
            for (int c = 0; c < WIDTH; ++c) sums[c] += w * value[c];
        }
        for (int c = 0; c < WIDTH; ++c) out.data[(size_t)p * num + first + c] = sums[c];
    }
"""
_MULTIPLY = "const int num = out.shape[1]; const auto end = offsets.data[p + 1];" + "".join(
    _MULTIPLY_BLOCK.replace("WIDTH", str(width)) for width in (64, 16, 4, 1)
)


@typing.no_type_check
@wp.func_native(_SPLAT_CODES)
def splat_codes_row(
    p: int,
    offsets: wp.array(dtype=wp.int64),
    columns: wp.array(dtype=wp.int32),
    weights: wp.array(dtype=float),
    channel_ids: wp.array2d(dtype=wp.int16),
    values: wp.array2d(dtype=float),
    out: wp.array2d(dtype=float),
):
    """Adds up the codes of one pixel."""


@typing.no_type_check
@wp.func_native(_GATHER_CODES)
def gather_codes_row(
    n: int,
    first: int,
    stop: int,
    offsets: wp.array(dtype=wp.int64),
    columns: wp.array(dtype=wp.int32),
    weights: wp.array(dtype=float),
    channel_ids: wp.array2d(dtype=wp.int16),
    maps: wp.array2d(dtype=float),
    out: wp.array2d(dtype=float),
):
    """Sums the products of one Gaussian for its codes ``first`` to ``stop``."""


@typing.no_type_check
@wp.func_native(_MULTIPLY)
def multiply_row(
    p: int,
    first: int,
    stop: int,
    offsets: wp.array(dtype=wp.int64),
    columns: wp.array(dtype=wp.int32),
    weights: wp.array(dtype=float),
    values: wp.array2d(dtype=float),
    out: wp.array2d(dtype=float),
):
    """Multiplies one row with the columns ``first`` to ``stop``."""


@typing.no_type_check
@wp.kernel
def splat_codes(
    start: int,
    offsets: wp.array(dtype=wp.int64),
    columns: wp.array(dtype=wp.int32),
    weights: wp.array(dtype=float),
    channel_ids: wp.array2d(dtype=wp.int16),
    values: wp.array2d(dtype=float),
    out: wp.array2d(dtype=float),
):
    """Splats the codes of one pixel per thread."""
    splat_codes_row(start + wp.tid(), offsets, columns, weights, channel_ids, values, out)


@typing.no_type_check
@wp.kernel
def gather_codes(
    start: int,
    block: int,
    offsets: wp.array(dtype=wp.int64),
    columns: wp.array(dtype=wp.int32),
    weights: wp.array(dtype=float),
    channel_ids: wp.array2d(dtype=wp.int16),
    maps: wp.array2d(dtype=float),
    out: wp.array2d(dtype=float),
):
    """Sums, for each Gaussian, what its ``block`` codes read from the pixels of its list."""
    t = start + wp.tid()
    blocks = (out.shape[1] + block - 1) // block
    first = t % blocks * block
    stop = wp.min(first + block, out.shape[1])
    gather_codes_row(t // blocks, first, stop, offsets, columns, weights, channel_ids, maps, out)


@typing.no_type_check
@wp.kernel
def multiply(
    start: int,
    block: int,
    offsets: wp.array(dtype=wp.int64),
    columns: wp.array(dtype=wp.int32),
    weights: wp.array(dtype=float),
    values: wp.array2d(dtype=float),
    out: wp.array2d(dtype=float),
):
    """Multiplies a CSR matrix with ``block`` columns of a dense one per thread: all on CPU, one on CUDA."""
    t = start + wp.tid()
    blocks = (out.shape[1] + block - 1) // block
    first = t % blocks * block
    stop = wp.min(first + block, out.shape[1])
    multiply_row(t // blocks, first, stop, offsets, columns, weights, values, out)
