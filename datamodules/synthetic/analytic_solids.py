"""Random solids with known signed distance: boxes, cylinders, capsules, rings, blends of them, and cuts."""

import json
import zlib
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from rich.progress import track
from scipy.spatial.transform import Rotation
from typing_extensions import override

from datamodules.readers.atomic_files import replacing
from datamodules.readers.sparse_sdf import StoredSdf, write_sparse_sdf
from datamodules.sdf_shapes import SdfShapesDataModule
from datamodules.synthetic.solid_distance import (
    Part,
    PartKind,
    Solid,
    points_on_surface,
    signed_distance_near_surface,
)

SETTINGS_FILE = "analytic_solids.json"
CUBE_FILL = 0.95  # half the longest side of a solid
PARTS: tuple[PartKind, ...] = ("ball", "capsule", "box", "ring", "cylinder")
KINDS = {"part": 0.2, "blend": 0.35, "cut part": 0.2, "cut blend": 0.25}  # of the family, with their shares


class AnalyticSolidsDataModule(SdfShapesDataModule):
    """Random solids as sparse signed distance, written once as ``.npz`` and read as a user's are.

    The files are ``<root>/<split>/<number>.npz``. See :class:`SdfShapesDataModule` for how they are batched.

    Args:
        root: Folder to write the solids to, or which holds them already.
        num_train: Solids to train on.
        num_val: Solids for validation.
        num_test: Solids for the test, of the same family but none of them trained on.
        world_seed: Of the solids.
        resolution: As in :class:`SdfShapesDataModule`.
        band: As there.
        down_factor: As there.
        crop_blocks: As there.
        max_voxels_per_batch: As there.
        augment: As there.
        predict_split: As there.
        num_workers: As there.
        cache_mib: As there.
        seed: As there.
    """

    def __init__(
        self,
        root: str | Path = "data/analytic_solids",
        num_train: int = 256,
        num_val: int = 16,
        num_test: int = 32,
        world_seed: int = 0,
        resolution: int = 32,
        band: float = 4.0,
        down_factor: int = 4,
        crop_blocks: int = 0,
        max_voxels_per_batch: int = 80_000,
        augment: bool = True,
        predict_split: Literal["all", "train", "val", "test"] = "test",
        num_workers: int = 0,
        cache_mib: int = 1024,
        seed: int = 0,
    ) -> None:
        self.counts = {"train": num_train, "val": num_val, "test": num_test}
        for split, count in self.counts.items():
            if count < 1:
                raise ValueError(f"num_{split} is {count}; allowed: at least 1.")
        super().__init__(
            root,
            resolution,
            band,
            down_factor,
            crop_blocks,
            max_voxels_per_batch,
            augment,
            val_files=[f"val/{number:05}" for number in range(num_val)],
            test_files=[f"test/{number:05}" for number in range(num_test)],
            predict_split=predict_split,
            num_workers=num_workers,
            cache_mib=cache_mib,
            seed=seed,
        )
        self.world_seed = world_seed

    @override
    def prepare_data(self) -> None:
        """Writes the solids that ``root`` does not hold yet.

        Raises:
            ValueError: If ``root`` holds something else.
        """
        settings = {"counts": self.counts, "world_seed": self.world_seed}
        settings |= {"resolution": self.settings.resolution, "band": self.settings.band}
        file = self.root / SETTINGS_FILE
        if self.root.exists() and any(self.root.iterdir()):
            found = json.loads(file.read_text()) if file.is_file() else "something else"
            if found != settings:
                raise ValueError(
                    f"{self.root} holds {found}, but the settings ask for {settings}. Give another root, or delete "
                    "that folder to have the solids written anew."
                )
        else:
            with replacing(file) as temporary:
                temporary.write_text(json.dumps(settings))
        self._write_lacking()
        super().prepare_data()

    def _write_lacking(self) -> None:
        wanted = [(split, number) for split, count in self.counts.items() for number in range(count)]
        lacking = [(s, n) for s, n in wanted if not (self.root / s / f"{n:05}.npz").is_file()]
        pool = ThreadPoolExecutor(self.num_threads)
        try:
            futures = [pool.submit(self._write, split, number) for split, number in lacking]
            for future in track(as_completed(futures), "Measuring solids", total=len(lacking), transient=True):
                future.result()
        finally:
            pool.shutdown(cancel_futures=True)
        if lacking:
            rank_zero_info(f"{len(lacking)} solids are written to {self.root}.")

    def _write(self, split: str, number: int) -> None:
        resolution, band = self.settings.resolution, self.settings.band
        solid = random_solid(np.random.default_rng([self.world_seed, zlib.crc32(split.encode()), number]))
        coords, sdf = signed_distance_near_surface(solid, resolution, band)
        stored = StoredSdf(torch.from_numpy(coords), torch.from_numpy(sdf), resolution, band)
        write_sparse_sdf(self.root / split / f"{number:05}.npz", stored)


