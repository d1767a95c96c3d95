"""Shows decoded shapes in TensorBoard while a VQVAE trains."""

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from typing_extensions import override

from callbacks.writers.shapes import side_by_side
from callbacks.writers.sheets import sheet
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
        batch = trainer.strategy.batch_to_device(pl_module.data.val_shapes(self.num_shapes), pl_module.device)
        with trainer.precision_plugin.forward_context():
            shapes = pl_module.decoded_shapes(batch)
        picture = sheet([side_by_side(shape, self.size) for shape in shapes])
        trainer.logger.experiment.add_image("shapes", picture, trainer.global_step, dataformats="HWC")
