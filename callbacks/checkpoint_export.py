"""Writes trained models as files that other programs read."""

from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from callbacks.writers.language_field import write_language_field
from lightning_modules.language_field import LanguageFieldModule


class CheckpointExport(Callback):
    """Exports the model when training ends, and whenever ``train.py export`` asks.

    A language field becomes ``language_field.safetensors``, ``gaussians.ply`` and one LangSplatV2 checkpoint per level.
    It is written after the last checkpoint, by the first process alone; a crash while writing loses no checkpoint.

    Args:
        output: Folder to write to; ``exports`` in the folder of the run unless given.
    """

    def __init__(self, output: str | None = None) -> None:
        self.output = output

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.export(trainer, pl_module, None)

    def export(self, trainer: Trainer, model: LightningModule, output: str | None) -> None:
        """Writes the files and says which.

        Raises:
            ValueError: If there is no export for a model of this class.
        """
        folder = Path(output or self.output or Path(trainer.log_dir or trainer.default_root_dir) / "exports")
        if not isinstance(model, LanguageFieldModule):
            raise ValueError(f"{type(model).__name__} has no export; models with one: LanguageFieldModule.")
        if trainer.is_global_zero:
            paths = write_language_field(model, folder, model.data.level_names, model.num_steps)
            rank_zero_info("Exported:\n" + "\n".join(f"  {path}" for path in paths))
        trainer.strategy.barrier()
