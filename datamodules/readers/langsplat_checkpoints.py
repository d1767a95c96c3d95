"""The ``chkpnt*.pth`` of 3D Gaussian Splatting, LangSplat and LangSplatV2: ``torch.save((capture, iteration))``.

``capture`` is a tuple of 12 entries (3DGS): SH degree; centres [N, 3]; constant harmonics [N, 1, 3]; other harmonics
[N, B - 1, 3]; log scales; wxyz quaternions; opacity logits [N, 1]; largest screen radii [N]; accumulated gradients
[N, 1]; their counts [N, 1]; the optimizer's state; learning-rate scale. LangSplat puts one entry after the opacities
(compressed features [N, 3]), LangSplatV2 two: logits [N, layers * K] and codebooks [layers, K, C].
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from datamodules.readers.atomic_files import replacing
from datamodules.readers.gaussian_checks import checked_scene
from datamodules.readers.safe_pickles import load_pickled_tensors
from lightning_modules.functional.splatting.gaussians import GaussianScene

# 3DGS's optimizer groups, in its order (which is not that of the tuple), and their learning rates.
_GROUP_RATES = {
    "xyz": 1.6e-4,
    "f_dc": 2.5e-3,
    "f_rest": 2.5e-3 / 20,
    "opacity": 0.025,
    "scaling": 5e-3,
    "rotation": 1e-3,
}


class LangSplatCheckpoint(NamedTuple):
    """What a ``chkpnt*.pth`` tells.

    Attributes:
        scene: The Gaussians.
        logits: [N, layers * K] coefficients before softmax and top-k, or None in a file without language.
        codebooks: [layers, K, C] entries, or None in a file without language.
        iteration: Training step at which it was saved.
        spatial_lr_scale: Extent of the cameras, metres; scales the learning rate of the centres in 3DGS.
    """

    scene: GaussianScene
    logits: Float[Tensor, "gaussians channels"] | None
    codebooks: Float[Tensor, "layers size channels"] | None
    iteration: int
    spatial_lr_scale: float


def read_langsplat_checkpoint(path: str | Path) -> LangSplatCheckpoint:
    """Reads a checkpoint of 3DGS (12-tuple), LangSplat (13; its features are left out) or LangSplatV2 (14).

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not such a tuple, is damaged, or holds values that are no scene or no codebook.
    """
    path = Path(path)
    content = load_pickled_tensors(path)
    if not (isinstance(content, tuple | list) and len(content) == 2 and isinstance(content[0], tuple | list)):
        raise ValueError(
            f"{path} holds {type(content).__name__}; allowed: (capture, iteration) as 3DGS and LangSplatV2 save it. "
            "Give a chkpnt*.pth."
        )
    capture, iteration = content
    scene = scene_of_capture(path, capture)
    logits = codebooks = None
    if len(capture) == 14:
        logits, codebooks = (_language_tensor(path, part) for part in capture[7:9])
        num = scene.num_gaussians
        if codebooks.ndim != 3 or tuple(logits.shape) != (num, codebooks.shape[0] * codebooks.shape[1]):
            raise ValueError(
                f"{path}: logits {list(logits.shape)} and codebooks {list(codebooks.shape)} do not belong together; "
                f"allowed: [{num}, layers * size] and [layers, size, channels]. Save the checkpoint again."
            )
    return LangSplatCheckpoint(scene, logits, codebooks, int(iteration), float(capture[-1]))


def _language_tensor(path: Path, part: Any) -> Tensor:
    if not isinstance(part, Tensor) or not torch.isfinite(part).all():
        raise ValueError(
            f"{path}: logits or codebooks hold NaN, infinite or no numbers at all. Take an earlier checkpoint."
        )
    return part.detach().float()


def scene_of_capture(path: Path, capture: Sequence[Any]) -> GaussianScene:
    """Takes the Gaussians out of a 12-, 13- or 14-tuple; their entries come first in all three."""
    if len(capture) not in (12, 13, 14) or not all(isinstance(part, Tensor) for part in capture[1:7]):
        raise ValueError(
            f"{path}: its first part has {len(capture)} entries; allowed: the 12 of 3DGS, 13 of LangSplat or 14 of "
            "LangSplatV2, with tensors at 1 to 6. Give a checkpoint of one of these, or the .ply."
        )
    means, constant, rest, log_scales, quaternions, opacity_logits = (part.detach() for part in capture[1:7])
    harmonics = torch.cat([constant, rest], dim=1) if constant.ndim == rest.ndim == 3 else constant
    return checked_scene(path, means, log_scales, quaternions, opacity_logits, harmonics)


def write_gaussian_checkpoint(
    path: str | Path,
    scene: GaussianScene,
    iteration: int,
    *,
    active_sh_degree: int | None = None,
    spatial_lr_scale: float = 1.0,
) -> None:
    """Writes a 3DGS checkpoint (12-tuple), from which 3DGS goes on and LangSplat and LangSplatV2 begin.

    The training-only entries are what a fresh start has: zero statistics, and an Adam state without moments over 3DGS's
    six groups at 3DGS's rates.

    Args:
        path: File to write; complete or absent.
        scene: The Gaussians, on any device.
        iteration: Training steps behind them.
        active_sh_degree: Degree of the harmonics trained so far; all by default.
        spatial_lr_scale: Extent of the cameras, metres.
    """
    num = scene.num_gaussians
    degree = round(scene.spherical_harmonics.shape[1] ** 0.5) - 1
    parts = [nn.Parameter(part) for part in _parts_of_capture(scene)]
    names = ("xyz", "f_dc", "f_rest", "scaling", "rotation", "opacity")
    by_name = dict(zip(names, parts, strict=True))
    rates = _GROUP_RATES | {"xyz": _GROUP_RATES["xyz"] * spatial_lr_scale}
    groups = [{"params": [by_name[name]], "lr": rate, "name": name} for name, rate in rates.items()]
    optimizer = torch.optim.Adam(groups, lr=0.0, eps=1e-15)
    capture = (
        degree if active_sh_degree is None else active_sh_degree,
        *parts,
        torch.zeros(num),
        torch.zeros(num, 1),
        torch.zeros(num, 1),
        optimizer.state_dict(),
        float(spatial_lr_scale),
    )
    with replacing(path) as temporary:
        torch.save((capture, int(iteration)), temporary)


def _parts_of_capture(scene: GaussianScene) -> list[Tensor]:
    """Returns copies of the Gaussians' parameters as entries 1 to 6 hold them."""
    means, log_scales, quaternions, opacity_logits, harmonics = (part.detach().cpu().float().clone() for part in scene)
    constant, rest = harmonics[:, :1].contiguous(), harmonics[:, 1:].contiguous()
    return [means, constant, rest, log_scales, quaternions, opacity_logits[:, None]]


