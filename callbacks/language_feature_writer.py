"""Writes the language features of photographs in LangSplat's layout; what is written is not computed again."""

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from rich.console import Console
from rich.table import Table
from typing_extensions import override

from datamodules.photographs import PhotoFile
from datamodules.posed_images import PosedImagesDataModule
from datamodules.readers.atomic_files import replacing
from datamodules.readers.language_features import is_whole, write_language_features
from datamodules.readers.posed_images import name_list
from datamodules.readers.scene_layout import feature_stems
from datamodules.samplers import process_rank
from lightning_modules.language_features import LanguageFeatureModule, PhotoFeatures

SETTINGS_FILE = "settings.json"
LEVELS = ("default", "s", "m", "l")
_BYTES_PER_PIXEL = 4 * 4  # four levels of float32
_BYTES_OF_FEATURES = 600 * 512 * 4  # a photograph of LERF-OVS has up to about 600 masks
_ABANDONED_AFTER_S = 600.0


class LanguageFeatureWriter(BasePredictionWriter):
    """Writes ``<stem>_f.npy`` and ``<stem>_s.npy`` of each photograph into the data module's folder of features.

    Before the work it checks the folder, the disk and the weights and prints what there is to do; afterwards, what was
    done and what failed. Photographs whose files are whole are left out. The folder's ``settings.json`` says how its
    features were made; others are refused there. Each process writes its own photographs.
    """

    def __init__(self) -> None:
        super().__init__(write_interval="batch")
        self._written: list[tuple[float, tuple[int, ...]]] = []  # seconds and number of masks per level
        self._failed: dict[str, str] = {}
        self._skipped: frozenset[str] = frozenset()

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Checks everything before the work.

        Raises:
            FileNotFoundError: If weights are absent.
            ValueError: If the folder holds features of other settings, or the disk is too full.
        """
        if stage != "predict":
            return
        data = trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(data, PosedImagesDataModule) or not isinstance(pl_module, LanguageFeatureModule):
            raise ValueError(
                f"LanguageFeatureWriter cannot write what a {type(pl_module).__name__} makes of a "
                f"{type(data).__name__}; allowed: a LanguageFeatureModule and a PosedImagesDataModule. Take it out of "
                "trainer.callbacks."
            )
        trainer.predict_loop.return_predictions = False  # all maps of a scene would take gigabytes
        self._written, self._failed = [], {}
        folder = data.features_folder
        settings = {"resolution": data.resolution} | pl_module.settings
        if not data.overwrite:
            check_settings(folder, settings)
        done = [] if data.overwrite else [file.name for file in data.photographs if _is_done(folder, file)]
        self._skipped = frozenset(done)
        waiting = [file for file in data.photographs if file.name not in self._skipped]
        needed, free = space_needed(waiting), space_left(folder)
        if trainer.is_global_zero:
            Console().print(overview(data, pl_module.settings, len(done), needed, free))
        if needed > free:
            raise ValueError(
                f"{folder} needs about {_gigabytes(needed)} for the features of {len(waiting)} photos, but the disk "
                f"has {_gigabytes(free)} left. Free some space, set data.init_args.features to a folder on another "
                "disk, or reduce data.init_args.resolution."
            )
        if waiting:
            pl_module.load_parts()  # weights that are absent or damaged are told before anything is deleted
        trainer.strategy.barrier()  # all have looked before one of them changes the folder
        if trainer.is_global_zero:
            _prepare(folder, settings, delete_features=data.overwrite)
        trainer.strategy.barrier()
        data.leave_out(done)

    @override
    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: list[PhotoFeatures],
        batch_indices: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        folder = trainer.datamodule.features_folder  # type: ignore[attr-defined]
        for photo in prediction:
            if photo.problem is not None:
                self._failed[photo.name] = photo.problem
                continue
            levels = [features.numpy() for features in photo.features]
            write_language_features(folder, photo.name, levels, photo.mask_ids.numpy())
            self._written.append((photo.seconds, tuple(map(len, levels))))

    @override
    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prints the report of all processes.

        Raises:
            ValueError: If no photograph could be read.
        """
        shares = _of_all_processes((self._written, self._failed))
        written = [photo for share, _ in shares for photo in share]
        failed = {name: problem for _, share in shares for name, problem in sorted(share.items())}
        folder = trainer.datamodule.features_folder  # type: ignore[attr-defined]
        if trainer.is_global_zero:
            Console().print(report(folder, written, len(self._skipped), failed))
        if failed and not written and not self._skipped:
            raise ValueError(f"None of the {len(failed)} photos could be read: {next(iter(failed.values()))}")


