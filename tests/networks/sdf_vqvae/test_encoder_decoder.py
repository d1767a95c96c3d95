import pytest
import torch

from lightning_modules.functional.sdf_vqvae.sparse_alignment import decoded_rows
from lightning_modules.networks.sdf_vqvae.attention import position_encoding
from lightning_modules.networks.sdf_vqvae.blocks import SparseSubdivideBlock3d, occupied_children
from lightning_modules.networks.sdf_vqvae.decoder import SparseSDFDecoder
from lightning_modules.networks.sdf_vqvae.encoder import SparseSDFEncoder, level_widths
from lightning_modules.networks.sdf_vqvae.sparse_tensor import SparseTensor, sparse_tensor
from tests.networks.sdf_vqvae.sphere_batch import sphere_batch


def small_encoder(down_factor: int = 4, **settings: object) -> SparseSDFEncoder:
    return SparseSDFEncoder(4, 32, 2, 2, down_factor=down_factor, window_size=4, **settings)


def small_decoder(up_factor: int = 4, **settings: object) -> SparseSDFDecoder:
    return SparseSDFDecoder(4, 32, 2, 2, up_factor=up_factor, window_size=4, **settings)


def means(latents: SparseTensor) -> SparseTensor:
    return latents.with_feats(latents.feats[:, : latents.feats.shape[1] // 2])


@pytest.mark.parametrize("factor", [4, 8])
def test_latents_lie_on_the_coarse_grid_and_differ_from_the_start(factor: int) -> None:
    sdf = sphere_batch(32)
    latents = small_encoder(factor)(sdf)
    assert latents.resolution == 32 // factor
    cells = torch.cat([sdf.coords[:, :1], sdf.coords[:, 1:] // factor], dim=1)
    assert latents.coords.tolist() == cells.unique(dim=0).tolist()
    assert latents.feats.shape == (len(latents.voxels), 8)
    assert latents.feats.std(dim=0).min() > 0.05


def test_shapes_of_a_batch_do_not_see_each_other() -> None:
    both, second = sphere_batch(radii=(0.4, 0.7)), sphere_batch(radii=(0.7,))
    encoder, decoder = small_encoder(), small_decoder()
    decoded = [decoder(means(encoder(sdf)), sdf.voxels).sdf.feats for sdf in (both, second)]
    torch.testing.assert_close(decoded[0][-len(second.voxels) :], decoded[1], rtol=1e-4, atol=1e-5)


def test_a_shape_without_voxels_changes_nothing() -> None:
    without, with_empty = sphere_batch(radii=(0.4, 0.7)), sphere_batch(radii=(0.4, 0.0, 0.7))
    encoder, decoder = small_encoder(), small_decoder()
    decoded = [decoder(means(encoder(sdf)), sdf.voxels).sdf.feats for sdf in (without, with_empty)]
    torch.testing.assert_close(decoded[0], decoded[1], rtol=1e-4, atol=1e-5)


def test_a_batch_without_voxels_goes_through_forward_and_backward() -> None:
    sdf = sparse_tensor(torch.zeros(0, 1), torch.zeros(0, 4, dtype=torch.int32), 16, 2)
    encoder, decoder = small_encoder(), small_decoder()
    for guide in (sdf.voxels, None):
        decoded = decoder(means(encoder(sdf)), guide)
        assert decoded.sdf.feats.shape == (0, 1)
        decoded.sdf.feats.sum().backward()


@pytest.mark.parametrize("factor", [4, 8])
def test_guided_rows_are_the_inputs_and_all_parameters_learn(factor: int) -> None:
    sdf = sphere_batch(16)
    encoder, decoder = small_encoder(factor), small_decoder(factor)
    decoded = decoder(means(encoder(sdf)), sdf.voxels)
    assert decoded.sdf.voxels is sdf.voxels
    assert decoded.sdf.feats.abs().max() < 1
    assert [tuple(logits.shape) for logits in decoded.occupancy] == [tuple(kept.shape) for kept in decoded.occupied]
    loss = (decoded.sdf.feats - sdf.feats).square().mean() + sum(logits.square().mean() for logits in decoded.occupancy)
    loss.backward()
    silent = [name for name, parameter in decoder.named_parameters() if parameter.grad.abs().max() == 0]
    silent += [name for name, parameter in encoder.named_parameters() if parameter.grad.abs().max() == 0]
    assert silent == []


@pytest.mark.parametrize("factor", [4, 8])
def test_without_pruning_rows_are_those_of_the_structure_and_values_those_where_all_are_kept(factor: int) -> None:
    sdf = sphere_batch(16)
    levels = factor.bit_length() - 1
    encoder, decoder = small_encoder(factor), small_decoder(factor, predicts_occupancy=False)
    latents = means(encoder(sdf))
    decoded = decoder(latents)
    assert decoded.occupancy == ()
    assert len(decoded.sdf.voxels) == len(latents.voxels) * 8**levels
    rows = decoded_rows(sdf.voxels.ancestor_rows(levels), sdf.coords, levels)
    torch.testing.assert_close(decoded.sdf.coords[rows], sdf.coords)
    # The same voxels as a guide in sorted order: the same values, row for row.
    keys = decoded.sdf.voxels.keys.argsort()
    guide = sparse_tensor(torch.zeros(len(keys), 1), decoded.sdf.coords[keys], 16, 2).voxels
    torch.testing.assert_close(decoder(latents, guide).sdf.feats, decoded.sdf.feats[keys], rtol=1e-4, atol=1e-5)


def test_predicted_children_get_the_features_that_the_same_voxels_get_as_a_guide() -> None:
    parents = sphere_batch(8, band=1.5).with_feats(torch.randn(len(sphere_batch(8, band=1.5).voxels), 16))
    block = SparseSubdivideBlock3d(16, 8)
    predicted = block(parents)
    keys, order = predicted.tensor.voxels.keys.sort()
    guide = sparse_tensor(torch.zeros(len(keys), 1), predicted.tensor.coords[order], 16, 2).voxels
    guided = block(parents, guide)
    assert 0 < len(keys) < 8 * len(parents.voxels)
    torch.testing.assert_close(guided.tensor.feats, predicted.tensor.feats[order], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(guide.occupancy, occupied_children(predicted.occupancy))


def test_pruning_keeps_what_is_likely_and_always_the_likeliest() -> None:
    logits = torch.tensor([[1.0, -1, -1, -1, -1, -1, -1, 2], [-4, -3, -2, -1, -2, -3, -4, -5]])
    assert occupied_children(logits).nonzero().tolist() == [[0, 0], [0, 7], [1, 3]]


def test_predicted_children_are_what_is_decoded() -> None:
    sdf = sphere_batch(16)
    latents = means(small_encoder()(sdf))
    decoder = small_decoder()
    torch.nn.init.normal_(decoder.upsample[1].occupancy.weight)
    decoded = decoder(latents)
    kept = [occupied_children(logits) for logits in decoded.occupancy]
    assert len(decoded.sdf.voxels) == int(kept[-1].sum())
    assert len(kept[1]) == int(kept[0].sum())
    assert decoded.occupied == ()


@pytest.mark.parametrize("predicts_occupancy", [True, False])
def test_checkpointing_changes_no_gradient(predicts_occupancy: bool) -> None:
    sdf = sphere_batch(16)
    encoder, decoder = small_encoder(), small_decoder(predicts_occupancy=predicts_occupancy)
    grads = []
    for checkpointing in (False, True):
        encoder.checkpointing = decoder.checkpointing = checkpointing
        decoder(means(encoder(sdf)), sdf.voxels).sdf.feats.square().sum().backward()
        grads.append([p.grad for p in (*encoder.parameters(), *decoder.parameters()) if p.grad is not None])
        encoder.zero_grad()
        decoder.zero_grad()
    for plain, checkpointed in zip(*grads, strict=True):
        torch.testing.assert_close(checkpointed, plain)


def test_autocast_gives_float32_latents_and_distances_near_the_exact_ones() -> None:
    sdf = sphere_batch(16)
    encoder, decoder = small_encoder(), small_decoder()
    exact = means(encoder(sdf))
    with torch.autocast("cpu", torch.bfloat16):
        latents = means(encoder(sdf))
        rounded = decoder(exact, sdf.voxels).sdf.feats
    assert latents.feats.dtype == rounded.dtype == torch.float32
    torch.testing.assert_close(latents.feats, exact.feats, rtol=0, atol=0.1)
    torch.testing.assert_close(rounded, decoder(exact, sdf.voxels).sdf.feats, rtol=0, atol=0.05)


def test_full_size_has_the_parameters_of_direct3d_s2() -> None:
    with torch.device("meta"):
        networks = (SparseSDFEncoder(16, 512, 4), SparseSDFDecoder(16, 512, 4, predicts_occupancy=False))
    sizes = [sum(parameter.numel() for parameter in network.parameters()) for network in networks]
    assert [round(size / 1e6, 2) for size in sizes] == [22.64, 15.24]
    assert level_widths(512, 8) == [32, 64, 128, 512]
    assert networks[0].blocks[0].attn.num_heads == 8


def test_positions_are_sines_and_cosines_of_falling_frequency() -> None:
    encoded = position_encoding(torch.tensor([[3.0, 0.0, 5.0]]), 14)
    frequencies = torch.tensor([1.0, 10_000**-0.5])
    x, y, z = ([*(p * frequencies).sin(), *(p * frequencies).cos()] for p in (3.0, 0.0, 5.0))
    torch.testing.assert_close(encoded[0], torch.stack([*x, *y, *z, torch.tensor(0.0), torch.tensor(0.0)]))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SparseSDFEncoder(down_factor=3), "down_factor must be 2, 4, 8 or 16, got 3"),
        (lambda: SparseSDFEncoder(model_channels=40), "model_channels must be a multiple of 16 for down_factor 8"),
        (lambda: SparseSDFDecoder(model_channels=32, num_heads=5), "num_heads must divide the 32 channels, got 5"),
    ],
)
def test_settings_that_cannot_be_are_refused(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_guide_of_other_latents_is_refused() -> None:
    sdf = sphere_batch(16)
    latents, decoder = means(small_encoder()(sdf)), small_decoder()
    with pytest.raises(ValueError, match="guide has resolution 32, but the decoder makes 16"):
        decoder(latents, sphere_batch(32).voxels)
    with pytest.raises(ValueError, match="which are not the"):
        decoder(latents, sphere_batch(16, radii=(0.4, 0.8)).voxels)
