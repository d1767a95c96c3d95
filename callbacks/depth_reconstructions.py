"""Shows a depth autoencoder in TensorBoard while it trains."""

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from typing_extensions import override

from lightning_modules.depth_autoencoder import DepthAutoencoderModule
from lightning_modules.functional.colour_maps import contact_sheet, depth_picture, turbo
from lightning_modules.functional.depth_autoencoder.depth_range import depth_of_scaled


class DepthReconstructions(Callback):
    """Adds a picture of some validation maps after each validation: observed, decoded, and how far these differ.

    Near is red and far blue; the difference is red at a tenth of the depth range; pixels without depth are black, but
    the decoder fills them in. Written by the first process; a run without a TensorBoard logger gets none.

    Args:
        num_maps: Maps to show.
    """

    def __init__(self, num_maps: int = 8) -> None:
        self.num_maps = num_maps

    @override
    @torch.no_grad()
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or not trainer.is_global_zero or not isinstance(trainer.logger, TensorBoardLogger):
            return
        assert isinstance(pl_module, DepthAutoencoderModule)
        images = pl_module.data.val_maps(self.num_maps).images.to(pl_module.device)
        with trainer.precision_plugin.forward_context():
            decoded = pl_module(images).images.float()
        depth_range, valid = pl_module.depth_range, images[:, 0] > 0
        observed_m, decoded_m = (depth_of_scaled(part[:, 0], depth_range).cpu() for part in (images, decoded))
        valid = valid.cpu()
        rows = []
        for observed, own, known in zip(observed_m, decoded_m, valid, strict=True):
            difference = turbo((own - observed).abs() / (0.1 * depth_range.span_m)) * known[..., None]
            everywhere = torch.ones_like(known)
            rows += [depth_picture(observed, known)[0], depth_picture(own, everywhere)[0], difference]
        sheet = contact_sheet(torch.stack(rows), columns=6)
        trainer.logger.experiment.add_image("reconstruction", sheet, trainer.global_step, dataformats="HWC")
