"""The whole network on a small ball and box: tokens, decoding, alignment, packing."""

import json

import pytest
import torch
from safetensors.torch import save_file

from lightning_modules.networks.sdf_vqvae.quantizers import QuantizerSettings
from lightning_modules.networks.sdf_vqvae.sparse_sdf_vqvae import ShapeTokens, SparseSDFVQVAE
from lightning_modules.networks.sdf_vqvae.sparse_tensor import sparse_tensor
from lightning_modules.networks.sdf_vqvae.vae_weights import (
    CONFIG_FILE,
    FORMAT,
    WEIGHTS_FILE,
    load_exported,
    load_pretrained,
)

RESOLUTION, BAND = 16, 2.0


def shapes():
    line = torch.linspace(-1, 1, RESOLUTION)
    points = torch.stack(torch.meshgrid(line, line, line, indexing="ij"), -1)
    fields = (points.norm(dim=-1) - 0.7, (points.abs() - 0.5).amax(-1))
    coords, sdf = [], []
    for number, field in enumerate(fields):
        scaled = field * (RESOLUTION - 1) / 2 / BAND
        inside = (scaled.abs() < 1).nonzero()
        coords.append(torch.nn.functional.pad(inside, (1, 0), value=number))
        sdf.append(scaled[tuple(inside.T)])
    return sparse_tensor(torch.cat(sdf)[:, None], torch.cat(coords).int(), RESOLUTION, 2)


def network_of(**settings):
    torch.manual_seed(1)
    given = {"embed_dim": 8, "model_channels": 32, "num_blocks": 1, "num_heads": 2, "down_factor": 4}
    given |= {"num_embeddings": 64, "quantizer": QuantizerSettings(start="none", kind="plain"), "window_size": 4}
    return SparseSDFVQVAE(**(given | settings)).eval()


@pytest.mark.parametrize("cells", [1, 2, 4])
@pytest.mark.parametrize("prunes", [True, False])
def test_training_decodes_the_inputs_own_voxels_in_their_order(cells, prunes):
    network, sdf = network_of(cells_per_token=cells, predicts_occupancy=prunes), shapes()
    found = network(sdf)
    assert found.aligned.shape == sdf.feats.shape
    decoded = found.decoded.sdf.coords
    assert torch.equal(decoded if found.rows is None else decoded[found.rows], sdf.coords)
    found.aligned.square().mean().backward()
    gradients = [network.encoder.input_layer1.weight.grad, network.decoder.out_layer.weight.grad]
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients)


