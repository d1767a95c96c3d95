"""3D Gaussians as parameters whose number changes while they are trained."""

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_modules.functional.splatting.densification import Densification, inherited_moments, reset_opacities
from lightning_modules.functional.splatting.gaussians import GaussianScene


class GaussianModel(nn.Module):
    """N Gaussians in the raw parameters of 3D Gaussian Splatting.

    N changes: by :meth:`densify` while training, and by :meth:`resize` before a checkpoint is loaded.

    Args:
        scene: The Gaussians to begin with; the degree of its spherical harmonics is the highest to train.

    Attributes:
        means: [N, 3] centres, metres.
        log_scales: [N, 3].
        quaternions: [N, 4] wxyz.
        opacity_logits: [N].
        sh_dc: [N, 1, 3] constant spherical harmonics; apart, because they learn faster than the others.
        sh_rest: [N, B - 1, 3] all others.
    """

    means: nn.Parameter
    log_scales: nn.Parameter
    quaternions: nn.Parameter
    opacity_logits: nn.Parameter
    sh_dc: nn.Parameter
    sh_rest: nn.Parameter

    def __init__(self, scene: GaussianScene) -> None:
        super().__init__()
        parts = scene._asdict()
        harmonics = parts.pop("spherical_harmonics")
        parts |= {"sh_dc": harmonics[:, :1], "sh_rest": harmonics[:, 1:]}
        for name, part in parts.items():
            self.register_parameter(name, nn.Parameter(part.detach().clone().contiguous()))

    @property
    def num_gaussians(self) -> int:
        """N."""
        return self.means.shape[0]

    @property
    def sh_degree(self) -> int:
        """Highest degree of the spherical harmonics."""
        return round((1 + self.sh_rest.shape[1]) ** 0.5) - 1

    def scene(self, active_degree: int | None = None) -> GaussianScene:
        """Returns the Gaussians with spherical harmonics up to a degree; None means all."""
        num_rest = self.sh_rest.shape[1] if active_degree is None else (active_degree + 1) ** 2 - 1
        harmonics = torch.cat([self.sh_dc, self.sh_rest[:, :num_rest]], dim=1)
        return GaussianScene(self.means, self.log_scales, self.quaternions, self.opacity_logits, harmonics)

    def resize(self, num_gaussians: int) -> None:
        """Makes room for another number of Gaussians, whose values are then loaded; before an optimizer is made."""
        for name, old in list(self.named_parameters()):
            self.register_parameter(name, nn.Parameter(old.new_zeros(num_gaussians, *old.shape[1:])))

    def densify(self, change: Densification, optimizer: Optimizer) -> None:
        """Puts M Gaussians in the place of N, in the model and in Adam's groups and moments."""
        given = {name: getattr(change, name) for name in ("means", "log_scales", "opacity_logits")}
        for name, old in list(self.named_parameters()):
            values = given[name] if name in given else old.detach()[change.parents]
            new = nn.Parameter(values)
            self.register_parameter(name, new)
            for group in optimizer.param_groups:
                group["params"] = [new if parameter is old else parameter for parameter in group["params"]]
            if old in optimizer.state:
                optimizer.state[new] = inherited_moments(optimizer.state.pop(old), change.parents, change.is_new)

    @torch.no_grad()
    def reset_opacities(self, largest: float, optimizer: Optimizer) -> None:
        """Lowers all opacities to at most ``largest`` and forgets Adam's moments of them."""
        self.opacity_logits.copy_(reset_opacities(self.opacity_logits, largest))
        for moments in optimizer.state[self.opacity_logits].values():
            if moments.ndim:
                moments.zero_()
