"""Trains, evaluates, exports and shows the models of Lexel.

    python train.py fit --config configs/language_field/demo.yaml
    python train.py test --config configs/language_field/demo.yaml --ckpt_path=last
    python train.py view --config configs/language_field/demo.yaml --ckpt_path=last

A run is a YAML file of ``configs/`` and flags that override it; nothing else sets anything. ``--print_config`` shows
the whole of it, and ``python train.py fit --model.help lightning_modules.language_field.LanguageFieldModule`` explains
every setting of a class. The same ``fit ... --ckpt_path=last`` starts a fresh run or resumes one.
"""

import os
import sys
import warnings

# Read when torch loads: how long OpenMP's threads spin for the next operation before they sleep. By default it is so
# long that shared cores slow down a hundredfold; not at all (OMP_WAIT_POLICY=passive) doubles the time of small
# networks, since every operation wakes a thread. A thousand turns are microseconds.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
# Large maps on huge pages: without, the first touch of a weight map costs as much as filling it.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

# Of other libraries about each other; nothing a user could do about them.
warnings.filterwarnings("ignore", ".*'set_vital' is deprecated")  # torchdata 0.11 with torch 2.15
warnings.filterwarnings("ignore", ".*LeafSpec")  # lightning 2.6 with torch 2.15

from jsonargparse import set_parsing_settings
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

from callbacks.checkpoint_export import CheckpointExport, find_extractor
from callbacks.test_metrics import TestMetricsFile

SWITCHES = ("--verify", "--partial")


class LexelTrainer(Trainer):
    """Lightning's Trainer with two commands more: ``export`` and ``view``."""

    def export(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        ckpt_path: str = "last",
        output: str | None = None,
        verify: bool = False,
        partial: bool = False,
    ) -> None:
        """Writes a trained model as files that other programs read.

        Args:
            model: The model to fill from the checkpoint.
            datamodule: The data of the experiment, for what the files need of it (the scene, say).
            ckpt_path: The checkpoint: a path, ``last`` or ``best``. A semantic encoder is taken out of any checkpoint
                of its family, of other programs too.
            output: Folder to write to; ``exports`` in the folder of the run unless given. A semantic encoder may go to
                a file, ``.pth``, ``.safetensors`` or ``.onnx``.
            verify: Load the written encoder afresh and compare its embeddings with the autoencoder's own.
            partial: Export a semantic encoder although weights of it are missing or unexpected.
        """
        if find_extractor(model) is None or ckpt_path in ("last", "best"):
            self._restore(model, datamodule, ckpt_path)
            ckpt_path = str(self.ckpt_path)
        exporters = [callback for callback in self.callbacks if isinstance(callback, CheckpointExport)]  # type: ignore[attr-defined]
        for exporter in exporters or [CheckpointExport()]:
            exporter.export(self, model, output, checkpoint=ckpt_path, verify=verify, partial=partial)

    def view(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        ckpt_path: str = "last",
        host: str = "127.0.0.1",
        port: int | None = None,
        seconds: float | None = None,
        max_pixels: int | None = None,
    ) -> None:
        """Shows a trained model in the browser: fly through the scene, ask by text, take objects out.

        Open the address that is printed. Type a text: relevancy is laid over the picture, with the mask and the level
        that answers best. Click a point to ask what is there. Gaussians that answer a text are downloaded as ``.ply``,
        the picture as PNG, a flight through key frames as a video. ``--trainer.callbacks+=callbacks.viewer.Viewer``
        shows the same while ``fit`` trains.

        Args:
            model: The model to fill from the checkpoint.
            datamodule: The data of the experiment: its cameras, and the encoder of texts.
            ckpt_path: The checkpoint: a path, ``last`` or ``best``.
            host: Address to serve at. 0.0.0.0 lets everybody in reach in, and there is no password.
            port: Port to serve at; refused if it is in use. By default 8080 or the next one that is free; 0 takes any.
            seconds: How long to serve; until Ctrl+C unless given.
            max_pixels: Pixels of a picture at most. By default 272160 (648 x 420) on CPU, 1200000 on CUDA.
        """
        from callbacks.viewer import serve  # a web server, which the other commands need not load
        from callbacks.viewing.server import check_address

        check_address(host, port)  # before the long work
        self._restore(model, datamodule, ckpt_path)
        if self.is_global_zero:
            serve(
                model,
                self.datamodule,  # type: ignore[attr-defined]
                device=self.strategy.root_device,
                host=host,
                port=port,
                seconds=seconds,
                max_pixels=max_pixels,
            )
        self.strategy.barrier()

    def _restore(self, model: LightningModule, datamodule: LightningDataModule | None, ckpt_path: str) -> None:
        """Sets data and model up and fills the model from the checkpoint, all as ``predict`` does."""
        self.limit_predict_batches = 0
        self.predict(model, datamodule=datamodule, ckpt_path=ckpt_path, return_predictions=False)
        model.on_predict_start()  # left out by Lightning where there is no batch; refuses a model without training
        model.on_predict_end()


class CommandLine(LightningCLI):
    """LightningCLI in which the YAML files and flags are the only source of settings."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Adds ours to Lightning's own."""
        return {**LightningCLI.subcommands(), "export": {"model", "datamodule"}, "view": {"model", "datamodule"}}

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Lets switches of ``export`` stand alone: ``--verify`` for ``--verify=true``."""
        words = sys.argv[1:] if args is None else args
        if isinstance(words, list):
            words = [
                f"{word}=true" if word in SWITCHES and following not in ("true", "false") else word
                for word, following in zip(words, [*words[1:], ""], strict=True)
            ]
            if args is None:
                sys.argv[1:] = words
            else:
                args = words
        super().parse_arguments(parser, args)

    def _parse_ckpt_path(self) -> None:
        """Leaves the settings alone; Lightning 2.6 would let the checkpoint overrule the flags (lightning#20801)."""


def main(args: ArgsType = None) -> CommandLine:
    """Runs one command line."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)  # settings are explained where they are defined
    return CommandLine(
        LightningModule,
        LightningDataModule,
        trainer_class=LexelTrainer,
        trainer_defaults={"callbacks": [TestMetricsFile()]},
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        seed_everything_default=42,
        save_config_kwargs={"overwrite": True},
        parser_kwargs={
            "description": __doc__,
            "view": {"description": str(LexelTrainer.view.__doc__).split("Args:")[0]},
        },
        args=args,
    )


if __name__ == "__main__":
    main()
