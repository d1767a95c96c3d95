"""Submanifold convolution by spconv (Apache-2.0), where it is installed, with its pairs built once per level.

Always ``ConvAlgo.Native``: the other algorithms refuse CPU tensors, and in spconv-cu120 2.3.6 crash beside numpy 2.
"""

from importlib.util import find_spec
from typing import NamedTuple

import torch
from jaxtyping import Float, Int32
from torch import Tensor


class PairMap(NamedTuple):
    """Which input rows meet which output rows, offset by offset, as spconv lists them.

    Attributes:
        pairs: Rows of inputs and outputs, spconv's own layout.
        counts: Pairs of each offset.
    """

    pairs: Int32[Tensor, "2 27 voxels"]
    counts: Int32[Tensor, " 27"]


def check_spconv() -> None:
    """Refuses the backend where spconv is absent.

    Raises:
        ValueError: If spconv is not installed.
    """
    if find_spec("spconv") is None:
        raise ValueError(
            "backend 'spconv' needs the library spconv, which is not installed: run `pip install spconv-cu126` "
            "(spconv-cu120==2.3.6 up to Python 3.11, which is right on CPU tensors too), or choose backend 'torch', "
            "which runs everywhere."
        )


@torch.no_grad()
def pair_map(coords: Int32[Tensor, "voxels 4"], resolution: int, num_shapes: int) -> PairMap:
    """Builds spconv's map for a kernel of 3 x 3 x 3.

    Args:
        coords: Rows (shape, x, y, z), at least one.
        resolution: Voxels along an edge of the grid.
        num_shapes: Of the batch.

    Raises:
        ValueError: If spconv is not installed.
    """
    check_spconv()
    from spconv.core import ConvAlgo
    from spconv.pytorch import ops

    _, pairs, counts = ops.get_indice_pairs(
        coords.contiguous(), num_shapes, [resolution] * 3, ConvAlgo.Native,
        ksize=[3] * 3, stride=[1] * 3, padding=[1] * 3, dilation=[1] * 3, out_padding=[0] * 3, subm=True,
    )  # fmt: skip
    return PairMap(pairs, counts)


def submanifold_convolution(
    feats: Float[Tensor, "voxels inputs"],
    weight: Float[Tensor, "outputs 3 3 3 inputs"],
    bias: Float[Tensor, " outputs"] | None,
    pairs: PairMap,
) -> Float[Tensor, "voxels outputs"]:
    """Computes what :func:`~.submanifold_convolution.submanifold_convolution` computes.

    In float32, or in float16 on CUDA under an autocast to it: spconv has no bfloat16. Under autocast the output has its
    type.
    """
    from spconv.core import ConvAlgo
    from spconv.pytorch.functional import indice_subm_conv

    device_type = feats.device.type
    dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else feats.dtype
    compute = dtype if dtype == torch.float16 and device_type == "cuda" else torch.float32
    with torch.autocast(device_type, enabled=False):
        output = indice_subm_conv(
            feats.to(compute), weight.to(compute), pairs.pairs, pairs.counts, len(feats), ConvAlgo.Native
        ).to(dtype)
        return output if bias is None else output + bias.to(dtype)
