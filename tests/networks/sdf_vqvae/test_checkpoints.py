import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_modules.networks.sdf_vqvae.checkpoints import (
    VaeArchitecture,
    load_vae_weights,
    read_vae_weights,
    spconv_kernel,
)
from lightning_modules.networks.sdf_vqvae.convolution import SparseConv3d
from lightning_modules.networks.sdf_vqvae.decoder import SparseSDFDecoder
from lightning_modules.networks.sdf_vqvae.encoder import SparseSDFEncoder
from tests.networks.sdf_vqvae.sphere_batch import sphere_batch


def networks(latent_channels: int = 4, num_blocks: int = 2) -> nn.ModuleDict:
    return nn.ModuleDict(
        {
            "encoder": SparseSDFEncoder(latent_channels, 32, num_blocks, include_self=True),
            "decoder": SparseSDFDecoder(latent_channels, 32, num_blocks, predicts_occupancy=False),
        }
    )


def torchsparse_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Kernels as torchsparse names and lays them out: [27, in, out] with x fastest, [in, out] of size 1."""
    renamed = {}
    for name, tensor in state.items():
        if name.endswith(".conv.weight"):
            kernel = tensor.permute(3, 2, 1, 4, 0).flatten(0, 2)
            renamed[name.replace("conv.weight", "conv.kernel")] = kernel[0] if len(kernel) == 1 else kernel
        else:
            renamed[name] = tensor
    return renamed


def test_torchsparse_kernels_multiply_the_neighbours_that_their_order_names() -> None:
    tensor = sphere_batch(8)
    tensor = tensor.with_feats(torch.randn(len(tensor.voxels), 3))
    kernel, layer = torch.randn(27, 3, 5), SparseConv3d(3, 5)
    layer.conv.weight.data = spconv_kernel(kernel)
    rows = {tuple(voxel): row for row, voxel in enumerate(tensor.coords.tolist())}
    expected = torch.zeros(len(rows), 5)
    for (b, x, y, z), row in rows.items():
        for dx in (-1, 0, 1):
            for dy in (-1, 0, 1):
                for dz in (-1, 0, 1):
                    neighbour = rows.get((b, x + dx, y + dy, z + dz))
                    if neighbour is not None:
                        expected[row] += tensor.feats[neighbour] @ kernel[(dx + 1) + 3 * (dy + 1) + 9 * (dz + 1)]
    torch.testing.assert_close(layer(tensor).feats, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", ["torchsparse", "spconv"])
@pytest.mark.parametrize("prefix", ["", "module.", "model.vae._orig_mod."])
@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_files_of_both_layouts_give_the_network_that_wrote_them(
    tmp_path: Path, layout: str, prefix: str, suffix: str
) -> None:
    source, target, path = networks(), networks(), tmp_path / f"vae{suffix}"
    state = source.state_dict() if layout == "spconv" else torchsparse_state(source.state_dict())
    state = {prefix + name: tensor.contiguous() for name, tensor in state.items()}
    save_file(state, path) if suffix == ".safetensors" else torch.save({"vae": state, "dit": {}}, path)
    weights = read_vae_weights(path)
    assert weights.kernel_layout == layout
    assert weights.architecture == VaeArchitecture(4, 32, 2, 8)
    report = load_vae_weights(weights, target["encoder"], target["decoder"])
    assert report.is_full_match
    assert str(report) == f"{len(source.state_dict())} weights match"
    sdf = sphere_batch(16)
    for name, tensor in source.state_dict().items():
        torch.testing.assert_close(target.state_dict()[name], tensor, rtol=0, atol=0)
    torch.testing.assert_close(target["encoder"](sdf).feats, source["encoder"](sdf).feats)


def test_latent_size_and_depth_come_from_the_file(tmp_path: Path) -> None:
    torch.save(networks(latent_channels=6, num_blocks=3).state_dict(), tmp_path / "vae.pt")
    assert read_vae_weights(tmp_path / "vae.pt").architecture == VaeArchitecture(6, 32, 3, 8)


def test_weights_beside_the_autoencoder_are_kept_apart(tmp_path: Path) -> None:
    state = {f"network.{name}": tensor for name, tensor in networks().state_dict().items()}
    torch.save({"state_dict": {**state, "network.quantizer.codes": torch.ones(2, 4)}}, tmp_path / "last.ckpt")
    weights = read_vae_weights(tmp_path / "last.ckpt")
    assert list(weights.others) == ["quantizer.codes"]
    assert len(weights.state) == len(state)


def test_a_lone_encoder_loads_where_part_of_the_weights_is_allowed(tmp_path: Path) -> None:
    source, target = networks(), networks()
    torch.save(source["encoder"].state_dict(), tmp_path / "encoder.pt")
    weights = read_vae_weights(tmp_path / "encoder.pt")
    with pytest.raises(ValueError, match=r"does not fit.*missing: decoder\.input_layer\.weight"):
        load_vae_weights(weights, target["encoder"], target["decoder"])
    report = load_vae_weights(weights, target["encoder"], target["decoder"], allow_partial=True)
    assert len(report.loaded) == len(source["encoder"].state_dict())
    assert torch.equal(target["encoder"].out_layer.weight, source["encoder"].out_layer.weight)


def test_an_occupancy_head_that_the_file_lacks_stays_as_it_was_made(tmp_path: Path) -> None:
    torch.save(networks().state_dict(), tmp_path / "vae.pt")
    encoder, decoder = networks()["encoder"], SparseSDFDecoder(4, 32, 2)
    before = decoder.upsample[0].occupancy.weight.clone()
    report = load_vae_weights(read_vae_weights(tmp_path / "vae.pt"), encoder, decoder)
    assert report.fresh == [f"decoder.upsample.{i}.occupancy.{name}" for i in range(3) for name in ("weight", "bias")]
    assert "left as they were made: decoder.upsample.0.occupancy.weight" in str(report)
    assert torch.equal(decoder.upsample[0].occupancy.weight, before)


def test_what_does_not_fit_is_listed_and_nothing_is_loaded(tmp_path: Path) -> None:
    state = networks(num_blocks=3).state_dict()
    state["encoder.extra.weight"] = torch.ones(1)
    state["decoder.out_layer.weight"] = torch.ones(1, 7)
    del state["encoder.out_layer.bias"]
    torch.save(state, tmp_path / "vae.pt")
    target = networks(num_blocks=2)
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    with pytest.raises(ValueError, match="does not fit") as refusal:
        load_vae_weights(read_vae_weights(tmp_path / "vae.pt"), target["encoder"], target["decoder"])
    message = str(refusal.value)
    assert "missing: encoder.out_layer.bias" in message
    assert "encoder.extra.weight" in message
    assert "encoder.blocks.2.attn.to_qkv.weight" in message
    assert "decoder.out_layer.weight ([1, 7] in the file, [1, 2] in the network)" in message
    assert "num_blocks 3" in message
    assert all(torch.equal(tensor, before[name]) for name, tensor in target.state_dict().items())


class Malicious:
    def __reduce__(self) -> tuple:
        return (print, ("executed",))


def test_code_in_a_file_is_refused_and_not_executed(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    torch.save({"vae": Malicious()}, tmp_path / "vae.ckpt")
    with pytest.raises(ValueError, match=r"was refused: it asks for .*print.*Nothing in it was executed"):
        read_vae_weights(tmp_path / "vae.ckpt")
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps(Malicious()))
    with pytest.raises(ValueError, match="was refused"):
        read_vae_weights(tmp_path / "plain.pkl")
    assert "executed\n" not in capsys.readouterr().out


def test_files_that_are_no_autoencoder_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist; allowed: a checkpoint file"):
        read_vae_weights(tmp_path / "absent.ckpt")
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "linear.pt")
    with pytest.raises(ValueError, match=r"holds no sparse SDF autoencoder.*it has bias, weight"):
        read_vae_weights(tmp_path / "linear.pt")
    torch.save({"epoch": 3}, tmp_path / "none.pt")
    with pytest.raises(ValueError, match="holds no weights; it has epoch"):
        read_vae_weights(tmp_path / "none.pt")
    torch.save([1], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="holds a list"):
        read_vae_weights(tmp_path / "list.pt")
    for name in ("cut.safetensors", "cut.ckpt"):
        torch.save(networks().state_dict(), tmp_path / "whole.ckpt")
        (tmp_path / name).write_bytes((tmp_path / "whole.ckpt").read_bytes()[:5000])
        with pytest.raises(ValueError, match=f"{name} (cannot be read|was refused)"):
            read_vae_weights(tmp_path / name)
    torch.save({"encoder.downsample.0.out_layers.0.conv.kernel": torch.ones(8, 3, 5)}, tmp_path / "even.pt")
    with pytest.raises(ValueError, match=r"even\.pt: encoder\.down.*kernel is \[8, 3, 5\]; allowed: kernels of size 3"):
        read_vae_weights(tmp_path / "even.pt")
    state = networks().state_dict()
    torch.save({f"{copy}.{name}": tensor for copy in ("a", "b") for name, tensor in state.items()}, tmp_path / "two.pt")
    with pytest.raises(ValueError, match=r"holds several autoencoders, under 'a\.', 'b\.'"):
        read_vae_weights(tmp_path / "two.pt")
