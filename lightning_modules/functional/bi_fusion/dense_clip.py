"""What an OpenCLIP image tower says of each patch, in ways that texts can be compared with.

The last block of CLIP mixes all patches into the class token and is not trained to leave them their own meaning. The
dense modes change that block alone and need no training:

========== ============================ ================= =========================================================
mode       attention of the last block  residual and MLP  source
========== ============================ ================= =========================================================
vanilla    softmax(q k)                 yes               CLIP as it is
maskclip   each patch to itself         no                MaskCLIP (arXiv 2112.01071)
sclip      softmax(q q) + softmax(k k)  yes               SCLIP (arXiv 2312.01597); the sum is not halved
clearclip  softmax(q q)                 no                ClearCLIP (arXiv 2407.12442)
========== ============================ ================= =========================================================

With OpenCLIP's ViT-B/16 of LAION-2B, ClearCLIP's table of five 2D benchmarks goes from 13.8 (vanilla) to 37.9 mIoU
(clearclip). The modes differ in the tokens alone: the image's embedding is always that of the unchanged tower.
"""

import hashlib
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

DenseMode = Literal["vanilla", "maskclip", "sclip", "clearclip"]


class DenseTokens(NamedTuple):
    """What a tower says of B images.

    Attributes:
        tokens: [B, D, gh, gw] of the patches, normalised, before the projection to texts. In the space of texts they
            are ``tokens.movedim(1, -1) @ projection``.
        clip_global: [B, C] unit embeddings of the whole images.
        teacher_tokens: [B, D, gh, gw] the tokens of the tower as it was trained by CLIP; ``tokens`` themselves unless
            some of its blocks are trained further.
    """

    tokens: Float[Tensor, "images tokens grid_height grid_width"]
    clip_global: Float[Tensor, "images text"]
    teacher_tokens: Float[Tensor, "images tokens grid_height grid_width"]


def check_tower(visual: nn.Module, mode: str) -> None:
    """Makes sure that the modes are defined for a tower.

    Raises:
        ValueError: If it is no transformer of OpenCLIP's plain kind, or the mode is unknown.
    """
    from open_clip.transformer import ResidualAttentionBlock, VisionTransformer

    if mode not in get_args(DenseMode):
        raise ValueError(f"dense_mode is {mode!r}; allowed: {', '.join(get_args(DenseMode))}.")
    is_plain = (
        isinstance(visual, VisionTransformer)
        and visual.attn_pool is None
        and visual.proj is not None
        and all(type(block) is ResidualAttentionBlock for block in visual.transformer.resblocks)
    )
    if not is_plain:
        raise ValueError(
            f"model_name gives a {type(visual).__name__} whose patches have no dense modes; allowed: transformers with "
            "a class token or mean pooling, such as ViT-B-16."
        )


def dense_tokens(visual: Any, images: Float[Tensor, "images 3 height width"], mode: DenseMode) -> DenseTokens:
    """Returns the tokens of all patches and the embeddings of the images.

    Args:
        visual: A tower that ``check_tower`` lets pass.
        images: With the tower's mean and deviation taken out; sides are multiples of its patches. Positions are
            interpolated where the size is not the tower's own.
        mode: As above.
    """
    x = first_blocks(visual, images, 1)
    tokens = last_blocks(visual.transformer.resblocks[-1:], visual.ln_post, x, mode)
    tokens = patch_grid(visual, tokens, (images.shape[2], images.shape[3]))
    return DenseTokens(tokens, image_embedding(visual, x), tokens)


def first_blocks(
    visual: Any, images: Float[Tensor, "images 3 height width"], num_left: int
) -> Float[Tensor, "images tokens channels"]:
    """Runs a tower up to its last ``num_left`` blocks; the first token is the class token.

    Raises:
        ValueError: If a side is no multiple of the tower's patches.
    """
    size, patch = tuple(images.shape[-2:]), tuple(visual.patch_size)
    if size[0] % patch[0] or size[1] % patch[1] or 0 in size:
        raise ValueError(f"images are {size[0]} x {size[1]}; allowed: multiples of the tower's patch, {patch}.")
    grid = size[0] // patch[0], size[1] // patch[1]
    x = visual.conv1(images).flatten(2).transpose(1, 2)
    x = torch.cat([visual.class_embedding.to(x.dtype).expand(len(x), 1, -1), x], dim=1)
    x = visual.ln_pre(x + _positions(visual, grid).to(x.dtype))
    blocks = visual.transformer.resblocks
    return run_blocks(blocks[: len(blocks) - num_left], x)


