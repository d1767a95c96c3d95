import torch

from lightning_modules.functional.depth_autoencoder.depth_range import DepthRange
from lightning_modules.metrics.depth import DepthErrors


def test_errors_of_a_known_case():
    metric = DepthErrors(DepthRange(1.0, 11.0))
    metric.update(torch.tensor([2.0, 3.0, 9.0]), torch.tensor([2.0, 4.0, 1.0]), torch.tensor([True, True, False]))
    figures = metric.compute()
    expected = {"mae_fraction": 0.05, "mae_m": 0.5, "rmse_m": 0.5**0.5, "delta_1_25": 0.5}
    assert figures.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(figures[name], torch.tensor(value))


def test_every_pixel_counts_the_same_however_maps_are_batched():
    predicted, target, valid = torch.rand(6, 1, 8, 8) + 1, torch.rand(6, 1, 8, 8) + 1, torch.rand(6, 1, 8, 8) > 0.3
    valid[0] = False
    together, apart = DepthErrors(DepthRange()), DepthErrors(DepthRange())
    together.update(predicted, target, valid)
    for part in (slice(0, 1), slice(1, 4), slice(4, 6)):
        apart.update(predicted[part], target[part], valid[part])
    torch.testing.assert_close(together.compute(), apart.compute())


def test_without_a_valid_pixel_errors_are_not_a_number():
    metric = DepthErrors(DepthRange())
    metric.update(torch.ones(4), torch.ones(4), torch.zeros(4, dtype=torch.bool))
    assert all(value.isnan() for value in metric.compute().values())


def test_states_are_sums_so_processes_add_up():
    metric = DepthErrors(DepthRange())
    assert set(metric._reductions) == {"absolute", "squared", "within", "count"}
    assert all(reduction.__name__ == "dim_zero_sum" for reduction in metric._reductions.values())
