"""The 3D branch: each point sees the colours and places of its neighbourhood."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from typing_extensions import override

from lightning_modules.functional.bi_fusion.ball_query import ball_query
from lightning_modules.functional.bi_fusion.geometric_encoding import build_geo_pe, geo_pe_channels
from lightning_modules.functional.bi_fusion.neighbourhood_attention import attend, neighbourhood_weights

OFFSET_FREQUENCIES = 2
HEIGHT_FREQUENCIES = 3
LONGEST_HEIGHT_M = 4.0  # no floor of a building is much higher
COLOURS = 3
RELATION_CHANNELS = geo_pe_channels(3, OFFSET_FREQUENCIES) + 1 + COLOURS
BIAS_CHANNELS = 16


class Neighbourhoods(NamedTuple):
    """Who is near whom, and how they differ.

    Attributes:
        ids: [M, K] int32 rows of the K nearest points within the radius, itself the first; -1 = none.
        relations: [M, K, R] offset (encoded), distance over the radius, difference of colours.
        differences: [M, K, 2] squares of the distance over the radius, and of the difference of colours.
    """

    ids: Int[Tensor, "points neighbours"]
    relations: Float[Tensor, "points neighbours relations"]
    differences: Float[Tensor, "points neighbours 2"]


class PointFeatures(NamedTuple):
    """What the 3D branch gives.

    Attributes:
        features: [M, C].
        neighbourhoods: That they were made with.
    """

    features: Float[Tensor, "points channels"]
    neighbourhoods: Neighbourhoods


class TinySAModule(nn.Module):
    """Self-attention of each point over its neighbourhood, in layers.

    A point starts as its colour and height; offsets and differences of colour enter every layer, as a bias of the
    attention and as values. Nothing depends on where in x and y a scene lies, nor on the order of its points.

    Args:
        out_channels: Of the result.
        channels: Of the layers.
        radius: Of a neighbourhood, metres.
        num_neighbours: The nearest ones that are looked at.
        num_layers: Each sees the radius further.
        heads: Of the attention.
        use_height: Let points know z, which must then point up and be 0 near the floor, as in ScanNet.
    """

    def __init__(
        self,
        out_channels: int = 256,
        channels: int = 128,
        *,
        radius: float = 0.3,
        num_neighbours: int = 16,
        num_layers: int = 2,
        heads: int = 4,
        use_height: bool = True,
    ) -> None:
        super().__init__()
        for name, value, allowed in (
            ("radius", radius, radius > 0),
            ("num_neighbours", num_neighbours, num_neighbours >= 1),
            ("heads", heads, heads >= 1 and channels % heads == 0),
        ):
            if not allowed:
                raise ValueError(
                    f"{name} is {value}; allowed: above 0, and heads a divisor of the point channels, {channels}."
                )
        self.radius, self.num_neighbours, self.use_height = radius, num_neighbours, use_height
        inputs = COLOURS + (geo_pe_channels(1, HEIGHT_FREQUENCIES) if use_height else 0)
        self.embed = nn.Sequential(nn.Linear(inputs, channels), nn.GELU(), nn.Linear(channels, channels))
        self.layers = nn.ModuleList(PointAttention(channels, heads) for _ in range(num_layers))
        self.out = nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, out_channels))

    @override
    def forward(
        self,
        points: Float[Tensor, "points 6"],
        cloud_ids: Int[Tensor, " points"],
        as_seen: Float[Tensor, "points 6"] | None = None,
    ) -> PointFeatures:
        """Returns the features of points of several clouds; none sees a point of another.

        Args:
            points: x y z in metres, r g b in 0 to 1; a cloud's points follow each other.
            cloud_ids: Cloud of each point, rising.
            as_seen: The same points turned or recoloured, to learn from instead; neighbours are those of ``points``.
        """
        seen = points if as_seen is None else as_seen
        ids = ball_query(points[:, :3].contiguous(), self.radius, self.num_neighbours, cloud_ids)
        neighbourhoods = self._neighbourhoods(seen, ids)
        x = self.embed(self._inputs(seen))
        for layer in self.layers:
            x = layer(x, neighbourhoods)
        return PointFeatures(self.out(x), neighbourhoods)

    def _inputs(self, points: Tensor) -> Tensor:
        if not self.use_height:
            return points[:, 3:] - 0.5
        height = build_geo_pe(points[:, 2:3], HEIGHT_FREQUENCIES, LONGEST_HEIGHT_M)
        return torch.cat([points[:, 3:] - 0.5, height], dim=-1)

    def _neighbourhoods(self, points: Tensor, ids: Tensor) -> Neighbourhoods:
        offsets, colours = (points[ids.clamp_min(0).long()] - points[:, None]).split(3, dim=-1)
        distances = offsets.norm(dim=-1, keepdim=True) / self.radius
        encoded = build_geo_pe(offsets, OFFSET_FREQUENCIES, 2 * self.radius)
        differences = torch.cat([distances.square(), colours.square().sum(dim=-1, keepdim=True)], dim=-1)
        return Neighbourhoods(ids, torch.cat([encoded, distances, colours], dim=-1), differences)


class PointAttention(nn.Module):
    """A layer of attention over neighbourhoods, then two linear layers of each point alone; both are added.

    Args:
        channels: Of the points.
        heads: Of the attention.
    """

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(channels)
        self.to_attention = nn.Linear(channels, 3 * channels)
        self.bias = relation_bias(heads)
        self.of_relations = nn.Linear(heads * RELATION_CHANNELS, channels)
        self.out = nn.Linear(channels, channels)
        self.alone = nn.Sequential(
            nn.LayerNorm(channels), nn.Linear(channels, 2 * channels), nn.GELU(), nn.Linear(2 * channels, channels)
        )

    @override
    def forward(
        self, x: Float[Tensor, "points channels"], neighbourhoods: Neighbourhoods
    ) -> Float[Tensor, "points channels"]:
        """Returns the features after the layer."""
        ids, relations, _ = neighbourhoods
        queries, keys, values = self.to_attention(self.norm(x)).unflatten(-1, (3, self.heads, -1)).unbind(1)
        weights = neighbourhood_weights(queries, keys, ids, self.bias(relations))
        # Each neighbour's value has a linear map of its relation added; sums of linear maps are maps of sums.
        mean_relations = torch.einsum("mkh,mkr->mhr", weights, relations.to(weights.dtype)).flatten(1)
        gathered = attend(weights, values, ids).flatten(1) + self.of_relations(mean_relations)
        x = x + self.out(gathered)
        return x + self.alone(x)


def relation_bias(heads: int) -> nn.Sequential:
    """Returns the network that scores relations, for each head."""
    return nn.Sequential(nn.Linear(RELATION_CHANNELS, BIAS_CHANNELS), nn.GELU(), nn.Linear(BIAS_CHANNELS, heads))
