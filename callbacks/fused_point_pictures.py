"""Shows what a Bi-Fusion encoder makes of points in TensorBoard while it trains."""

import torch
from jaxtyping import Float, Int
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from typing_extensions import override

from lightning_modules.bi_fusion import BiFusionModule
from lightning_modules.functional.colour_maps import class_colours, contact_sheet, turbo

NO_CLASS = (0.25, 0.25, 0.25)


class FusedPointPictures(Callback):
    """Adds a picture of some validation scenes after each validation, a row for each, as their first frame sees them.

    From left to right: the points' own colours, their classes, what the fused features say, what the 2D teacher fused
    over the views says, and the gate: red trusts the cameras, blue the points' own shape and colour. Written by the
    first process; a run without a TensorBoard logger gets none.

    Args:
        num_scenes: Batches to show, the first scene of each.
        point_size: Width and height of a point, pixels of the images.
    """

    def __init__(self, num_scenes: int = 3, point_size: int = 7) -> None:
        self.num_scenes, self.point_size = num_scenes, point_size

    @override
    @torch.no_grad()
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or not trainer.is_global_zero or not isinstance(trainer.logger, TensorBoardLogger):
            return
        assert isinstance(pl_module, BiFusionModule)
        table = pl_module.data.class_tables[0]
        texts = pl_module.texts(table)
        colours = torch.cat([class_colours(len(texts)), torch.tensor([NO_CLASS])]).to(texts.device)
        panels: list[Tensor] = []
        for _, frames in zip(range(self.num_scenes), pl_module.data.val_dataloader(), strict=False):
            frames = trainer.strategy.batch_to_device(frames, pl_module.device)
            with trainer.precision_plugin.forward_context():
                out = pl_module(frames)
            own = out.cloud_ids == 0
            painted = [frames.points[0][:, 3:]]
            if table in frames.labels:
                painted.append(colours[frames.labels[table][0]])
            painted += [colours[(features[own] @ texts.T).argmax(dim=1)] for features in (out.text, out.teacher)]
            painted.append(turbo(out.gate[own].float()))
            uv, seen = out.uv[own, 0], out.view_conf[own, 0] > 0
            panels += [paint_points(uv[seen], part[seen], frames.image_size, self.point_size) for part in painted]
        if panels:
            sheet = contact_sheet(torch.stack(panels).cpu(), columns=len(painted))
            trainer.logger.experiment.add_image("points", sheet, trainer.global_step, dataformats="HWC")


def paint_points(
    uv: Float[Tensor, "points 2"], colours: Float[Tensor, "points 3"], size: tuple[int, int], point_size: int
) -> Float[Tensor, "height width 3"]:
    """Paints points as squares on black; where several meet, the one whose centre is nearest to a pixel shows.

    Args:
        uv: Pixel of each point.
        colours: Of the points, 0 to 1.
        size: Height and width of the picture.
        point_size: Width and height of a square, pixels.
    """
    height, width = size
    picture = colours.new_zeros(height * width, 3)
    reach = torch.arange(point_size, device=uv.device) - point_size // 2
    steps: Int[Tensor, "steps 2"] = torch.cartesian_prod(reach, reach)
    for step in steps[steps.square().sum(dim=1).argsort(descending=True)]:  # outer pixels first, centres over them
        column, row = (uv.long() + step).unbind(-1)
        inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
        picture[(row * width + column)[inside]] = colours[inside]
    return picture.view(height, width, 3)
