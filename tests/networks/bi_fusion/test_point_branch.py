import math

import pytest
import torch

from lightning_modules.networks.bi_fusion.point_branch import PointAttention, TinySAModule


def clouds(*sizes: int) -> tuple[torch.Tensor, torch.Tensor]:
    points = torch.rand(sum(sizes), 6)
    return points, torch.repeat_interleave(torch.arange(len(sizes), dtype=torch.int32), torch.tensor(sizes))


def module(**options) -> TinySAModule:
    return TinySAModule(10, 8, **{"radius": 0.4, "num_neighbours": 5, "heads": 2, **options}).eval()


def dense_layer(layer: PointAttention, x, ids, relations):
    """The layer with every pair of points spelt out; relations are values of their own neighbour."""
    q, k, v = layer.to_attention(layer.norm(x)).unflatten(-1, (3, layer.heads, -1)).unbind(1)
    bias = layer.bias(relations)
    weight = layer.of_relations.weight.unflatten(1, (layer.heads, -1))  # [channels, heads, relations]
    rows = []
    for i in range(len(x)):
        near = [n for n, j in enumerate(ids[i].tolist()) if j >= 0]
        total = layer.of_relations.bias.clone()
        for head in range(layer.heads):
            scores = torch.stack(
                [(q[i, head] * k[ids[i, n], head]).sum() / math.sqrt(q.shape[-1]) + bias[i, n, head] for n in near]
            )
            shares = scores.softmax(0)
            own = slice(head * q.shape[-1], (head + 1) * q.shape[-1])
            for share, n in zip(shares, near, strict=True):
                total = total + share * (weight[:, head] @ relations[i, n])
                total = torch.cat([total[: own.start], total[own] + share * v[ids[i, n], head], total[own.stop :]])
        rows.append(total)
    x = x + layer.out(torch.stack(rows))
    return x + layer.alone(x)


def test_a_layer_equals_its_dense_twin_in_value_and_gradient():
    points, cloud_ids = clouds(9, 6)
    net = module()
    with torch.no_grad():
        _, around = net(points, cloud_ids)
    layer = net.layers[0]
    x = torch.randn(15, 8, requires_grad=True)

    ours, dense = layer(x, around), dense_layer(layer, x, around.ids, around.relations)
    torch.testing.assert_close(ours, dense)
    wanted = [x, *layer.parameters()]
    upstream = torch.randn_like(dense)
    for mine, twin in zip(
        torch.autograd.grad(ours, wanted, upstream), torch.autograd.grad(dense, wanted, upstream), strict=True
    ):
        torch.testing.assert_close(mine, twin, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("use_height", [True, False])
@pytest.mark.parametrize("num_layers", [1, 2])
def test_the_order_of_points_changes_nothing_but_the_order_of_features(use_height, num_layers):
    points, _ = clouds(30)
    net = module(use_height=use_height, num_layers=num_layers)
    order = torch.randperm(30)
    one = torch.zeros(30, dtype=torch.int32)
    torch.testing.assert_close(net(points, one).features[order], net(points[order], one).features)


def test_clouds_together_have_the_features_they_have_alone():
    points, cloud_ids = clouds(12, 1, 25)
    net = module()
    together = net(points, cloud_ids).features
    alone = [
        net(points[cloud_ids == c], torch.zeros(int((cloud_ids == c).sum()), dtype=torch.int32)).features
        for c in range(3)
    ]
    torch.testing.assert_close(together, torch.cat(alone))


def test_moving_a_scene_sideways_changes_nothing_and_moving_it_up_does():
    points, cloud_ids = clouds(20)
    net = module()
    aside, above = points.clone(), points.clone()
    aside[:, :2] += torch.tensor([2.0, -4.0])  # powers of two: the differences stay exact
    above[:, 2] += 1.0
    torch.testing.assert_close(net(aside, cloud_ids).features, net(points, cloud_ids).features, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(net(above, cloud_ids).features, net(points, cloud_ids).features, atol=1e-3)
    without = module(use_height=False)
    torch.testing.assert_close(
        without(above, cloud_ids).features, without(points, cloud_ids).features, rtol=1e-4, atol=1e-4
    )


def test_points_as_seen_change_the_features_and_not_the_neighbours():
    points, cloud_ids = clouds(20)
    net = module()
    seen = points.clone()
    seen[:, :3] *= 3
    seen[:, 3:] = 1 - seen[:, 3:]
    plain, varied = net(points, cloud_ids), net(points, cloud_ids, seen)
    assert torch.equal(plain.neighbourhoods.ids, varied.neighbourhoods.ids)
    assert not torch.allclose(plain.features, varied.features, atol=1e-3)


def test_settings_out_of_range_are_refused():
    for option in ({"radius": 0.0}, {"num_neighbours": 0}, {"heads": 3}):
        with pytest.raises(ValueError, match=f"{next(iter(option))} is"):
            module(**option)
