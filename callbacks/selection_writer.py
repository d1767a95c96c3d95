"""Writes the Gaussians that prompts select."""

from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from callbacks.prediction_writer import file_name
from callbacks.run_folder import run_folder
from callbacks.writers.selection import Part, write_labels, write_selection
from lightning_modules.functional.answers.gaussian_answers import gaussian_classes
from lightning_modules.functional.answers.gaussian_components import GaussianSelector
from lightning_modules.language_field import LanguageFieldModule


class SelectionWriter(Callback):
    """Writes at the end of ``predict``, under ``predictions/<prompt>/gaussians``, what each prompt selects in 3D.

    The prompts are the module's ``queries``, else the labelled ones; its ``selection`` says how they select. Per prompt
    ``selected.ply``, ``removed.ply``, ``relevancy.ply`` and ``boxes.json``; with several prompts also ``labels.ply``
    and ``labels.json`` of all of them. The answers are computed on the Gaussians, without rendering; the first process
    writes.

    Args:
        output: Folder to write to; ``predictions`` in the folder of the run unless given.
        min_relevancy: Least relevancy of a Gaussian's label in ``labels.ply``; at 0.5 the prompt fits no better than
            the best fitting negative phrase.
        parts: Which ``.ply`` files of each prompt are written; of a large scene each may take hundreds of megabytes.
    """

    def __init__(
        self,
        output: str | None = None,
        min_relevancy: float = 0.5,
        parts: Sequence[Part] = ("selected", "removed", "relevancy"),
    ) -> None:
        self.output = output
        self.min_relevancy = min_relevancy
        self.parts = parts

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not isinstance(pl_module, LanguageFieldModule):
            raise ValueError(f"SelectionWriter is for a LanguageFieldModule, not for {type(pl_module).__name__}.")
        if not asked_prompts(pl_module):
            raise ValueError(
                "There is nothing to select: the scene has no labelled prompts and model.init_args.queries is empty. "
                "Give some, such as --model.init_args.queries '[\"red mug\"]'."
            )

    @override
    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, LanguageFieldModule)
        root = Path(self.output or run_folder(trainer) / "predictions")
        if trainer.is_global_zero:
            self.write(root, pl_module, asked_prompts(pl_module))
        trainer.strategy.barrier()

    def write(self, root: Path, module: LanguageFieldModule, prompts: list[str]) -> None:
        """Answers the prompts and writes the files."""
        language = module.language_scene()
        selector = GaussianSelector(language, module.selection)
        embeddings = module.data.encode_text(prompts).to(module.device)
        for prompt, embedding in zip(prompts, embeddings, strict=True):
            answer = selector.select(embedding)
            folder = root / file_name(prompt) / "gaussians"
            write_selection(
                folder,
                language,
                prompt,
                answer.selected,
                answer.scores,
                module.selection,
                level=module.data.level_names[answer.level],
                parts=self.parts,
            )
            num_selected, num = int(answer.selected.sum()), answer.selected.numel()
            rank_zero_info(f"{prompt}: {num_selected} of {num} Gaussians, in {folder}")
        if len(prompts) > 1:
            class_ids, scores = gaussian_classes(
                language,
                embeddings,
                min_relevancy=self.min_relevancy,
                baseline=selector.baseline,
                neighbours=selector.neighbours,
            )
            write_labels(root, language, prompts, class_ids, scores)


def asked_prompts(module: LanguageFieldModule) -> list[str]:
    """Returns the prompts that ``predict`` answers: the module's queries, else the labelled ones."""
    return list(module.queries or module.data.prompts)
