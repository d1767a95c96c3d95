"""Shows a language field in TensorBoard while it trains."""

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from typing_extensions import override

from lightning_modules.functional.answers.view_answers import Prompts
from lightning_modules.functional.colour_maps import heat_picture
from lightning_modules.language_field import LanguageFieldModule


class TensorBoardImages(Callback):
    """Adds pictures of one validation view after each validation: colours of the features, relevancy of its prompts.

    Colours are the principal components of the codebook's entries, splatted: the same feature has the same colour in
    every view. Written by the first process; a run without a TensorBoard logger gets none.

    Args:
        num_prompts: Prompts of the view to draw.
    """

    def __init__(self, num_prompts: int = 4) -> None:
        self.num_prompts = num_prompts

    @override
    @torch.no_grad()
    def on_validation_end(self, trainer: Trainer, pl_module: LanguageFieldModule) -> None:
        if trainer.sanity_checking or not trainer.is_global_zero or not isinstance(trainer.logger, TensorBoardLogger):
            return
        view = next(iter(pl_module.data.val_dataloader()), None)
        if view is None:
            return
        view = trainer.strategy.batch_to_device(view, pl_module.device)
        embeddings = pl_module.negative_embeddings[:0] if view.labels is None else view.labels.embeddings
        prompts = () if view.labels is None else view.labels.prompts
        asked = Prompts(prompts[: self.num_prompts], embeddings[: self.num_prompts])
        _, pictures, answers, *_ = pl_module.answer(view, asked)
        assert pictures is not None  # asked for by default
        board, step = trainer.logger.experiment, trainer.global_step
        board.add_image("view/rgb", pictures.rgb, step, dataformats="HWC")
        for level, colours in enumerate(pictures.feature_colours):
            board.add_image(f"view/features_level_{level}", colours, step, dataformats="HWC")
        for block in answers:
            for prompt, relevancy in zip(block.prompts, block.relevancy, strict=True):
                board.add_image(f"relevancy/{prompt}", heat_picture(relevancy), step, dataformats="HWC")
