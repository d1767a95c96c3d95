import pytest
import torch

from lightning_modules.functional.sdf_vqvae import matrix_product
from lightning_modules.functional.sdf_vqvae.nearest_code import nearest_code_ids


@pytest.fixture(params=["oneDNN", "torch"])
def library(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(matrix_product, "_HAS_ONEDNN", False)
    elif not matrix_product._HAS_ONEDNN:
        pytest.skip("torch was built without oneDNN")


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("num_rows", [0, 1, 37])
def test_the_product_is_that_of_double_precision(dtype, num_rows):
    rows, others, bias = (torch.randn(*shape).to(dtype) for shape in ((num_rows, 24), (50, 24), (50,)))
    exact = rows.double() @ others.double().t()
    tolerance = {"rtol": 2e-2, "atol": 5e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    found = matrix_product.product_with_rows(rows, others, None)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), exact, **tolerance)
    found = matrix_product.product_with_rows(rows, others, bias)
    torch.testing.assert_close(found.double(), exact + bias.double(), **tolerance)
    found = matrix_product.product_with_rows(rows.t().contiguous().t(), others.t().contiguous().t(), None)
    torch.testing.assert_close(found.double(), exact, **tolerance)  # rows that are not contiguous


@pytest.mark.usefixtures("library")
def test_both_find_the_same_codes():
    latents, codebook = torch.randn(2000, 64), torch.randn(1000, 64)
    exact = torch.cdist(latents.double(), codebook.double()).argmin(1)
    assert torch.equal(nearest_code_ids(latents, codebook), exact)
