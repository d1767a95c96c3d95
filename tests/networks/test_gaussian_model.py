import copy

import torch
from torch import nn

from lightning_modules.functional.splatting.densification import Densification
from lightning_modules.networks.gaussian_model import GaussianModel
from tests.datamodules.tiny_scene import random_scene


def change() -> Densification:
    return Densification(
        parents=torch.tensor([0, 2, 2]),
        is_new=torch.tensor([False, False, True]),
        means=torch.ones(3, 3),
        log_scales=torch.zeros(3, 3),
        opacity_logits=torch.full((3,), 2.0),
        num_cloned=1,
        num_split=0,
        num_pruned=1,
    )


def trained(model: GaussianModel) -> torch.optim.Adam:
    optimizer = torch.optim.Adam([{"params": [parameter], "lr": 0.01} for parameter in model.parameters()], fused=True)
    step(model, optimizer)
    return optimizer


def step(model: GaussianModel, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    sum((part * torch.arange(1.0, part.numel() + 1).view_as(part)).sum() for part in model.scene()).backward()
    optimizer.step()


def test_a_model_is_the_scene_it_began_with():
    scene = random_scene(6)
    model = GaussianModel(scene)
    assert model.sh_degree == 3
    assert all(torch.equal(part, given) for part, given in zip(model.scene(), scene, strict=True))
    assert model.scene(1).spherical_harmonics.shape == (6, 4, 3)
    assert torch.equal(model.scene(1).spherical_harmonics, scene.spherical_harmonics[:, :4])


def test_parameters_and_moments_change_together():
    model = GaussianModel(random_scene(4))
    optimizer = trained(model)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    moments = {name: optimizer.state[parameter]["exp_avg"].clone() for name, parameter in model.named_parameters()}
    model.densify(change(), optimizer)
    assert model.num_gaussians == 3
    assert torch.equal(model.means, change().means)
    assert torch.equal(model.sh_rest, before["sh_rest"][[0, 2, 2]])
    for (name, parameter), group in zip(model.named_parameters(), optimizer.param_groups, strict=True):
        assert isinstance(parameter, nn.Parameter)
        assert group["params"][0] is parameter
        kept = moments[name][[0, 2]]
        assert torch.equal(optimizer.state[parameter]["exp_avg"], torch.cat([kept, torch.zeros_like(kept[:1])]))
    assert len(optimizer.state) == 6
    step(model, optimizer)
    assert not torch.equal(model.means, change().means)


def test_state_of_a_changed_optimizer_loads_into_one_of_that_size():
    model = GaussianModel(random_scene(4))
    optimizer = trained(model)
    model.densify(change(), optimizer)
    other = GaussianModel(random_scene(9, seed=1))
    other.resize(3)
    other.load_state_dict(model.state_dict())
    resumed = torch.optim.Adam([{"params": [parameter], "lr": 0.01} for parameter in other.parameters()], fused=True)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # torch would share the moments
    for one, its_optimizer in ((model, optimizer), (other, resumed)):
        step(one, its_optimizer)
    for first, second in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(first, second)


def test_a_reset_forgets_the_moments_of_opacities_alone():
    model = GaussianModel(random_scene(4))
    optimizer = trained(model)
    model.reset_opacities(0.01, optimizer)
    assert model.scene().opacities.max() <= 0.0101
    assert not optimizer.state[model.opacity_logits]["exp_avg"].any()
    assert not optimizer.state[model.opacity_logits]["exp_avg_sq"].any()
    assert optimizer.state[model.means]["exp_avg"].any()
