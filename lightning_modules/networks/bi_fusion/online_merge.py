"""Objects of a stream of frames, merged into objects of the scene."""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from lightning_modules.functional.bi_fusion.instances import (
    Instances,
    box_iou,
    match_objects,
    same_class,
    voxel_overlap,
)
from lightning_modules.functional.bi_fusion.voxel_keys import voxel_keys

STATE = ("ids", "counts", "last_frames", "scores", "descriptors", "boxes", "votes")


class OnlineMerge:
    """The objects of a scene, as far as frames have shown them.

    ESAM's rule (arXiv 2408.11811): a frame's object and one seen before are as alike as the product of the cosine of
    their descriptors, the overlap of their boxes and the equality of their classes; the Hungarian method pairs them,
    what finds no partner is new, and partners are averaged over the frames that saw them. Where we differ: an object is
    the set of voxels it was seen in, so that frames may have any number of points and memory grows with surfaces, not
    with frames; its class is that of most votes instead of the first frame's; old and unsure objects can be forgotten;
    and overlap may be counted in voxels, which tells a chair from the table it stands under.

    Args:
        voxel_size: Of the objects' voxels, metres.
        overlap: ``boxes`` (ESAM): volume shared over united. ``voxels``: shared over those of the smaller object.
        box_update: ``union`` of the boxes seen, or their running ``mean`` (ESAM), which stays smaller than an object
            that no single frame shows whole.
        min_similarity: Partners must be more alike than this.
        max_objects: Beyond, those seen in the fewest frames are forgotten, of them the least sure. 0 keeps all.
        max_age: Frames after which an object that only one frame has seen is forgotten. 0 keeps all.
    """

    def __init__(
        self,
        voxel_size: float = 0.05,
        overlap: Literal["boxes", "voxels"] = "boxes",
        box_update: Literal["union", "mean"] = "union",
        min_similarity: float = 0.0,
        max_objects: int = 0,
        max_age: int = 0,
    ) -> None:
        if voxel_size <= 0 or max_objects < 0 or max_age < 0:
            raise ValueError(
                f"voxel_size is {voxel_size}, max_objects {max_objects}, max_age {max_age}; the first must be "
                "positive, the others 0 (no limit) or more."
            )
        self.voxel_size, self.overlap, self.box_update = voxel_size, overlap, box_update
        self.min_similarity, self.max_objects, self.max_age = min_similarity, max_objects, max_age
        self.reset()

    def reset(self, scene: str = "") -> None:
        """Forgets everything; the frames that follow are of ``scene``."""
        self.scene, self.num_frames, self.next_id = scene, 0, 0
        self.voxels: list[Int[Tensor, " _"]] = []
        self.ids = torch.empty(0, dtype=torch.int64)
        self.counts = torch.empty(0, dtype=torch.int64)
        self.last_frames = torch.empty(0, dtype=torch.int64)
        self.scores = torch.empty(0)
        self.descriptors = torch.empty(0, 0)
        self.boxes = torch.empty(0, 6)
        self.votes = torch.empty(0, 0)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def class_ids(self) -> Int[Tensor, " objects"]:
        """The class with most votes, weighted by score; -1 where no frame knew one."""
        if self.votes.shape[1] == 0:
            return torch.full_like(self.ids, -1)
        most, winner = self.votes.max(dim=1)
        return torch.where(most > 0, winner, -1)

    def similarity(
        self, instances: Instances, voxels: tuple[Int[Tensor, " _"], ...]
    ) -> Float[Tensor, "objects instances"]:
        """Returns how alike each known object and each object of a frame are; 0 = cannot be the same."""
        cosine = F.normalize(self.descriptors, dim=-1) @ instances.descriptors.T
        if self.overlap == "boxes":
            overlap = box_iou(self.boxes, instances.boxes)
        else:
            overlap = voxel_overlap(tuple(self.voxels), voxels)
        return cosine.clamp_min(0) * overlap * same_class(self.class_ids, instances.class_ids)

    @torch.no_grad()
    def merge(self, points: Float[Tensor, "points 3"], instances: Instances) -> Int[Tensor, " instances"]:
        """Takes in a frame.

        Args:
            points: Of the frame, world coordinates, metres.
            instances: Its objects.

        Returns:
            [K] id in the scene of each of them; an id is given once and stays.
        """
        instances = Instances(
            tuple(rows.cpu() for rows in instances.point_ids), *(part.cpu() for part in instances[1:])
        )
        keys = voxel_keys(points.cpu(), self.voxel_size)
        voxels = tuple(torch.unique(keys[rows]) for rows in instances.point_ids)
        own = torch.full_like(instances.class_ids, -1)
        if len(self) and voxels:
            objects, partners = match_objects(self.similarity(instances, voxels), self.min_similarity)
            self._average(objects, partners, instances, voxels)
            own[partners] = self.ids[objects]
        new = (own < 0).nonzero()[:, 0]
        own[new] = torch.arange(self.next_id, self.next_id + len(new))
        self._append(new, own[new], instances, voxels)
        self.num_frames += 1
        self._prune()
        return own

    def _average(self, objects: Tensor, partners: Tensor, new: Instances, voxels: tuple[Tensor, ...]) -> None:
        count = self.counts[objects, None].float()
        for name in ("descriptors", "scores", *(("boxes",) if self.box_update == "mean" else ())):
            part, other = getattr(self, name), getattr(new, name)[partners]
            weight = count if part.ndim > 1 else count[:, 0]
            part[objects] = (part[objects] * weight + other) / (weight + 1)
        if self.box_update == "union":
            self.boxes[objects, :3] = torch.minimum(self.boxes[objects, :3], new.boxes[partners, :3])
            self.boxes[objects, 3:] = torch.maximum(self.boxes[objects, 3:], new.boxes[partners, 3:])
        for known, partner in zip(objects.tolist(), partners.tolist(), strict=True):
            self.voxels[known] = torch.unique(torch.cat([self.voxels[known], voxels[partner]]))
        self.counts[objects] += 1
        self.last_frames[objects] = self.num_frames
        self._vote(objects, new.class_ids[partners], new.scores[partners])

    def _append(self, rows: Tensor, ids: Tensor, new: Instances, voxels: tuple[Tensor, ...]) -> None:
        first, number = len(self), len(rows)
        if number == 0:
            return
        if self.descriptors.shape[1] == 0:
            self.descriptors = new.descriptors[:0]
        self.ids = torch.cat([self.ids, ids])
        self.counts = torch.cat([self.counts, torch.ones(number, dtype=torch.int64)])
        self.last_frames = torch.cat([self.last_frames, torch.full((number,), self.num_frames)])
        self.scores = torch.cat([self.scores, new.scores[rows]])
        self.descriptors = torch.cat([self.descriptors, new.descriptors[rows]])
        self.boxes = torch.cat([self.boxes, new.boxes[rows]])
        self.votes = torch.cat([self.votes, self.votes.new_zeros(number, self.votes.shape[1])])
        self.voxels += [voxels[row] for row in rows.tolist()]
        self.next_id += number
        self._vote(torch.arange(first, first + number), new.class_ids[rows], new.scores[rows])

    def _vote(self, objects: Tensor, class_ids: Tensor, scores: Tensor) -> None:
        highest = int(class_ids.max()) if len(class_ids) else -1
        if highest >= self.votes.shape[1]:
            self.votes = F.pad(self.votes, (0, highest + 1 - self.votes.shape[1]))
        known = class_ids >= 0
        self.votes[objects[known], class_ids[known]] += scores[known]

    def _prune(self) -> None:
        keep = torch.ones_like(self.ids, dtype=torch.bool)
        if self.max_age:
            keep = (self.counts > 1) | (self.num_frames - self.last_frames <= self.max_age)
        excess = int(keep.sum()) - self.max_objects
        if self.max_objects and excess > 0:
            worth = self.counts + self.scores.double().clamp(0, 1) * 0.999  # counts first
            keep[torch.where(keep, worth, torch.inf).argsort(stable=True)[:excess]] = False
        if not bool(keep.all()):
            for name in STATE:
                setattr(self, name, getattr(self, name)[keep])
            self.voxels = [keys for keys, kept in zip(self.voxels, keep.tolist(), strict=True) if kept]

    def state_dict(self) -> dict[str, Any]:
        """Returns everything it knows, as tensors, numbers and a name."""
        lengths = torch.tensor([len(keys) for keys in self.voxels], dtype=torch.int64)
        keys = torch.cat([*self.voxels, torch.empty(0, dtype=torch.int64)])
        numbers = {"scene": self.scene, "num_frames": self.num_frames, "next_id": self.next_id}
        tensors = {name: getattr(self, name).clone() for name in STATE}
        return {**tensors, **numbers, "voxels": keys, "lengths": lengths, "voxel_size": self.voxel_size}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what another one knew.

        Raises:
            ValueError: If its voxels are of another size.
        """
        if state["voxel_size"] != self.voxel_size:
            raise ValueError(
                f"The stored objects have voxels of {state['voxel_size']:g} m, this one of {self.voxel_size:g} m; make "
                f"it with voxel_size={state['voxel_size']:g}."
            )
        for name in STATE:
            setattr(self, name, state[name].clone())
        self.voxels = list(state["voxels"].clone().split(state["lengths"].tolist()))
        self.scene, self.num_frames, self.next_id = state["scene"], state["num_frames"], state["next_id"]
