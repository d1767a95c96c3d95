"""A Warp kernel that asks every pixel of a weight map one prompt; for CPU, where it reads the map once."""

import typing

import warp as wp

wp.set_module_options({"enable_backward": False})

# In C++ for sums that stay in one SIMD register: the product of a long matrix with one vector is all reading, and
# libraries split it into calls too small to read fast.
_RELEVANCY = """
    const int entries = scores.shape[1], num_pixels = norms.shape[1];
    const float* weight = weights.data + (size_t)pixel * weights.shape[1];
    for (int level = 0; level < scores.shape[0]; ++level, weight += entries) {
        const float* score = scores.data + (size_t)level * entries;
        float sums[16];
        for (int i = 0; i < 16; ++i) sums[i] = 0.0f;
        int k = 0;
        for (; k + 16 <= entries; k += 16)
            for (int i = 0; i < 16; ++i) sums[i] += weight[k + i] * score[k + i];
        float product = 0.0f;
        for (int i = 0; i < 16; ++i) product += sums[i];
        for (; k < entries; ++k) product += weight[k] * score[k];
        const size_t at = (size_t)level * num_pixels + pixel;
        const float cosine = norms.data[at] > 0.0f ? product / norms.data[at] : 0.0f;
        relevancy.data[at] = 1.0f / (1.0f + wp::exp(temperature * (negatives.data[at] - cosine)));
    }
"""


@typing.no_type_check
@wp.func_native(_RELEVANCY)
def relevancy_of_pixel(
    pixel: int,
    weights: wp.array2d(dtype=float),
    scores: wp.array2d(dtype=float),
    norms: wp.array2d(dtype=float),
    negatives: wp.array2d(dtype=float),
    temperature: float,
    relevancy: wp.array2d(dtype=float),
):
    """Compares the decoded features of one pixel with a prompt."""


@typing.no_type_check
@wp.kernel
def relevancies(
    start: int,
    weights: wp.array2d(dtype=float),
    scores: wp.array2d(dtype=float),
    norms: wp.array2d(dtype=float),
    negatives: wp.array2d(dtype=float),
    temperature: float,
    relevancy: wp.array2d(dtype=float),
):
    """Compares the decoded features of one pixel per thread with a prompt, at all levels."""
    relevancy_of_pixel(start + wp.tid(), weights, scores, norms, negatives, temperature, relevancy)
