import json
from dataclasses import asdict

import pytest
import torch
from safetensors.torch import save_file

from lightning_modules.networks.bi_fusion.bi_fusion_encoder import BiFusionEncoder
from lightning_modules.networks.bi_fusion.exported_encoder import (
    CONFIG_FILE,
    FORMAT,
    WEIGHTS_FILE,
    load_bi_fusion_encoder,
)
from lightning_modules.networks.bi_fusion.settings import EncoderSettings

SETTINGS = EncoderSettings(channels=8, fused_channels=6, point_channels=8, heads=2)


@pytest.fixture
def export(tmp_path):
    encoder = BiFusionEncoder(torch.randn(16, 12), **asdict(SETTINGS))
    save_file(encoder.state_dict(), tmp_path / WEIGHTS_FILE)
    config = {"format": FORMAT, "encoder": asdict(SETTINGS), "token_channels": 16, "text_channels": 12}
    (tmp_path / CONFIG_FILE).write_text(json.dumps(config))
    return tmp_path, encoder, config


def test_an_export_gives_the_encoder_back_in_evaluation_mode(export):
    folder, encoder, _ = export
    loaded = load_bi_fusion_encoder(folder)
    assert not loaded.training
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name


def test_settings_are_those_of_the_encoder(export):
    import inspect

    own = {name: part.default for name, part in inspect.signature(BiFusionEncoder).parameters.items()}
    own.pop("projection")
    assert own == asdict(EncoderSettings())


@pytest.mark.parametrize("absent", [CONFIG_FILE, WEIGHTS_FILE])
def test_an_absent_file_is_named(export, absent):
    folder, *_ = export
    (folder / absent).unlink()
    with pytest.raises(FileNotFoundError, match=rf"{absent} does not exist; .*train.py export"):
        load_bi_fusion_encoder(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other 1"}, "its format is 'other 1'"),
        ({"encoder": {"depth": 3}}, "unknown setting depth"),
        ({"token_channels": None}, "does not describe an encoder"),
        ({"token_channels": 32}, "does not hold the weights"),
    ],
)
def test_what_does_not_fit_is_said(export, change, message):
    folder, _, config = export
    (folder / CONFIG_FILE).write_text(json.dumps({**config, **change}))
    with pytest.raises(ValueError, match=message):
        load_bi_fusion_encoder(folder)


def test_damaged_weights_are_said(export):
    folder, *_ = export
    (folder / WEIGHTS_FILE).write_bytes((folder / WEIGHTS_FILE).read_bytes()[:200])
    with pytest.raises(ValueError, match=r"does not hold the weights.*Export the encoder again"):
        load_bi_fusion_encoder(folder)