def check_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Refuses a folder whose features were made otherwise.

    Raises:
        ValueError: If it has features and other settings, or none.
    """
    stems = feature_stems(folder)
    if not stems:
        return
    remedy = (
        "Set data.init_args.features to another folder, delete this one, or set data.init_args.overwrite=true to have "
        "all its features deleted and made again."
    )
    path = folder / SETTINGS_FILE
    if not path.is_file():
        raise ValueError(
            f"{folder} holds features of {len(stems)} photos but no {SETTINGS_FILE} that says how they were made (they "
            f"may be LangSplat's own, which can be trained on as they are). {remedy}"
        )
    try:
        found = flat(json.loads(path.read_text()))
    except ValueError as error:
        raise ValueError(f"{path} cannot be read ({error}). {remedy}") from error
    wanted = flat(json.loads(json.dumps(settings)))
    different = [
        f"{key} is {found.get(key)!r} there, {wanted.get(key)!r} now"
        for key in dict.fromkeys([*wanted, *found])
        if found.get(key) != wanted.get(key)
    ]
    if different:
        raise ValueError(f"{folder} holds features made with other settings: {'; '.join(different)}. {remedy}")


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns nested settings by dotted names."""
    pairs: dict[str, Any] = {}
    for key, value in settings.items():
        pairs |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return pairs


def space_needed(files: Sequence[PhotoFile]) -> int:
    """Estimates the bytes of the features of photographs."""
    return sum(_BYTES_PER_PIXEL * file.width * file.height + _BYTES_OF_FEATURES for file in files if file.width)


def space_left(folder: Path) -> int:
    """Returns the free bytes of the disk which a folder is or will be on."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
    return shutil.disk_usage(existing).free


def overview(data: PosedImagesDataModule, settings: Mapping[str, Any], num_done: int, needed: int, free: int) -> Table:
    """Describes a scene before the work."""
    files = data.photographs
    unreadable = [file.path.name for file in files if file.problem is not None]
    sizes: dict[str, int] = {}
    for file in files:
        if file.problem is None:
            size = f"{file.width} x {file.height}"
            sizes[size] = sizes.get(size, 0) + 1
    without_camera, without_photo = data.unmatched
    rows = {
        "photos": str(len(files)) + (f", not readable: {name_list(unreadable)}" if unreadable else ""),
        "size": ", ".join(size if len(sizes) == 1 else f"{count} of {size}" for size, count in sizes.items()),
        "resolution": f"{data.resolution}" + (" (heights above 1080 become 1080)" if data.resolution == -1 else ""),
        "cameras": str(data.cameras_found or "none (not needed here)"),
        "photos without camera": (
            f"{len(without_camera)}, {'left out' if data.only_posed else 'done as well'}: {name_list(without_camera)}"
            if without_camera
            else ""
        ),
        "cameras without photo": f"{len(without_photo)}: {name_list(without_photo)}" if without_photo else "",
        "masks": _described(settings["mask_source"]),
        "features": _described(settings["describer"]),
        "folder": str(data.features_folder),
        "done already": f"{num_done} of {len(files)}" + (" (nothing to do)" if num_done == len(files) else ""),
        "disk": f"{_gigabytes(needed)} needed, {_gigabytes(free)} free",
    }
    table = _table(f"Language features of {data.root.name}")
    for name, value in rows.items():
        if value:
            table.add_row(name, value)
    return table


def report(
    folder: Path, written: Sequence[tuple[float, tuple[int, ...]]], num_skipped: int, failed: Mapping[str, str]
) -> Table:
    """Describes what was done."""
    table = _table("Language features written")
    table.add_row("folder", str(folder))
    table.add_row("photos done", str(len(written)))
    table.add_row("done before", str(num_skipped))
    table.add_row("failed", str(len(failed)))
    if written:
        seconds = sum(seconds for seconds, _ in written) / len(written)
        means = [sum(counts) / len(written) for counts in zip(*(counts for _, counts in written), strict=True)]
        table.add_row("seconds per photo", f"{seconds:.2f}")
        table.add_row(
            "masks per photo", ", ".join(f"{name} {mean:.0f}" for name, mean in zip(LEVELS, means, strict=True))
        )
    for name, problem in failed.items():
        table.add_row(f"failed: {name}", problem)
    return table


def _table(title: str) -> Table:
    table = Table(title=title, show_header=False, title_justify="left")
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    return table


def _described(part: Mapping[str, Any]) -> str:
    weights = [str(part[key]) for key in ("model_name", "pretrained", "model_type", "checkpoint") if key in part]
    return part["class"] + (f" ({', '.join(weights)})" if weights else "")


def _prepare(folder: Path, settings: Mapping[str, Any], *, delete_features: bool) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if delete_features:
        for stem in feature_stems(folder):
            for letter in "sf":
                (folder / f"{stem}_{letter}.npy").unlink(missing_ok=True)
    for path in folder.glob(".*_[fs].*.npy"):  # of killed runs; another run may be writing one of its own
        if time.time() - path.stat().st_mtime > _ABANDONED_AFTER_S:
            path.unlink(missing_ok=True)
    with replacing(folder / SETTINGS_FILE) as temporary:
        temporary.write_text(json.dumps(settings, indent=2) + "\n")


def _is_done(folder: Path, file: PhotoFile) -> bool:
    return file.problem is None and is_whole(folder, file.name, file.width, file.height)


def _of_all_processes(share: Any) -> list[Any]:
    num_processes, _ = process_rank()
    shares = [share] * num_processes
    if num_processes > 1:
        torch.distributed.all_gather_object(shares, share)
    return shares


def _gigabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB"
