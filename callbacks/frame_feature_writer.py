"""Writes the per-point features of frames, each into a file of its own; what is written is not computed again."""

import json
import time
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import UInt8
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities import rank_zero_info
from rich.console import Console
from rich.table import Table
from torch import Tensor
from typing_extensions import override

from callbacks.run_folder import run_folder
from callbacks.writers.frame_features import (
    FeatureColours,
    FrameCost,
    append_costs,
    feature_colours,
    features_file,
    is_whole,
    join_costs,
    picture_file,
    weights_digest,
    write_features,
    write_picture,
)
from datamodules.batches import SceneFrames
from datamodules.readers.atomic_files import replacing
from datamodules.scannet import ScanNetDataModule
from lightning_modules.bi_fusion import BiFusionModule, FramePrediction

SETTINGS_FILE = "settings.json"
COST_TABLE = "frames.csv"


class FrameFeatureWriter(BasePredictionWriter):
    """Writes ``<scene>/frame_<n>.npz`` and ``<scene>/vis_<n>.png`` under ``frame_features`` in the folder of the run.

    The ``.npz`` holds ``pts_feat`` [N, 128], ``uv_idx`` [N, 2] (pixels at ``image_size``, sub-pixel, u before v),
    ``conf_2d`` [N] (0 = not seen), ``points`` [N, 6] (x y z, r g b), ``gate`` [N] and, where known, ``clip_global``.
    The picture shows the photo and, beside it, the features by their three main directions, fitted to the first frame
    of a scene that a process writes and that has points.

    Frames whose files are whole are left out, so that the same command goes on after a break. ``settings.json`` says
    which weights and settings made the files; others are refused. Each process writes its own frames; at the end
    ``frames.csv`` has a row for each frame with time, memory and bytes, and their medians are printed.

    Args:
        output: Folder to write to; ``frame_features`` in the folder of the run unless given.
        dtype: Of ``pts_feat``; ``float16`` is exact to a thousandth, at half the bytes.
        pictures: Write the pictures, too.
    """

    def __init__(
        self, output: str | None = None, dtype: Literal["float16", "float32"] = "float16", pictures: bool = True
    ) -> None:
        super().__init__(write_interval="batch")
        if dtype not in ("float16", "float32"):
            raise ValueError(f"dtype is {dtype!r}; allowed: {', '.join(('float16', 'float32'))}.")
        self.output, self.dtype, self.pictures = output, dtype, pictures
        self._root = Path()
        self._num_wanted = self._num_skipped = 0
        self._colours: dict[str, FeatureColours] = {}
        self._started = self._loaded = 0.0

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leaves out frames that are done.

        Raises:
            ValueError: If it is used with another module or data module.
        """
        if not _predicts(trainer, stage):
            return
        data = trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(data, ScanNetDataModule) or not isinstance(pl_module, BiFusionModule):
            raise ValueError(
                f"FrameFeatureWriter cannot write what a {type(pl_module).__name__} makes of a {type(data).__name__}; "
                "allowed: a BiFusionModule and a ScanNetDataModule. Take it out of trainer.callbacks."
            )
        trainer.predict_loop.return_predictions = False  # megabytes per frame
        self._root = Path(self.output or run_folder(trainer) / "frame_features")
        wanted = data.frames_to_predict()
        done = [(scene, frame) for scene, frame in wanted if self._is_done(scene, frame)]
        self._num_wanted, self._num_skipped, self._colours = len(wanted), len(done), {}
        trainer.strategy.barrier()  # all have looked before one of them writes
        data.leave_out(done)
        if trainer.is_global_zero:
            join_costs(self._root, COST_TABLE)  # what a killed run left

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuses a folder with the features of other weights or settings.

        Raises:
            ValueError: If it holds such.
        """
        settings = self._settings(trainer, pl_module)
        check_settings(self._root, settings)
        with replacing(self._root / SETTINGS_FILE) as temporary:  # the same from all processes
            temporary.write_text(json.dumps(settings, indent=2) + "\n")
        self._started = time.perf_counter()

    @override
    def on_predict_batch_start(self, *_: Any) -> None:
        self._loaded = time.perf_counter()

    @override
    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: list[FramePrediction],
        batch_indices: Any,
        batch: SceneFrames,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        computed, count = time.perf_counter(), len(prediction)
        costs = []
        for number, frame in enumerate(prediction):
            before = time.perf_counter()
            size = self._write(trainer, frame, None if batch.images is None else batch.images[number, 0].cpu())
            cost = FrameCost(
                scene=frame.scene,
                frame=frame.frame_id,
                points=len(frame.points),
                load_ms=1000 * (self._loaded - self._started) / count,
                network_ms=1000 * (computed - self._loaded) / count,
                write_ms=1000 * (time.perf_counter() - before),
                peak_mib=peak_memory_mib(pl_module.device),
                bytes=size,
            )
            costs.append(cost)
        append_costs(self._root / f".{COST_TABLE}.{trainer.global_rank}", costs)
        self._started = time.perf_counter()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Joins the tables of all processes, also of those that had no frame left, whose loop Lightning skips.

        Raises:
            ValueError: If all frames are there, but of other weights or settings.
        """
        if not _predicts(trainer, stage):
            return
        check_settings(self._root, self._settings(trainer, pl_module))
        trainer.strategy.barrier()
        if trainer.is_global_zero:
            costs = join_costs(self._root, COST_TABLE)
            Console(stderr=True).print(cost_table(costs, self._num_skipped))
            if self._num_skipped == self._num_wanted:
                rank_zero_info(f"{self._root} has all {self._num_wanted} frames already; nothing to do.")
            else:
                rank_zero_info(f"Written: {self._root}")

    def _settings(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Returns what the features follow from, beside the data."""
        assert isinstance(pl_module, BiFusionModule)
        data = trainer.datamodule  # type: ignore[attr-defined]
        return {
            "weights": weights_digest(pl_module.encoder),
            "step": pl_module.num_steps,
            "image_tower": pl_module.image_tower,
            "image_size": list(data.image_size),
            "depth_size": list(data.depth_size),
            "intrinsics": data.intrinsics,
            "points": data.points,
            "max_points": data.max_points,
            "seed": data.seed,
            "dtype": self.dtype,
        }

    def _is_done(self, scene: str, frame: int) -> bool:
        has_picture = not self.pictures or picture_file(self._root, scene, frame).is_file()
        return has_picture and is_whole(features_file(self._root, scene, frame))

    def _write(self, trainer: Trainer, frame: FramePrediction, image: UInt8[Tensor, "height width 3"] | None) -> int:
        """Writes the files of a frame and returns their bytes; the numbers last, by which a frame counts as done."""
        paths = [features_file(self._root, frame.scene, frame.frame_id)]
        if self.pictures:
            paths.append(picture_file(self._root, frame.scene, frame.frame_id))
            if image is None:  # tokens came from a store
                source = trainer.datamodule.source  # type: ignore[attr-defined]
                image = source.load(frame.scene, frame.frame_id, with_depth=False).image
            assert image is not None
            colours = self._colours.get(frame.scene) or feature_colours(frame.fused)
            if len(frame.fused):
                self._colours[frame.scene] = colours
            write_picture(paths[1], frame, image, colours)
        write_features(paths[0], frame, self.dtype)
        return sum(path.stat().st_size for path in paths)


