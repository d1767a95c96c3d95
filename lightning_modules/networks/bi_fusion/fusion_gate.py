"""Joins the two branches: what cameras saw, cleaned by the neighbourhood, and what the points themselves show."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from typing_extensions import override

from lightning_modules.functional.bi_fusion.neighbourhood_attention import neighbourhood_weights, weighted_neighbours
from lightning_modules.networks.bi_fusion.point_branch import Neighbourhoods, relation_bias

FILTER_CHANNELS = 32
GATE_CHANNELS = 64
FIRST_SCORE = 2.0  # of the gate before its sigmoid: a share of 0.88
# Of the filter: by squared distance over the radius's, and by squared difference of colour.
FIRST_SHARPNESS = (1.0, 100.0)


class GatedFeatures(NamedTuple):
    """What the gate gives.

    Attributes:
        features: [M, C] of both branches.
        gate: [M] share of the 2D branch, 0 to 1; 0 where no camera sees a point.
    """

    features: Float[Tensor, "points channels"]
    gate: Float[Tensor, " points"]


class FusionGate(nn.Module):
    """Mixes the 2D and the 3D feature of each point by a share that both decide, then lets them act on each other.

    Where no camera sees a point the share is 0, and the 3D branch stands alone.

    Args:
        channels: Of both branches.
        num_clues: Further numbers that the share depends on.
    """

    def __init__(self, channels: int, num_clues: int) -> None:
        super().__init__()
        self.score = nn.Sequential(
            nn.Linear(2 * channels + num_clues, GATE_CHANNELS), nn.GELU(), nn.Linear(GATE_CHANNELS, 1)
        )
        with torch.no_grad():  # training starts with the cameras: a gate that shuts early learns nothing more from them
            last = self.score[-1]
            assert isinstance(last, nn.Linear)
            last.weight.mul_(0.1)
            last.bias.fill_(FIRST_SCORE)
        self.together = nn.Sequential(
            nn.LayerNorm(channels), nn.Linear(channels, channels), nn.GELU(), nn.Linear(channels, channels)
        )

    @override
    def forward(
        self,
        image_features: Float[Tensor, "points channels"],
        point_features: Float[Tensor, "points channels"],
        clues: Float[Tensor, "points clues"],
        seen: Bool[Tensor, " points"],
    ) -> GatedFeatures:
        """Returns the mixed features and the share of ``image_features`` in them."""
        score = self.score(torch.cat([image_features, point_features, clues.to(image_features.dtype)], dim=-1))
        gate = score[:, 0].float().sigmoid() * seen
        share = gate[:, None].to(image_features.dtype)
        return GatedFeatures(self.act(share * image_features + (1 - share) * point_features), gate)

    def act(self, mixed: Float[Tensor, "points channels"]) -> Float[Tensor, "points channels"]:
        """Returns mixed features after the layers behind the gate; of the 3D branch alone for a share of 0."""
        return mixed + self.together(mixed)


class GuidedFilter(nn.Module):
    """Replaces what cameras saw at a point by a mean over its neighbourhood, whose weights follow from both branches.

    A joint bilateral filter that is learned: neighbours of like colour, shape and content count, others do not, and
    none that no camera saw. It starts as the common one, exp(-a distance^2 - b colour^2). Means of image features stay
    in the space of image features, so texts still fit.

    Args:
        channels: Of both branches.
        num_steps: Times the same weights are applied; each reaches a radius further.
    """

    def __init__(self, channels: int, num_steps: int) -> None:
        super().__init__()
        self.num_steps = num_steps
        self.to_queries = nn.Linear(2 * channels, FILTER_CHANNELS)
        self.to_keys = nn.Linear(2 * channels, FILTER_CHANNELS)
        self.bias = relation_bias(1)
        self.certainty = nn.Linear(1, 1, bias=False)  # what is added to all changes no weight
        self.log_sharpness = nn.Parameter(torch.tensor(FIRST_SHARPNESS).log())
        with torch.no_grad():  # what is learned on top starts at nothing
            for parameter in (*self.to_queries.parameters(), *self.bias[-1].parameters(), self.certainty.weight):
                parameter.zero_()

    @override
    def forward(
        self,
        values: Float[Tensor, "points wide"],
        image_features: Float[Tensor, "points channels"],
        point_features: Float[Tensor, "points channels"],
        conf_2d: Float[Tensor, " points"],
        neighbourhoods: Neighbourhoods,
    ) -> Float[Tensor, "points wide"]:
        """Returns the values after the filter.

        Args:
            values: Of the points; those with ``conf_2d`` 0 reach no other, and stay as they are.
            image_features: Of the 2D branch.
            point_features: Of the 3D branch.
            conf_2d: How well cameras see each point; 0 = not at all.
            neighbourhoods: Of the points.
        """
        both = torch.cat([image_features, point_features], dim=-1)
        queries, keys = self.to_queries(both)[:, None], self.to_keys(both)[:, None]
        seen = conf_2d > 0
        certain = self.certainty(conf_2d[:, None].to(both.dtype))[:, 0].float()
        certain = certain.masked_fill(~seen, -torch.inf)
        bias = self.bias(neighbourhoods.relations)[..., 0].float() + certain[neighbourhoods.ids.clamp_min(0).long()]
        bias = bias - neighbourhoods.differences.float() @ self.log_sharpness.exp()
        weights = neighbourhood_weights(queries, keys, neighbourhoods.ids, bias[..., None])[..., 0]
        for _ in range(self.num_steps):
            values = torch.where(seen[:, None], weighted_neighbours(weights, values, neighbourhoods.ids), values)
        return values
