"""Shaded pictures of meshes in the cube, seen from a corner without perspective."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from lightning_modules.functional.ray_casting import cast_rays
from lightning_modules.functional.sdf_vqvae.meshes import TriangleMesh, face_normals

OVERSAMPLING = 2
HALF_WIDTH = 1.45
"""Of the picture, in the cube's unit: a shape of the cube [-0.95, 0.95]^3 fits, seen from any side but a diagonal."""

LIGHTS = (
    ((-0.5, 0.6, 0.7), 0.75),
    ((0.9, 0.2, 0.3), 0.25),
)  # towards each, in the camera's right, up and back; how bright
AMBIENT = 0.18
OUTSIDE, INSIDE, GROUND = (0.62, 0.72, 0.86), (0.86, 0.42, 0.36), (0.97, 0.97, 0.97)


def shaded_picture(
    mesh: TriangleMesh, size: int = 256, azimuth_deg: float = 35.0, elevation_deg: float = 25.0
) -> Float[Tensor, "size size 3"]:
    """Draws a mesh with flat faces under two lights; faces seen from behind (holes, turned faces) are red.

    Args:
        mesh: In the cube [-1, 1]^3; z is up. Without faces the picture is empty.
        size: Pixels along an edge.
        azimuth_deg: Of the camera around z, from x towards y.
        elevation_deg: Of the camera above the plane of x and y.
    """
    ground = torch.tensor(GROUND, device=mesh.vertices.device)
    if not len(mesh.faces):
        return ground.expand(size, size, 3).clone()
    azimuth, elevation = math.radians(azimuth_deg), math.radians(elevation_deg)
    back = torch.tensor(
        [math.cos(elevation) * math.cos(azimuth), math.cos(elevation) * math.sin(azimuth), math.sin(elevation)]
    ).to(ground)
    right = torch.tensor([-math.sin(azimuth), math.cos(azimuth), 0.0]).to(ground)
    up = torch.linalg.cross(back, right)
    rays = size * OVERSAMPLING
    places = HALF_WIDTH * ((torch.arange(rays, device=ground.device) + 0.5) * 2 / rays - 1)
    origins = places[None, :, None] * right - places[:, None, None] * up + 4 * back
    face_ids = cast_rays(
        mesh.vertices.float(), mesh.faces, origins.view(-1, 3), (-back).expand(rays * rays, 3)
    ).face_ids
    hit = face_ids >= 0
    normals = face_normals(mesh).float()[face_ids.clamp_min(0).long()]
    behind = (normals @ back) < 0
    normals = torch.where(behind[:, None], -normals, normals)
    brightness = torch.full_like(normals[:, 0], AMBIENT)
    for towards, strength in LIGHTS:
        light = F.normalize(torch.tensor(towards), dim=0).to(ground) @ torch.stack([right, up, back])
        brightness += strength * (normals @ light).clamp_min(0)
    paint = torch.where(behind[:, None], ground.new_tensor(INSIDE), ground.new_tensor(OUTSIDE))
    colours = torch.where(hit[:, None], (paint * brightness[:, None]).clamp(0, 1), ground)
    tall = colours.view(size, OVERSAMPLING, size, OVERSAMPLING, 3)
    return tall.mean(dim=(1, 3))
