"""Exact cosines, norms and relevancy of decoded features, computed from the weight map without decoding it.

A pixel's decoded feature is ``f = w S`` with coefficients ``w [K]`` and codebook ``S [K, C]``. With the Gram matrix
``G = S S^T [K, K]`` and scores ``A = S T^T [K, M]`` against unit vectors ``T [M, C]``,

    ``|f|^2 = w G w^T``  and  ``cos(f, t_m) = (w A_m) / |f|``,

so everything a loss or a query asks is K numbers a pixel instead of C. Weight maps are pixel-major ``[P, K]``; the
layers of a residual codebook are concatenated (``[layers, size, C]`` flattened to ``[K, C]``). Slices of a wider map
(one level of several) need no copy.

A pixel whose decoded feature is zero, or cancels to rounding noise, has no direction: its cosine is defined as 0 and it
gives no gradient. (``torch.nn.functional.cosine_similarity`` gives it a gradient of 1/eps instead.) Relevancy follows:
such a pixel scores 0.5, as in the dense reference.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from lightning_modules.functional.relevancy import contrast

MIN_NORM = 1e-6
"""Decoded features shorter than this count as zero."""

# Rows are taken in blocks: on a processor a block stays in its cache, elsewhere it bounds the temporaries.
CPU_BLOCK_BYTES = 2 * 2**20
DEVICE_BLOCK_BYTES = 256 * 2**20


def gram_matrix(codebook: Float[Tensor, "entries channels"]) -> Float[Tensor, "entries entries"]:
    """Returns the scalar products of all pairs of entries, G."""
    return codebook @ codebook.T


def decoded_norms(
    weight_map: Float[Tensor, "pixels entries"], gram: Float[Tensor, "entries entries"]
) -> Float[Tensor, " pixels"]:
    """Returns the length of each decoded feature, exactly 0 where it counts as zero.

    It does not depend on a prompt: keep it per view and pass it to ``similarity`` and ``relevancy``.
    """
    with torch.autocast(weight_map.device.type, enabled=False):
        gram = _at_least_single(gram)
        return torch.cat([_norms(_at_least_single(rows), gram) for rows in _blocks(weight_map)])


def normalized_coefficients(
    weight_map: Float[Tensor, "pixels entries"], gram: Float[Tensor, "entries entries"]
) -> Float[Tensor, "pixels entries"]:
    """Returns the coefficients whose decoded feature is the L2-normalised one; zero where it counts as zero."""
    return weight_map * _reciprocal(decoded_norms(weight_map, gram))[:, None]


def similarity(
    weight_map: Float[Tensor, "pixels entries"],
    codebook: Float[Tensor, "entries channels"],
    texts: Float[Tensor, "prompts channels"],
    *,
    norms: Float[Tensor, " pixels"] | None = None,
) -> Float[Tensor, "pixels prompts"]:
    """Returns the cosine between each decoded feature and each text embedding.

    Args:
        weight_map: Coefficients.
        codebook: Entries of all layers.
        texts: Of any length; normalised here.
        norms: ``decoded_norms`` of the same map, if they are at hand; they are most of the work.
    """
    return torch.cat([cosines for (cosines,) in _cosines(weight_map, codebook, [texts], norms)])


def relevancy(
    weight_map: Float[Tensor, "pixels entries"],
    codebook: Float[Tensor, "entries channels"],
    positives: Float[Tensor, "prompts channels"],
    negatives: Float[Tensor, "negatives channels"],
    *,
    temperature: float = 10.0,
    norms: Float[Tensor, " pixels"] | None = None,
) -> Float[Tensor, "pixels prompts"]:
    """Returns LERF's relevancy of each pixel to each prompt, 0 to 1; equal to ``relevancy.relevancy`` on decoded features.

    Args:
        weight_map: Coefficients.
        codebook: Entries of all layers.
        positives: Text embeddings of the prompts; normalised here.
        negatives: Text embeddings of the canonical negatives; normalised here.
        temperature: Factor on the cosines.
        norms: ``decoded_norms`` of the same map, if they are at hand; they are most of the work.

    Raises:
        ValueError: If there is no negative.
    """
    blocks = _cosines(weight_map, codebook, [positives, negatives], norms)
    return torch.cat([contrast(positive, negative, temperature) for positive, negative in blocks])


def cosine_similarity_to_targets(
    weight_map: Float[Tensor, "pixels entries"],
    codebook: Float[Tensor, "entries channels"],
    targets: Float[Tensor, "masks channels"],
    target_ids: Int[Tensor, " pixels"],
) -> Float[Tensor, " pixels"]:
    """Returns the cosine between each pixel's decoded feature and the feature of its mask.

    LangSplatV2's cosine loss is 1 - this, averaged. Differentiable once with respect to the weight map and the codebook,
    in closed form; nothing of size pixels x channels is made, forward or backward. Targets are constants and get no
    gradient.

    Args:
        weight_map: Coefficients. To train on parts of a wider map, ``split`` it once rather than slicing each part, so
            that the backward pass joins the parts in one go.
        codebook: Entries of all layers.
        targets: Features of the masks, of any length.
        target_ids: Row of ``targets`` of each pixel. A pixel of no mask (below 0) has cosine 0 and no gradient, and so
            has one whose decoded feature or target is zero.
    """
    return _CosineToTargets.apply(weight_map, codebook, targets, target_ids)


class _CosineToTargets(torch.autograd.Function):
    """Per pixel, with c the incoming gradient, n = |f| and a = A[m]:

    ``d/dw = c/n a - (c cos / n^2) G w``  and  ``d/dS = (W^T diag(c/n) onehot) T - (W^T diag(c cos / n^2) W) S``.
    """  # noqa: D205

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: FunctionCtx, weight_map: Tensor, codebook: Tensor, targets: Tensor, target_ids: Tensor
    ) -> Tensor:
        with torch.autocast(weight_map.device.type, enabled=False):
            atoms, units = _at_least_single(codebook), F.normalize(_at_least_single(targets), dim=1)
            if targets.shape[0] == 0:
                units = targets.new_zeros(1, targets.shape[1], dtype=units.dtype)  # every pixel is without a mask
            gram, scores = atoms @ atoms.T, units @ atoms.T
            cosines, reciprocals = [], []
            for rows, ids in _blocks(weight_map, target_ids):
                rows = _at_least_single(rows)
                reciprocal = _reciprocal(_norms(rows, gram)) * (ids >= 0)
                cosines.append((rows * scores.index_select(0, ids.clamp_min(0))).sum(1) * reciprocal)
                reciprocals.append(reciprocal)
            cosine, reciprocal = torch.cat(cosines), torch.cat(reciprocals)
        ctx.save_for_backward(weight_map, codebook, units, target_ids, cosine, reciprocal)
        return cosine.to(weight_map.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:  # type: ignore[override]
        weight_map, codebook, units, target_ids, cosine, reciprocal = ctx.saved_tensors  # type: ignore[attr-defined]
        needs_weights, needs_codebook = ctx.needs_input_grad[:2]  # type: ignore[attr-defined]
        atoms = _at_least_single(codebook)
        gram, scores = atoms @ atoms.T, units @ atoms.T
        to_target = grad.to(cosine.dtype) * reciprocal
        to_self = to_target * cosine * reciprocal
        grad_weights = torch.empty_like(weight_map) if needs_weights else None
        by_mask = torch.zeros_like(scores)
        by_entry = torch.zeros_like(gram)
        grad_blocks = _blocks(weight_map if grad_weights is None else grad_weights)
        for (rows, ids, along, back), (out,) in zip(
            _blocks(weight_map, target_ids, to_target, to_self), grad_blocks, strict=True
        ):
            rows, ids = _at_least_single(rows), ids.clamp_min(0)
            pulled = rows * back[:, None]
            if needs_weights:
                pushed = scores.index_select(0, ids) * along[:, None]
                out.copy_(torch.addmm(pushed, pulled, gram, alpha=-1))
            if needs_codebook:
                by_entry.addmm_(rows.T, pulled)
                by_mask.index_add_(0, ids, rows * along[:, None])
        grad_codebook = None
        if needs_codebook:
            grad_codebook = torch.addmm(by_mask.T @ units, by_entry, atoms, alpha=-1).to(codebook.dtype)
        return grad_weights, grad_codebook, None, None
