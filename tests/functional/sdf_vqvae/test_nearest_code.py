import pytest
import torch

from lightning_modules.functional.sdf_vqvae.nearest_code import nearest_code_ids


def exact_ids(latents, codebook):
    return torch.cdist(latents.double(), codebook.double(), compute_mode="donot_use_mm_for_euclid_dist").argmin(1)


@pytest.mark.parametrize("num_codes", [1, 127, 128, 1000])
def test_ids_are_those_of_exact_distances_whatever_the_number_of_codes(num_codes):
    latents, codebook = torch.randn(700, 16), torch.randn(num_codes, 16)
    assert torch.equal(nearest_code_ids(latents, codebook), exact_ids(latents, codebook))


def test_ids_are_those_of_cdist_in_blocks():
    latents, codebook = torch.randn(3000, 64), torch.randn(2048, 64)
    in_blocks = torch.cat([torch.cdist(part, codebook).argmin(1) for part in latents.split(1024)])
    assert torch.equal(nearest_code_ids(latents, codebook), in_blocks)


def test_latents_far_from_the_origin_keep_their_digits():
    latents, codebook = torch.randn(500, 8) + 1000, torch.randn(300, 8) + 1000
    assert torch.equal(nearest_code_ids(latents, codebook), exact_ids(latents, codebook))


def test_codes_find_themselves():
    codebook = torch.randn(500, 4)
    assert torch.equal(nearest_code_ids(codebook, codebook), torch.arange(500))


def test_autocast_changes_nothing():
    latents, codebook = torch.randn(400, 64), torch.randn(512, 64)
    with torch.autocast("cpu", torch.bfloat16):
        ids = nearest_code_ids(latents, codebook)
    assert torch.equal(ids, exact_ids(latents, codebook))


def test_no_latents_have_no_ids():
    assert nearest_code_ids(torch.zeros(0, 4), torch.randn(5, 4)).shape == (0,)
