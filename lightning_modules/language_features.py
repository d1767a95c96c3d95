"""Computes the language features of photographs: masks at four granularities, and a CLIP feature of each mask."""

import abc
import functools
import logging
import os
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from typing_extensions import override

from datamodules.batches import Photograph
from lightning_modules.functional.language_features.mask_nms import suppress_masks
from lightning_modules.functional.language_features.mask_sources import MaskSource
from lightning_modules.functional.language_features.mask_tiles import mask_map, mask_tiles
from lightning_modules.networks.mask_features import TileEncoder

_log = logging.getLogger(__name__)
_CHANGE_NO_RESULT = ("batch_size", "points_per_batch")  # settings for speed and memory alone


class PhotoMasks(NamedTuple):
    """The masks of a photograph to describe.

    Attributes:
        photo: The photograph.
        levels: Four tensors [M_l, H, W] bool: default, s, m, l.
    """

    photo: Photograph
    levels: tuple[Bool[Tensor, "_ height width"], ...]


class PhotoFeatures(NamedTuple):
    """The language features of a photograph, on the CPU.

    Attributes:
        name: Image stem.
        features: Four tensors [M_l, C] float32 of unit features: default, s, m, l.
        mask_ids: [4, H, W] int32 row of its level's features that a pixel belongs to, -1 = none.
        seconds: Time it took.
        problem: Why the photograph could not be read (then there are no features), or None.
    """

    name: str
    features: tuple[Float[Tensor, "_ channels"], ...]
    mask_ids: Int[Tensor, "4 height width"]
    seconds: float
    problem: str | None = None


class MaskDescriber(nn.Module, abc.ABC):
    """Gives the masks of photographs unit features."""

    @abc.abstractmethod
    def describe(self, photos: Sequence[PhotoMasks]) -> list[tuple[Float[Tensor, "_ channels"], ...]]:
        """Returns the features of each photograph's four levels."""


