"""Signed distances to tokens and back: Direct3D-S2's sparse encoder and decoder around a quantizer."""

from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from typing_extensions import override

from lightning_modules.functional.sdf_vqvae.sparse_alignment import decoded_rows
from lightning_modules.networks.sdf_vqvae.convolution import Backend
from lightning_modules.networks.sdf_vqvae.decoder import DecodedSdf, SparseSDFDecoder
from lightning_modules.networks.sdf_vqvae.encoder import SparseSDFEncoder
from lightning_modules.networks.sdf_vqvae.quantizers import Quantized, QuantizerSettings, build_quantizer
from lightning_modules.networks.sdf_vqvae.sparse_tensor import SparseTensor, Voxels, checked_voxels

LARGEST_LOG_VARIANCE = 20.0


class Posterior(NamedTuple):
    """What the encoder says about each latent: a Gaussian, of which quantizers take the mean.

    Attributes:
        mean: [n, C] on the latents' voxels.
        log_variance: [n, C] between -30 and 20.
    """

    mean: SparseTensor
    log_variance: Float[Tensor, "latents channels"]

    def sample(self, noise: Float[Tensor, "latents channels"]) -> SparseTensor:
        """Returns the draw that standard normal noise stands for."""
        return self.mean.with_feats(self.mean.feats.float() + (0.5 * self.log_variance).exp() * noise)


class ShapeTokens(NamedTuple):
    """Shapes as tokens: all that a decoder needs.

    Attributes:
        coords: [T, 4] int32 rows (shape, x, y, z) of the latent grid, a shape's after each other. With four cells a
            token, z counts groups of four.
        code_ids: [T] int64.
        num_shapes: Shapes of the batch.
        resolution: Of the signed distances that they stand for.
    """

    coords: Int[Tensor, "tokens 4"]
    code_ids: Int[Tensor, " tokens"]
    num_shapes: int
    resolution: int


class Reconstruction(NamedTuple):
    """What training compares with the input.

    Attributes:
        decoded: Distances, and logits and truth of the children at each level.
        rows: [N] int64 row of each input voxel among the decoded ones; None where they are the same rows.
        quantized: Codes and losses; None where nothing was quantized.
        cells: Logits and truth of which cells of a token are occupied; None with one cell a token.
    """

    decoded: DecodedSdf
    rows: Int[Tensor, " voxels"] | None
    quantized: Quantized | None
    cells: tuple[Float[Tensor, "tokens cells"], Bool[Tensor, "tokens cells"]] | None

    @property
    def aligned(self) -> Float[Tensor, "voxels 1"]:
        """Decoded distances, row by row with the input's."""
        sdf = self.decoded.sdf.feats
        return sdf if self.rows is None else sdf[self.rows]