def _predicts(trainer: Trainer, stage: str) -> bool:
    """Tells ``predict`` from ``export`` and ``view``, which only set it up."""
    return stage == "predict" and trainer.limit_predict_batches != 0


def check_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Refuses a folder of features made otherwise.

    Raises:
        ValueError: If its settings are others, or cannot be read.
    """
    file = folder / SETTINGS_FILE
    if not file.is_file():
        return
    remedy = "Give another folder as the writer's output, or delete that one."
    try:
        found = dict(json.loads(file.read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file} cannot be read ({error}). {remedy}") from error
    different = [
        f"{key} is {found.get(key)!r} there, {settings.get(key)!r} now"
        for key in {**settings, **found}
        if found.get(key) != settings.get(key)
    ]
    if different:
        raise ValueError(f"{folder} holds features made otherwise: {'; '.join(different)}. {remedy}")


def peak_memory_mib(device: torch.device) -> float:
    """Returns the most memory in use so far: of the GPU where there is one, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def cost_table(costs: list[FrameCost], num_skipped: int) -> Table:
    """Describes what frames cost; medians, so that the first one, which warms up, does not count."""
    table = Table(title=f"Features of {len(costs)} frames", title_justify="left")
    for name in ("", "median", "highest"):
        table.add_column(name, justify="left" if not name else "right")
    for label, name, digits in (
        ("points", "points", 0),
        ("loading, ms", "load_ms", 1),
        ("network, ms", "network_ms", 1),
        ("writing, ms", "write_ms", 1),
        ("peak memory, MiB", "peak_mib", 0),
        ("bytes", "bytes", 0),
    ):
        values = torch.tensor([getattr(cost, name) for cost in costs] or [0], dtype=torch.float64)
        table.add_row(label, f"{values.median():,.{digits}f}", f"{values.max():,.{digits}f}")
    table.add_section()
    table.add_row("done before", str(num_skipped), "")
    table.add_row("all together, MB", f"{sum(cost.bytes for cost in costs) / 1e6:,.1f}", "")
    return table
