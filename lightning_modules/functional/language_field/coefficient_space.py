"""Cosines with decoded features, computed from the coefficients alone.

A decoded feature f = w S is linear in the coefficients w [K] over the codebook S [K, C]. With the Gram matrix
G = S S^T its length is sqrt(w G w^T), and its inner product with any g is w (S g): exact, in K numbers per pixel
instead of C.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_modules.functional.answers.relevancy import contrast

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
    dtype = _working_dtype(weight_map)
    with torch.autocast(weight_map.device.type, enabled=False):
        return torch.cat([_norms(rows.to(dtype), gram.to(dtype)) for (rows,) in _blocks(weight_map)])


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
    return torch.cat(list(_cosines(weight_map, codebook, texts, norms)), dim=1).T


def relevancy(
    weight_map: Float[Tensor, "pixels entries"],
    codebook: Float[Tensor, "entries channels"],
    positives: Float[Tensor, "prompts channels"],
    negatives: Float[Tensor, "negatives channels"],
    *,
    temperature: float = 10.0,
    norms: Float[Tensor, " pixels"] | None = None,
) -> Float[Tensor, "pixels prompts"]:
    """Returns LERF's relevancy of each pixel to each prompt, 0 to 1: ``relevancy.relevancy`` of the decoded features.

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
    num_prompts = positives.shape[0]
    blocks = _cosines(weight_map, codebook, torch.cat([positives, negatives]), norms)
    answers = [contrast(cosines[:num_prompts].T, cosines[num_prompts:].T, temperature).T for cosines in blocks]
    return torch.cat(answers, dim=1).T


def cosine_similarity_to_targets(
    weight_map: Float[Tensor, "pixels entries"],
    codebook: Float[Tensor, "entries channels"],
    targets: Float[Tensor, "masks channels"],
    target_ids: Int[Tensor, " pixels"],
) -> Float[Tensor, " pixels"]:
    """Returns the cosine between each pixel's decoded feature and the feature of its mask.

    LangSplatV2's cosine loss is 1 - this, averaged. Differentiable once with respect to the weight map and the
    codebook, in closed form; nothing of size pixels x channels is made, forward or backward. Targets are constants.

    Args:
        weight_map: Coefficients. To train on parts of a wider map, ``split`` it once rather than slicing each part, so
            that the backward pass joins the parts in one go.
        codebook: Entries of all layers.
        targets: Features of the masks, of any length; they get no gradient.
        target_ids: Row of ``targets`` of each pixel. A pixel of no mask (below 0) has cosine 0 and no gradient, and so
            has one whose decoded feature or target is zero.
    """
    return _CosineToTargets.apply(weight_map, codebook, targets, target_ids)


