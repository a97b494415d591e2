import pytest
import torch

from wandapp_kernels.pruning.precision import exact_products, fast_products


@pytest.fixture(autouse=True)
def restored():
    before = torch.get_float32_matmul_precision()
    yield
    assert torch.get_float32_matmul_precision() == before


def test_a_gpu_gets_tf32_and_sums_inside_stay_exact():
    with fast_products(torch.device("cuda", 0)):
        assert torch.get_float32_matmul_precision() == "high"
        with exact_products():
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "high"


def test_a_cpu_keeps_what_is_set():
    before = torch.get_float32_matmul_precision()
    with fast_products(torch.device("cpu")):
        assert torch.get_float32_matmul_precision() == before


def test_the_precision_is_restored_after_an_error():
    with pytest.raises(ValueError), fast_products(torch.device("cuda")):
        raise ValueError