@pytest.mark.parametrize("cells", [1, 4])
def test_shapes_of_a_batch_do_not_see_each_other(cells):
    network, both = network_of(cells_per_token=cells), shapes()
    first = both.coords[:, 0] == 0
    alone = sparse_tensor(both.feats[first], both.coords[first], RESOLUTION, 1)
    together, single = network(both), network(alone)
    torch.testing.assert_close(together.aligned[first], single.aligned, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cells", [1, 4])
@torch.no_grad()
def test_tokens_hold_all_that_the_decoder_needs(cells):
    network, sdf = network_of(cells_per_token=cells), shapes()
    tokens = network.tokens(sdf)
    again = ShapeTokens(tokens.coords.clone(), tokens.code_ids.clone(), 2, RESOLUTION)
    decoded = network.decode(again).sdf
    posterior = network.encode(sdf)
    joined = network.joined(posterior.mean)
    direct = network.decode_latents(joined.with_feats(network.quantizer.quantize(joined.feats).latents)).sdf
    assert torch.equal(decoded.coords, direct.coords)
    torch.testing.assert_close(decoded.feats, direct.feats)
    assert (decoded.coords[:, 0].diff() >= 0).all()


def test_four_cells_share_a_token_and_come_back_to_their_places():
    network, sdf = network_of(cells_per_token=4), shapes()
    latents = network.encode(sdf).mean
    joined = network.joined(latents)
    assert joined.feats.shape[1] == 32
    assert len(joined.feats) == len(torch.unique(latents.coords // torch.tensor([1, 1, 1, 4]), dim=0))
    assert torch.equal(network.split(joined, latents.voxels).feats, latents.feats)
    found = network(sdf)
    logits, occupied = found.cells
    assert logits.shape == occupied.shape == (len(joined.feats), 4)
    assert occupied.sum() == len(latents.feats)
    assert (joined.feats.unflatten(1, (4, 8))[~occupied] == 0).all()


def test_without_a_quantizer_latents_pass_and_noise_moves_them():
    network, sdf = network_of(), shapes()
    latents = network.encode(sdf).mean.feats
    plain = network(sdf, quantize=False)
    assert plain.quantized is None
    still = network(sdf, noise=torch.zeros_like(latents), quantize=False)
    assert torch.equal(plain.aligned, still.aligned)
    moved = network(sdf, noise=torch.ones_like(latents), quantize=False)
    assert not torch.equal(plain.aligned, moved.aligned)


def test_a_token_at_the_edge_of_the_grid_does_not_reach_beyond_it():
    """A latent grid of 6 has tokens of four cells and of two."""
    network = network_of(cells_per_token=4)
    places = (torch.ones(1, 6, 6, 2) > 0).nonzero().int()
    latents = sparse_tensor(torch.randn(len(places), 32), places, 6, 1)
    torch.nn.init.constant_(network.cell_head.bias, 100.0)  # every cell is occupied
    coarse = []
    hook = network.decoder.register_forward_pre_hook(lambda _, given: coarse.append(given[0].coords))
    network.decode_latents(latents)
    hook.remove()
    assert torch.equal(coarse[0], (torch.ones(1, 6, 6, 6) > 0).nonzero().int())


@pytest.mark.parametrize("cells", [1, 4])
@torch.no_grad()
def test_no_tokens_are_no_voxels(cells):
    nothing = ShapeTokens(torch.zeros(0, 4).int(), torch.zeros(0).long(), 1, RESOLUTION)
    assert network_of(cells_per_token=cells).decode(nothing).sdf.feats.shape == (0, 1)


def test_impossible_tokens_are_refused():
    network = network_of()
    for coords, ids, message in (
        ([[0, 1, 1, 4]], [3], "allowed: shape 0 to 0, x, y and z 0 to 3"),
        ([[0, 1, 1, 1], [0, 1, 1, 1]], [3, 4], "doubled"),
        ([[0, 1, 1, 1]], [64], "has 64 codes"),
    ):
        with pytest.raises(ValueError, match=message):
            network.decode(ShapeTokens(torch.tensor(coords).int(), torch.tensor(ids), 1, RESOLUTION))
    token = torch.tensor([[0, 1, 1, 1]]).int()
    with pytest.raises(ValueError, match=r"resolution of 18, but the model has a down_factor of 4"):
        network.decode(ShapeTokens(token, torch.tensor([3]), 1, 18))
    with pytest.raises(ValueError, match=r"z 1; allowed with 4 cells a token: 0 to 0"):
        network_of(cells_per_token=4).decode(ShapeTokens(token, torch.tensor([3]), 1, RESOLUTION))
    with pytest.raises(ValueError, match="num_embeddings must be 1 or more, got 0"):
        network_of(num_embeddings=0)
    with pytest.raises(ValueError, match="cells_per_token must be 1, 2 or 4, got 3"):
        network_of(cells_per_token=3)


# Weights from files


def test_weights_of_a_run_are_taken_with_the_codebook_only_where_it_fits(tmp_path):
    source = network_of()
    torch.save({"state_dict": {f"network.{k}": v for k, v in source.state_dict().items()}}, tmp_path / "a.ckpt")
    same, other = network_of(), network_of(num_embeddings=32)
    for network in (same, other):
        torch.nn.init.zeros_(network.encoder.out_layer.weight)
    assert "With its codebook" in load_pretrained(same, tmp_path / "a.ckpt")
    assert all(torch.equal(t, same.state_dict()[name]) for name, t in source.state_dict().items())
    words = load_pretrained(other, tmp_path / "a.ckpt")
    assert "codebook is left to start" in words
    assert torch.equal(other.encoder.out_layer.weight, source.encoder.out_layer.weight)


def test_a_codebook_that_has_not_started_is_not_taken(tmp_path):
    source = network_of(quantizer=QuantizerSettings(kind="ema"))
    torch.save({"state_dict": {f"network.{k}": v for k, v in source.state_dict().items()}}, tmp_path / "vae.ckpt")
    network = network_of(quantizer=QuantizerSettings(kind="ema"))
    assert "codebook is left to start" in load_pretrained(network, tmp_path / "vae.ckpt")
    assert network.quantizer.needs_start


@pytest.mark.parametrize("num_embeddings", [64, 32])
def test_what_a_vae_has_trained_besides_its_coders_is_taken(tmp_path, num_embeddings):
    """The head of cells, and the maps around codes that have not started; of another number of codes, the head."""
    settings = {"cells_per_token": 4, "quantizer": QuantizerSettings(kind="projection")}
    source, network = network_of(**settings), network_of(**settings, num_embeddings=num_embeddings)
    torch.save({"state_dict": source.state_dict()}, tmp_path / "vae.ckpt")
    for module in (network.cell_head, network.quantizer.into, network.quantizer.out_of):
        torch.nn.init.zeros_(module.weight)
    codes = network.quantizer.codes.detach().clone()
    words = load_pretrained(network, tmp_path / "vae.ckpt")
    assert "codebook is left to start" in words
    assert "is new" not in words
    assert torch.equal(network.cell_head.weight, source.cell_head.weight)
    assert torch.equal(network.quantizer.into.weight, source.quantizer.into.weight)
    assert torch.equal(network.quantizer.codes, codes)
    assert network.quantizer.needs_start


def test_a_vae_without_occupancy_heads_is_enough(tmp_path):
    """As Direct3D-S2's are, kernels in torchsparse's layout under ``vae``."""
    source = network_of(predicts_occupancy=False)
    state = {}
    for name, tensor in source.state_dict().items():
        if name.endswith("conv.weight"):
            outputs, size, inputs = tensor.shape[0], tensor.shape[1], tensor.shape[-1]
            kernel = tensor.permute(3, 2, 1, 4, 0).reshape(size**3, inputs, outputs)
            state[name.removesuffix("weight") + "kernel"] = kernel if size == 3 else kernel[0]
        elif name.startswith(("encoder.", "decoder.")):
            state[name] = tensor
    torch.save({"vae": state}, tmp_path / "model_sparse.ckpt")
    network = network_of(include_self=True)
    assert "occupancy" in load_pretrained(network, tmp_path / "model_sparse.ckpt")
    own = network.state_dict()
    assert all(torch.equal(t, own[n]) for n, t in source.state_dict().items() if not n.startswith("quantizer."))
    assert "set include_self" in load_pretrained(network_of(), tmp_path / "model_sparse.ckpt")


def test_weights_that_do_not_fit_are_named(tmp_path):
    torch.save({"state_dict": network_of(embed_dim=4).state_dict()}, tmp_path / "narrow.ckpt")
    with pytest.raises(
        ValueError, match=r"encoder.out_layer.weight \(\[8, 32\] in the file, \[16, 32\] in the network\)"
    ):
        load_pretrained(network_of(), tmp_path / "narrow.ckpt")
    state = network_of().state_dict()
    state.pop("decoder.out_layer.bias")
    torch.save({"state_dict": state}, tmp_path / "part.ckpt")
    with pytest.raises(ValueError, match=r"missing: decoder.out_layer.bias"):
        load_pretrained(network_of(), tmp_path / "part.ckpt")
    with pytest.raises(FileNotFoundError, match=r"absent\.ckpt"):
        load_pretrained(network_of(), tmp_path / "absent.ckpt")
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load_exported(tmp_path)


def test_damaged_exports_are_refused(tmp_path):
    network = network_of()
    facts = {"format": FORMAT, "config": network.config}
    (tmp_path / CONFIG_FILE).write_text(json.dumps(facts))
    save_file(network_of(embed_dim=4).state_dict(), str(tmp_path / WEIGHTS_FILE))
    with pytest.raises(ValueError, match=r"sdf_vqvae\.safetensors does not fit config\.json"):
        load_exported(tmp_path)
    (tmp_path / WEIGHTS_FILE).write_bytes((tmp_path / WEIGHTS_FILE).read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"sdf_vqvae\.safetensors cannot be read"):
        load_exported(tmp_path)
    (tmp_path / CONFIG_FILE).write_text(json.dumps({**facts, "format": "other"}))
    with pytest.raises(ValueError, match=r"of the format 'other'; allowed"):
        load_exported(tmp_path)
    (tmp_path / CONFIG_FILE).write_text("{")
    with pytest.raises(ValueError, match=r"config\.json cannot be read as JSON"):
        load_exported(tmp_path)