def last_blocks(
    blocks: Iterable[Any], ln_post: Any, x: Float[Tensor, "images tokens channels"], mode: DenseMode
) -> Float[Tensor, "images tokens channels"]:
    """Runs the last blocks, the very last in a dense mode, and the norm after them; float32, without projection."""
    *before, last = blocks
    x = run_blocks(before, x)
    if mode == "vanilla":
        x = run_blocks([last], x)
    else:
        attended = last.ls_1(_attend_to_alike(last.attn, last.ln_1(x), mode))
        if mode == "sclip":
            x = x + attended
            x = x + last.ls_2(last.mlp(last.ln_2(x)))
        else:
            x = attended
    with torch.autocast(x.device.type, enabled=False):
        return ln_post(x.to(ln_post.weight.dtype))


def image_embedding(visual: Any, x: Float[Tensor, "images tokens channels"]) -> Float[Tensor, "images text"]:
    """Returns unit embeddings of images from the input of a tower's last block, which runs unchanged.

    Where the class token is the image's, the block runs for it alone.
    """
    last = visual.transformer.resblocks[-1]
    if visual.pool_type == "tok":
        normed = last.ln_1(x) if last.attn.batch_first else last.ln_1(x).transpose(0, 1).contiguous()
        query = normed[:, :1] if last.attn.batch_first else normed[:1]
        attended = last.attn(query, normed, normed, need_weights=False)[0].reshape(len(x), 1, -1)
        x = x[:, :1] + last.ls_1(attended)
        x = x + last.ls_2(last.mlp(last.ln_2(x)))
    else:
        x = run_blocks([last], x)
    with torch.autocast(x.device.type, enabled=False):
        pooled, _ = visual._pool(x.to(visual.proj.dtype))
        return F.normalize((pooled @ visual.proj).float(), dim=-1)


def patch_grid(
    visual: Any, tokens: Float[Tensor, "images tokens channels"], size: tuple[int, int]
) -> Float[Tensor, "images channels grid_height grid_width"]:
    """Lays out the tokens of patches as a picture, without the class token."""
    height, width = size[0] // visual.patch_size[0], size[1] // visual.patch_size[1]
    return tokens[:, 1:].transpose(1, 2).unflatten(2, (height, width)).contiguous()


def tower_hash(visual: nn.Module) -> str:
    """Returns a SHA-256 of a tower's weights, in hexadecimals: what cached tokens are valid for."""
    digest = hashlib.sha256()
    for name, value in sorted(visual.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def run_blocks(
    blocks: Iterable[Any], x: Float[Tensor, "images tokens channels"]
) -> Float[Tensor, "images tokens channels"]:
    """Runs blocks in the order of dimensions that they are set to (``open_clip_loading.image_tower``)."""
    for block in blocks:
        x = block(x) if block.attn.batch_first else block(x.transpose(0, 1).contiguous()).transpose(0, 1)
    return x


def _attend_to_alike(
    attention: nn.MultiheadAttention, x: Float[Tensor, "images tokens channels"], mode: DenseMode
) -> Float[Tensor, "images tokens channels"]:
    """Attends as a dense mode does, with the weights of the attention, and projects."""
    *leading, channels = x.shape
    rows = x.reshape(-1, channels)  # in two dimensions, or autocast on CPU copies the weights for every image
    projected = F.linear(rows, attention.in_proj_weight, attention.in_proj_bias).view(*leading, 3, -1)
    if mode == "maskclip":
        mixed = projected[..., 2, :]
    else:
        q, k, v = projected.unflatten(-1, (attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, q, v)
        if mode == "sclip":
            mixed = mixed + F.scaled_dot_product_attention(k, k, v)
        mixed = mixed.transpose(1, 2).flatten(2)
    return attention.out_proj(mixed.reshape(-1, channels)).view(x.shape)


def _positions(visual: Any, grid: tuple[int, int]) -> Float[Tensor, "tokens channels"]:
    """Returns the embeddings of positions at another grid, interpolated as OpenCLIP does when it loads weights."""
    embedding = visual.positional_embedding
    own = tuple(visual.grid_size)
    if grid == own:
        return embedding
    picture = embedding[1:].float().T.unflatten(1, own)[None]
    resized = F.interpolate(picture, size=grid, mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([embedding[:1], resized[0].flatten(1).T.to(embedding.dtype)])
