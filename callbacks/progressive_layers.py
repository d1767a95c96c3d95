"""Learns the residual layers of a codebook one after the other."""

from typing import Any

from lightning.pytorch import Callback, Trainer
from torch.optim import Optimizer
from typing_extensions import override

from lightning_modules.language_field import LanguageFieldModule


def current_layer(step: int, schedule_steps: int, num_layers: int) -> int:
    """Returns the layer in training at an optimizer step: LangSplatV2's schedule, its literal 10000 an argument."""
    return min(step * num_layers // schedule_steps, num_layers - 1)


class ProgressiveLayers(Callback):
    """Trains layer ``min(floor(step / schedule_steps * layers), layers - 1)`` on top of the finished, frozen ones.

    A pure function of the optimizer step: there is no state to save, and a run resumed in the middle of an epoch is in
    the right layer. What evaluation needs, the number of layers in use, is a buffer of the field, so in its checkpoint.

    Args:
        schedule_steps: Optimizer steps over which all layers get their turn (LangSplatV2: 10000).
    """

    def __init__(self, schedule_steps: int = 10_000) -> None:
        if schedule_steps < 1:
            raise ValueError(f"schedule_steps must be at least 1, got {schedule_steps}.")
        self.schedule_steps = schedule_steps

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LanguageFieldModule, batch: Any, batch_idx: int
    ) -> None:
        field = pl_module.field
        field.active_layers.fill_(current_layer(trainer.global_step, self.schedule_steps, field.num_layers) + 1)

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LanguageFieldModule, optimizer: Optimizer) -> None:
        field = pl_module.field
        current = current_layer(trainer.global_step, self.schedule_steps, field.num_layers)
        for layers in (field.codebook_layers, field.logit_layers):
            for layer, parameter in enumerate(layers):
                if layer != current:
                    parameter.grad = None  # a gradient of zero would let Adam's momentum move a finished layer on
