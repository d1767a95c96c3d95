"""What a stream of frames has said about a scene so far, voxel by voxel."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from typing_extensions import override

from lightning_modules.functional.bi_fusion.voxel_keys import find_keys, voxel_centres, voxel_keys

STATE = ("keys", "features", "weights", "counts", "last_frames")


class Remembered(NamedTuple):
    """What a bank knows at some places.

    Attributes:
        features: [N, C] running means; zero where nothing is known.
        counts: [N] int32 frames that saw the voxel; 0 = unknown.
    """

    features: Float[Tensor, "points channels"]
    counts: Int[Tensor, " points"]

    @property
    def known(self) -> Bool[Tensor, " points"]:
        """Places that some frame has seen."""
        return self.counts > 0


class MemoryBank(nn.Module):
    """A hash of voxels with the running mean of the features that frames have seen there.

    It has no parameters. Where ESAM carries sparse-convolution memories from frame to frame (arXiv 2408.11811), this
    holds a mean per voxel, so that it needs no training, and its size is that of the surface, not of the stream. Voxels
    are kept sorted by key: an update is one sort of the frame's voxels and one merge, a look-up a binary search.

    The whole state is in ``state_dict()``, whatever its size; a bank loads that of another.

    Args:
        channels: Of the features.
        voxel_size: Width of a voxel, metres.
        max_voxels: Most voxels kept; where there are more, those seen in the fewest frames go, of them the oldest.
            0 keeps all.
        max_age: Frames after which a voxel that only one frame has seen is forgotten (noise of a depth edge is rarely
            seen twice). 0 keeps all.
    """

    keys: Tensor
    features: Tensor
    weights: Tensor
    counts: Tensor
    last_frames: Tensor

    def __init__(self, channels: int, voxel_size: float = 0.05, max_voxels: int = 0, max_age: int = 0) -> None:
        super().__init__()
        for name, value, allowed in (
            ("channels", channels, channels > 0),
            ("voxel_size", voxel_size, voxel_size > 0),
            ("max_voxels", max_voxels, max_voxels >= 0),
            ("max_age", max_age, max_age >= 0),
        ):
            if not allowed:
                raise ValueError(f"{name} is {value}; it must be {'positive' if name[0] in 'cv' else '0 or more'}.")
        self.channels, self.voxel_size, self.max_voxels, self.max_age = channels, voxel_size, max_voxels, max_age
        self.register_buffer("keys", torch.empty(0, dtype=torch.int64))
        self.register_buffer("features", torch.empty(0, channels))
        self.register_buffer("weights", torch.empty(0))
        self.register_buffer("counts", torch.empty(0, dtype=torch.int32))
        self.register_buffer("last_frames", torch.empty(0, dtype=torch.int32))
        self.scene = ""
        self.num_frames = 0

    def __len__(self) -> int:
        return len(self.keys)

    def reset(self, scene: str = "") -> None:
        """Forgets everything; the frames that follow are of ``scene``."""
        for name in STATE:
            part = getattr(self, name)
            setattr(self, name, part.new_empty(0, *part.shape[1:]))  # a slice would keep, and save, all of it
        self.scene, self.num_frames = scene, 0

    @torch.no_grad()
    def update(
        self,
        points: Float[Tensor, "points 3"],
        features: Float[Tensor, "points channels"],
        confidence: Float[Tensor, " points"] | None = None,
    ) -> None:
        """Takes in a frame.

        Args:
            points: World coordinates, metres.
            features: Of the points.
            confidence: Weight of each point in the means, 0 = leave it out. All the same by default.

        Raises:
            ValueError: If a point is not finite or out of reach, or a weighted feature is not finite.
        """
        weights = torch.ones_like(points[:, 0]) if confidence is None else confidence.to(points)
        used = weights > 0
        points, weights, new_features = points[used], weights[used], features[used].to(self.features)
        if not bool(new_features.isfinite().all()):
            raise ValueError(
                f"Features of frame {self.num_frames} of scene {self.scene!r} are not finite: a bank would keep that "
                "for good. Give such points the confidence 0."
            )
        frame_keys, row = torch.unique(voxel_keys(points, self.voxel_size), return_inverse=True)
        added = self.weights.new_zeros(len(frame_keys)).index_add_(0, row, weights.to(self.weights))
        sums = self.features.new_zeros(len(frame_keys), self.channels)
        sums.index_add_(0, row, new_features * weights.to(self.features)[:, None])

        keys = torch.unique(torch.cat([self.keys, frame_keys]))
        old, new = torch.searchsorted(keys, self.keys), torch.searchsorted(keys, frame_keys)
        state = {name: getattr(self, name) for name in STATE[1:]}
        grown = {name: part.new_zeros(len(keys), *part.shape[1:]) for name, part in state.items()}
        for name, part in state.items():
            grown[name][old] = part
        total = grown["weights"][new] + added
        # The mean moves by its share of the difference, so that thousands of frames do not lose digits.
        grown["features"][new] += (sums - added[:, None] * grown["features"][new]) / total[:, None]
        grown["weights"][new] = total
        grown["counts"][new] += 1
        grown["last_frames"][new] = self.num_frames
        self.keys = keys
        for name, part in grown.items():
            setattr(self, name, part)
        self.num_frames += 1
        self._prune()

    def _prune(self) -> None:
        keep = torch.ones_like(self.keys, dtype=torch.bool)
        if self.max_age:
            keep = (self.counts > 1) | (self.num_frames - self.last_frames <= self.max_age)
        excess = int(keep.sum()) - self.max_voxels
        if self.max_voxels and excess > 0:
            worth = self.counts.long() * (self.num_frames + 1) + self.last_frames
            worth = torch.where(keep, worth, torch.iinfo(worth.dtype).max)
            keep[worth.argsort(stable=True)[:excess]] = False
        if not bool(keep.all()):
            for name in STATE:
                setattr(self, name, getattr(self, name)[keep])

    @torch.no_grad()
    def recall(self, points: Float[Tensor, "points 3"]) -> Remembered:
        """Returns what is known of the voxels that points fall in."""
        places = find_keys(self.keys, voxel_keys(points, self.voxel_size))
        known = places >= 0
        if len(self) == 0:
            return Remembered(self.features.new_zeros(len(points), self.channels), self.counts.new_zeros(len(points)))
        return Remembered(self.features[places] * known[:, None], self.counts[places] * known)

    def centres(self) -> Float[Tensor, "voxels 3"]:
        """Returns the middle of each voxel, metres."""
        return voxel_centres(self.keys, self.voxel_size)

    def unit_features(self) -> Float[Tensor, "voxels channels"]:
        """Returns the means at unit length, to compare with texts."""
        return F.normalize(self.features, dim=-1)

    @override
    def get_extra_state(self) -> dict[str, Any]:
        return {"scene": self.scene, "num_frames": self.num_frames, "voxel_size": self.voxel_size}

    @override
    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Takes the scene and its number of frames.

        Raises:
            ValueError: If the voxels are of another size.
        """
        if state["voxel_size"] != self.voxel_size:
            raise ValueError(
                f"The stored memory has voxels of {state['voxel_size']:g} m, this one of {self.voxel_size:g} m; make "
                f"it with voxel_size={state['voxel_size']:g}."
            )
        self.scene, self.num_frames = state["scene"], state["num_frames"]

    @override
    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in STATE:  # buffers of another length would be refused
            stored = state_dict.get(prefix + name)
            if stored is not None and stored.shape[1:] == getattr(self, name).shape[1:]:
                setattr(self, name, torch.empty_like(stored, device=self.keys.device))
        super()._load_from_state_dict(state_dict, prefix, *args)
