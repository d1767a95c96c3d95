"""Trains, evaluates and exports the models of Lexel.

    python train.py fit --config configs/language_field/demo.yaml
    python train.py test --config configs/language_field/demo.yaml --ckpt_path=last

A run is a YAML file of ``configs/`` and flags that override it; nothing else sets anything. ``--print_config`` shows
the whole of it, and ``python train.py fit --model.help lightning_modules.language_field.LanguageFieldModule`` explains
every setting of a class. The same ``fit ... --ckpt_path=last`` starts a fresh run or resumes one.
"""

import os
import warnings

# Read when torch loads: small operations spin in OpenMP and slow down a hundredfold on shared cores.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Large maps on huge pages: without, the first touch of a weight map costs as much as filling it.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

# Of other libraries about each other; nothing a user could do about them.
warnings.filterwarnings("ignore", ".*'set_vital' is deprecated")  # torchdata 0.11 with torch 2.15
warnings.filterwarnings("ignore", ".*LeafSpec")  # lightning 2.6 with torch 2.15

from jsonargparse import set_parsing_settings
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import ArgsType, LightningCLI

from callbacks.checkpoint_export import CheckpointExport
from callbacks.test_metrics import TestMetricsFile


class ExportingTrainer(Trainer):
    """Lightning's Trainer with the ``export`` command."""

    def export(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        ckpt_path: str = "last",
        output: str | None = None,
    ) -> None:
        """Writes a trained model as files that other programs read.

        Args:
            model: The model to fill from the checkpoint.
            datamodule: The data of the experiment, for what the files need of it (the scene, say).
            ckpt_path: The checkpoint: a path, ``last`` or ``best``.
            output: Folder to write to; ``exports`` in the folder of the run unless given.
        """
        self.limit_predict_batches = 0  # only sets up the model and restores the checkpoint
        self.predict(model, datamodule=datamodule, ckpt_path=ckpt_path, return_predictions=False)
        exporters = [callback for callback in self.callbacks if isinstance(callback, CheckpointExport)]  # type: ignore[attr-defined]
        for exporter in exporters or [CheckpointExport()]:
            exporter.export(self, model, output)


class CommandLine(LightningCLI):
    """LightningCLI in which the YAML files and flags are the only source of settings."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Adds ``export`` to Lightning's own."""
        return {**LightningCLI.subcommands(), "export": {"model", "datamodule"}}

    def _parse_ckpt_path(self) -> None:
        """Leaves the settings alone; Lightning 2.6 would let the checkpoint overrule the flags (lightning#20801)."""


def main(args: ArgsType = None) -> CommandLine:
    """Runs one command line."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)  # settings are explained where they are defined
    return CommandLine(
        LightningModule,
        LightningDataModule,
        trainer_class=ExportingTrainer,
        trainer_defaults={"callbacks": [TestMetricsFile()]},
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        seed_everything_default=42,
        save_config_kwargs={"overwrite": True},
        parser_kwargs={"description": __doc__},
        args=args,
    )


if __name__ == "__main__":
    main()
