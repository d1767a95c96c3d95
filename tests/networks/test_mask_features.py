import json
from pathlib import Path

import pytest
import torch

from lightning_modules.functional.language_features.tile_features import encode_tiles
from lightning_modules.functional.open_clip_loading import image_tower, random_open_clip
from lightning_modules.networks.mask_features import OpenClipTiles, RandomTiles, TileEncoder

TINY_CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 512, "width": 32, "heads": 2, "layers": 1},
}


def tiles_of(num_tiles: int, size: int = 32) -> torch.Tensor:
    return torch.randint(0, 256, (num_tiles, 3, size, size), dtype=torch.uint8)


def test_weights_of_a_local_file_give_the_models_own_features(tmp_path: Path) -> None:
    import open_clip

    (tmp_path / "tiny-tiles.json").write_text(json.dumps(TINY_CLIP))
    open_clip.add_model_config(tmp_path / "tiny-tiles.json")
    model = open_clip.create_model("tiny-tiles").eval()
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    encoder = OpenClipTiles("tiny-tiles", str(tmp_path / "weights.pt"), precision="float32")
    assert encoder.tile_size == 32
    tiles = tiles_of(3)
    torch.testing.assert_close(encoder(tiles), encode_tiles(model.visual, tiles))
    assert {name.split(".")[0] for name, _ in encoder.named_parameters()} == {"visual"}  # no text tower
    (tmp_path / "weights.pt").write_bytes((tmp_path / "weights.pt").read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"weights\.pt: the weights do not fit tiny-tiles, or are damaged"):
        OpenClipTiles("tiny-tiles", str(tmp_path / "weights.pt"))


def test_absent_weights_fail_at_once_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: None)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match=r"'laion2b_s34b_b88k' of ViT-B-16 .*give the path of a local file"):
        OpenClipTiles()


def test_the_tower_is_frozen_and_stays_in_evaluation_mode() -> None:
    encoder = RandomTiles(embed_dim=16, image_size=32).train()
    assert not any(module.training for module in encoder.modules())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


@pytest.mark.parametrize(("is_native", "expected"), [(True, torch.bfloat16), (False, torch.float32)])
def test_automatic_precision_on_a_cpu_is_what_it_multiplies_natively(
    monkeypatch: pytest.MonkeyPatch, is_native: bool, expected: torch.dtype
) -> None:
    tower, tiles = image_tower(random_open_clip(0, embed_dim=16, image_size=32)), tiles_of(2)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: is_native)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert torch.equal(TileEncoder(tower)(tiles), encode_tiles(tower, tiles, precision=expected))


def test_an_empty_batch_size_is_refused() -> None:
    with pytest.raises(ValueError, match="batch_size must be 1 or more, got 0"):
        RandomTiles(batch_size=0)
