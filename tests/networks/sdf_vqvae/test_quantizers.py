"""All quantizers through one interface, and what each does besides."""

import math
import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from lightning_modules.networks.sdf_vqvae.quantizers import (
    CodebookQuantizer,
    FiniteScalarQuantizer,
    QuantizerSettings,
    build_quantizer,
)

KINDS = ("ema", "plain", "l2", "projection", "sim", "fsq")
WITH_CODES = ("ema", "plain", "l2", "projection")


def quantizer_of(kind, num_codes=32, channels=6, **settings):
    return build_quantizer(
        num_codes, channels, QuantizerSettings(kind=kind, levels=(4, 8), code_channels=4, **settings)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_decoder_sees_follows_from_the_ids_alone(kind):
    quantizer = quantizer_of(kind)
    latents = torch.randn(50, 6)
    quantizer.start(latents)
    found = quantizer.quantize(latents)
    torch.testing.assert_close(quantizer.look_up(found.code_ids), found.latents)
    torch.testing.assert_close(quantizer.codebook()[found.code_ids], found.latents)
    assert found.code_ids.min() >= 0
    assert found.code_ids.max() < 32


@pytest.mark.parametrize("kind", ["ema", "plain", "sim"])
def test_ids_losses_and_straight_through_gradients_are_those_of_the_formulas(kind):
    quantizer = quantizer_of(kind)
    latents = torch.randn(40, 6, requires_grad=True)
    quantizer.start(latents.detach())
    found = quantizer.quantize(latents)
    codes = quantizer.codebook()
    distances = (latents.double()[:, None] - codes.double()).square().sum(2)
    assert torch.equal(found.code_ids, distances.argmin(1))
    nearest = codes[found.code_ids]
    torch.testing.assert_close(found.codebook_loss, (latents - nearest).square().mean(1))
    torch.testing.assert_close(found.commitment_loss, found.codebook_loss)

    weights = torch.randn(40, 6)
    (through,) = torch.autograd.grad((found.latents * weights).sum(), latents, retain_graph=True)
    torch.testing.assert_close(through, weights)
    (committed,) = torch.autograd.grad(found.commitment_loss.sum(), latents, retain_graph=True)
    torch.testing.assert_close(committed, 2 * (latents - nearest) / 6)
    assert torch.autograd.grad(found.codebook_loss.sum(), latents, allow_unused=True, retain_graph=True) == (None,)


def test_the_codebook_loss_moves_codes_and_the_commitment_loss_does_not():
    quantizer = quantizer_of("plain")
    latents = torch.randn(40, 6, requires_grad=True)
    quantizer.start(latents.detach()[:20])
    found = quantizer.quantize(latents)
    (gradient,) = torch.autograd.grad(found.codebook_loss.sum(), quantizer.codes, retain_graph=True)
    expected = torch.zeros_like(gradient)
    expected.index_add_(0, found.code_ids, 2 * (quantizer.codes[found.code_ids] - latents).detach() / 6)
    torch.testing.assert_close(gradient, expected)
    rest = torch.autograd.grad((found.commitment_loss + found.latents.sum(1)).sum(), quantizer.codes, allow_unused=True)
    assert rest == (None,)


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_changes_nothing(kind):
    quantizer = quantizer_of(kind)
    latents = torch.randn(64, 6)
    quantizer.start(latents)
    with torch.autocast("cpu", torch.bfloat16):
        found = quantizer.quantize(latents)
    expected = quantizer.quantize(latents)
    assert torch.equal(found.code_ids, expected.code_ids)
    assert torch.equal(found.latents, expected.latents)


# EMA


def test_ema_codes_follow_running_means():
    quantizer = quantizer_of("ema", num_codes=8, decay=0.9, revive_below=0.0)
    assert isinstance(quantizer, CodebookQuantizer)
    quantizer.start(torch.randn(100, 6))
    counts, sums = torch.ones(8, dtype=torch.float64), quantizer.codes.detach().double()
    for step in range(5):
        latents = torch.randn(30, 6)
        ids = quantizer.quantize(latents).code_ids
        quantizer.learn(latents, ids, step)
        members = torch.nn.functional.one_hot(ids, 8).double()
        counts = 0.9 * counts + 0.1 * members.sum(0)
        sums = 0.9 * sums + 0.1 * members.T @ latents.double()
        torch.testing.assert_close(quantizer.codes.detach().double(), sums / counts[:, None], rtol=1e-4, atol=1e-6)


def test_an_unused_code_stays_where_it_is_however_long():
    quantizer = quantizer_of("ema", num_codes=2, channels=2, decay=0.5, revive_below=0.0)
    with torch.no_grad():
        quantizer.codes.copy_(torch.tensor([[0.0, 0.0], [50.0, 50.0]]))
        quantizer.sums.copy_(quantizer.codes)
    for step in range(200):
        quantizer.learn(torch.randn(10, 2), torch.zeros(10, dtype=torch.int64), step)
    torch.testing.assert_close(quantizer.codes[1].detach(), torch.tensor([50.0, 50.0]))


def test_the_gradient_of_ema_codes_is_dropped():
    quantizer = quantizer_of("ema")
    latents = torch.randn(20, 6)
    found = quantizer.quantize(latents)
    found.codebook_loss.sum().backward()
    quantizer.learn(latents, found.code_ids, 1)
    assert quantizer.codes.grad is None


# Start


@pytest.mark.parametrize("kind", WITH_CODES)
def test_codes_start_at_the_latents_and_kmeans_brings_them_closer(kind):
    latents = torch.randn(400, 6) + 3
    errors = {}
    for start in ("none", "data", "kmeans"):
        torch.manual_seed(1)
        quantizer = quantizer_of(kind, start=start)
        assert quantizer.needs_start == (start != "none")
        if quantizer.needs_start:
            quantizer.start(latents)
        assert not quantizer.needs_start
        errors[start] = float(quantizer.quantize(latents).commitment_loss.detach().mean())
    assert errors["kmeans"] < errors["data"] < errors["none"]


def test_with_fewer_latents_than_codes_every_code_still_lies_at_one():
    quantizer = quantizer_of("ema", start="data")
    latents = torch.randn(5, 6)
    quantizer.start(latents)
    nearest = torch.cdist(quantizer.codes.detach(), latents).amin(1)
    assert nearest.max() < 0.2
    assert len(quantizer.codes.unique(dim=0)) == 32


def test_a_start_without_latents_says_what_is_wrong():
    with pytest.raises(ValueError, match="begin at 0 latents"):
        quantizer_of("ema").start(torch.zeros(0, 6))


# Revival


@pytest.mark.parametrize("kind", WITH_CODES)
def test_dead_codes_move_to_latents_and_their_statistics_follow(kind):
    quantizer = quantizer_of(kind, num_codes=8, decay=0.5, revive_every=10)
    latents = torch.randn(64, 6)
    quantizer.start(latents)
    with torch.no_grad():
        quantizer.codes[3] = quantizer._placed(torch.full((1, quantizer.codes.shape[1]), 100.0))[0]
        quantizer.counts[3], quantizer.sums[3] = 1e-4, 1e-2 * quantizer.codes[3]
    if kind == "l2":  # on a sphere nothing is far away: take its latents from it
        latents = latents[quantizer.quantize(latents).code_ids != 3]
    before = quantizer.codes.detach()[3].clone()
    revived = quantizer.learn(latents, quantizer.quantize(latents).code_ids, 10)
    assert revived >= 1
    code = quantizer.codes.detach()[3]
    assert not torch.equal(code, before)
    points = quantizer._points(latents).detach()
    assert (points - code).norm(dim=1).min() < 1e-5
    torch.testing.assert_close(quantizer.sums[3] / quantizer.counts[3], code)
    assert quantizer.counts[3] == pytest.approx(float(quantizer.counts.mean()), rel=0.3)
    if quantizer.ema:  # the next step does not take the code back
        quantizer.learn(latents, quantizer.quantize(latents).code_ids, 11)
        assert (quantizer.codes.detach()[3] - before).norm() > (quantizer.codes.detach()[3] - code).norm()


def test_revival_waits_for_its_step_and_can_be_left_out():
    for settings, step in ((QuantizerSettings(revive_every=10), 11), (QuantizerSettings(revive_below=0.0), 10)):
        quantizer = build_quantizer(8, 4, settings)
        quantizer.counts[2] = 0
        assert quantizer.learn(torch.randn(30, 4), torch.zeros(30, dtype=torch.int64), step) == 0


def test_the_same_steps_give_the_same_codes_and_a_restored_state_goes_on_with_them():
    def steps(quantizer, first, last):
        for step in range(first, last):
            latents = torch.randn(40, 6, generator=torch.Generator().manual_seed(step))
            quantizer.learn(latents, quantizer.quantize(latents).code_ids, step)

    whole, first, second = (quantizer_of("ema", decay=0.7, revive_every=3, revive_below=0.5) for _ in range(3))
    for quantizer in (whole, first):
        quantizer.start(torch.randn(20, 6, generator=torch.Generator().manual_seed(99)))
    steps(whole, 0, 12)
    steps(first, 0, 7)
    second.load_state_dict(first.state_dict())
    assert not second.needs_start
    steps(second, 7, 12)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name


# Two processes


def _rank(rank, port, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1")
    dist.init_process_group("gloo", rank=rank, world_size=2)
    torch.manual_seed(0)
    states = {}
    for kind in WITH_CODES:
        quantizer = quantizer_of(kind, decay=0.7, revive_every=2, revive_below=0.5)
        own = torch.Generator().manual_seed(rank)
        quantizer.start(torch.randn(60 if rank else 3, 6, generator=own))
        for step in range(5):
            latents = torch.randn(0 if step == 3 and rank else 30, 6, generator=own)
            quantizer.learn(latents, quantizer.quantize(latents).code_ids, step)
        states[kind] = quantizer.state_dict()
    torch.save(states, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.ddp
def test_two_processes_with_other_latents_have_equal_codes(tmp_path, free_port):
    mp.spawn(_rank, (free_port, tmp_path), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for kind, state in first.items():
        for name, tensor in state.items():
            assert torch.equal(tensor, second[kind][name]), (kind, name)


# Kinds


def test_l2_codes_and_latents_have_channels_of_variance_one():
    quantizer = quantizer_of("l2")
    latents = 5 * torch.randn(50, 6)
    quantizer.start(latents)
    for seen in (quantizer.quantize(latents).latents, quantizer.continuous(latents), quantizer.codebook()):
        torch.testing.assert_close(seen.norm(dim=1), torch.full((len(seen),), math.sqrt(6)))


def test_finite_scalars_have_every_id_once_and_round_like_the_paper():
    quantizer = FiniteScalarQuantizer(15, 2, (3, 5))
    with torch.no_grad():
        for layer in (quantizer.into, quantizer.out_of):
            layer.weight.copy_(torch.eye(2))
            layer.bias.zero_()
    codes = quantizer.codebook()
    assert len(codes.unique(dim=0)) == 15
    assert sorted(codes[:, 0].unique().tolist()) == [-1, 0, 1]
    assert sorted(codes[:, 1].unique().tolist()) == [-1, -0.5, 0, 0.5, 1]
    assert torch.equal(quantizer.quantize(torch.zeros(1, 2)).latents, torch.zeros(1, 2))
    extreme = quantizer.quantize(torch.tensor([[9.0, -9.0]])).latents
    torch.testing.assert_close(extreme, torch.tensor([[1.0, -1.0]]))


def test_every_finite_scalar_code_is_found_by_its_own_latent():
    quantizer = FiniteScalarQuantizer(8 * 4, 2, (8, 4))
    with torch.no_grad():
        quantizer.into.weight.copy_(torch.eye(2))
        quantizer.into.bias.zero_()
    half = (quantizer.levels - 1) * (1 + 1e-3) / 2
    ids = torch.arange(32)
    digits = ids[:, None] // quantizer.strides % quantizer.levels - quantizer.levels // 2
    latents = torch.atanh((digits + 0.5) / half * 0.999) - torch.atanh(0.5 / half)
    assert torch.equal(quantizer.quantize(latents).code_ids, ids)


def test_finite_scalars_refuse_another_number_of_codes():
    with pytest.raises(ValueError, match=r"product is 2048, but num_embeddings is 8192"):
        FiniteScalarQuantizer(8192, 16, (8, 8, 8, 4))


def test_settings_out_of_range_are_refused():
    with pytest.raises(ValueError, match="decay of the quantizer is 1"):
        QuantizerSettings(decay=1.0)
