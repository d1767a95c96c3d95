"""The product of two matrices by whatever is fastest for float32 on CPU."""

import torch
from jaxtyping import Float
from torch import Tensor

_HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def product_with_rows(
    rows: Float[Tensor, "rows inner"], others: Float[Tensor, "columns inner"], bias: Float[Tensor, " columns"] | None
) -> Float[Tensor, "rows columns"]:
    """Returns ``rows @ others.t()``, plus a bias if there is one; without a gradient.

    In float32 on CPU by oneDNN, where torch was built with it: MKL, which torch takes there, needed more than twice the
    time on an AMD processor with AVX-512. Torch has no public way to ask for it.
    """
    if _HAS_ONEDNN and rows.dtype == torch.float32 and rows.device.type == "cpu":
        return torch.ops.mkldnn._linear_pointwise(rows, others, bias, "none", [], "")
    return rows @ others.t() if bias is None else torch.addmm(bias, rows, others.t())
