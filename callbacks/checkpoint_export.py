"""Writes trained models as files that other programs read."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from callbacks.run_folder import run_folder
from callbacks.writers.bi_fusion import write_bi_fusion
from callbacks.writers.gaussian_scene import write_gaussian_scene
from callbacks.writers.language_field import write_language_field
from callbacks.writers.sdf_vqvae import write_sdf_vqvae
from callbacks.writers.semantic_encoder import extract_semantic_encoder, write_semantic_encoder
from lightning_modules.bi_fusion import BiFusionModule
from lightning_modules.depth_autoencoder import DepthAutoencoderModule
from lightning_modules.gaussian_rgb import GaussianRgbModule
from lightning_modules.language_field import LanguageFieldModule
from lightning_modules.sdf_vqvae import SparseSdfVqvaeModule


def _write_language_field(module: LanguageFieldModule, folder: Path) -> list[Path]:
    return write_language_field(module, folder, module.data.level_names, module.num_steps)


# What writes a model of each class into a folder and returns the files.
WRITERS: dict[type[LightningModule], Callable[[Any, Path], list[Path]]] = {
    BiFusionModule: write_bi_fusion,
    DepthAutoencoderModule: write_semantic_encoder,
    GaussianRgbModule: write_gaussian_scene,
    LanguageFieldModule: _write_language_field,
    SparseSdfVqvaeModule: write_sdf_vqvae,
}

# What takes a model of a class out of any checkpoint file of its family, needing neither data nor trainer.
EXTRACTORS: dict[type[LightningModule], Callable[..., list[Path]]] = {DepthAutoencoderModule: extract_semantic_encoder}


def find_extractor(model: LightningModule) -> Callable[..., list[Path]] | None:
    """Returns what takes a model of this class out of a checkpoint file, if anything does."""
    return next((extract for kind, extract in EXTRACTORS.items() if isinstance(model, kind)), None)


class CheckpointExport(Callback):
    """Exports the model when training ends, and whenever ``train.py export`` asks.

    A language field becomes ``language_field.safetensors``, ``gaussians.ply`` and one LangSplatV2 checkpoint per level;
    Gaussians trained on photographs ``gaussians.ply`` and a 3DGS ``chkpnt{step}.pth``; the encoder of a depth
    autoencoder ``encoder_weights.pth``, a folder for ``SemanticEncoder.from_pretrained`` and
    ``semantic_encoder.onnx``; a Bi-Fusion encoder ``bi_fusion_encoder.safetensors`` with ``config.json``, and its dense
    parts as ONNX; a sparse-SDF VQVAE ``sdf_vqvae.safetensors`` with ``config.json``, its encoder and its codebook. They
    are written after the last checkpoint, by the first process alone; a crash while writing loses no checkpoint.

    Args:
        output: Folder to write to; ``exports`` in the folder of the run unless given.
    """

    def __init__(self, output: str | None = None) -> None:
        self.output = output

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.export(trainer, pl_module, None)

    def export(
        self,
        trainer: Trainer,
        model: LightningModule,
        output: str | None,
        *,
        checkpoint: str | Path | None = None,
        verify: bool = False,
        partial: bool = False,
    ) -> None:
        """Writes the files and says which.

        Args:
            trainer: The trainer.
            model: The model, filled from the checkpoint unless its class is taken out of the file itself.
            output: Folder to write to; for a semantic encoder a file, too.
            checkpoint: The file to take the model out of, where its class allows that.
            verify: Load the result afresh and compare it with the model; see ``train.py export``.
            partial: Allow weights that are missing; likewise.

        Raises:
            ValueError: If there is no export for a model of this class, or none that could be verified or be partial.
        """
        folder = Path(output or self.output or run_folder(trainer) / "exports")
        extractor = find_extractor(model) if checkpoint is not None else None
        writer = next((write for kind, write in WRITERS.items() if isinstance(model, kind)), None)
        if writer is None:
            with_export = ", ".join(kind.__name__ for kind in WRITERS)
            raise ValueError(f"{type(model).__name__} has no export; models with one: {with_export}.")
        if (verify or partial) and extractor is None:
            with_option = ", ".join(kind.__name__ for kind in EXTRACTORS)
            raise ValueError(f"verify and partial are for {with_option}, not {type(model).__name__}; leave them out.")
        if trainer.is_global_zero:
            if extractor is not None and checkpoint is not None:
                paths = extractor(Path(checkpoint), folder, verify=verify, partial=partial)
            else:
                paths = writer(model, folder)
            rank_zero_info("Exported:\n" + "\n".join(f"  {path}" for path in paths))
        trainer.strategy.barrier()
