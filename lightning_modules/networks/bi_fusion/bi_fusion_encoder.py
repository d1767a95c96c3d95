"""From frames and points to a feature of each point that texts are compared with."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from typing_extensions import override

from lightning_modules.functional.collectives import sum_over_processes
from lightning_modules.functional.projection import UvIndex, build_uv_index_batch, sample_views
from lightning_modules.networks.bi_fusion.fusion_gate import FusionGate, GuidedFilter
from lightning_modules.networks.bi_fusion.grid_branch import GridBranch
from lightning_modules.networks.bi_fusion.point_branch import Neighbourhoods, TinySAModule

Points = Float[Tensor, "scenes points 6"] | Sequence[Float[Tensor, "_ 6"]]

NUM_CLUES = 3
HEAD_CHANNELS = 256
FIRST_CORRECTION = 0.02  # share of the text head's usual first weights: training starts at the teacher


class EncodedScenes(NamedTuple):
    """Both branches before they are joined; M points of B scenes, one after the other.

    Attributes:
        cloud_ids: [M] int32 scene of each point.
        slots: [M] int64 place of each point among the B * N padded ones.
        maps: [B, V, C, h, w] features of the images.
        teacher_maps: [B, V, T, gh, gw] tokens in the space of texts, unit length.
        uv_index: Where the padded points lie in the views.
        image_size: Height and width that ``uv_index`` counts in.
        point_features: [M, C] of the 3D branch.
        neighbourhoods: Of the points.
        text_3d: [M, T] unit features of the 3D branch alone.
        clip_global: [B, V, T] embeddings of the images, or None.
    """

    cloud_ids: Int[Tensor, " points"]
    slots: Int[Tensor, " points"]
    maps: Float[Tensor, "scenes views channels height width"]
    teacher_maps: Float[Tensor, "scenes views text grid_height grid_width"]
    uv_index: UvIndex
    image_size: tuple[int, int]
    point_features: Float[Tensor, "points channels"]
    neighbourhoods: Neighbourhoods
    text_3d: Float[Tensor, "points text"]
    clip_global: Float[Tensor, "scenes views text"] | None


class FusedPoints(NamedTuple):
    """Features of M points of B scenes, one after the other.

    Attributes:
        fused: [M, 128] float32 features for further networks.
        text: [M, 512] float32 unit features in the space of texts.
        gate: [M] share of what cameras saw, 0 to 1.
        conf_2d: [M] of the view that sees the point best, 0 to 1; 0 = none does.
        seen: [M] bool, some view sees the point.
        cloud_ids: [M] int32 scene of each point.
        teacher: [M, 512] the dense tokens fused over the views, unit length; zero where not seen. The 2D baseline.
        text_3d: [M, 512] unit features of the point branch alone.
        uv: [M, V, 2] pixel of each point in each view.
        view_conf: [M, V] ``conf_2d`` of each view.
        clip_global: [B, V, 512] embeddings of the images, or None.
    """

    fused: Float[Tensor, "points fused"]
    text: Float[Tensor, "points text"]
    gate: Float[Tensor, " points"]
    conf_2d: Float[Tensor, " points"]
    seen: Bool[Tensor, " points"]
    cloud_ids: Int[Tensor, " points"]
    teacher: Float[Tensor, "points text"]
    text_3d: Float[Tensor, "points text"]
    uv: Float[Tensor, "points views 2"]
    view_conf: Float[Tensor, "points views"]
    clip_global: Float[Tensor, "scenes views text"] | None


class BiFusionEncoder(nn.Module):
    """Per-point features that match text, from a frozen CLIP's tokens and the points themselves.

    The 2D branch makes the tokens a fine map that points are looked up in; the 3D branch sees colours and shapes around
    each point. A gate joins them to ``fused``. The text feature stays tied to the teacher, so that it keeps words that
    nobody trained it on: ``text = unit(gate * centred teacher + correction(fused))``. The teacher is averaged over like
    neighbours (:class:`GuidedFilter`), then centred: most of a CLIP feature is what all image features share, which
    draws every point towards the same few words. Points no camera sees have the correction alone, from the 3D branch.

    Args:
        projection: [D, T] from tokens to the space of texts; kept with the weights.
        channels: Of both branches.
        fused_channels: Of ``fused``.
        point_channels: Of the 3D branch's layers.
        radius: Of a neighbourhood, metres.
        num_neighbours: Points of a neighbourhood at most.
        point_layers: Layers of attention over neighbourhoods.
        heads: Of every attention.
        use_height: Let points know z; it must point up and be 0 near the floor.
        mix_before_shuffle: Put a learned 1x1 before the pixel shuffle.
        upsample: Make the map four times as fine as the tokens; without it each point takes the patch it falls in.
        use_tiny_sa_2d: Self-attention on the map.
        filter_steps: Times the teacher is averaged over neighbours; 0 leaves it as it is.
        centring: Share of what all points have in common that is taken off the teacher, 0 to 1.
    """

    projection: Tensor
    common: Tensor
    num_common: Tensor

    def __init__(
        self,
        projection: Float[Tensor, "tokens text"],
        *,
        channels: int = 256,
        fused_channels: int = 128,
        point_channels: int = 128,
        radius: float = 0.3,
        num_neighbours: int = 16,
        point_layers: int = 2,
        heads: int = 4,
        use_height: bool = True,
        mix_before_shuffle: bool = True,
        upsample: bool = True,
        use_tiny_sa_2d: bool = False,
        filter_steps: int = 3,
        centring: float = 0.75,
    ) -> None:
        super().__init__()
        if not 0 <= centring <= 1:
            raise ValueError(f"centring is {centring}; allowed: 0 to 1.")
        token_channels, text_channels = projection.shape
        self.upsample, self.centring = upsample, centring
        self.register_buffer("projection", projection.float().clone())
        self.register_buffer("common", torch.zeros(text_channels))
        self.register_buffer("num_common", torch.zeros(()))
        self.grid_branch = GridBranch(
            token_channels,
            channels,
            mix_before_shuffle=mix_before_shuffle,
            upsample=upsample,
            use_tiny_sa_2d=use_tiny_sa_2d,
            heads=heads,
        )
        self.image_norm = nn.LayerNorm(channels)
        self.point_branch = TinySAModule(
            channels,
            point_channels,
            radius=radius,
            num_neighbours=num_neighbours,
            num_layers=point_layers,
            heads=heads,
            use_height=use_height,
        )
        self.filter = GuidedFilter(channels, filter_steps) if filter_steps else None
        self.gate = FusionGate(channels, NUM_CLUES)
        self.reduce = nn.Linear(channels, fused_channels)
        self.text_head = TextHead(fused_channels, text_channels)

    @override
    def forward(
        self,
        points: Points,
        tokens: Float[Tensor, "scenes views tokens grid_height grid_width"],
        intrinsics: Float[Tensor, "scenes views 3 3"],
        camera_from_world: Float[Tensor, "scenes views 4 4"],
        image_size: tuple[int, int],
        depth: Float[Tensor, "scenes views depth_height depth_width"] | None = None,
        has_frame: Bool[Tensor, "scenes views"] | None = None,
        clip_global: Float[Tensor, "scenes views text"] | None = None,
    ) -> FusedPoints:
        """Returns the features of all points, fused over all views.

        Args:
            points: Of each scene: x y z in metres, r g b in 0 to 1.
            tokens: Of the image tower before its projection.
            intrinsics: Of the images at ``image_size``.
            camera_from_world: OpenCV cameras.
            image_size: Height and width of the images.
            depth: Registered to the images, of any size, metres; without it nothing hides anything.
            has_frame: False for views that only fill up.
            clip_global: Passed on.
        """
        return self.fuse(
            self.encode(points, tokens, intrinsics, camera_from_world, image_size, depth, has_frame, clip_global)
        )

    def encode(
        self,
        points: Points,
        tokens: Float[Tensor, "scenes views tokens grid_height grid_width"],
        intrinsics: Float[Tensor, "scenes views 3 3"],
        camera_from_world: Float[Tensor, "scenes views 4 4"],
        image_size: tuple[int, int],
        depth: Float[Tensor, "scenes views depth_height depth_width"] | None = None,
        has_frame: Bool[Tensor, "scenes views"] | None = None,
        clip_global: Float[Tensor, "scenes views text"] | None = None,
        *,
        as_seen: Sequence[Float[Tensor, "_ 6"]] | None = None,
        teacher_tokens: Float[Tensor, "scenes views tokens grid_height grid_width"] | None = None,
    ) -> EncodedScenes:
        """Runs both branches; what ``fuse`` joins, for all views or some.

        Args:
            points: As in ``forward``.
            tokens: Likewise.
            intrinsics: Likewise.
            camera_from_world: Likewise.
            image_size: Likewise.
            depth: Likewise.
            has_frame: Likewise.
            clip_global: Likewise.
            as_seen: The points as the 3D branch sees them: turned or recoloured copies.
            teacher_tokens: Of the tower as CLIP trained it, where ``tokens`` are of blocks that are trained further.
        """
        clouds = list(points)
        counts = torch.tensor([len(cloud) for cloud in clouds])
        padded = pad_sequence(clouds, batch_first=True)  # [B, N, 6]
        longest = padded.shape[1]
        cloud_ids = torch.repeat_interleave(counts)
        starts = counts.cumsum(0) - counts
        slots = torch.arange(int(counts.sum())) + (torch.arange(len(clouds)) * longest - starts)[cloud_ids]
        cloud_ids, slots = cloud_ids.to(padded.device, torch.int32), slots.to(padded.device)
        if has_frame is not None:  # what fills up may hold anything
            tokens = torch.where(has_frame[..., None, None, None], tokens, 0.0)
            if teacher_tokens is not None:
                teacher_tokens = torch.where(has_frame[..., None, None, None], teacher_tokens, 0.0)
        index = build_uv_index_batch(
            padded[..., :3], intrinsics, camera_from_world, image_size, depth, has_frame=has_frame
        )
        dtype = self.projection.dtype
        maps = self.grid_branch(tokens.flatten(0, 1).to(dtype)).unflatten(0, tokens.shape[:2])
        from_points = self.point_branch(
            torch.cat(clouds).to(dtype), cloud_ids, None if as_seen is None else torch.cat(list(as_seen)).to(dtype)
        )
        with torch.autocast(padded.device.type, enabled=False):
            alone = self.reduce(self.gate.act(from_points.features.to(dtype)))
            text_3d = self.text_head(alone)
        return EncodedScenes(
            cloud_ids,
            slots,
            maps,
            self.teacher_maps(tokens if teacher_tokens is None else teacher_tokens),
            index,
            image_size,
            from_points.features,
            from_points.neighbourhoods,
            text_3d,
            clip_global,
        )

    @torch.no_grad()
    def teacher_maps(
        self, tokens: Float[Tensor, "scenes views tokens grid_height grid_width"]
    ) -> Float[Tensor, "scenes views text grid_height grid_width"]:
        """Returns the tokens in the space of texts, unit length."""
        with torch.autocast(tokens.device.type, enabled=False):
            projected = torch.einsum("bvdhw,dc->bvchw", tokens.to(self.projection.dtype), self.projection)
        return F.normalize(projected, dim=2)

    def fused_teacher(
        self, encoded: EncodedScenes, views: Bool[Tensor, "scenes views"] | None = None
    ) -> tuple[Float[Tensor, "points text"], Bool[Tensor, " points"]]:
        """Returns the teacher's mean over the views at each point, and where there is any.

        The mean of unit vectors is shorter where views or patches disagree.
        """
        mean, seen = sample_views(
            encoded.teacher_maps, encoded.uv_index.uv, _confidence(encoded, views), encoded.image_size
        )
        return mean.flatten(0, 1)[encoded.slots], seen.flatten()[encoded.slots]

    def centred(self, teacher: Float[Tensor, "points text"]) -> Float[Tensor, "points text"]:
        """Returns unit teachers without their share of what all points have in common."""
        return F.normalize(teacher, dim=-1) - self.centring * self.common

    @torch.no_grad()
    def add_to_common(self, teacher: Float[Tensor, "points text"], seen: Bool[Tensor, " points"]) -> None:
        """Adds points to the mean of unit teachers that is taken off them; from all processes, where there are several.

        Args:
            teacher: Of the points, of any length.
            seen: Those that count.
        """
        total = F.normalize(teacher[seen], dim=-1).sum(dim=0)
        sums = sum_over_processes(torch.cat([total, seen.sum()[None].to(total)]))
        number = sums[-1] + self.num_common
        self.common += (sums[:-1] - sums[-1] * self.common) / number.clamp_min(1)
        self.num_common.copy_(number)

    def fuse(
        self,
        encoded: EncodedScenes,
        views: Bool[Tensor, "scenes views"] | None = None,
        teacher: Float[Tensor, "points text"] | None = None,
    ) -> FusedPoints:
        """Joins both branches by what some views see.

        Args:
            encoded: By ``encode``.
            views: By default all.
            teacher: The first of ``fused_teacher`` for the same views, where it is at hand.
        """
        conf = _confidence(encoded, views)
        uv = encoded.uv_index.uv
        if not self.upsample:
            uv = patch_centres(uv, encoded.image_size, (encoded.maps.shape[-2], encoded.maps.shape[-1]))
        sampled, seen = sample_views(encoded.maps.float(), uv, conf, encoded.image_size)
        seen = seen.flatten()[encoded.slots]
        from_images = self.image_norm(sampled.flatten(0, 1)[encoded.slots]) * seen[:, None]
        if teacher is None:
            teacher, _ = self.fused_teacher(encoded, views)
        agreement = teacher.norm(dim=-1)
        best = conf.amax(dim=1).flatten()[encoded.slots]
        filtered = teacher
        if self.filter is not None:
            filtered = self.filter(teacher, from_images, encoded.point_features, best, encoded.neighbourhoods)
        clues = torch.stack([best, agreement, filtered.norm(dim=-1)], dim=-1)
        centred = self.centred(filtered)
        joined = self.gate(from_images, encoded.point_features, clues, seen)
        with torch.autocast(teacher.device.type, enabled=False):
            fused = self.reduce(joined.features.to(self.reduce.weight.dtype))
            return FusedPoints(
                fused,
                self.text_head(fused, centred, joined.gate),
                joined.gate,
                best,
                seen,
                encoded.cloud_ids,
                F.normalize(teacher, dim=-1),
                encoded.text_3d,
                _by_point(encoded, encoded.uv_index.uv),
                _by_point(encoded, conf),
                encoded.clip_global,
            )


class TextHead(nn.Module):
    """Turns fused features into unit features in the space of texts: a correction of what the teacher says.

    Args:
        fused_channels: Of the fused features.
        text_channels: Of the space of texts.
    """

    def __init__(self, fused_channels: int, text_channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.LayerNorm(fused_channels),
            nn.Linear(fused_channels, HEAD_CHANNELS),
            nn.GELU(),
            nn.Linear(HEAD_CHANNELS, text_channels),
        )
        with torch.no_grad():
            for parameter in self.layers[-1].parameters():
                parameter.mul_(FIRST_CORRECTION)

    @override
    def forward(
        self,
        fused: Float[Tensor, "points fused"],
        teacher: Float[Tensor, "points text"] | None = None,
        gate: Float[Tensor, " points"] | None = None,
    ) -> Float[Tensor, "points text"]:
        """Returns unit features; without a teacher, of the correction alone."""
        correction = self.layers(fused)
        if teacher is not None and gate is not None:
            correction = correction + gate[:, None] * teacher
        return F.normalize(correction, dim=-1)


def patch_centres(
    uv: Float[Tensor, "*rows 2"], image_size: tuple[int, int], grid: tuple[int, int]
) -> Float[Tensor, "*rows 2"]:
    """Returns the centre of the patch that each point falls in: looked up there, it has that patch's feature alone.

    Args:
        uv: Pixels of an image.
        image_size: Its height and width.
        grid: Rows and columns of patches.
    """
    cell = uv.new_tensor([image_size[1] / grid[1], image_size[0] / grid[0]])
    return ((uv / cell).floor() + 0.5) * cell


def _confidence(encoded: EncodedScenes, views: Tensor | None) -> Tensor:
    conf = encoded.uv_index.conf_2d
    return conf if views is None else conf * views[..., None]


def _by_point(encoded: EncodedScenes, values: Tensor) -> Tensor:
    """Turns [B, V, N, ...] into [M, V, ...]."""
    return values.transpose(1, 2).flatten(0, 1)[encoded.slots]
