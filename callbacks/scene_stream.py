"""Streams a scene frame by frame into a map and its objects, as a robot would, and shows how the map grows."""

import difflib
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from typing_extensions import override

from callbacks.run_folder import run_folder
from callbacks.writers.scene_map import (
    SightRecord,
    map_picture,
    objects_of_voxels,
    write_map,
    write_moving_picture,
    write_objects,
    write_sights,
)
from callbacks.writers.sheets import LegendEntry, with_legend
from datamodules.batches import SceneFrames
from datamodules.readers.atomic_files import replacing
from lightning_modules.bi_fusion import BiFusionModule, FramePrediction
from lightning_modules.functional.bi_fusion.instances import frame_instances
from lightning_modules.functional.bi_fusion.voxel_keys import voxel_centres, voxel_keys
from lightning_modules.functional.colour_maps import class_colours
from lightning_modules.networks.bi_fusion.memory_bank import MemoryBank
from lightning_modules.networks.bi_fusion.online_merge import OnlineMerge

LEAST_OF_A_RECORD = 0.02  # share of the voxels that curves are drawn of; those of a few would be of one object
LEAST_TRUE_OBJECT = 20  # voxels; smaller objects are not asked for


class SceneStream(Callback):
    """Merges what ``predict`` says of single frames, in their order, scene by scene.

    Each frame's text features go into a :class:`MemoryBank`; the frame's points then take the class of the map, are
    grouped into objects, and :class:`OnlineMerge` finds out which of them are known. Below ``scene_stream/<scene>`` in
    the folder of the run: ``map.ply``, ``objects.json``, ``growth.gif`` (the map from above, frame by frame; left its
    colours, right its classes), ``agreement.csv`` and ``agreement.png`` (how well a voxel's class is known, the more
    frames have seen it) and, if asked for, ``memory.pt`` (the state of both, to go on from).

    Args:
        output: Folder to write to; ``scene_stream`` in the folder of the run unless given.
        class_table: Classes to name points by; the data module's first unless given.
        voxel_size: Of map and objects, metres.
        radius: Points of one class at most this far apart are one object, metres.
        min_points: Of an object in a frame.
        overlap: How objects are found again: ``voxels`` they share, or their ``boxes`` (ESAM).
        min_similarity: Objects that are less alike are different ones.
        leave_out: Classes that are no objects.
        use_superpoints: Give the points of a superpoint one class before they are grouped, where the data module knows
            any. ESAM's layouts keep those of each frame; those of a scan are patches of its finished mesh, which a
            robot does not have yet.
        max_height: What is higher is not drawn, metres above the lowest point, so that a ceiling hides nothing.
        save_memory: Write ``memory.pt``: 2 kB for each voxel.
    """

    def __init__(
        self,
        output: str | None = None,
        class_table: str | None = None,
        voxel_size: float = 0.05,
        radius: float = 0.15,
        min_points: int = 30,
        overlap: Literal["boxes", "voxels"] = "voxels",
        min_similarity: float = 0.1,
        leave_out: tuple[str, ...] = ("wall", "floor"),
        use_superpoints: bool = True,
        max_height: float = 2.2,
        save_memory: bool = False,
    ) -> None:
        self.output, self.class_table, self.voxel_size = output, class_table, voxel_size
        self.radius, self.min_points, self.max_height = radius, min_points, max_height
        self.overlap, self.min_similarity, self.leave_out = overlap, min_similarity, tuple(leave_out)
        self.use_superpoints, self.save_memory = use_superpoints, save_memory
        self._scene: _StreamedScene | None = None

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuses what cannot be streamed.

        Raises:
            ValueError: If there are several processes, or another module.
        """
        if stage != "predict":
            return
        if not isinstance(pl_module, BiFusionModule):
            raise ValueError(
                f"SceneStream cannot stream what a {type(pl_module).__name__} predicts; allowed: a BiFusionModule."
            )
        if trainer.world_size > 1:
            raise ValueError(
                f"A stream is one after the other, but there are {trainer.world_size} processes: set trainer.devices=1."
            )
        trainer.predict_loop.return_predictions = False

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuses classes that are not there.

        Raises:
            ValueError: If the data module has no table of this name, or the table no class to leave out.
        """
        assert isinstance(pl_module, BiFusionModule)
        tables = pl_module.data.class_tables
        if self.class_table is not None and self.class_table not in tables:
            raise ValueError(f"class_table is {self.class_table!r}; allowed: {', '.join(tables)}.")
        table = self.class_table or tables[0]
        names = pl_module.data.class_names(table)
        unknown = [name for name in self.leave_out if name not in names]
        if unknown:
            close = [match for name in unknown for match in difflib.get_close_matches(name, names, n=3)]
            raise ValueError(
                f"leave_out has {', '.join(map(repr, unknown))}, no class of {table}; close: "
                f"{', '.join(close) or 'none'}."
            )
        self._scene = None

    @override
    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        assert isinstance(pl_module, BiFusionModule)
        assert isinstance(batch, SceneFrames)
        table = self.class_table or pl_module.data.class_tables[0]
        for row, frame in enumerate(outputs):
            if self._scene is None or self._scene.name != frame.scene:
                self._finish(trainer, pl_module)
                self._scene = _StreamedScene(
                    self, frame, pl_module.texts(table).cpu(), pl_module.data.class_names(table)
                )
            truth = batch.labels[table][row].cpu() if table in batch.labels else None
            objects = None if batch.instances is None else batch.instances[row].cpu()
            self._scene.add(frame, truth, objects)

    @override
    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._finish(trainer, pl_module)

    def _finish(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._scene is None:
            return
        scene, self._scene = self._scene, None
        if len(scene.bank) == 0:
            rank_zero_warn(f"{scene.name}: no frame sees a point, so there is no map of it.")
            return
        folder = Path(self.output or run_folder(trainer) / "scene_stream") / scene.name
        scene.write(folder)
        rank_zero_info(f"{scene.name}: {scene.summary()}\n  {folder}")


class _StreamedScene:
    """The map of one scene and what is recorded while it grows."""

    def __init__(
        self,
        settings: SceneStream,
        first: FramePrediction,
        texts: Float[Tensor, "classes text"],
        names: tuple[str, ...],
    ) -> None:
        self.settings, self.name, self.texts, self.names = settings, first.scene, texts, tuple(names)
        self.bank = MemoryBank(texts.shape[1], settings.voxel_size)
        self.merge = OnlineMerge(settings.voxel_size, overlap=settings.overlap, min_similarity=settings.min_similarity)
        for memory in (self.bank, self.merge):
            memory.reset(self.name)
        self.colours = MemoryBank(3, settings.voxel_size)
        self.sights: list[Tensor] = []  # a row for each voxel and frame: key, n, kept, labelled, right by frame, by map
        self.snapshots: list[tuple[Tensor, Tensor, Tensor]] = []
        self.true_objects: dict[int, Tensor] = {}

    def add(self, frame: FramePrediction, truth: Tensor | None, objects: Tensor | None) -> None:
        """Takes in a frame, and records how its points' classes went."""
        seen = (frame.conf_2d > 0) & frame.points[:, :3].isfinite().all(dim=1)
        points, text, conf = frame.points[seen], frame.text[seen].float(), frame.conf_2d[seen]
        places = points[:, :3]
        before = self.bank.recall(places)
        self.bank.update(places, text, conf)
        self.colours.update(places, points[:, 3:].contiguous())
        after = self.bank.recall(places)
        alone = MemoryBank(self.bank.channels, self.settings.voxel_size)  # what this frame says of its voxels
        alone.update(places, text, conf)
        scores, class_ids = (F.normalize(after.features, dim=-1) @ self.texts.T).max(dim=1)
        self._record(
            voxel_keys(places, self.settings.voxel_size),
            after.counts.long(),
            self._classes(before.features),
            self._classes(alone.recall(places).features),
            class_ids,
            torch.full_like(class_ids, -1) if truth is None else truth[seen],
        )
        superpoints = frame.superpoints if self.settings.use_superpoints else None
        left_out = [self.names.index(name) for name in self.settings.leave_out]
        instances = frame_instances(
            places,
            text,
            class_ids,
            scores.clamp(0, 1),
            radius=self.settings.radius,
            min_points=self.settings.min_points,
            leave_out=left_out,
            superpoints=None if superpoints is None else superpoints[seen],
        )
        self.merge.merge(places, instances)
        if objects is not None:
            self._see_true_objects(voxel_keys(places, self.settings.voxel_size), objects[seen], truth, seen, left_out)
        self.snapshots.append((self.bank.keys, self.colours.features, self._map_classes()))

    def _map_classes(self) -> Int[Tensor, " voxels"]:
        return self._classes(self.bank.features)

    def _classes(self, features: Float[Tensor, "rows text"]) -> Int[Tensor, " rows"]:
        return (features @ self.texts.T).argmax(dim=1)

    def _record(self, keys: Tensor, counts: Tensor, before: Tensor, frame: Tensor, now: Tensor, truth: Tensor) -> None:
        columns = [keys, counts, now == before, truth >= 0, frame == truth, now == truth]
        self.sights.append(_one_for_each_voxel(torch.stack([column.long() for column in columns], dim=1)))

    def _see_true_objects(
        self, keys: Tensor, objects: Tensor, truth: Tensor | None, seen: Tensor, left_out: list[int]
    ) -> None:
        for number in objects[objects >= 0].unique().tolist():
            own = objects == number
            if truth is not None and int(truth[seen][own].mode().values) in left_out:
                continue
            known = self.true_objects.get(number, keys[:0])
            self.true_objects[number] = torch.cat([known, keys[own]]).unique()

    def records(self) -> list[SightRecord]:
        """Returns how the sights went of the voxels that were seen most often."""
        rows, found, nan = self._most_seen(), [], float("nan")
        for sights in rows[:, 1].unique().tolist():
            own = rows[rows[:, 1] == sights].double()
            frame, right = own[own[:, 3] > 0, 4:].mean(dim=0).tolist()
            kept = float(own[:, 2].mean()) if sights > 1 else nan
            found.append(SightRecord(sights, len(own), kept, frame, right))
        return found

    def _most_seen(self) -> Tensor:
        """Returns the sights of the voxels that were seen most often, up to that number."""
        rows = torch.cat(self.sights)
        keys, voxel = rows[:, 0].unique(return_inverse=True)
        total = torch.zeros(len(keys), dtype=torch.int64).scatter_reduce(0, voxel, rows[:, 1], "amax")
        ever = torch.bincount(total).flip(0).cumsum(0).flip(0)  # voxels seen at least so often
        most = int((ever >= max(1, LEAST_OF_A_RECORD * len(self.bank))).sum()) - 1
        return rows[(total[voxel] >= most) & (rows[:, 1] <= most)]

    def found_objects(self) -> tuple[int, int]:
        """Returns how many true objects have one in the map that shares half of the voxels of both, and of how many."""
        wanted = [keys for keys in self.true_objects.values() if len(keys) >= LEAST_TRUE_OBJECT]
        found = 0
        for keys in wanted:
            shared = [int(torch.isin(keys, own).sum()) for own in self.merge.voxels]
            united = [len(keys) + len(own) - both for own, both in zip(self.merge.voxels, shared, strict=True)]
            found += any(2 * both >= all_ for both, all_ in zip(shared, united, strict=True))
        return found, len(wanted)

    def summary(self) -> str:
        """Returns what came out of the stream, in a line."""
        records = self.records()
        text = f"{self.bank.num_frames} frames, {len(self.bank)} voxels, {len(self.merge)} objects"
        if self.true_objects:
            found, wanted = self.found_objects()
            text += f", {found} of {wanted} true ones found (IoU 0.5)"
        if len(records) > 2:
            second, last = records[1], records[-1]
            text += (
                f"; the class of a voxel stays at {second.kept:.0%} of second sights, {last.kept:.0%} of those number "
                f"{last.sights}"
            )
            if last.right_map >= 0:
                text += f", where the map is right in {last.right_map:.0%} and the frame in {last.right_frame:.0%}"
        return text

    def write(self, folder: Path) -> None:
        """Writes all files."""
        folder.mkdir(parents=True, exist_ok=True)
        class_ids = self._map_classes()
        owners = objects_of_voxels(self.bank.keys, self.merge)
        write_map(folder / "map.ply", self.bank.centres(), class_ids, self.bank.counts, owners, len(self.names))
        write_objects(folder / "objects.json", self.merge, self.names)
        write_sights(folder, self.records())
        write_moving_picture(folder / "growth.gif", self._growth())
        if self.settings.save_memory:
            with replacing(folder / "memory.pt") as temporary:
                torch.save({"memory_bank": self.bank.state_dict(), "online_merge": self.merge.state_dict()}, temporary)

    def _growth(self) -> list[np.ndarray]:
        palette = class_colours(len(self.names))
        centres, half = self.bank.centres(), self.settings.voxel_size / 2
        corner = torch.stack([centres.amin(dim=0) - half, centres.amax(dim=0) + half])
        highest = corner[0, 2] + self.settings.max_height
        legend, pictures = self._legend(palette), []
        for keys, colours, class_ids in self.snapshots:
            drawn = voxel_centres(keys, self.settings.voxel_size)[:, 2] <= highest
            halves = [
                map_picture(keys[drawn], part[drawn].clamp(0, 1), self.settings.voxel_size, corner)
                for part in (colours, palette[class_ids])
            ]
            picture = torch.from_numpy(np.concatenate(halves, axis=1)).float() / 255
            pictures.append((with_legend(picture, legend) * 255).round().byte().numpy())
        return pictures

    def _legend(self, palette: Float[Tensor, "classes 3"]) -> list[LegendEntry]:
        """Returns the classes of the finished map, the largest first."""
        sizes = torch.bincount(self._map_classes(), minlength=len(self.names))
        shown = [i for i in sizes.argsort(descending=True, stable=True).tolist() if sizes[i] > 0]
        return [LegendEntry(self.names[i], palette[i], f"{sizes[i] / len(self.bank):.0%}") for i in shown]


def _one_for_each_voxel(rows: Int[Tensor, "points columns"]) -> Int[Tensor, "voxels columns"]:
    """Returns the first row of each key, which is the first column."""
    _, first = np.unique(rows[:, 0].numpy(), return_index=True)
    return rows[torch.from_numpy(first)]
