"""Warp kernels for the colours of Gaussians seen from a camera, by spherical harmonics, and their gradients."""

import typing

import warp as wp

from lightning_modules.functional.kernels.projection import Projected

wp.set_module_options({"enable_backward": False})

_DIRECTION = """
    const int num_bases = harmonics.shape[1];
    const float* coefficients = harmonics.data + (size_t)n * num_bases * 3;
    float x = means.data[n * 3] - position.data[0];
    float y = means.data[n * 3 + 1] - position.data[1];
    float z = means.data[n * 3 + 2] - position.data[2];
    const float length = sqrtf(x * x + y * y + z * z), scale = length > 1e-12f ? 1.0f / length : 0.0f;
    x *= scale, y *= scale, z *= scale;
    const float xx = x * x, yy = y * y, zz = z * z;
"""
# The order and sign of spherical_harmonics.py.
_BASES = """
    const float bases[16] = {
        0.28209479177387814f,
        -0.4886025119029199f * y, 0.4886025119029199f * z, -0.4886025119029199f * x,
        1.0925484305920792f * x * y, -1.0925484305920792f * y * z, 0.31539156525252005f * (2.0f * zz - xx - yy),
        -1.0925484305920792f * x * z, 0.5462742152960396f * (xx - yy),
        -0.5900435899266435f * y * (3.0f * xx - yy), 2.890611442640554f * x * y * z,
        -0.4570457994644658f * y * (4.0f * zz - xx - yy), 0.3731763325901154f * z * (2.0f * zz - 3.0f * (xx + yy)),
        -0.4570457994644658f * x * (4.0f * zz - xx - yy), 1.445305721320277f * z * (xx - yy),
        -0.5900435899266435f * x * (xx - 3.0f * yy),
    };
"""
_SHADE = """
    float color[3] = {0.5f, 0.5f, 0.5f};
    for (int k = 0; k < num_bases; ++k)
        for (int c = 0; c < 3; ++c) color[c] += bases[k] * coefficients[k * 3 + c];
    for (int c = 0; c < 3; ++c) colors.data[(size_t)v * 3 + c] = color[c] > 0.0f ? color[c] : 0.0f;
"""
_SHADE_GRADIENTS = """
    // Rows of dbasis/dx, dbasis/dy and dbasis/dz.
    const float slopes[3][16] = {
        {0.0f, 0.0f, 0.0f, -0.4886025119029199f,
         1.0925484305920792f * y, 0.0f, -0.6307831305050401f * x, -1.0925484305920792f * z, 1.0925484305920792f * x,
         -3.540261539559861f * x * y, 2.890611442640554f * y * z, 0.9140915989289316f * x * y,
         -2.2390579955406924f * x * z, -0.4570457994644658f * (4.0f * zz - 3.0f * xx - yy),
         2.890611442640554f * x * z, -1.7701307697799304f * (xx - yy)},
        {0.0f, -0.4886025119029199f, 0.0f, 0.0f,
         1.0925484305920792f * x, -1.0925484305920792f * z, -0.6307831305050401f * y, 0.0f, -1.0925484305920792f * y,
         -1.7701307697799304f * (xx - yy), 2.890611442640554f * x * z,
         -0.4570457994644658f * (4.0f * zz - xx - 3.0f * yy),
         -2.2390579955406924f * y * z, 0.9140915989289316f * x * y, -2.890611442640554f * y * z,
         3.540261539559861f * x * y},
        {0.0f, 0.0f, 0.4886025119029199f, 0.0f,
         0.0f, -1.0925484305920792f * y, 1.2615662610100802f * z, -1.0925484305920792f * x, 0.0f,
         0.0f, 2.890611442640554f * x * y, -3.6563663957157264f * y * z,
         1.1195289977703462f * (2.0f * zz - xx - yy), -3.6563663957157264f * x * z, 1.445305721320277f * (xx - yy),
         0.0f},
    };
    float grad[3], along[3] = {0.0f, 0.0f, 0.0f};
    const float* color = colors.data + (size_t)v * 3;
    for (int c = 0; c < 3; ++c) grad[c] = color[c] > 0.0f ? grad_colors.data[(size_t)v * 3 + c] : 0.0f;
    float* grad_coefficients = grad_harmonics.data + (size_t)n * num_bases * 3;
    for (int k = 0; k < num_bases; ++k) {
        float per_basis = 0.0f;
        for (int c = 0; c < 3; ++c) {
            grad_coefficients[k * 3 + c] = bases[k] * grad[c];
            per_basis += coefficients[k * 3 + c] * grad[c];
        }
        for (int a = 0; a < 3; ++a) along[a] += slopes[a][k] * per_basis;
    }
    const float inward = along[0] * x + along[1] * y + along[2] * z;
    grad_means.data[n * 3] += (along[0] - inward * x) * scale;
    grad_means.data[n * 3 + 1] += (along[1] - inward * y) * scale;
    grad_means.data[n * 3 + 2] += (along[2] - inward * z) * scale;
"""


