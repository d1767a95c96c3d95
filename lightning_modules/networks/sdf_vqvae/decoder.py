"""The decoder: latents on a coarse grid to signed distances near the surface (Direct3D-S2's sparse SDF VAE)."""

from itertools import pairwise
from typing import NamedTuple

from jaxtyping import Bool, Float
from torch import Tensor, nn
from typing_extensions import override

from lightning_modules.networks.sdf_vqvae.attention import SparseTransformer
from lightning_modules.networks.sdf_vqvae.blocks import SparseSubdivideBlock3d
from lightning_modules.networks.sdf_vqvae.convolution import Backend, SparseLinear
from lightning_modules.networks.sdf_vqvae.encoder import level_widths
from lightning_modules.networks.sdf_vqvae.sparse_tensor import SparseTensor, Voxels


class DecodedSdf(NamedTuple):
    """What a decoder makes of latents.

    Attributes:
        sdf: [M, 1] signed distances in -1 to 1. With a guide its rows are the guide's; without guide and prediction
            they are all descendants of the latents in the order that ``decoded_rows`` computes.
        occupancy: For each level, the coarsest first, logits that each of a voxel's eight children is occupied; empty
            where the decoder predicts none.
        occupied: For each level, which of the children are, of the guide; empty without a guide.
    """

    sdf: SparseTensor
    occupancy: tuple[Float[Tensor, "parents 8"], ...]
    occupied: tuple[Bool[Tensor, "parents 8"], ...]


class SparseSDFDecoder(SparseTransformer):
    """Windowed transformer blocks, then subdivisions down to signed distances.

    Where we differ from Direct3D-S2, whose decoder keeps all eight children at every step (of which most are far from
    the surface): a head predicts which children are occupied (TRELLIS.2, TripoSF). In training the children are those
    of the true voxels, so the output is already aligned with them. ``predicts_occupancy=False`` is their form.

    Args:
        latent_channels: Of a latent.
        model_channels: As in :class:`SparseSDFEncoder`.
        num_blocks: As there.
        num_heads: As there.
        up_factor: The encoder's ``down_factor``.
        predicts_occupancy: Whether to predict which children to keep, or keep all.
        window_size: As there.
        backend: As there.
        checkpointing: As there.
    """

    def __init__(
        self,
        latent_channels: int = 16,
        model_channels: int = 512,
        num_blocks: int = 4,
        num_heads: int = 0,
        *,
        up_factor: int = 8,
        predicts_occupancy: bool = True,
        window_size: int = 8,
        backend: Backend = "torch",
        checkpointing: bool = False,
    ) -> None:
        widths = level_widths(model_channels, up_factor)[::-1]
        super().__init__(
            latent_channels,
            model_channels,
            num_blocks,
            num_heads or max(model_channels // 64, 1),
            window_size=window_size,
            checkpointing=checkpointing,
        )
        self.predicts_occupancy = predicts_occupancy
        self.upsample = nn.ModuleList(
            SparseSubdivideBlock3d(coarse, fine, backend=backend, predicts_occupancy=predicts_occupancy)
            for coarse, fine in pairwise(widths)
        )
        self.out_layer = SparseLinear(widths[-1], 1, exact=True)
        self.out_active = nn.Tanh()

    @override
    def forward(self, latents: SparseTensor, guide: Voxels | None = None, position_scale: float = 1.0) -> DecodedSdf:
        """Returns signed distances at ``up_factor`` times the resolution.

        Args:
            latents: [n, latent_channels].
            guide: The voxels to decode, all of whose ancestors at the latents' resolution are the latents' voxels in
                the same order, such as the encoder's input. None decodes what the decoder predicts, or all.
            position_scale: As in the encoder.

        Raises:
            ValueError: If the guide does not belong to the latents.
        """
        guides = [None] * len(self.upsample) if guide is None else self._guides(guide, latents.voxels)
        tensor = self.transform(latents, position_scale)
        occupancy, occupied = [], []
        for block, children in zip(self.upsample, guides, strict=True):
            tensor, logits = self.run_block(block, tensor, children)
            if logits is not None:
                occupancy.append(logits)
            if children is not None:
                occupied.append(children.occupancy)
        sdf = self.out_layer(tensor)
        return DecodedSdf(sdf.with_feats(self.out_active(sdf.feats)), tuple(occupancy), tuple(occupied))

    def _guides(self, guide: Voxels, latents: Voxels) -> list[Voxels]:
        """Returns the guide's voxels of each level, the coarsest first."""
        levels = len(self.upsample)
        if guide.resolution != latents.resolution << levels:
            raise ValueError(
                f"guide has resolution {guide.resolution}, but the decoder makes {latents.resolution << levels} of "
                f"latents of {latents.resolution}; give the voxels that the encoder saw."
            )
        chain = [guide]
        for _ in range(levels):
            chain.append(chain[-1].parents.voxels)
        root = chain.pop()
        if root is not latents and not (len(root) == len(latents) and (root.coords == latents.coords).all()):
            raise ValueError(
                f"guide has {len(root)} voxels at the latents' resolution, which are not the {len(latents)} latents' "
                "in their order; give the voxels that the encoder saw, or guide=None."
            )
        return chain[::-1]
