"""Gaussians of the tabletop world: flat discs on the surfaces, some faint, some inside, and floaters in the air."""

from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.spatial import cKDTree

from datamodules.synthetic.tabletop_photos import RayCaster
from datamodules.synthetic.tabletop_rooms import World
from datamodules.synthetic.tabletop_shapes import perpendicular_frame
from lightning_modules.functional.splatting.gaussians import GaussianScene, matrices_to_quaternions

Floaters = Literal["isolated", "clumped", "faint", "none"]

INSIDE_FRACTION = 0.04  # trained scenes hold Gaussians behind the surface that no view can tell from empty space
FLOATER_FRACTION = 0.04
SEMI_TRANSPARENT_FRACTION = 0.15
WIDE_FRACTION = 0.03  # discs 2.2 times too wide, as after stopped densification
SIGMA_OVER_SPACING = 0.50  # of a disc, over the mean distance to its three nearest opaque neighbours
OPAQUE = (0.8, 0.99)  # opacities of the discs that are not faint
SIGMA_SPREAD = (0.75, 1.3)
COARSE_SIGMA_OVER_SPACING = 0.65  # the same for furniture and room, whose discs hide behind nothing
FLATNESS = 0.14  # sigma along the normal over sigma along the surface
# The rasterizer blurs every footprint by 0.55 pixels, which fattens silhouettes. Training on photographs pulls discs
# inwards until outlines fit; half a pixel at the cameras' distance does the same here.
SURFACE_INSET = 0.0015  # metres
CLUMP_SIZE = 12
FLOATER_BOUNDS = np.array([(-0.75, -0.75, 0.0), (0.75, 0.75, 0.7)])  # metres; the air between the cameras and the table
_SH_DEGREE_0 = 0.28209479177387814


class SurfaceSamples(NamedTuple):
    """Points where a Gaussian will sit, on surfaces that a camera could see.

    Attributes:
        points: [points, 3] metres.
        normals: [points, 3] unit, outward.
        solid_ids: [points] number of the solid in :class:`RayCaster`.
    """

    points: Float[np.ndarray, "points 3"]
    normals: Float[np.ndarray, "points 3"]
    solid_ids: Int[np.ndarray, " points"]


class LabelledGaussians(NamedTuple):
    """A scene that knows the truth about itself.

    Attributes:
        scene: N Gaussians, colours in spherical harmonics of degree 0.
        concept_ids: [N, 3] rows of part, object and group in ``World.prompts``, -1 for floaters.
        is_floater: [N].
    """

    scene: GaussianScene
    concept_ids: Int[np.ndarray, "gaussians 3"]
    is_floater: Bool[np.ndarray, " gaussians"]


def sample_surfaces(
    world: World, caster: RayCaster, num_gaussians: int, floaters: Floaters, rng: np.random.Generator
) -> SurfaceSamples:
    """Spreads points for a scene of about ``num_gaussians``; finer on small parts, coarse far away."""
    target = num_gaussians * (1 - INSIDE_FRACTION - (FLOATER_FRACTION if floaters != "none" else 0))
    factors = _spacing_factors(world)[caster.part_of_solid]
    areas = np.array([solid.area() for solid in caster.solids])
    spacing = float(np.sqrt((areas / factors**2).sum() / target))
    state = rng.bit_generator.state
    for _ in range(2):  # hidden points fall away; the second round makes up for them
        rng.bit_generator.state = state
        samples = _visible_samples(caster, world.num_things, spacing * factors, rng)
        spacing *= float(np.sqrt(len(samples.points) / target))
    return samples


