"""Warp kernels of the structural similarity of two images: separable Gaussian filters, and what is made of them.

Images are rows of width times channels floats; beyond the borders are zeros. A thread computes ``block`` elements of a
row: all on CPU, where the loops become SIMD, one on CUDA, where neighbours read together.
"""

import math
import typing

import warp as wp

wp.set_module_options({"enable_backward": False})

_SIGMA, _REACH = 1.5, 5
_WEIGHTS = [math.exp(-(k**2) / (2 * _SIGMA**2)) for k in range(-_REACH, _REACH + 1)]
_WINDOW = "const float weights[11] = {" + ", ".join(f"{w / sum(_WEIGHTS):.9e}f" for w in _WEIGHTS) + "};"

# 64 elements at a time: loops over them become SIMD, and their sums stay in the nearest cache.
_FILTER_PRODUCTS = """
    const int length = a.shape[1];
    const size_t at = (size_t)r * length, plane = (size_t)a.shape[0] * length;
    const float* __restrict__ of_a = a.data + at;
    const float* __restrict__ of_b = b.data + at;
    for (int from = first; from < stop; from += 64) {
        const int to = from + 64 < stop ? from + 64 : stop;
        float sums[4][64] = {{0.0f}};
        for (int k = -5; k <= 5; ++k) {
            const int shift = k * channels;
            const int lowest = from + shift < 0 ? -shift : from, highest = to + shift > length ? length - shift : to;
            for (int i = lowest; i < highest; ++i) {
                const float w = weights[k + 5], x = of_a[i + shift], y = of_b[i + shift];
                sums[0][i - from] += w * x;
                sums[1][i - from] += w * y;
                sums[2][i - from] += w * (x * x + y * y);
                sums[3][i - from] += w * (x * y);
            }
        }
        for (int m = 0; m < 4; ++m)
            for (int i = from; i < to; ++i) out.data[m * plane + at + i] = sums[m][i - from];
    }
"""
_FILTER_SLOPES = """
    const int length = a.shape[1];
    const size_t at = (size_t)r * length, plane = (size_t)a.shape[0] * length;
    for (int from = first; from < stop; from += 64) {
        const int to = from + 64 < stop ? from + 64 : stop;
        float sums[3][64] = {{0.0f}};
        for (int m = 0; m < 3; ++m) {
            const float* __restrict__ values = slopes.data + m * plane + at;
            for (int k = -5; k <= 5; ++k) {
                const int shift = k * channels;
                const int lowest = from + shift < 0 ? -shift : from;
                const int highest = to + shift > length ? length - shift : to;
                for (int i = lowest; i < highest; ++i) sums[m][i - from] += weights[k + 5] * values[i + shift];
            }
        }
        for (int i = from; i < to; ++i)
            out.data[at + i] =
                sums[0][i - from] + 2.0f * a.data[at + i] * sums[1][i - from] + b.data[at + i] * sums[2][i - from];
    }
"""
_DOWN_THE_COLUMNS = """
    const int length = maps.shape[2], row = r % height;
    const size_t at = (size_t)r * length, plane = (size_t)maps.shape[1] * length;
    const int lowest = row < 5 ? -row : -5, highest = height - 1 - row < 5 ? height - 1 - row : 5;
    for (int from = first; from < stop; from += 64) {
        const int num = stop - from < 64 ? stop - from : 64;
        float filtered[MAPS][64] = {{0.0f}};
        for (int m = 0; m < MAPS; ++m)
            for (int k = lowest; k <= highest; ++k) {
                const float* __restrict__ values = maps.data + m * plane + at + (long long)k * length + from;
                for (int j = 0; j < num; ++j) filtered[m][j] += weights[k + 5] * values[j];
            }
        STORE
    }
"""
_STORE_COMPARISON = """
        float* __restrict__ similarity = out.data + at + from;
        float* __restrict__ of_mean = slopes.data + at + from;
        float* __restrict__ of_squares = of_mean + plane;
        float* __restrict__ of_product = of_squares + plane;
        for (int j = 0; j < num; ++j) {
            const float mean_a = filtered[0][j], mean_b = filtered[1][j];
            const float squares = mean_a * mean_a + mean_b * mean_b, product = mean_a * mean_b;
            const float alike = 2.0f * product + 1e-4f, together = 2.0f * (filtered[3][j] - product) + 9e-4f;
            const float bright = squares + 1e-4f, apart = filtered[2][j] - squares + 9e-4f;
            const float inverse = 1.0f / (bright * apart), value = alike * together * inverse;
            similarity[j] = value;
            // The means are subtracted in the variances and the covariance, too.
            of_mean[j] = 2.0f * inverse * (mean_b * (together - alike) + mean_a * value * (bright - apart));
            of_squares[j] = -value * bright * inverse;
            of_product[j] = 2.0f * alike * inverse;
        }
"""
_STORE_FILTERED = """
        for (int m = 0; m < MAPS; ++m)
            for (int j = 0; j < num; ++j) out.data[m * plane + at + from + j] = filtered[m][j];
"""


