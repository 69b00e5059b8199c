"""Test set-up: Triton's interpreter where there is no GPU, seeds, the `gpu` mark."""

import os

import pytest
import torch

if not torch.cuda.is_available():  # before anything imports triton
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a CUDA GPU")
    torch.set_num_threads(1)  # the tensors of tests are small: threads would wait for each other


def pytest_report_header(config):
    if torch.cuda.is_available():
        return f"flashstudy: on {torch.cuda.get_device_name()}, torch {torch.__version__}"
    return f"flashstudy: no GPU, kernels run in Triton's interpreter; torch {torch.__version__}"


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def device():
    return "cuda" if torch.cuda.is_available() else "cpu"
