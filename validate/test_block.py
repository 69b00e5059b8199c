"""The block against a plain computation written out in fp64."""

import math

import pytest
import torch
from flashstudy.backends import load
from flashstudy.block import Block

B, N, E, H = 2, 19, 48, 6


def plain(block, x, kv_heads, causal):
    """What the block computes, head by head in einsum, in fp64, from the block's parameters."""
    p = {n: t.double() for n, t in block.named_parameters()}
    mean, var = x.mean(-1, keepdim=True), x.var(-1, unbiased=False, keepdim=True)
    y = (x - mean) / torch.sqrt(var + 1e-5) * p["norm.weight"] + p["norm.bias"]
    d, n = E // H, x.shape[1]
    w_q, w_k, w_v = p["qkv.weight"].split((E, kv_heads * d, kv_heads * d))
    heads = []
    for h in range(H):
        g = h // (H // kv_heads)  # consecutive query heads share a KV head
        q = torch.einsum("bne,de->bnd", y, w_q[h * d : (h + 1) * d])
        k = torch.einsum("bne,de->bnd", y, w_k[g * d : (g + 1) * d])
        v = torch.einsum("bne,de->bnd", y, w_v[g * d : (g + 1) * d])
        s = torch.einsum("bid,bjd->bij", q, k) / math.sqrt(d)
        if causal:
            s = s + torch.full((n, n), -math.inf, dtype=s.dtype).triu(1)
        heads.append(torch.einsum("bij,bjd->bid", torch.softmax(s, -1), v))
    return x + torch.einsum("bnf,ef->bne", torch.cat(heads, -1), p["out.weight"])


def make(kv_heads=None, causal=False, name="naive", dtype=torch.float64):
    block = Block(E, H, load(name), kv_heads=kv_heads, causal=causal, dtype=dtype)
    with torch.no_grad():  # a norm that does nothing would hide a missing norm
        block.norm.weight.add_(torch.randn(E) / 4)
        block.norm.bias.add_(torch.randn(E) / 4)
    return block


@pytest.mark.parametrize("name", ["naive", "sdpa"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kv_heads", [None, 1, 2, 3, 6])
def test_forward_and_gradients(kv_heads, causal, name):
    block = make(kv_heads, causal, name)
    x = torch.randn(B, N, E, dtype=torch.float64, requires_grad=True)
    wanted = plain(block, x, kv_heads or H, causal)
    got = block(x)
    assert got.shape == x.shape
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)
    dy = torch.randn_like(got)
    leaves = [x, *block.parameters()]
    for a, b in zip(
        torch.autograd.grad(got, leaves, dy), torch.autograd.grad(wanted, leaves, dy), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


def test_the_attention_function_gets_views_and_the_mask():
    """No copy before attention: three strided views of one projection, last dim contiguous."""
    seen = {}

    def spy(q, k, v, **options):
        seen.update(q=q, k=k, v=v, options=options)
        return q

    Block(E, H, spy, kv_heads=2, causal=True)(torch.randn(B, N, E))
    q, k, v = seen["q"], seen["k"], seen["v"]
    assert (q.shape, k.shape, v.shape) == ((B, H, N, 8), (B, 2, N, 8), (B, 2, N, 8))
    assert q.untyped_storage().data_ptr() == k.untyped_storage().data_ptr()
    assert k.untyped_storage().data_ptr() == v.untyped_storage().data_ptr()
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    assert seen["options"] == {"causal": True}


def test_parameters_follow_device_and_dtype():
    block = Block(E, H, load("naive"), device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in block.parameters()} == {("meta", torch.bfloat16)}


@pytest.mark.parametrize(
    ("sizes", "named"),
    [
        ((0, 1, None), "embed"),
        ((48, 0, None), "heads"),
        ((48, 5, None), "heads"),
        ((48, 6, 4), "kv_heads"),
        ((48, 6, 0), "kv_heads"),
        ((48, 6, 12), "kv_heads"),
        ((48, -6, None), "heads"),
    ],
)
def test_bad_sizes_are_named(sizes, named):
    embed, heads, kv_heads = sizes
    with pytest.raises(ValueError, match=f"^{named}: expected .*, got -?\\d+"):
        Block(embed, heads, load("naive"), kv_heads=kv_heads)


def test_attention_has_to_be_a_function():
    with pytest.raises(ValueError, match=r"^attention: expected a function, got 'naive'"):
        Block(E, H, "naive")