def random_solid(rng: np.random.Generator) -> Solid:
    """Draws a solid of the family, turned at random, its box centred, the longest side from -0.95 to 0.95."""
    while True:
        kind = str(rng.choice(list(KINDS), p=list(KINDS.values())))
        solid = _blend(rng) if "blend" in kind else Solid((_part(rng, PARTS[1:], np.zeros(3)),))
        if kind == "part" and rng.random() < 0.5:
            solid = solid._replace(parts=(_sharpened(solid.parts[0]),))
        if "cut" in kind:
            solid = solid._replace(cut=_cut(rng))
        fitted = _fitted(solid)
        if fitted is not None:
            return fitted


def _blend(rng: np.random.Generator) -> Solid:
    parts = [_part(rng, PARTS, np.zeros(3))]
    for _ in range(rng.integers(1, 3)):
        direction = rng.standard_normal(3)
        parts.append(_part(rng, PARTS, direction / np.linalg.norm(direction) * rng.uniform(0.25, 0.6)))
    return Solid(tuple(parts), rng.uniform(0.1, 0.3))


def _part(rng: np.random.Generator, kinds: tuple[PartKind, ...], centre: np.ndarray) -> Part:
    kind = kinds[rng.integers(len(kinds))]
    axes = Rotation.random(random_state=rng).as_matrix()
    size, radius = {
        "ball": (np.zeros(3), rng.uniform(0.25, 0.5)),
        "capsule": (np.array([rng.uniform(0.3, 0.7), 0, 0]), rng.uniform(0.15, 0.3)),
        "box": (rng.uniform(0.08, 0.5, 3), rng.uniform(0.06, 0.15)),
        "ring": (np.array([rng.uniform(0.4, 0.65), 0, 0]), rng.uniform(0.12, 0.25)),
        "cylinder": (np.array([rng.uniform(0.15, 0.45), rng.uniform(0.1, 0.6), 0]), rng.uniform(0.06, 0.12)),
    }[kind]
    return Part(kind, centre, axes, size, float(radius))


def _sharpened(part: Part) -> Part:
    if part.kind not in ("box", "cylinder"):
        return part
    return part._replace(size=np.where(part.size > 0, part.size + part.radius, 0), radius=0.0)


def _cut(rng: np.random.Generator) -> Part:
    """Draws a half space or a part to take away, near the middle."""
    direction = rng.standard_normal(3)
    centre = direction / np.linalg.norm(direction) * rng.uniform(0.05, 0.45)
    if rng.random() < 0.5:
        axes = Rotation.align_vectors(-centre[None], np.array([[0.0, 0, 1]]))[0].as_matrix().T
        return Part("half_space", centre, axes, np.zeros(3), 0.0)  # the far side goes
    return _part(rng, ("ball", "capsule", "box"), centre)


def _fitted(solid: Solid, least: float = 0.3) -> Solid | None:
    """Moves and scales a solid to fill the cube; None where next to nothing is left of it."""
    solid, least = _moved(solid, 0.5, np.zeros(3)), least / 2  # all parts lie within [-2, 2]
    for resolution in (24, 48):  # roughly, then well
        surface = points_on_surface(solid, resolution)
        if len(surface) < 100:
            return None
        low, high = surface.min(0), surface.max(0)
        longest = float((high - low).max())
        if longest < least:
            return None
        solid = _moved(solid, 2 * CUBE_FILL / longest, (low + high) / 2)
    return solid


def _moved(solid: Solid, scale: float, centre: np.ndarray) -> Solid:
    def moved(part: Part) -> Part:
        return part._replace(centre=(part.centre - centre) * scale, size=part.size * scale, radius=part.radius * scale)

    cut = None if solid.cut is None else moved(solid.cut)
    return Solid(tuple(moved(part) for part in solid.parts), solid.blend * scale, cut)
