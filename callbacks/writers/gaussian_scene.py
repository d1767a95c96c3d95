"""Writes trained Gaussians: a .ply that viewers open, and 3DGS's own checkpoint."""

from pathlib import Path

from datamodules.readers.gaussians import write_gaussian_ply
from datamodules.readers.langsplat_checkpoints import write_gaussian_checkpoint
from lightning_modules.gaussian_rgb import GaussianRgbModule


def write_gaussian_scene(module: GaussianRgbModule, folder: Path) -> list[Path]:
    """Writes ``gaussians.ply`` and ``chkpnt{step}.pth``, from which LangSplatV2 trains, and returns their paths."""
    scene, step = module.scene, module.num_steps
    paths = [folder / "gaussians.ply", folder / f"chkpnt{step}.pth"]
    write_gaussian_ply(paths[0], scene)
    write_gaussian_checkpoint(
        paths[1],
        scene,
        step,
        active_sh_degree=module.active_sh_degree,
        spatial_lr_scale=float(module.cameras_extent),
    )
    return paths
