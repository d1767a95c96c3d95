"""Writes the tokens of shapes, and what is decoded from them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from callbacks.run_folder import run_folder
from callbacks.writers.pictures import write_png
from callbacks.writers.shapes import side_by_side, surfaces, write_mesh, write_tokens
from lightning_modules.networks.sdf_vqvae.sparse_sdf_vqvae import ShapeTokens
from lightning_modules.sdf_vqvae import DecodedShape, SparseSdfVqvaeModule


class ShapeWriter(BasePredictionWriter):
    """Writes, under ``predictions`` in the folder of the run, what ``predict`` makes of shapes, each under its name.

    ``tokens/<name>.npz`` (places, ids and the sequence for a language model), ``meshes/<name>.ply`` decoded from the
    tokens alone, in the cube [-1, 1]^3 that shapes are normalised to, and ``pictures/<name>.png``: input left, output
    right. Each process writes its own.

    Args:
        output: Folder to write to; ``predictions`` in the folder of the run unless given.
        mesh_format: Suffix of the meshes, or ``none``.
        pictures: Whether to draw them.
        picture_size: Pixels along an edge of each of the two.
    """

    def __init__(
        self,
        output: str | None = None,
        mesh_format: Literal["ply", "glb", "obj", "stl", "none"] = "ply",
        pictures: bool = True,
        picture_size: int = 256,
    ) -> None:
        super().__init__(write_interval="batch")
        self.output, self.mesh_format = output, mesh_format
        self.pictures, self.picture_size = pictures, picture_size
        self._folder: Path | None = None

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._folder = Path(self.output or run_folder(trainer) / "predictions")
        trainer.predict_loop.return_predictions = False  # both grids of all shapes would take gigabytes

    @override
    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Sequence[DecodedShape],
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        assert isinstance(pl_module, SparseSdfVqvaeModule)
        assert self._folder is not None
        for shape in prediction:
            self._write(shape, pl_module, self._folder)

    def _write(self, shape: DecodedShape, module: SparseSdfVqvaeModule, folder: Path) -> None:
        if module.quantizes:
            network = module.network
            coords = torch.nn.functional.pad(shape.token_coords, (1, 0))
            tokens = ShapeTokens(coords, shape.code_ids, 1, shape.resolution)
            path = folder / "tokens" / f"{shape.name}.npz"
            write_tokens(path, tokens, network.quantizer.num_codes, network.cells_per_token, network.down_factor)
        if self.mesh_format == "none" and not self.pictures:
            return
        meshes = surfaces(shape)
        if self.mesh_format != "none":
            write_mesh(folder / "meshes" / f"{shape.name}.{self.mesh_format}", meshes[1])
        if self.pictures:
            write_png(folder / "pictures" / f"{shape.name}.png", side_by_side(shape, self.picture_size, meshes))

    @override
    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        rank_zero_info(f"Written: {self._folder}")
