"""Warp kernels that ask each Gaussian, from its sparse codes alone, how long its features are and what they say.

A Gaussian owns its results and adds in the order of its codes, so results are the same bits on any number of threads.
"""

import typing

import warp as wp

wp.set_module_options({"enable_backward": False})

# In C++ for raw pointers, as in ``splatting``. The codes of a level usually stand side by side: only the columns from
# its first to its last are looked at again.
_OWN_COLUMNS = """
    const int num = values.shape[1];
    const auto* id = channel_ids.data + (size_t)n * num;
    const float* value = values.data + (size_t)n * num;
    const int base = level * entries;
    int first = num, stop = 0;
    for (int a = 0; a < num; ++a)
        if (id[a] >= base && id[a] < base + entries) {
            if (first == num) first = a;
            stop = a + 1;
        }
"""
_NORM = """
    const int entries = gram.shape[1];
    for (int level = 0; level < gram.shape[0]; ++level) {
        OWN_COLUMNS
        float square = 0.0f, size = 0.0f;
        for (int a = first; a < stop; ++a) {
            const int i = id[a] - base;
            if (i < 0 || i >= entries) continue;
            const float* row = gram.data + ((size_t)base + i) * entries;
            square += value[a] * value[a] * row[i];
            size += value[a] * value[a];
            for (int b = first; b < a; ++b) {
                const int j = id[b] - base;
                if (j < 0 || j >= entries) continue;
                const float both = 2.0f * value[a] * value[b];
                square += both * row[j];
                size += i == j ? both : 0.0f;
            }
        }
        const float noise = noise_level * size;
        const float least = noise > least_square ? noise : least_square;
        norms.data[(size_t)level * norms.shape[1] + n] = square > least ? wp::sqrt(square) : 0.0f;
    }
""".replace("OWN_COLUMNS", _OWN_COLUMNS)
# Blocks of texts whose sums stay in registers while the codes are walked.
_COSINE_BLOCK = """
        for (; text + WIDTH <= num_texts; text += WIDTH) {
            float sums[WIDTH];
            for (int t = 0; t < WIDTH; ++t) sums[t] = 0.0f;
            for (int a = first; a < stop; ++a) {
                if (id[a] < base || id[a] >= base + entries) continue;
                const float* row = scores.data + (size_t)id[a] * num_texts + text;
                for (int t = 0; t < WIDTH; ++t) sums[t] += value[a] * row[t];
            }
            for (int t = 0; t < WIDTH; ++t)
                out.data[((size_t)level * num_texts + text + t) * num_gaussians + n] = sums[t] * reciprocal;
        }
"""
_COSINES = (
    """
    const int num_texts = out.shape[1], entries = scores.shape[0] / out.shape[0];
    const size_t num_gaussians = out.shape[2];
    for (int level = 0; level < out.shape[0]; ++level) {
        const float norm = norms.data[level * num_gaussians + n];
        const float reciprocal = norm > 0.0f ? 1.0f / norm : 0.0f;
        OWN_COLUMNS
        int text = 0;
""".replace("OWN_COLUMNS", _OWN_COLUMNS)
    + "".join(_COSINE_BLOCK.replace("WIDTH", str(width)) for width in (16, 4, 1))
    + "    }"
)


@typing.no_type_check
@wp.func_native(_NORM)
def norms_of_gaussian(
    n: int,
    channel_ids: wp.array2d(dtype=wp.int16),
    values: wp.array2d(dtype=float),
    gram: wp.array3d(dtype=float),
    noise_level: float,
    least_square: float,
    norms: wp.array2d(dtype=float),
):
    """Measures the decoded features of one Gaussian."""


@typing.no_type_check
@wp.func_native(_COSINES)
def cosines_of_gaussian(
    n: int,
    channel_ids: wp.array2d(dtype=wp.int16),
    values: wp.array2d(dtype=float),
    norms: wp.array2d(dtype=float),
    scores: wp.array2d(dtype=float),
    out: wp.array3d(dtype=float),
):
    """Compares the decoded features of one Gaussian with texts."""


@typing.no_type_check
@wp.kernel
def decoded_norms(
    start: int,
    channel_ids: wp.array2d(dtype=wp.int16),
    values: wp.array2d(dtype=float),
    gram: wp.array3d(dtype=float),
    noise_level: float,
    least_square: float,
    norms: wp.array2d(dtype=float),
):
    """Measures the decoded features of one Gaussian per thread; lengths whose square is too small become 0."""
    norms_of_gaussian(start + wp.tid(), channel_ids, values, gram, noise_level, least_square, norms)


@typing.no_type_check
@wp.kernel
def cosines(
    start: int,
    channel_ids: wp.array2d(dtype=wp.int16),
    values: wp.array2d(dtype=float),
    norms: wp.array2d(dtype=float),
    scores: wp.array2d(dtype=float),
    out: wp.array3d(dtype=float),
):
    """Compares the decoded features of one Gaussian per thread with texts; 0 where there is no feature."""
    cosines_of_gaussian(start + wp.tid(), channel_ids, values, norms, scores, out)