def make_gaussians(
    world: World,
    caster: RayCaster,
    samples: SurfaceSamples,
    colors: Float[np.ndarray, "points 3"],
    floaters: Floaters,
    rng: np.random.Generator,
) -> LabelledGaussians:
    """Puts a disc on every surface sample and adds Gaussians inside the solids and floaters.

    Args:
        world: The furnished room.
        caster: Its solids.
        samples: Where the discs go.
        colors: [points, 3] display colours, 0 to 1, of the samples.
        floaters: ``isolated``: anywhere in the air, 30 % of them opaque; ``clumped``: the same in clumps of twelve;
            ``faint``: isolated with opacities up to 0.35; ``none``.
        rng: Decides everything random.
    """
    count = len(samples.points)
    part_ids = caster.part_of_solid[samples.solid_ids]
    opacities = rng.uniform(*OPAQUE, count)
    is_faint = rng.uniform(size=count) < SEMI_TRANSPARENT_FRACTION
    opacities[is_faint] = rng.uniform(0.05, 0.4, int(is_faint.sum()))
    relative = np.where(part_ids < world.num_movable, SIGMA_OVER_SPACING, COARSE_SIGMA_OVER_SPACING)
    tangential = relative * _neighbour_distances(samples, part_ids, ~is_faint) * rng.uniform(*SIGMA_SPREAD, count)
    tangential = np.where(rng.uniform(size=count) < WIDE_FRACTION, 2.2 * tangential, tangential)
    scales = tangential[:, None] * np.concatenate(
        [rng.uniform(0.85, 1.15, (count, 2)), np.full((count, 1), FLATNESS)], 1
    )
    rotations = _frames_on(samples.normals, rng)

    total = count / (1 - INSIDE_FRACTION - (FLOATER_FRACTION if floaters != "none" else 0))
    discs = samples.points - SURFACE_INSET * samples.normals
    sunken = discs - rng.uniform(0.003, 0.01, (count, 1)) * samples.normals
    inside = rng.permutation(np.nonzero(_is_inside_own_solid(caster, sunken, samples))[0])
    inside = inside[: round(INSIDE_FRACTION * total)]
    means = np.concatenate([discs, sunken[inside]])
    rows = np.concatenate([np.arange(count), inside])
    opacities = np.concatenate([opacities, rng.uniform(0.2, 0.9, len(inside))])
    scales, rotations, colors, part_ids = (array[rows] for array in (scales, rotations, colors, part_ids))

    num_floaters = round(FLOATER_FRACTION * total) if floaters != "none" else 0
    positions, floater_opacities = _floaters(floaters, num_floaters, rng)
    floater_scales = rng.uniform(0.004, 0.02, (num_floaters, 1)) * rng.uniform(0.7, 1.3, (num_floaters, 3))
    floater_frames = _frames_on(_random_directions(num_floaters, rng), rng)
    nearest = cKDTree(discs).query(positions)[1]
    floater_colors = np.clip(colors[nearest] + rng.normal(0, 0.08, (num_floaters, 3)), 0, 1)
    scene = _scene(
        np.concatenate([means, positions]),
        np.concatenate([scales, floater_scales]),
        np.concatenate([rotations, floater_frames]),
        np.concatenate([opacities, floater_opacities]),
        np.concatenate([colors, floater_colors]),
    )
    concept_ids = np.concatenate([world.concept_ids[part_ids], np.full((num_floaters, 3), -1)])
    return LabelledGaussians(scene, concept_ids, concept_ids[:, 0] < 0)


def _spacing_factors(world: World) -> np.ndarray:
    """Returns the spacing of each part relative to that of a large part of an object on the table."""
    areas = np.array([sum(solid.area() for solid in part.solids) for part in world.parts])
    factors = np.clip((areas / 0.02) ** 0.25, 0.5, 1.0)
    coarse = {"table top": 2.4, "table leg": 5.0, "stool seat": 5.0, "stool leg": 5.0}
    for part_id, part in enumerate(world.parts):
        factors[part_id] = 14.0 if part_id >= world.num_things else coarse.get(part.prompt, factors[part_id])
    return factors