class SparseSDFVQVAE(nn.Module):
    """Encodes signed distances near a surface into codes on a coarse grid, and decodes these.

    With ``cells_per_token`` 4, four cells along z share a code, as in ShapeLLM-Omni: a 16^3 grid is 1024 tokens. Their
    latents are joined, zero where a cell is empty; a linear head tells from the code which of the four are occupied.

    Args:
        embed_dim: Channels of a latent, so of a code for each of its cells.
        model_channels: Of the transformers; see :class:`SparseSDFEncoder`.
        num_blocks: Of each transformer.
        num_heads: Of their attention; 0 gives heads of 64 channels.
        down_factor: Grid of the distances over grid of the latents: 4 or 8, also 2 or 16.
        num_embeddings: Codes.
        quantizer: How latents become codes.
        cells_per_token: Cells along z that share a code: 1, 2 or 4.
        predicts_occupancy: Whether the decoder prunes what it predicts to be empty, or keeps every child.
        window_size: Cells along an edge of an attention window.
        backend: Of the convolutions.
        include_self: Means divide by one more than there are, for weights of Direct3D-S2.
        checkpointing: Less memory for more time in training.
    """

    def __init__(
        self,
        embed_dim: int = 64,
        model_channels: int = 512,
        num_blocks: int = 4,
        *,
        num_heads: int = 0,
        down_factor: int = 8,
        num_embeddings: int = 8192,
        quantizer: QuantizerSettings | None = None,
        cells_per_token: int = 1,
        predicts_occupancy: bool = True,
        window_size: int = 8,
        backend: Backend = "torch",
        include_self: bool = False,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if cells_per_token not in (1, 2, 4):
            raise ValueError(f"cells_per_token must be 1, 2 or 4, got {cells_per_token}.")
        if num_embeddings < 1:
            raise ValueError(f"num_embeddings must be 1 or more, got {num_embeddings}.")
        settings = quantizer or QuantizerSettings()
        self.embed_dim, self.down_factor, self.cells_per_token = embed_dim, down_factor, cells_per_token
        self.config: dict[str, Any] = {  # what the weights depend on; plain values, for files
            "embed_dim": embed_dim,
            "model_channels": model_channels,
            "num_blocks": num_blocks,
            "num_heads": num_heads,
            "down_factor": down_factor,
            "num_embeddings": num_embeddings,
            "quantizer": asdict(settings),
            "cells_per_token": cells_per_token,
            "predicts_occupancy": predicts_occupancy,
            "window_size": window_size,
            "include_self": include_self,
        }
        self.encoder = SparseSDFEncoder(
            embed_dim,
            model_channels,
            num_blocks,
            num_heads,
            down_factor=down_factor,
            window_size=window_size,
            backend=backend,
            include_self=include_self,
            checkpointing=checkpointing,
        )
        self.decoder = SparseSDFDecoder(
            embed_dim,
            model_channels,
            num_blocks,
            num_heads,
            up_factor=down_factor,
            predicts_occupancy=predicts_occupancy,
            window_size=window_size,
            backend=backend,
            checkpointing=checkpointing,
        )
        self.quantizer = build_quantizer(num_embeddings, embed_dim * cells_per_token, quantizer or QuantizerSettings())
        self.cell_head = nn.Linear(embed_dim * cells_per_token, cells_per_token) if cells_per_token > 1 else None

    @property
    def levels(self) -> int:
        """Halvings between distances and latents."""
        return self.down_factor.bit_length() - 1

    def encode(self, sdf: SparseTensor) -> Posterior:
        """Returns the latents' means and log-variances.

        Raises:
            ValueError: If ``down_factor`` does not divide the resolution.
        """
        latents = self.encoder(sdf)
        mean, log_variance = latents.feats.chunk(2, dim=1)
        return Posterior(latents.with_feats(mean), log_variance.float().clamp(-30.0, LARGEST_LOG_VARIANCE))

    def joined(self, latents: SparseTensor) -> SparseTensor:
        """Returns what is quantized: the latents themselves, or the cells of each token side by side."""
        if self.cells_per_token == 1:
            return latents
        groups, rows, cells = _groups(latents.coords, self.cells_per_token)
        feats = latents.feats.float()
        table = feats.new_zeros(len(groups), self.cells_per_token, self.embed_dim)
        table = table.index_put((rows, cells), feats)
        return SparseTensor(table.flatten(1), Voxels(groups, latents.resolution, latents.num_shapes, is_sorted=True))

    def split(self, joined: SparseTensor, latents: Voxels) -> SparseTensor:
        """Returns what the decoder sees at given cells: the inverse of :meth:`joined`."""
        if self.cells_per_token == 1:
            return SparseTensor(joined.feats, latents)
        _, rows, cells = _groups(latents.coords, self.cells_per_token)
        return SparseTensor(joined.feats.unflatten(1, (self.cells_per_token, -1))[rows, cells], latents)

    @override
    def forward(self, sdf: SparseTensor, *, noise: Tensor | None = None, quantize: bool = True) -> Reconstruction:
        """Encodes, quantizes and decodes at the input's own voxels, as in training.

        Args:
            sdf: [N, 1] signed distances, -1 to 1.
            noise: [n, C] standard normal, to sample the posterior with; None takes its mean.
            quantize: Or leave the latents as they are, as a VAE does.

        Raises:
            ValueError: If ``down_factor`` does not divide the resolution.
        """
        posterior = self.encode(sdf)
        return self.reconstruct(sdf, posterior.mean if noise is None else posterior.sample(noise), quantize=quantize)

    def reconstruct(self, sdf: SparseTensor, latents: SparseTensor, *, quantize: bool = True) -> Reconstruction:
        """Does what :meth:`forward` does after the encoder."""
        joined = self.joined(latents)
        quantized = self.quantizer.quantize(joined.feats) if quantize else None
        seen = joined.with_feats(self.quantizer.continuous(joined.feats) if quantized is None else quantized.latents)
        given = self.split(seen, latents.voxels)
        cells = None
        if self.cell_head is not None:
            _, rows, places = _groups(latents.coords, self.cells_per_token)
            occupied = torch.zeros(len(joined.feats), self.cells_per_token, dtype=torch.bool, device=rows.device)
            cells = (self.cell_head(seen.feats), occupied.index_put((rows, places), torch.ones_like(rows) > 0))
        if self.decoder.predicts_occupancy:
            return Reconstruction(self.decoder(given, sdf.voxels), None, quantized, cells)
        rows = decoded_rows(sdf.voxels.ancestor_rows(self.levels), sdf.coords, self.levels)
        return Reconstruction(self.decoder(given), rows, quantized, cells)

    def tokens(self, sdf: SparseTensor) -> ShapeTokens:
        """Returns the tokens of shapes.

        Raises:
            ValueError: If ``down_factor`` does not divide the resolution.
        """
        joined = self.joined(self.encode(sdf).mean)
        code_ids = self.quantizer.quantize(joined.feats).code_ids
        return ShapeTokens(joined.coords, code_ids, sdf.num_shapes, sdf.resolution)

    def decode(self, tokens: ShapeTokens) -> DecodedSdf:
        """Returns the distances that tokens stand for; the decoder itself says where the surface is.

        Raises:
            ValueError: If places are out of range or doubled, ids are not of the codebook, or the resolution does not
                fit.
        """
        num_codes = self.quantizer.num_codes
        if len(tokens.code_ids) and not 0 <= int(tokens.code_ids.min()) <= int(tokens.code_ids.max()) < num_codes:
            raise ValueError(
                f"Token ids are from {int(tokens.code_ids.min())} to {int(tokens.code_ids.max())}, but the codebook "
                f"has {num_codes} codes, from 0. Give tokens that this model has made."
            )
        if tokens.resolution < 1 or tokens.resolution % self.down_factor:
            raise ValueError(
                f"The tokens are for a resolution of {tokens.resolution}, but the model has a down_factor of "
                f"{self.down_factor}, which does not divide it. Give tokens that this model has made."
            )
        cells = tokens.resolution // self.down_factor
        groups = -(-cells // self.cells_per_token)
        if self.cells_per_token > 1 and bool((tokens.coords[:, 3] >= groups).any()):
            raise ValueError(
                f"A token has z {int(tokens.coords[:, 3].max())}; allowed with {self.cells_per_token} cells a token: 0 "
                f"to {groups - 1}. Give tokens that this model has made."
            )
        places = checked_voxels(tokens.coords, cells, tokens.num_shapes)
        return self.decode_latents(SparseTensor(self.quantizer.look_up(tokens.code_ids), places))

    def decode_latents(self, joined: SparseTensor) -> DecodedSdf:
        """Decodes what the quantizer returns, or would; nothing else of the input is known."""
        if self.cell_head is None:
            return self.decoder(joined)
        coords = joined.coords[:, None].repeat(1, self.cells_per_token, 1)
        cells = torch.arange(self.cells_per_token, device=coords.device, dtype=coords.dtype)
        coords[:, :, 3] = coords[:, :, 3] * self.cells_per_token + cells
        # Where the cells along z are no multiple of a token's, the last token reaches beyond the grid.
        logits = self.cell_head(joined.feats).masked_fill(coords[:, :, 3] >= joined.resolution, -torch.inf)
        kept = (logits > 0) | nn.functional.one_hot(logits.argmax(1), self.cells_per_token).bool()
        voxels = Voxels(coords[kept], joined.resolution, joined.num_shapes, is_sorted=joined.voxels.is_sorted)
        return self.decoder(self.split(joined, voxels))


def _groups(coords: Tensor, cells: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the groups of cells along z, the row of each cell's group, and the cell's place in it."""
    grouped = torch.cat([coords[:, :3], coords[:, 3:] // cells], dim=1)
    groups, rows = grouped.unique(dim=0, return_inverse=True)
    return groups, rows, (coords[:, 3] % cells).long()
