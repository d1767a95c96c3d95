import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lightning_modules.functional.depth_autoencoder.depth_range import DepthRange, scale_depth
from lightning_modules.networks.depth_autoencoder import DepthAutoencoder
from lightning_modules.networks.semantic_encoder import LAYERS, SemanticEncoder, create_semantic_encoder

TINY = {"widths": (4, 6, 8, 10), "latent_dim": 16, "blocks": (1, 1, 2, 1)}


@pytest.fixture
def encoder() -> SemanticEncoder:
    """A tiny one whose batch norms and residual branches do something."""
    encoder = SemanticEncoder(**TINY)
    for module in encoder.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.weight.data.uniform_(0.5, 1.5)
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return encoder


def test_the_default_is_resnet_18_with_768_numbers_for_a_map():
    encoder = SemanticEncoder()
    assert encoder.encode(torch.rand(2, 1, 128, 128)).shape == (2, 768)
    # torchvision's resnet18 has 11,176,512 parameters before its classifier, 6,272 of them for two more colours.
    assert encoder.count_parameters() == 11_176_512 - 6_272 + 512 * 16 * 768 + 768


def test_equals_torchvisions_resnet_with_the_same_weights():
    from torchvision.models import resnet18

    ours, theirs = SemanticEncoder(input_channels=3), resnet18(weights=None)
    renamed = {
        name.replace("conv1", "stem.0", 1).replace("bn1", "stem.1", 1) if name.startswith(("conv1", "bn1")) else name: w
        for name, w in theirs.state_dict().items()
        if not name.startswith("fc")
    }
    ours.load_state_dict({**ours.state_dict(), **renamed})
    images = torch.rand(2, 3, 128, 128)
    theirs.fc = torch.nn.Identity()
    means = F.avg_pool2d(ours.eval().forward_features(images)["layer4"], 4).flatten(1)
    torch.testing.assert_close(means, theirs.eval()(images), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("size", [(128, 128), (64, 96), (200, 130), (16, 16)])
def test_any_size_gives_the_same_number_of_channels(encoder, size):
    assert encoder.encode(torch.rand(2, 1, *size)).shape == (2, 16)


def test_three_channels():
    encoder = SemanticEncoder(input_channels=3, **TINY)
    assert encoder.encode(torch.rand(2, 3, 64, 64)).shape == (2, 16)


def test_layers_are_named_and_halve_the_size(encoder):
    features = encoder.forward_features(torch.rand(2, 1, 128, 128))
    assert tuple(features) == LAYERS
    sizes = [tuple(features[name].shape[1:]) for name in LAYERS[:-1]]
    assert sizes == [(4, 32, 32), (4, 32, 32), (6, 16, 16), (8, 8, 8), (10, 4, 4)]
    encoder.eval()
    images = torch.rand(2, 1, 128, 128)
    torch.testing.assert_close(encoder.forward_features(images)["latent"], encoder(images))


# Encoding


def test_all_ways_to_encode_agree(encoder):
    depth = np.random.default_rng(0).uniform(0.5, 5, (7, 64, 64)).astype(np.float32)
    images = scale_depth(torch.from_numpy(depth), encoder.depth_range)[:, None]
    expected = encoder.encode(images)
    torch.testing.assert_close(encoder.encode_batch(images, 3), expected)
    torch.testing.assert_close(torch.from_numpy(encoder.encode_numpy(depth, 2)), expected)
    torch.testing.assert_close(torch.from_numpy(encoder.encode_numpy(depth[:, None], 4)), expected)
    torch.testing.assert_close(torch.from_numpy(encoder.encode_numpy(depth[3])), expected[3])
    scaled = encoder.encode_numpy(images.numpy(), normalize=False)
    torch.testing.assert_close(torch.from_numpy(scaled), expected)


def test_bfloat16_keeps_the_direction():
    encoder, images = SemanticEncoder(), torch.rand(4, 1, 64, 64)
    exact, rounded = encoder.encode_batch(images), encoder.encode_batch(images, precision="bfloat16")
    assert rounded.dtype == torch.float32
    assert not torch.equal(exact, rounded)
    assert F.cosine_similarity(exact, rounded).min() > 0.999


def test_a_batch_of_maps_without_channel_gets_one(encoder):
    images = torch.rand(3, 64, 64)
    torch.testing.assert_close(encoder.encode(images), encoder.encode(images[:, None]))


def test_encoding_leaves_every_mode_and_every_statistic_as_it_was(encoder):
    encoder.train()
    encoder.layer2.eval()
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    modes = [module.training for module in encoder.modules()]
    encoder.encode(torch.rand(4, 1, 32, 32))
    encoder.encode_batch(torch.rand(4, 1, 32, 32))
    with pytest.raises(ValueError, match="NaN"):
        encoder.encode_numpy(np.full((2, 32, 32), np.nan, np.float32))
    assert [module.training for module in encoder.modules()] == modes
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_embeddings_can_feed_a_head_that_trains(encoder):
    head = torch.nn.Linear(16, 2)
    head(encoder.encode(torch.rand(3, 1, 32, 32))).sum().backward()
    assert head.weight.grad is not None
    assert all(parameter.grad is None for parameter in encoder.parameters())


def test_integer_tensors_and_arrays_are_refused(encoder):
    with pytest.raises(ValueError, match=r"torch\.int32; allowed: floats"):
        encoder.encode(torch.ones(2, 1, 32, 32, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"uint16; allowed: floats, in metres.*/ 1000"):
        encoder.encode_numpy(np.ones((32, 32), np.uint16))


@pytest.mark.parametrize("size", [(32, 32), (1, 1, 1, 32, 32), (32,)])
def test_tensors_of_two_or_five_dimensions_are_refused(encoder, size):
    with pytest.raises(ValueError, match=rf"has {len(size)} dimensions; allowed: \[B, C, H, W\]"):
        encoder.encode(torch.rand(size))
    with pytest.raises(ValueError, match="dimensions; allowed"):
        encoder.encode_batch(torch.rand(size))


@pytest.mark.parametrize("size", [(2, 1, 1, 32, 32), (32,)])
def test_arrays_of_one_or_five_dimensions_are_refused(encoder, size):
    with pytest.raises(ValueError, match=r"dimensions; allowed: \[H, W\], \[N, H, W\] or"):
        encoder.encode_numpy(np.ones(size))


@pytest.mark.parametrize("size", [(0, 1, 32, 32), (2, 1, 0, 32)])
def test_nothing_to_encode_is_refused(encoder, size):
    for encode in (encoder.encode, encoder.encode_batch):
        with pytest.raises(ValueError, match="is empty"):
            encode(torch.rand(size))
    with pytest.raises(ValueError, match="is empty"):
        encoder.encode_numpy(np.ones(size))


def test_a_wrong_number_of_channels_is_refused_with_the_way_out(encoder):
    with pytest.raises(ValueError, match="has 3 channels; this encoder has input_channels 1"):
        encoder.encode(torch.rand(2, 3, 32, 32))
    three = SemanticEncoder(input_channels=3, **TINY)
    with pytest.raises(ValueError, match=r"has no channels.*\[None\].*expand\(-1, 3, -1, -1\)"):
        three.encode(torch.rand(3, 32, 32))
    with pytest.raises(ValueError, match="has no channels"):
        three.encode_numpy(np.ones((32, 32)))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_depth_is_refused_with_the_number_of_the_map(encoder, bad):
    maps = torch.rand(6, 1, 32, 32)
    maps[4, 0, 3, 3] = bad
    for encode in (encoder.encode, lambda maps: encoder.encode_batch(maps, 3)):
        with pytest.raises(ValueError, match="Map 4 hold NaN or infinity"):
            encode(maps)
    with pytest.raises(ValueError, match="Map 4 hold NaN or infinity"):
        encoder.encode_numpy(maps.numpy(), batch_size=3)


def test_metres_below_zero_are_refused(encoder):
    with pytest.raises(ValueError, match="below 0"):
        encoder.encode_numpy(np.full((2, 32, 32), -1.0))


def test_a_batch_size_of_zero_is_refused(encoder):
    with pytest.raises(ValueError, match="batch_size is 0"):
        encoder.encode_batch(torch.rand(2, 1, 32, 32), 0)


@pytest.mark.parametrize(
    "argument", [{"input_channels": 2}, {"latent_dim": 0}, {"widths": (1, 2, 3)}, {"blocks": (1, 1, 1, 0)}]
)
def test_an_impossible_architecture_is_refused(argument):
    with pytest.raises(ValueError, match=next(iter(argument))):
        SemanticEncoder(**argument)


# Freezing


def test_a_frozen_encoder_stays_as_it_is_in_training(encoder):
    encoder.freeze_parameters()
    encoder.train()
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    encoder(torch.rand(4, 1, 32, 32))
    assert all(torch.equal(tensor, before[name]) for name, tensor in encoder.state_dict().items())
    assert encoder.count_parameters(only_trainable=True) == 0
    encoder.freeze_parameters(False)
    assert encoder.stem[1].training
    assert encoder.count_parameters(only_trainable=True) == encoder.count_parameters()


def test_frozen_layers_keep_weights_and_statistics_and_the_others_learn(encoder):
    encoder.freeze_layers(["stem", "layer1"])
    encoder.train()
    optimizer = torch.optim.SGD(encoder.parameters(), 0.1, weight_decay=0.1)
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    encoder(torch.rand(4, 1, 64, 64)).square().sum().backward()
    optimizer.step()
    changed = {name.split(".")[0] for name, tensor in encoder.state_dict().items() if not tensor.equal(before[name])}
    assert changed == {"layer2", "layer3", "layer4", "latent"}
    assert encoder.frozen_layers == ("stem", "layer1")


def test_an_unknown_layer_is_refused(encoder):
    with pytest.raises(ValueError, match="no layer 'layer5'; allowed: stem, layer1"):
        encoder.freeze_layers(["layer5"])


# Description


def test_it_says_what_it_is(encoder):
    encoder.freeze_layers("stem")
    assert "[1, H, W] -> 16" in repr(encoder)
    assert "frozen layers: stem" in repr(encoder)
    assert "0.1 to 10 m linear" in repr(encoder)
    info = encoder.get_model_info()
    assert info["total_params"] == sum(p.numel() for p in encoder.parameters())
    assert info["trainable_params"] == info["total_params"] - sum(p.numel() for p in encoder.stem.parameters())
    assert info["frozen_layers"] == ["stem"]


# Folders


def test_a_saved_folder_gives_back_the_encoder(encoder, tmp_path):
    encoder.depth_range = DepthRange(0.2, 6, "log")
    encoder.save_pretrained(tmp_path / "encoder")
    assert {"config.json", "model.safetensors"} <= {path.name for path in (tmp_path / "encoder").iterdir()}
    again = SemanticEncoder.from_pretrained(tmp_path / "encoder")
    assert not again.training
    assert again.depth_range == encoder.depth_range
    images = torch.rand(2, 1, 32, 32)
    assert torch.equal(again.encode(images), encoder.encode(images))
    assert torch.equal(
        create_semantic_encoder(pretrained_path=tmp_path / "encoder").encode(images), again.encode(images)
    )


def test_a_folder_with_other_weights_than_its_config_is_refused(encoder, tmp_path):
    encoder.save_pretrained(tmp_path)
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace('"latent_dim": 16', '"latent_dim": 17'))
    with pytest.raises(ValueError, match=r"latent.weight \(\[16, 160\] in the file, \[17, 160\] in the encoder\)"):
        SemanticEncoder.from_pretrained(tmp_path)


# The autoencoder


@pytest.mark.parametrize("size", [(128, 128), (64, 96), (100, 70)])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_decoded_map_has_the_size_of_its_input(size, channels):
    reconstruction = DepthAutoencoder(channels, **TINY)(torch.rand(2, 1, *size))
    assert reconstruction.images.shape == (2, 1, *size)
    assert reconstruction.latent.shape == (2, 16)


def test_every_weight_of_the_autoencoder_gets_a_gradient():
    network = DepthAutoencoder(**TINY)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.ones_(module.weight)
    network(torch.rand(2, 1, 64, 64)).images.square().sum().backward()
    assert [name for name, parameter in network.named_parameters() if parameter.grad is None] == []


def test_encoding_many_maps_leaves_the_weights_as_they_lay(encoder):
    encoder.encode_batch(torch.rand(40, 1, 32, 32), 16)
    assert all(weight.is_contiguous() for weight in encoder.state_dict().values())
