"""One checkpoint, always the latest, from which a run goes on."""

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from typing_extensions import override


class ResumableCheckpoint(ModelCheckpoint):
    """Keeps ``last.ckpt``: every so many steps, and when a run ends.

    The file is replaced as a whole, so a kill at any moment leaves the one before. ``--ckpt_path=last`` finds it, also
    in the middle of an epoch. Lightning's own ``save_last`` writes a second file and forgets the steps after the last
    multiple. Nothing is saved when a run breaks off: a step may be half done, and what it began would be lost.

    Args:
        every_n_train_steps: Optimizer steps between two saves.
        dirpath: Folder; ``checkpoints`` in the folder of the run unless given.
    """

    def __init__(self, every_n_train_steps: int = 50, dirpath: str | None = None) -> None:
        super().__init__(
            dirpath=dirpath,
            filename=self.CHECKPOINT_NAME_LAST,
            save_top_k=1,
            every_n_train_steps=every_n_train_steps,
            enable_version_counter=False,
        )
        self._last_global_step_saved = -1  # a run of no steps, which only lifts, is worth a file, too

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._should_skip_saving_checkpoint(trainer):
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))
