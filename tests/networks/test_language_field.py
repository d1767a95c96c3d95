import pytest
import torch

from lightning_modules.functional.language_field.sparse_codes import densify_codes
from lightning_modules.networks.language_field import LanguageField


def lifted(num_gaussians=6, num_levels=3, num_layers=2, top_k=3, size=8):
    generator = torch.Generator().manual_seed(1)
    groups = num_levels * num_layers
    entries = torch.stack(
        [torch.randperm(size, generator=generator)[:top_k] for _ in range(num_gaussians * groups)]
    ).view(num_gaussians, groups, top_k)
    values = torch.rand(num_gaussians, groups, top_k, generator=generator)
    values = values / values.sum(-1, keepdim=True)
    codebooks = torch.randn(1, num_layers, size, 5, generator=generator)
    return codebooks, entries, values


def field(support="fixed", **settings):
    return LanguageField(6, 3, num_layers=2, codebook_size=8, feature_dim=5, top_k=3, support=support, **settings)


@pytest.mark.parametrize("support", ["fixed", "free"])
def test_a_lifted_field_splats_the_lifted_coefficients(support):
    codebooks, entries, values = lifted()
    model = field(support)
    model.set_lifted(codebooks, entries, values, torch.ones(6, dtype=torch.bool))
    expected = torch.zeros(6, 6, 8).scatter_add_(2, entries, values).flatten(1)
    torch.testing.assert_close(densify_codes(model.codes()), expected)
    assert model.initialised


def test_gaussians_dropped_by_the_gate_or_never_seen_carry_nothing():
    codebooks, entries, values = lifted()
    values[2] = 0
    reliable = torch.ones(6, dtype=torch.bool)
    reliable[4] = False
    model = field()
    model.set_lifted(codebooks, entries, values, reliable)
    sums = densify_codes(model.codes()).sum(1)
    torch.testing.assert_close(sums, torch.tensor([6.0, 6, 0, 6, 0, 6]))
    assert float(densify_codes(model.codes(gated=False)).sum(1)[4].detach()) == pytest.approx(6)


def test_zero_start_puts_every_gaussian_on_the_same_entries():
    model = field("free")
    model.set_zeros(torch.randn(1, 2, 8, 5), torch.ones(6, dtype=torch.bool))
    codes = model.codes()
    assert (codes.channel_ids == codes.channel_ids[:1]).all()
    torch.testing.assert_close(codes.values, torch.full_like(codes.values, 1 / 3))


def test_zero_start_of_a_fixed_support_is_refused():
    with pytest.raises(ValueError, match="free"):
        field("fixed").set_zeros(torch.randn(1, 2, 8, 5), torch.ones(6, dtype=torch.bool))


def test_stored_logits_become_langsplatv2s_coefficients_of_every_level_and_layer():
    generator = torch.Generator().manual_seed(2)
    logits, codebooks = torch.randn(6, 6, 8, generator=generator), torch.randn(3, 2, 8, 5, generator=generator)
    model = field("free", share_codebook=False)
    model.set_logits(codebooks, logits)
    soft = logits.softmax(-1)  # softmax, top-k, renormalise, layer by layer
    kept = torch.zeros_like(soft).scatter_(2, soft.topk(3, dim=2).indices, 1) * soft
    torch.testing.assert_close(densify_codes(model.codes()), (kept / kept.sum(2, keepdim=True)).flatten(1))
    for level in range(3):
        assert torch.equal(model.level_codebook(level), codebooks[level].flatten(0, 1))
    assert model.initialised
    with pytest.raises(ValueError, match="free"):
        field("fixed").set_logits(codebooks, logits)


@pytest.mark.parametrize("active", [1, 2])
def test_only_the_layer_in_training_gets_gradients(active):
    model = field(share_codebook=False)
    codebooks, entries, values = lifted()
    model.set_lifted(codebooks, entries, values, torch.ones(6, dtype=torch.bool))
    model.active_layers.fill_(active)
    weight_map = densify_codes(model.codes())
    decoded = model.level_weights(weight_map, 1) @ model.level_codebook(1)
    decoded.square().sum().backward()
    for layer in range(2):
        for level in range(3):
            in_training = level == 1 and layer == active - 1
            assert bool(model.codebook_layers[layer].grad[level].any()) == in_training
            assert bool(model.logit_layers[layer].grad[:, level].any()) == in_training


def test_layers_that_wait_add_nothing():
    model = field().eval()
    codebooks, entries, values = lifted()
    model.set_lifted(codebooks, entries, values, torch.ones(6, dtype=torch.bool))
    model.active_layers.fill_(1)
    assert (model.level_codebook(0)[8:] == 0).all()
    torch.testing.assert_close(model.level_codebook(0)[:8], codebooks[0, 0])


def test_more_coefficients_than_entries_are_refused():
    with pytest.raises(ValueError, match="between 1 and 8"):
        LanguageField(3, 1, codebook_size=8, top_k=9)


def test_more_channels_than_a_channel_id_holds_are_refused():
    with pytest.raises(ValueError, match="16 bits"):
        LanguageField(3, 3, num_layers=8, codebook_size=2048)