def write_langsplat_checkpoint(
    path: str | Path,
    scene: GaussianScene,
    logits: Float[Tensor, "gaussians channels"],
    codebooks: Float[Tensor, "layers size features"],
    iteration: int,
    spatial_lr_scale: float = 1.0,
) -> None:
    """Writes a LangSplatV2 checkpoint (14-tuple), which its evaluation and rendering scripts open.

    The training-only entries are what a fresh start has: zero statistics and an Adam state without moments over one
    group (logits and codebooks, lr 0.0025, eps 1e-15), as LangSplatV2 sets it up.
    """
    num, (num_layers, size, _) = scene.num_gaussians, codebooks.shape
    if tuple(logits.shape) != (num, num_layers * size):
        raise ValueError(
            f"logits have shape {list(logits.shape)}; allowed for {num} Gaussians and codebooks "
            f"{list(codebooks.shape)}: [{num}, {num_layers * size}]."
        )
    logits, codebooks = (nn.Parameter(part.detach().cpu().float().clone()) for part in (logits, codebooks))
    optimizer = torch.optim.Adam([{"params": [logits, codebooks], "lr": 0.0025}], lr=0.0, eps=1e-15)
    capture = (
        round(scene.spherical_harmonics.shape[1] ** 0.5) - 1,
        *(nn.Parameter(part, requires_grad=False) for part in _parts_of_capture(scene)),
        logits,
        codebooks,
        torch.zeros(num),
        torch.zeros(num, 1),
        torch.zeros(num, 1),
        optimizer.state_dict(),
        float(spatial_lr_scale),
    )
    with replacing(path) as temporary:
        torch.save((capture, int(iteration)), temporary)
