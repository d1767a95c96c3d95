"""Transformer blocks whose attention stays within shifted windows, and the encoding of positions."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from typing_extensions import override

from lightning_modules.functional.sdf_vqvae.window_partition import WindowPartition, windowed_attention
from lightning_modules.networks.sdf_vqvae.sparse_tensor import SparseTensor


class WindowedSelfAttention(nn.Module):
    """Multi-head attention among the voxels of each window.

    Args:
        channels: Of the features.
        num_heads: Divides the channels.
    """

    def __init__(self, channels: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.to_qkv = nn.Linear(channels, 3 * channels)
        self.to_out = nn.Linear(channels, channels)

    @override
    def forward(
        self, feats: Float[Tensor, "voxels channels"], partition: WindowPartition
    ) -> Float[Tensor, "voxels channels"]:
        """Returns what each voxel gathers from its window."""
        qkv = self.to_qkv(feats).unflatten(1, (3, self.num_heads, -1))
        return self.to_out(windowed_attention(qkv, partition))


class FeedForward(nn.Module):
    """Two linear maps with a GELU (its tanh form) between them.

    Args:
        channels: In and out; four times as many between.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(channels, 4 * channels), nn.GELU(approximate="tanh"), nn.Linear(4 * channels, channels)
        )

    @override
    def forward(self, feats: Float[Tensor, "voxels channels"]) -> Float[Tensor, "voxels channels"]:
        """Returns new features."""
        return self.mlp(feats)


class SparseTransformerBlock(nn.Module):
    """Attention in windows and a feed-forward part, each after a norm without parameters and beside its input.

    Args:
        channels: Of the features.
        num_heads: Divides the channels.
        window_size: Voxels along an edge of a window.
        shift: Of the windows; half a window in every other block joins what borders cut (Swin, arXiv 2103.14030).
    """

    def __init__(self, channels: int, num_heads: int, *, window_size: int = 8, shift: int = 0) -> None:
        super().__init__()
        self.window_size, self.shift = window_size, shift
        self.norm1 = nn.LayerNorm(channels, elementwise_affine=False, eps=1e-6)
        self.attn = WindowedSelfAttention(channels, num_heads)
        self.norm2 = nn.LayerNorm(channels, elementwise_affine=False, eps=1e-6)
        self.mlp = FeedForward(channels)

    @override
    def forward(self, tensor: SparseTensor) -> SparseTensor:
        """Returns new features on the same voxels."""
        partition = tensor.voxels.windows(self.window_size, self.shift)
        feats = tensor.feats + self.attn(self.norm1(tensor.feats), partition)
        return tensor.with_feats(feats + self.mlp(self.norm2(feats)))


def position_encoding(
    positions: Float[Tensor, "voxels 3"], channels: int, *, slowest: float = 10_000.0
) -> Float[Tensor, "voxels channels"]:
    """Encodes each axis by sines and cosines of falling frequency; channels left over are zero.

    A sixth of the channels (rounded down) are sines of x, then as many cosines of x, then the same of y and of z.

    Args:
        positions: In voxels.
        channels: Of the result.
        slowest: Ratio of the fastest frequency, 1 per voxel, to the one after the slowest.
    """
    num_frequencies = channels // 6
    exponents = torch.arange(num_frequencies, device=positions.device, dtype=torch.float32) / max(num_frequencies, 1)
    angles = positions.float()[:, :, None] * slowest**-exponents
    encoded = torch.cat([angles.sin(), angles.cos()], dim=2).flatten(1)
    return F.pad(encoded, (0, channels - encoded.shape[1]))


class SparseTransformer(nn.Module):
    """What encoder and decoder share: a linear map, positions, blocks, a norm.

    Subclasses hold ``input_layer`` and ``blocks`` under their own names, which are those of the weights.

    Args:
        inputs: Channels in.
        channels: Of the blocks.
        num_blocks: Windows are shifted in every other one.
        num_heads: Divides the channels.
        window_size: Voxels along an edge of a window.
        checkpointing: Computes each block again on the way back instead of keeping its activations.
    """

    def __init__(
        self, inputs: int, channels: int, num_blocks: int, num_heads: int, *, window_size: int, checkpointing: bool
    ) -> None:
        super().__init__()
        if channels % num_heads:
            raise ValueError(f"num_heads must divide the {channels} channels, got {num_heads}.")
        self.channels = channels
        self.checkpointing = checkpointing
        self.input_layer = nn.Linear(inputs, channels)
        self.blocks = nn.ModuleList(
            SparseTransformerBlock(
                channels, num_heads, window_size=window_size, shift=window_size // 2 if index % 2 else 0
            )
            for index in range(num_blocks)
        )

    def run_block(self, block: nn.Module, *arguments: object) -> Any:
        """Calls a block, again on the way back where checkpointing is on."""
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *arguments, use_reentrant=False)
        return block(*arguments)

    def transform(self, tensor: SparseTensor, position_scale: float) -> SparseTensor:
        """Returns the normalised features after all blocks.

        Args:
            tensor: Features of ``inputs`` channels.
            position_scale: Of the coordinates before they are encoded.
        """
        positions = tensor.coords[:, 1:].float() * position_scale
        encoding = position_encoding(positions, self.channels).to(self.input_layer.weight.dtype)
        # Under autocast the sum is float32, and with it all that blocks add to.
        tensor = tensor.with_feats(self.input_layer(tensor.feats) + encoding)
        for block in self.blocks:
            tensor = self.run_block(block, tensor)
        return tensor.with_feats(F.layer_norm(tensor.feats, tensor.feats.shape[1:]))
