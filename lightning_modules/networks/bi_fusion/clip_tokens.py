"""Tokens of images from a frozen CLIP."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from typing_extensions import override

from lightning_modules.functional.bi_fusion.dense_clip import (
    DenseMode,
    DenseTokens,
    check_tower,
    first_blocks,
    image_embedding,
    last_blocks,
    patch_grid,
    run_blocks,
    tower_hash,
)
from lightning_modules.functional.language_features.tile_features import tile_format
from lightning_modules.functional.open_clip_loading import image_tower, load_open_clip, random_open_clip


class DenseClip(nn.Module):
    """A frozen image tower of OpenCLIP that says what is in each patch.

    The tower stays in evaluation mode, follows ``.to()``, and is neither among the parameters nor in the state dict: it
    is the same for everyone, and 345 MB. Where some blocks are trained, copies of them are: they start from the tower's
    and give ``tokens``, while ``teacher_tokens`` and ``clip_global`` remain those of the frozen tower, for a teacher
    that learns from its student forgets the texts.

    Args:
        visual: An image tower of OpenCLIP's classes, such as ``model.visual``.
        dense_mode: What the last block does (``functional.bi_fusion.dense_clip``).
        freeze_blocks: Number of last blocks that are trained; 0 = everything is frozen.
        use_amp: Compute under autocast: float16 on CUDA, bfloat16 on CPUs that multiply it natively.
        cpu_offload: Keep the frozen tower on the CPU, wherever the rest is, for GPUs with under 8 GB.

    Attributes:
        weight_hash: SHA-256 of the tower's weights.

    Raises:
        ValueError: If the tower has no dense modes, ``dense_mode`` is unknown, or ``freeze_blocks`` is out of range.
    """

    visual: Any

    def __init__(
        self,
        visual: Any,
        dense_mode: DenseMode = "clearclip",
        freeze_blocks: int = 0,
        use_amp: bool = True,
        cpu_offload: bool = False,
    ) -> None:
        super().__init__()
        check_tower(visual, dense_mode)
        num_blocks = len(visual.transformer.resblocks)
        if not 0 <= freeze_blocks <= num_blocks:
            raise ValueError(
                f"freeze_blocks is {freeze_blocks}; allowed: 0 (everything is frozen) to {num_blocks} (that many last "
                "blocks are trained)."
            )
        self.dense_mode = dense_mode
        self.freeze_blocks = freeze_blocks
        self.use_amp = use_amp
        self.cpu_offload = cpu_offload
        visual = visual.eval().requires_grad_(False)
        self.weight_hash = tower_hash(visual)
        object.__setattr__(self, "visual", visual)  # not as a child, whose weights would be saved and trained
        if freeze_blocks:
            trained = copy.deepcopy(visual.transformer.resblocks[-freeze_blocks:])
            self.trained_blocks = nn.ModuleList(trained).requires_grad_(True)
            self.trained_norm = copy.deepcopy(visual.ln_post).requires_grad_(True)
            if dense_mode in ("maskclip", "clearclip"):  # which leave out these layers of the last block
                for part in (self.trained_blocks[-1].ln_2, self.trained_blocks[-1].mlp):
                    part.requires_grad_(False)

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """Takes the frozen tower along to other devices and dtypes."""
        if not self.cpu_offload:
            self.visual._apply(fn)
        return super()._apply(fn, recurse)

    @property
    def projection(self) -> Float[Tensor, "tokens text"]:
        """[D, C] from tokens to the space of texts."""
        return self.visual.proj.detach()

    @override
    def forward(self, images: UInt8[Tensor, "images height width 3"]) -> DenseTokens:
        """Returns float32 tokens and embeddings on the images' device.

        Args:
            images: RGB, squashed to the size to encode them at; sides are multiples of the tower's patches.
        """
        frozen = next(self.visual.parameters())
        look = tile_format(self.visual)
        mean, std = (torch.tensor(values, device=frozen.device).view(3, 1, 1) for values in (look.mean, look.std))
        pixels = ((images.to(frozen.device).movedim(3, 1).float() / 255 - mean) / std).to(frozen.dtype)
        blocks, num_left = self.visual.transformer.resblocks, max(self.freeze_blocks, 1)
        size = pixels.shape[-2], pixels.shape[-1]
        with torch.no_grad(), self._autocast(frozen.device):
            x = first_blocks(self.visual, pixels, num_left)
            before_last = run_blocks(blocks[-num_left:-1], x)
            clip_global = image_embedding(self.visual, before_last)
            teacher = last_blocks(blocks[-1:], self.visual.ln_post, before_last, self.dense_mode)
        teacher_tokens = patch_grid(self.visual, teacher, size).float().to(images.device)
        tokens = teacher_tokens
        if self.freeze_blocks:
            trained = next(self.trained_blocks.parameters())
            with self._autocast(trained.device):
                own = last_blocks(self.trained_blocks, self.trained_norm, x.to(trained.device), self.dense_mode)
            tokens = patch_grid(self.visual, own, size).float().to(images.device)
        return DenseTokens(tokens, clip_global.to(images.device), teacher_tokens)

    def _autocast(self, device: torch.device) -> torch.autocast:
        if device.type != "cpu":
            return torch.autocast(device.type, dtype=torch.float16, enabled=self.use_amp)
        is_native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.use_amp and is_native)


class ClipTokens(DenseClip):
    """The tower of an OpenCLIP model by tag or local file.

    Args:
        model_name: Architecture, one of ``open_clip.list_models()``.
        pretrained: Tag of the weights (downloaded once from the Hugging Face hub), or the path of a local file.
        dense_mode: As in :class:`DenseClip`.
        freeze_blocks: Likewise.
        use_amp: Likewise.
        cpu_offload: Likewise.

    Raises:
        ValueError: If the architecture or the tag is unknown or has no dense modes, or the file does not fit it.
        FileNotFoundError: If the weights are neither a local file nor in reach.
    """

    def __init__(
        self,
        model_name: str = "ViT-B-16",
        pretrained: str = "laion2b_s34b_b88k",
        dense_mode: DenseMode = "clearclip",
        freeze_blocks: int = 0,
        use_amp: bool = True,
        cpu_offload: bool = False,
    ) -> None:
        visual = image_tower(load_open_clip(model_name, pretrained))
        super().__init__(visual, dense_mode, freeze_blocks, use_amp, cpu_offload)


class RandomClipTokens(DenseClip):
    """A small tower of OpenCLIP's own class with random weights: no downloads, and no meaning in words.

    Args:
        seed: Of the weights.
        embed_dim: Channels of the space of texts.
        image_size: Height and width that its positions are for.
        dense_mode: As in :class:`DenseClip`.
        freeze_blocks: Likewise.
        use_amp: Likewise.
        cpu_offload: Likewise.
    """

    def __init__(
        self,
        seed: int = 0,
        embed_dim: int = 512,
        image_size: int = 224,
        dense_mode: DenseMode = "clearclip",
        freeze_blocks: int = 0,
        use_amp: bool = False,
        cpu_offload: bool = False,
    ) -> None:
        visual = image_tower(random_open_clip(seed, embed_dim, image_size))
        super().__init__(visual, dense_mode, freeze_blocks, use_amp, cpu_offload)
