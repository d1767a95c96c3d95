"""Scores of decoded shapes, averaged over shapes. States are sums, so processes add up."""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torchmetrics import Metric
from typing_extensions import override

from lightning_modules.functional.sdf_vqvae.shape_scores import mesh_scores, sdf_scores

OF_DISTANCES = (
    "sign_iou",
    "sdf_mae",
    "sdf_mae_inside",
    "sdf_mae_outside",
    "sdf_mae_beyond",
    "missing_voxels",
    "extra_voxels",
)
OF_MESHES = ("chamfer", "chamfer_voxels", "f_score_64", "f_score_128", "normal_consistency", "without_mesh")
LARGEST_RESOLUTION = 1024


class ShapeScores(Metric):
    """Means over shapes of what :func:`sdf_scores` and :func:`mesh_scores` say of each; every shape counts the same.

    A figure that a shape does not have (NaN) is left out of its mean. Where shapes of several resolutions were added,
    each figure is also there for each, as ``sign_iou_at_64``.

    Args:
        meshes: Whether to extract and compare meshes, which takes longer than all else.
    """

    full_state_update = False
    sums: Tensor
    counts: Tensor

    def __init__(self, *, meshes: bool = True) -> None:
        super().__init__()
        self.meshes = meshes
        self.names = OF_DISTANCES + (OF_MESHES if meshes else ())
        size = (LARGEST_RESOLUTION + 1, len(self.names))
        self.add_state("sums", torch.zeros(size, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("counts", torch.zeros(size, dtype=torch.float64), dist_reduce_fx="sum")

    @override
    def update(
        self,
        decoded_coords: Int[Tensor, "decoded 3"],
        decoded_sdf: Float[Tensor, " decoded"],
        coords: Int[Tensor, "voxels 3"],
        sdf: Float[Tensor, " voxels"],
        resolution: int,
        band: float,
    ) -> None:
        """Adds a shape; see :func:`sdf_scores`."""
        shape = (decoded_coords, decoded_sdf, coords, sdf, resolution)
        figures = sdf_scores(*shape, band)
        if self.meshes:
            figures |= mesh_scores(*shape)
        row = torch.tensor([figures[name] for name in self.names], dtype=torch.float64, device=self.sums.device)
        self.sums[resolution] += row.nan_to_num(0.0)
        self.counts[resolution] += ~row.isnan()

    @override
    def compute(self) -> dict[str, Float[Tensor, ""]]:
        """Returns the mean of each figure; NaN for one that no shape had."""
        means = self.sums.sum(0) / self.counts.sum(0)
        figures = dict(zip(self.names, means.float(), strict=True))
        resolutions = (self.counts.sum(1) > 0).nonzero()[:, 0].tolist()
        if len(resolutions) > 1:
            for resolution in resolutions:
                own = (self.sums[resolution] / self.counts[resolution]).float()
                figures |= {f"{name}_at_{resolution}": value for name, value in zip(self.names, own, strict=True)}
        return figures