def _down_the_columns(num_maps: int, store: str) -> str:
    return _WINDOW + _DOWN_THE_COLUMNS.replace("STORE", store).replace("MAPS", str(num_maps))


@typing.no_type_check
@wp.func_native(_WINDOW + _FILTER_PRODUCTS)
def filter_products_of_row(
    r: int,
    first: int,
    stop: int,
    channels: int,
    a: wp.array2d(dtype=float),
    b: wp.array2d(dtype=float),
    out: wp.array3d(dtype=float),
):
    """Filters a, b, a^2 + b^2 and a b along a row."""


@typing.no_type_check
@wp.func_native(_down_the_columns(4, _STORE_COMPARISON))
def compare_row(
    r: int,
    first: int,
    stop: int,
    height: int,
    maps: wp.array3d(dtype=float),
    out: wp.array2d(dtype=float),
    slopes: wp.array3d(dtype=float),
):
    """Filters the four maps across rows; stores the similarity, and its slopes by mean of a, squares and product."""


@typing.no_type_check
@wp.func_native(_down_the_columns(3, _STORE_FILTERED))
def filter_row(
    r: int,
    first: int,
    stop: int,
    height: int,
    maps: wp.array3d(dtype=float),
    out: wp.array3d(dtype=float),
):
    """Filters three maps across rows."""


@typing.no_type_check
@wp.func_native(_WINDOW + _FILTER_SLOPES)
def row_gradient(
    r: int,
    first: int,
    stop: int,
    channels: int,
    a: wp.array2d(dtype=float),
    b: wp.array2d(dtype=float),
    slopes: wp.array3d(dtype=float),
    out: wp.array2d(dtype=float),
):
    """Filters the slopes along a row and joins them to the gradient of a."""


@typing.no_type_check
@wp.kernel
def filter_products(
    start: int,
    block: int,
    channels: int,
    a: wp.array2d(dtype=float),
    b: wp.array2d(dtype=float),
    out: wp.array3d(dtype=float),
):
    """Writes a, b, a^2 + b^2 and a b, filtered along the rows."""
    t = start + wp.tid()
    blocks = (a.shape[1] + block - 1) // block
    first = t % blocks * block
    filter_products_of_row(t // blocks, first, wp.min(first + block, a.shape[1]), channels, a, b, out)


@typing.no_type_check
@wp.kernel
def compare(
    start: int,
    block: int,
    height: int,
    maps: wp.array3d(dtype=float),
    out: wp.array2d(dtype=float),
    slopes: wp.array3d(dtype=float),
):
    """Writes the similarity of each element, and its slopes by what ``filter_products`` made."""
    t = start + wp.tid()
    blocks = (out.shape[1] + block - 1) // block
    first = t % blocks * block
    compare_row(t // blocks, first, wp.min(first + block, out.shape[1]), height, maps, out, slopes)


@typing.no_type_check
@wp.kernel
def filter_columns(start: int, block: int, height: int, maps: wp.array3d(dtype=float), out: wp.array3d(dtype=float)):
    """Filters the slopes along the columns."""
    t = start + wp.tid()
    blocks = (out.shape[2] + block - 1) // block
    first = t % blocks * block
    filter_row(t // blocks, first, wp.min(first + block, out.shape[2]), height, maps, out)


@typing.no_type_check
@wp.kernel
def gradient(
    start: int,
    block: int,
    channels: int,
    a: wp.array2d(dtype=float),
    b: wp.array2d(dtype=float),
    slopes: wp.array3d(dtype=float),
    out: wp.array2d(dtype=float),
):
    """Writes the gradient of the sum of all similarities with respect to a, from slopes filtered along the columns."""
    t = start + wp.tid()
    blocks = (a.shape[1] + block - 1) // block
    first = t % blocks * block
    row_gradient(t // blocks, first, wp.min(first + block, a.shape[1]), channels, a, b, slopes, out)