class _CosineToTargets(torch.autograd.Function):
    """Closed form of ``cosine_similarity_to_targets``.

    With c the incoming gradient of a pixel, n = |f| and a = A[m]:
    ``d/dw = c/n a - (c cos / n^2) G w`` and ``d/dS = (W^T diag(c/n) onehot) T - (W^T diag(c cos / n^2) W) S``.
    """

    @staticmethod
    def forward(ctx: Any, weight_map: Tensor, codebook: Tensor, targets: Tensor, target_ids: Tensor) -> Tensor:
        dtype = _working_dtype(weight_map)
        with torch.autocast(weight_map.device.type, enabled=False):
            atoms, units = codebook.to(dtype), F.normalize(targets.to(dtype), dim=1)
            if units.shape[0] == 0:  # every pixel is without a mask, but needs a row to look up
                units = units.new_zeros(1, units.shape[1])
            gram, scores = atoms @ atoms.T, units @ atoms.T
            cosines, reciprocals = [], []
            for rows, ids in _blocks(weight_map, target_ids):
                rows = rows.to(dtype)
                reciprocal = _reciprocal(_norms(rows, gram)) * (ids >= 0)
                cosines.append((rows * scores.index_select(0, ids.clamp_min(0))).sum(1) * reciprocal)
                reciprocals.append(reciprocal)
            cosine, reciprocal = torch.cat(cosines), torch.cat(reciprocals)
        ctx.save_for_backward(weight_map, codebook, units, target_ids, cosine, reciprocal)
        return cosine

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        weight_map, codebook, units, target_ids, cosine, reciprocal = ctx.saved_tensors
        needs_weights, needs_codebook = ctx.needs_input_grad[:2]
        dtype = cosine.dtype
        with torch.autocast(weight_map.device.type, enabled=False):
            atoms = codebook.to(dtype)
            gram, scores = atoms @ atoms.T, units @ atoms.T
            along_target = grad * reciprocal
            along_self = along_target * cosine * reciprocal
            by_mask, by_entry = torch.zeros_like(scores), torch.zeros_like(gram)
            grad_weights = torch.empty_like(weight_map) if needs_weights else weight_map
            for rows, out, ids, to_target, to_self in _blocks(
                weight_map, grad_weights, target_ids, along_target, along_self
            ):
                rows, ids = rows.to(dtype), ids.clamp_min(0)
                pulled = rows * to_self[:, None]
                if needs_weights:
                    pushed = scores.index_select(0, ids).mul_(to_target[:, None])
                    out.copy_(pushed.addmm_(pulled, gram, alpha=-1))
                if needs_codebook:
                    by_entry.addmm_(rows.T, pulled)
                    by_mask.index_add_(0, ids, rows * to_target[:, None])
            grad_codebook = torch.addmm(by_mask.T @ units, by_entry, atoms, alpha=-1) if needs_codebook else None
        return grad_weights if needs_weights else None, grad_codebook, None, None


def _cosines(weight_map: Tensor, codebook: Tensor, texts: Tensor, norms: Tensor | None) -> Iterator[Tensor]:
    """Yields the [texts, rows] cosines of each block of pixels."""
    dtype = _working_dtype(weight_map)
    with torch.autocast(weight_map.device.type, enabled=False):
        atoms = codebook.to(dtype)
        scores = F.normalize(texts.to(dtype), dim=1) @ atoms.T
        gram = gram_matrix(atoms) if norms is None else None
        for rows, *lengths in _blocks(weight_map, *([] if norms is None else [norms])):
            rows = rows.to(dtype)
            length = _norms(rows, gram) if gram is not None else lengths[0]
            # Few texts, many pixels: a product of this orientation is several times faster than its transpose.
            yield (scores @ rows.T) * _reciprocal(length)


def _norms(weights: Tensor, gram: Tensor) -> Tensor:
    squares = ((weights @ gram) * weights).sum(1)
    # Below this, coefficients of both signs have cancelled and the rest is rounding.
    sizes = torch.linalg.vector_norm(weights.detach(), dim=1)
    noise = 4 * torch.finfo(gram.dtype).eps * gram.detach().diagonal().amax() * sizes.square()
    has_direction = squares > noise.clamp_min(MIN_NORM**2)
    return torch.where(has_direction, squares, 1).sqrt() * has_direction


def _reciprocal(norms: Tensor) -> Tensor:
    positive = norms > 0
    return torch.where(positive, norms, 1).reciprocal() * positive


def _working_dtype(weight_map: Tensor) -> torch.dtype:
    return torch.promote_types(weight_map.dtype, torch.float32)


def _blocks(weight_map: Tensor, *per_pixel: Tensor) -> Iterator[Sequence[Tensor]]:
    """Splits a weight map and whatever runs along its pixels into blocks of rows."""
    limit = CPU_BLOCK_BYTES if weight_map.device.type == "cpu" else DEVICE_BLOCK_BYTES
    rows = max(1, limit // max(1, weight_map.shape[1] * weight_map.element_size()))
    return zip(*(tensor.split(rows) for tensor in (weight_map, *per_pixel)), strict=True)
