"""Three balls on a shelf that know their names: a scene whose every answer is plain."""

from collections.abc import Sequence

import torch
from torch import Tensor

from callbacks.viewing.renderer import ViewedScene
from callbacks.viewing.sessions import ViewerContent
from lightning_modules.functional.answers.language_scene import LanguageScene
from lightning_modules.functional.answers.lerf_protocol import ProtocolSettings
from lightning_modules.functional.cameras import Camera
from lightning_modules.functional.language_field.sparse_codes import SparseCodes
from lightning_modules.functional.splatting.gaussian_initialisation import constant_harmonics
from lightning_modules.functional.splatting.gaussians import GaussianScene

BALLS = ("red ball", "green ball", "blue ball")
COLOURS = torch.tensor([[0.9, 0.1, 0.1], [0.1, 0.8, 0.1], [0.15, 0.2, 0.9]])
CENTRES = torch.tensor([[-1.0, 0.0, 4.0], [0.0, 0.0, 4.0], [1.0, 0.0, 4.0]])
PER_BALL = 60
PHRASES = (*BALLS, "toys")
CHANNELS = 8


def encode(phrases: Sequence[str]) -> Tensor:
    """Axes of feature space: a ball each, and one for toys; other phrases are unknown."""
    unknown = [phrase for phrase in phrases if phrase not in PHRASES]
    if unknown:
        raise ValueError(f"The table has no embedding of {unknown[0]!r}. Use one of {', '.join(PHRASES)}.")
    return torch.eye(CHANNELS)[[PHRASES.index(phrase) for phrase in phrases]]


def shelf() -> ViewedScene:
    """At level 0 each ball is itself, at level 1 all balls are toys; on the fine level mixed with a common axis."""
    generator = torch.Generator().manual_seed(0)
    count = 3 * PER_BALL
    gaussians = GaussianScene(
        means=CENTRES.repeat_interleave(PER_BALL, 0) + 0.15 * torch.randn(count, 3, generator=generator),
        log_scales=torch.full((count, 3), 0.1).log(),
        quaternions=torch.tensor([1.0, 0.0, 0.0, 0.0]).repeat(count, 1),
        opacity_logits=torch.full((count,), 0.8).logit(),
        spherical_harmonics=constant_harmonics(COLOURS.repeat_interleave(PER_BALL, 0))[:, None],
    )
    axes = torch.eye(CHANNELS)
    fine = axes[:4]
    coarse = torch.stack([axes[3], axes[4], axes[5], axes[6]])
    own = torch.arange(3).repeat_interleave(PER_BALL)
    channel_ids = torch.stack([own, torch.full_like(own, 4)], dim=1).to(torch.int16)
    codes = SparseCodes(channel_ids, torch.ones(count, 2), 8)
    language = LanguageScene(gaussians, codes, torch.stack([fine, coarse]), axes[7:])
    return ViewedScene(gaussians, language)


def front(width: int = 96, height: int = 72) -> Camera:
    """A camera at the origin that looks at the balls."""
    intrinsics = torch.tensor([[0.9 * width, 0.0, 0.5 * width], [0.0, 0.9 * width, 0.5 * height], [0.0, 0.0, 1.0]])
    return Camera(torch.eye(4), intrinsics, width, height)


def aside() -> Camera:
    """A camera that sees them from the left."""
    camera_from_world = torch.eye(4)
    camera_from_world[0, 3] = 1.0
    return front()._replace(camera_from_world=camera_from_world)


def content() -> ViewerContent:
    return ViewerContent(
        "Lexel · shelf", ("fine", "coarse"), {"front": front(), "aside": aside()}, BALLS, encode, ProtocolSettings()
    )
