"""flashstudy.attention: which step it picks, and that it is that step."""

from types import SimpleNamespace

import pytest
import torch
from flashstudy.kernels import _gluon, attention, choose, v3_tma


def tensor(b=4, h=16, n=4096, d=128, dtype=torch.bfloat16, **changed):
    """What `choose` looks at of a CUDA tensor, without one."""
    strides = changed.pop("strides", (h * n * d, n * d, d, 1))
    fields = {
        "shape": (b, h, n, d), "dtype": dtype, "is_cuda": True, "requires_grad": False,
        "device": torch.device("cuda", 0), "data_ptr": lambda: 1 << 20,
        "stride": strides.__getitem__,
    }  # fmt: skip
    return SimpleNamespace(**fields | changed)


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setattr(_gluon, "why_not", lambda device: None)


def test_hopper_gets_the_hopper_step(hopper):
    t = tensor()
    assert choose(t, t, t) == "v6_persistent"
    assert choose(tensor(n=1), t, t) == "v6_persistent"  # decoding


@pytest.mark.parametrize(
    "changed",
    [
        {"n": 128},
        {"d": 100},
        {"is_cuda": False},
        {"dtype": torch.float32},
        {"requires_grad": True},
        {"data_ptr": lambda: (1 << 20) + 2},
        {"strides": (16 * 4096 * 132, 4096 * 132, 132, 1)},
    ],
)
def test_what_it_cannot_take_or_would_not_gain_goes_to_the_portable_step(hopper, changed):
    t = tensor(**changed)
    assert choose(t, t, t) == "v3_tma"


def test_no_gradient_is_needed_under_no_grad(hopper):
    t = tensor(requires_grad=True)
    with torch.no_grad():
        assert choose(t, t, t) == "v6_persistent"


def test_other_gpus_get_the_portable_step(monkeypatch):
    monkeypatch.setattr(_gluon, "why_not", lambda device: "not a Hopper")
    t = tensor()
    assert choose(t, t, t) == "v3_tma"


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without GPU")
def test_it_is_the_step_that_it_names():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 50, 32, requires_grad=True) for _ in range(3))
    o, lse = attention(q, k, v, causal=True, return_lse=True)
    expected, expected_lse = v3_tma.attention(q, k, v, causal=True, return_lse=True)
    assert torch.equal(o, expected)
    assert torch.equal(lse, expected_lse)
    (dq,) = torch.autograd.grad(o.sum(), q)
    assert torch.equal(dq, torch.autograd.grad(expected.sum(), q)[0])


def test_bad_arguments_get_the_message_of_the_step():
    q = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="q: expected 4 dimensions"):
        attention(q, q, q)