@typing.no_type_check
@wp.func_native(_DIRECTION + _BASES + _SHADE)
def shade_row(
    n: int,
    v: int,
    means: wp.array2d(dtype=float),
    harmonics: wp.array3d(dtype=float),
    position: wp.array(dtype=float),
    colors: wp.array2d(dtype=float),
):
    """Evaluates max(harmonics + 0.5, 0) of one Gaussian."""


@typing.no_type_check
@wp.func_native(_DIRECTION + _BASES + _SHADE_GRADIENTS)
def shade_row_gradients(
    n: int,
    v: int,
    means: wp.array2d(dtype=float),
    harmonics: wp.array3d(dtype=float),
    position: wp.array(dtype=float),
    colors: wp.array2d(dtype=float),
    grad_colors: wp.array2d(dtype=float),
    grad_harmonics: wp.array3d(dtype=float),
    grad_means: wp.array2d(dtype=float),
):
    """Writes the gradient of one Gaussian's harmonics and adds that of its mean."""


@typing.no_type_check
@wp.kernel
def shade(
    start: int,
    visible_rows: wp.array(dtype=wp.int32),
    projected: wp.array(dtype=Projected),
    means: wp.array2d(dtype=float),
    harmonics: wp.array3d(dtype=float),
    position: wp.array(dtype=float),
    colors: wp.array2d(dtype=float),
    radii: wp.array(dtype=float),
):
    """Writes the colour of Gaussian n, where visible, and 3 standard deviations along its longer axis, its radius."""
    n = start + wp.tid()
    v = visible_rows[n]
    if v < 0:
        radii[n] = 0.0
        return
    shade_row(n, v, means, harmonics, position, colors)
    g = projected[v]
    # The covariance is the inverse of the conic: its trace and determinant are those of the conic over the determinant.
    determinant = 1.0 / (g[2] * g[4] - g[3] * g[3])
    middle = 0.5 * (g[2] + g[4]) * determinant
    largest = middle + wp.sqrt(wp.max(0.1, middle * middle - determinant))
    radii[n] = wp.ceil(3.0 * wp.sqrt(largest))


@typing.no_type_check
@wp.kernel
def shade_gradients(
    start: int,
    visible_rows: wp.array(dtype=wp.int32),
    means: wp.array2d(dtype=float),
    harmonics: wp.array3d(dtype=float),
    position: wp.array(dtype=float),
    colors: wp.array2d(dtype=float),
    grad_colors: wp.array2d(dtype=float),
    grad_harmonics: wp.array3d(dtype=float),
    grad_means: wp.array2d(dtype=float),
):
    """Differentiates the colour of Gaussian n; what it gives the mean is added to what is there."""
    n = start + wp.tid()
    v = visible_rows[n]
    if v < 0:
        for k in range(harmonics.shape[1]):
            for c in range(3):
                grad_harmonics[n, k, c] = 0.0
        return
    shade_row_gradients(n, v, means, harmonics, position, colors, grad_colors, grad_harmonics, grad_means)
