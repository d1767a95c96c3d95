"""Fills a feature store with the tokens of frames; what is in it is not computed again."""

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from callbacks.language_feature_writer import space_left
from callbacks.run_folder import run_folder
from datamodules.readers.feature_records import Backend, RecordWriter, StoreHeader
from datamodules.readers.feature_store import open_feature_store, write_feature_store
from datamodules.scannet import ScanNetDataModule
from lightning_modules.image_tokens import FrameTokens, ImageTokensModule


class FeatureStoreWriter(BasePredictionWriter):
    """Writes tokens and embedding of each frame, float16, into a store that ``ScanNetDataModule`` trains from.

    Frames in the store are left out, so that the same command goes on after a break and adds scenes that are new. Each
    process writes a shard of its own; a store with shards is read as one. The store says which weights, mode and image
    size made it; others are refused.

    Args:
        output: Folder of the store; ``feature_store`` in the folder of the run unless given.
        backend: ``lmdb``, or ``safetensors`` for network disks.
    """

    def __init__(self, output: str | None = None, backend: Backend = "lmdb") -> None:
        super().__init__(write_interval="batch")
        self.output, self.backend = output, backend
        self._writer: RecordWriter | None = None
        self._root = Path()

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Opens the store and leaves out frames that it has.

        Raises:
            ValueError: If it is used with another module or data module, the store was made otherwise, or the disk is
                too full.
            FileNotFoundError: If weights are absent.
        """
        if stage != "predict":
            return
        data = trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(data, ScanNetDataModule) or not isinstance(pl_module, ImageTokensModule):
            raise ValueError(
                f"FeatureStoreWriter cannot write what a {type(pl_module).__name__} makes of a {type(data).__name__}; "
                "allowed: an ImageTokensModule and a ScanNetDataModule. Take it out of trainer.callbacks."
            )
        if data.offline_clip_feat:
            raise ValueError(
                "data.init_args.offline_clip_feat is set, but tokens for a store come from photos; set it to false."
            )
        trainer.predict_loop.return_predictions = False
        self._root = Path(self.output or run_folder(trainer) / "feature_store")
        tower = pl_module.tower()
        header = StoreHeader(
            **pl_module.identity,
            image_size=data.image_size,
            token_shape=pl_module.token_shape(data.image_size),
            text_channels=tower.projection.shape[1],
            backend=self.backend,
        )
        if trainer.is_global_zero:  # the others find the store made
            self._writer = write_feature_store(self._root, header, tower.projection)
        trainer.strategy.barrier()
        if not trainer.is_global_zero:
            self._writer = write_feature_store(self._root, header, tower.projection, shard=trainer.global_rank)
        assert self._writer is not None
        wanted = data.frames_to_predict()
        done = [key for key in wanted if key in self._writer]
        waiting = len(wanted) - len(done)
        needed, free = 2 * header.num_values * waiting, space_left(self._root)
        rank_zero_info(
            f"{self._root}: {len(done)} of {len(wanted)} frames are there; {waiting} more need {needed / 1e9:.2f} GB "
            f"of {free / 1e9:.1f} GB free."
        )
        if needed > free:
            raise ValueError(
                f"{self._root} needs {needed / 1e9:.2f} GB for {waiting} frames, but the disk has {free / 1e9:.2f} GB "
                "left. Give a folder on another disk as the writer's output, or raise data.init_args.frame_stride."
            )
        trainer.strategy.barrier()  # all have looked before one of them writes
        data.leave_out(done)

    @override
    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: list[FrameTokens],
        batch_indices: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        assert self._writer is not None
        for frame in prediction:
            self._writer.write(frame.scene, frame.frame_id, frame.tokens, frame.clip_global)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._close()  # what was computed is kept

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Closes the store, also in processes that had no frame left, whose loop Lightning skips."""
        if self._writer is None:
            return
        self._close()
        trainer.strategy.barrier()
        if trainer.is_global_zero:
            store = open_feature_store(self._root)
            size = sum(file.stat().st_size for file in self._root.rglob("*") if file.is_file())
            rank_zero_info(
                f"Written: {self._root}, {len(store.keys())} frames, {size / 1e9:.2f} GB. To train from it: "
                f"--data.init_args.offline_clip_feat true --data.init_args.feature_store {self._root}"
            )

    def _close(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()
