"""The views of a scene in memory: integer maps as small as they go, photographs and label masks made when asked for."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.batches import LanguageView, PromptLabels
from datamodules.readers.labels import LabelFrame, drawn_labels
from datamodules.readers.photos import read_photo
from lightning_modules.functional.cameras import Camera


class StoredView(NamedTuple):
    """What is kept of one view; see :class:`datamodules.batches.LanguageView`.

    Attributes:
        name: Image stem.
        camera: The camera at the size of the maps.
        photo: Its photograph's file, or None.
        mask_ids: [L, H, W] int16 where 32767 masks suffice, else int32; -1 = no mask. None without features.
        mask_features: [M, C] unit features, or None.
        frame: Its labels, or None.
        native_labels: Whether the labels keep their own size instead of the maps'.
    """

    name: str
    camera: Camera
    photo: Path | None
    mask_ids: Int[Tensor, "levels height width"] | None
    mask_features: Float[Tensor, "masks channels"] | None
    frame: LabelFrame | None
    native_labels: bool = False


class LanguageViews(Dataset[LanguageView]):
    """Some views of a scene as batches of one.

    Args:
        stored: All views of the scene, sorted by name.
        view_ids: Which of them, in which order.
        text_embeddings: Unit embedding of every labelled category.
        with_photos: Whether the photographs are decoded.
    """

    def __init__(
        self,
        stored: Sequence[StoredView],
        view_ids: Sequence[int],
        text_embeddings: Mapping[str, Float[Tensor, " channels"]],
        with_photos: bool,
    ) -> None:
        self._stored = stored
        self.view_ids = list(view_ids)
        self._text_embeddings = text_embeddings
        self._with_photos = with_photos

    @property
    def names(self) -> list[str]:
        """The stems of the views."""
        return [self._stored[view_id].name for view_id in self.view_ids]

    @property
    def cameras(self) -> list[Camera]:
        """The cameras of the views; no photograph is decoded for them."""
        return [self._stored[view_id].camera for view_id in self.view_ids]

    def __iter__(self) -> Iterator[LanguageView]:
        return (self[index] for index in range(len(self)))

    def __len__(self) -> int:
        return len(self.view_ids)

    def __getitem__(self, index: int) -> LanguageView:
        view_id = self.view_ids[index]
        view = self._stored[view_id]
        width, height = view.camera.width, view.camera.height
        labels = None
        if view.frame is not None:
            size = (view.frame.width, view.frame.height) if view.native_labels else (width, height)
            prompts, masks, boxes = drawn_labels(view.frame, *size)
            embeddings = torch.stack([self._text_embeddings[prompt] for prompt in prompts])
            labels = PromptLabels(prompts, embeddings, masks, boxes)
        return LanguageView(
            name=view.name,
            view_id=view_id,
            camera=view.camera,
            image=read_photo(view.photo, width, height) if self._with_photos and view.photo else None,
            mask_ids=None if view.mask_ids is None else view.mask_ids.int(),
            mask_features=view.mask_features,
            labels=labels,
        )


def compact_ids(mask_ids: Int[Tensor, "levels height width"], num_masks: int) -> Int[Tensor, "levels height width"]:
    """Returns the map as int16 where the ids fit."""
    return mask_ids.to(torch.int16 if num_masks <= torch.iinfo(torch.int16).max else torch.int32)