class TileDescriber(MaskDescriber):
    """Cuts each mask out, as LangSplat does it, and encodes the tiles of all photographs together.

    A mask that occurs in several levels is encoded once: ``default`` is made of those of the others.

    Args:
        encoder: The image tower.
    """

    def __init__(self, encoder: TileEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    @override
    def describe(self, photos: Sequence[PhotoMasks]) -> list[tuple[Float[Tensor, "_ channels"], ...]]:
        tiles, rows = [], []
        start = 0
        for photo, levels in photos:
            masks, members = distinct_masks(levels)
            tiles.append(mask_tiles(photo.image, masks, self.encoder.tile_size))
            rows.append([start + level for level in members])
            start += len(masks)
        features = self.encoder(torch.cat(tiles))
        return [tuple(features[level.to(features.device)] for level in members) for members in rows]


class WorldDescriber(MaskDescriber):
    """Describes a mask by a synthetic world's own feature of what most of its pixels show.

    It stands in for CLIP where nothing may be downloaded. Masks of the levels s, m and l are parts, objects and groups
    of objects of the world, those of ``default`` objects.
    """

    def __init__(self) -> None:
        super().__init__()
        _log.warning(
            "The features are not CLIP's: each mask gets the synthetic world's own feature of what most of its pixels "
            "show. For your photographs use OpenClipTiles."
        )

    @override
    def describe(self, photos: Sequence[PhotoMasks]) -> list[tuple[Float[Tensor, "_ channels"], ...]]:
        """Returns the features of each photograph's four levels.

        Raises:
            ValueError: If a photograph is not of a synthetic world.
        """
        described = []
        for photo, levels in photos:
            if photo.truth is None:
                raise ValueError(
                    f"Nobody knows what the pixels of {photo.name} show: WorldDescriber works on synthetic worlds. Set "
                    "model.init_args.describer to lightning_modules.networks.mask_features.OpenClipTiles."
                )
            ids, features = photo.truth
            truths = (ids[1], *ids)
            described.append(
                tuple(
                    features[most_frequent(masks, level_ids, len(features))]
                    for masks, level_ids in zip(levels, truths, strict=True)
                )
            )
        return described


class LanguageFeatureModule(LightningModule):
    """Finds the masks of photographs and describes them, as LangSplat's preprocessing does (arXiv 2312.16084).

    The parts are given as functions that make them, so that weights are loaded only when there is a photograph to do.

    Args:
        mask_source: Makes what divides photographs into masks.
        describer: Makes what gives masks features: the image tower of a CLIP, or another describer.
        iou: Mask suppression: largest allowed IoU with a better mask.
        score: Mask suppression: score to exceed.
        inner: Mask suppression: LangSplat's ``inner_thr``, see
            :func:`lightning_modules.functional.language_features.mask_nms.suppress_masks`.
    """

    def __init__(
        self,
        mask_source: Callable[[], MaskSource],
        describer: Callable[[], TileEncoder | MaskDescriber],
        iou: float = 0.8,
        score: float = 0.7,
        inner: float = 0.5,
    ) -> None:
        super().__init__()
        self.iou, self.score, self.inner = iou, score, inner
        self._make_mask_source, self._make_describer = mask_source, describer
        self.mask_source: MaskSource | None = None
        self.describer: MaskDescriber | None = None

    def load_parts(self) -> None:
        """Makes the parts, unless they are there: loads their weights.

        Raises:
            FileNotFoundError: If weights are absent.
            ValueError: If they are damaged or do not fit.
        """
        if self.mask_source is not None:
            return
        source, describer = self._make_mask_source(), self._make_describer()
        self.describer = TileDescriber(describer) if isinstance(describer, TileEncoder) else describer
        self.mask_source = source
        self.to(self.device).eval().requires_grad_(False)

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the features, by name: the classes of the parts and their settings."""
        return {
            "mask_source": _recipe(self._make_mask_source),
            "suppression": {"iou": self.iou, "score": self.score, "inner": self.inner},
            "describer": _recipe(self._make_describer),
        }

    @override
    def predict_step(self, photos: list[Photograph], batch_idx: int) -> list[PhotoFeatures]:
        """Returns the features of a batch of photographs; those that cannot be read come back with their problem."""
        start = time.perf_counter()
        unreadable = [_without_features(photo.name, photo.problem) for photo in photos if photo.problem is not None]
        readable = [photo for photo in photos if photo.problem is None]
        if all(photo.is_done for photo in readable):  # nobody to do but those that cannot be read
            return unreadable
        self.load_parts()
        assert self.describer is not None
        masks = [PhotoMasks(photo, self.find_masks(photo)) for photo in readable]
        described = self.describer.describe(masks)
        seconds = (time.perf_counter() - start) / len(readable)
        return unreadable + [
            PhotoFeatures(
                photo.name,
                tuple(level.float().cpu() for level in features),
                torch.stack([mask_map(level) for level in levels]).cpu(),
                seconds,
            )
            for (photo, levels), features in zip(masks, described, strict=True)
        ]

    def find_masks(self, photo: Photograph) -> tuple[Bool[Tensor, "_ height width"], ...]:
        """Returns the masks of the four granularities after suppression; a level may have none."""
        assert self.mask_source is not None, "load_parts() comes first"
        kept = []
        for masks, scores in self.mask_source(photo.image):
            if len(masks):
                masks = masks[suppress_masks(masks, scores, iou=self.iou, score=self.score, inner=self.inner)]
            kept.append(masks)
        return tuple(kept)


def distinct_masks(
    levels: Sequence[Bool[Tensor, "_ height width"]],
) -> tuple[Bool[Tensor, "distinct height width"], list[Int[Tensor, " _"]]]:
    """Returns the masks that differ, in the order of their first occurrence, and each level's rows of them."""
    row_of: dict[bytes, int] = {}
    distinct: list[Tensor] = []
    members = []
    for masks in levels:
        rows = []
        for mask in masks:
            row = row_of.setdefault(np.packbits(mask.cpu().numpy()).tobytes(), len(row_of))
            if row == len(distinct):
                distinct.append(mask)
            rows.append(row)
        members.append(torch.tensor(rows, dtype=torch.long))
    return torch.stack(distinct) if distinct else levels[0][:0], members


def most_frequent(
    masks: Bool[Tensor, "masks height width"], ids: Int[Tensor, "height width"], num_ids: int
) -> Int[Tensor, " masks"]:
    """Returns the id that most pixels of each mask have, the smallest of several."""
    winners = [torch.bincount(ids[mask].long(), minlength=num_ids).argmax() for mask in masks]
    return torch.stack(winners) if winners else ids.new_zeros(0, dtype=torch.long)


def _without_features(name: str, problem: str | None) -> PhotoFeatures:
    return PhotoFeatures(name, (torch.zeros(0, 0),) * 4, torch.zeros(4, 0, 0, dtype=torch.int32), 0.0, problem)


def _recipe(make: Callable[[], object]) -> dict[str, Any]:
    """Returns the class that a function without arguments makes an instance of, and the settings it makes it with."""
    parts = (*make.args, make.func) if isinstance(make, functools.partial) else (make,)
    settings = make.keywords if isinstance(make, functools.partial) else {}
    name = next(part.__name__ for part in parts if isinstance(part, type))
    return {"class": name} | {
        key: os.path.basename(value) if isinstance(value, str | os.PathLike) else value  # files may move
        for key, value in settings.items()
        if key not in _CHANGE_NO_RESULT
    }