def _visible_samples(
    caster: RayCaster, num_things: int, spacings: np.ndarray, rng: np.random.Generator
) -> SurfaceSamples:
    """Samples all solids and leaves out what no camera sees: contacts, undersides and the outsides of the room."""
    parts = [solid.surface_points(spacing, rng) for solid, spacing in zip(caster.solids, spacings, strict=True)]
    points = np.concatenate([part.points for part in parts])
    normals = np.concatenate([part.normals for part in parts])
    solid_ids = np.repeat(np.arange(len(parts)), [len(part.points) for part in parts])
    kept = ~((normals[:, 2] < -0.95) & (points[:, 2] < 1e-3))
    kept &= (caster.part_of_solid[solid_ids] < num_things) | ((normals * points).sum(1) < 0)
    for probes in (points + 0.0002 * normals, points + 0.002 * normals):
        for solid_id, solid in enumerate(caster.solids):
            centre, radius = solid.bounding_sphere()
            near = np.nonzero(kept & (((probes - centre) ** 2).sum(1) < radius**2))[0]
            kept[near[solid.contains(probes[near]) & (solid_ids[near] != solid_id)]] = False
    return SurfaceSamples(points[kept], normals[kept], solid_ids[kept])


def _is_inside_own_solid(caster: RayCaster, points: np.ndarray, samples: SurfaceSamples) -> np.ndarray:
    """Tells which points, moved inwards from the samples, have not come out again behind a thin wall."""
    is_inside = np.zeros(len(points), bool)
    for solid_id in np.unique(samples.solid_ids):
        rows = np.nonzero(samples.solid_ids == solid_id)[0]
        is_inside[rows] = caster.solids[solid_id].contains(points[rows])
    return is_inside


def _neighbour_distances(samples: SurfaceSamples, part_ids: np.ndarray, is_opaque: np.ndarray) -> np.ndarray:
    """Returns the mean distance to the three nearest opaque samples of the same part, metres."""
    distances = np.empty(len(part_ids))
    for part_id in np.unique(part_ids):
        rows = np.nonzero(part_ids == part_id)[0]
        opaque = rows[is_opaque[rows]]
        if len(opaque) < 5:
            distances[rows] = 0.003
            continue
        nearest, _ = cKDTree(samples.points[opaque]).query(samples.points[rows], k=4)
        # An opaque sample finds itself first, at distance zero.
        distances[rows] = np.where(is_opaque[rows], nearest[:, 1:].mean(1), nearest[:, :3].mean(1))
    return distances


def _floaters(kind: Floaters, count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Returns positions [F, 3], metres, and opacities [F]."""
    low, high = FLOATER_BOUNDS
    positions = rng.uniform(low, high, (count, 3))
    if kind == "clumped":
        centres = positions[: max(1, round(count / CLUMP_SIZE))]
        positions = centres[rng.integers(0, len(centres), count)] + rng.normal(0, 0.015, (count, 3))
    opacities = rng.uniform(0.05, 0.35, count)
    if kind != "faint":
        is_opaque = rng.uniform(size=count) < 0.3
        opacities[is_opaque] = rng.uniform(0.35, 0.9, int(is_opaque.sum()))
    return positions, opacities


def _random_directions(count: int, rng: np.random.Generator) -> np.ndarray:
    vectors = rng.normal(size=(count, 3))
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def _frames_on(normals: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Returns rotations [N, 3, 3] whose third column is the normal, turned about it at random."""
    side, across = perpendicular_frame(normals)
    angle = rng.uniform(0, np.pi, (len(normals), 1))
    first = np.cos(angle) * side + np.sin(angle) * across
    return np.stack([first, np.cross(normals, first), normals], 2)


def _scene(
    means: np.ndarray, scales: np.ndarray, rotations: np.ndarray, opacities: np.ndarray, colors: np.ndarray
) -> GaussianScene:
    return GaussianScene(
        means=torch.from_numpy(means.astype(np.float32)),
        log_scales=torch.from_numpy(np.log(scales).astype(np.float32)),
        quaternions=matrices_to_quaternions(torch.from_numpy(rotations)).float(),
        opacity_logits=torch.from_numpy(np.log(opacities / (1 - opacities)).astype(np.float32)),
        spherical_harmonics=torch.from_numpy(((colors - 0.5) / _SH_DEGREE_0).astype(np.float32))[:, None],
    )
