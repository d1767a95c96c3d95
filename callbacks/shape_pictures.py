"""Shows decoded shapes in TensorBoard while a VQVAE trains."""

from collections.abc import Iterator

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from typing_extensions import override

from callbacks.writers.shapes import side_by_side
from callbacks.writers.sheets import sheet
from datamodules.batches import SparseSdf
from lightning_modules.sdf_vqvae import SparseSdfVqvaeModule


class ShapePictures(Callback):
    """Adds a picture of some validation shapes after each validation, input left, decoded from tokens alone right.

    Faces seen from behind, as through holes, are red. Written by the first process; a run without a TensorBoard logger
    gets none.

    Args:
        num_shapes: Shapes to show.
        size: Pixels along an edge of each picture.
    """

    def __init__(self, num_shapes: int = 6, size: int = 192) -> None:
        self.num_shapes, self.size = num_shapes, size

    @override
    @torch.no_grad()
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or not trainer.is_global_zero or not isinstance(trainer.logger, TensorBoardLogger):
            return
        assert isinstance(pl_module, SparseSdfVqvaeModule)
        pictures = []
        for alone in _one_by_one(pl_module.data.val_shapes(self.num_shapes)):
            batch = trainer.strategy.batch_to_device(alone, pl_module.device)
            with trainer.precision_plugin.forward_context():
                pictures += [side_by_side(shape, self.size) for shape in pl_module.decoded_shapes(batch)]
        trainer.logger.experiment.add_image("shapes", sheet(pictures), trainer.global_step, dataformats="HWC")


def _one_by_one(batch: SparseSdf) -> Iterator[SparseSdf]:
    """Yields the shapes of a batch as batches of their own: whole shapes together could take too much memory."""
    for number, name in enumerate(batch.names):
        own = batch.coords[:, 0] == number
        coords = batch.coords[own]
        coords[:, 0] = 0
        yield SparseSdf((name,), coords, batch.sdf[own], batch.resolution, batch.band)
