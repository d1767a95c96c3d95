"""Sparse codes of lifted features over a codebook, in closed form: what the logits of LangSplatV2 would have to learn.

Both coders return the ``top_k`` entries of each layer with coefficients that are not negative and sum to one, as the
softmax of LangSplatV2 (arXiv 2507.07136) would; Gaussians that paint no mask get zeros.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from lightning_modules.functional.language_field.lifting import MaskWeights, product_chunks, weight_per_gaussian


def _check_top_k(top_k: int, size: int) -> None:
    if not 1 <= top_k <= size:
        raise ValueError(f"top_k must be between 1 and {size} (the codebook size), got {top_k}.")


def code_by_histogram(
    mask_weights: MaskWeights, mask_entries: Int[Tensor, "masks layers"], size: int, top_k: int
) -> tuple[Int[Tensor, "gaussians layers top_k"], Float[Tensor, "gaussians layers top_k"]]:
    """Codes each Gaussian by how often, by blending weight, its masks are assigned to each codebook entry.

    Args:
        mask_weights: A of one level.
        mask_entries: [M, layers] codebook entry of each mask in each layer.
        size: Entries of a layer.
        top_k: Entries kept per layer.

    Returns:
        The largest entries, ties by lower number, and their shares of the kept weight.

    Raises:
        ValueError: If ``top_k`` is out of range.
    """
    _check_top_k(top_k, size)
    shape = (mask_weights.num_gaussians, mask_entries.shape[1], top_k)
    entries = torch.empty(shape, dtype=torch.int64, device=mask_entries.device)
    values = mask_weights.weights.new_empty(shape)
    for layer, assigned in enumerate(mask_entries.T):
        atoms = F.one_hot(assigned.long(), size).to(values.dtype)
        for gaussians, histogram in product_chunks(mask_weights, atoms):
            # A stable sort breaks ties alike on every device, topk does not.
            counts, order = histogram.sort(dim=-1, descending=True, stable=True)
            counts = counts[:, :top_k]
            entries[gaussians, layer] = order[:, :top_k]
            values[gaussians, layer] = counts / counts.sum(dim=-1, keepdim=True).clamp(
                min=torch.finfo(values.dtype).tiny
            )
    return entries, values


def code_by_simplex_pursuit(
    mask_weights: MaskWeights,
    features: Float[Tensor, "masks channels"],
    codebook: Float[Tensor, "layers size channels"],
    top_k: int,
) -> tuple[Int[Tensor, "gaussians layers top_k"], Float[Tensor, "gaussians layers top_k"]]:
    """Codes the weighted mean feature of each Gaussian by the nearest mixture of few atoms that it finds.

    Orthogonal matching pursuit under the constraints that coefficients are not negative and sum to one: each step adds
    the atom along which the squared distance falls fastest and solves for all coefficients again (active set of Lawson
    and Hanson). A later layer codes what the layers below it leave over. All in Gram matrices: no [N, C] tensor exists.

    Args:
        mask_weights: A of one level.
        features: [M, C] mask features.
        codebook: Residual layers of atoms.
        top_k: Entries kept per layer.

    Raises:
        ValueError: If ``top_k`` is out of range.
    """
    num_layers, size, _ = codebook.shape
    _check_top_k(top_k, size)
    atoms = codebook.flatten(0, 1)
    gram = atoms @ atoms.T
    mask_products = features @ atoms.T
    weights = weight_per_gaussian(mask_weights).to(features.dtype)
    shape = (mask_weights.num_gaussians, num_layers, top_k)
    entries = torch.empty(shape, dtype=torch.int64, device=features.device)
    values = features.new_empty(shape)
    for gaussians, sums in product_chunks(mask_weights, mask_products):
        seen = weights[gaussians] > 0
        products = sums / torch.where(seen, weights[gaussians], 1)[:, None]
        for layer in range(num_layers):
            own = slice(layer * size, (layer + 1) * size)
            support, coefficients = simplex_pursuit(products[:, own], gram[own, own], top_k)
            mixtures = torch.zeros_like(products[:, own]).scatter_(1, support, coefficients)
            products = products - mixtures @ gram[own]
            entries[gaussians, layer] = support
            values[gaussians, layer] = torch.where(seen[:, None], coefficients, 0)
    return entries, values


def simplex_pursuit(
    products: Float[Tensor, "points size"], gram: Float[Tensor, "size size"], top_k: int
) -> tuple[Int[Tensor, "points top_k"], Float[Tensor, "points top_k"]]:
    """Approximates points by convex mixtures of at most ``top_k`` atoms, from inner products alone.

    Args:
        products: [P, K] inner products of the points with the atoms.
        gram: [K, K] inner products of the atoms.
        top_k: Atoms per mixture.

    Returns:
        Distinct atoms of each point and their coefficients, which sum to one; atoms that are not needed have zero.
    """
    num_points = products.shape[0]
    support = torch.zeros(num_points, top_k, dtype=torch.int64, device=products.device)
    coefficients = products.new_zeros(num_points, top_k)
    support[:, 0] = (products - 0.5 * gram.diagonal()).argmax(dim=-1)  # the nearest single atom
    coefficients[:, 0] = 1
    for step in range(1, top_k):
        mixtures = torch.zeros_like(products).scatter_(1, support[:, :step], coefficients[:, :step])
        # Moving weight to atom a changes half the squared distance at the rate -(x - mixture) . c_a, up to a constant.
        gains = (products - mixtures @ gram).scatter_(1, support[:, :step], -torch.inf)
        support[:, step] = gains.argmax(dim=-1)
        current = support[:, : step + 1]
        coefficients[:, : step + 1] = _simplex_least_squares(
            gram[current[:, :, None], current[:, None, :]], products.gather(1, current), coefficients[:, : step + 1]
        )
    return support, coefficients


def _simplex_least_squares(
    grams: Float[Tensor, "points atoms atoms"],
    products: Float[Tensor, "points atoms"],
    start: Float[Tensor, "points atoms"],
) -> Float[Tensor, "points atoms"]:
    """Minimises w' G w / 2 - w' b over the simplex from a feasible start, by Lawson and Hanson's inner loop.

    The last atom enters; each round solves with the free atoms, goes as far as the simplex allows and fixes the atoms
    that reach zero. One atom at least is fixed per round, so ``atoms`` rounds suffice.
    """
    num_points, num_atoms = products.shape
    # A relative ridge keeps the system regular where two atoms coincide.
    ridge = 1e-6 if grams.dtype == torch.float32 else 1e-12
    diagonal = grams.diagonal(dim1=1, dim2=2).mean(dim=1)[:, None, None]
    system = grams.new_zeros(num_points, num_atoms + 1, num_atoms + 1)
    identity = torch.eye(num_atoms, dtype=grams.dtype, device=grams.device)
    current, free = start, (start > 0).index_fill(1, torch.tensor(num_atoms - 1, device=start.device), True)
    for _ in range(num_atoms):
        both = free[:, :, None] & free[:, None, :]
        system[:, :-1, :-1] = torch.where(both, grams + ridge * diagonal * identity, identity)
        system[:, :-1, -1] = system[:, -1, :-1] = free.to(grams.dtype)
        target = torch.cat([torch.where(free, products, 0), products.new_ones(num_points, 1)], dim=1)
        solved = torch.linalg.solve(system, target)[:, :-1]
        falling = free & (solved < 0)
        ratios = torch.where(falling, current / (current - solved), torch.inf)
        reach = ratios.amin(dim=1, keepdim=True)
        current = torch.where(
            falling.any(dim=1, keepdim=True), current + reach.clamp(max=1) * (solved - current), solved
        )
        fixed = falling & (ratios <= reach)
        current = current.masked_fill(fixed, 0)
        free = free & ~fixed
        if not bool(falling.any()):
            break
    return current
