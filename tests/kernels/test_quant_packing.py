# SPDX-License-Identifier: Apache-2.0
"""Packed weights mean exactly what their source formats mean."""

from __future__ import annotations

import pytest
import torch

from scap_nncf.kernels import packing


def random_weight(bits, k, n, groups, zero=None, scale_dtype=torch.float16):
    """Unsigned integers [N, K], scales [N, groups] and zero points of a kind."""
    u = torch.randint(0, 2**bits, (n, k))
    scale = (torch.rand(n, groups) * 0.1 + 0.01).to(scale_dtype)
    zeros = None
    if zero == "integer":
        zeros = torch.randint(0, 2**bits, (n, groups))
    elif zero == "float":
        zeros = torch.randn(n, groups).to(scale_dtype)
    return u, scale, zeros


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", [(1, 1), (3, 16), (32, 129), (65, 300)])
def test_words_round_trip(bits, shape):
    values = torch.randint(0, 2**bits, shape, dtype=torch.uint8)
    packed = packing.pack_words(values, bits)
    assert packed.shape == (shape[0], packing.row_words(shape[1], bits))
    assert torch.equal(packing.unpack_words(packed, bits, shape[1]), values)


def test_word_layout_is_as_documented():
    values = torch.randint(0, 16, (2, 256), dtype=torch.uint8)
    packed = packing.pack_words(values, 4)
    for word in (0, 5, 16, 31):
        block, i = divmod(word, 16)
        for field in range(8):
            nibble = (int(packed[1, word]) >> (4 * field)) & 0xF
            assert nibble == int(values[1, block * 128 + 16 * field + i])


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zero", [None, "integer", "float"])
@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dequantize_follows_the_formula_in_the_scales_dtype(bits, zero, scale_dtype):
    k, n, groups = 96, 70, 3
    u, scale, zeros = random_weight(bits, k, n, groups, zero, scale_dtype)
    weight = packing.from_integers(u, scale, zeros, bits=bits, signed=False, dtype=torch.float32)
    q = u.reshape(n, groups, -1)
    half = 2 ** (bits - 1)
    s = scale[..., None]
    if zero == "integer":
        dense = (q - zeros[..., None]).to(scale_dtype) * s
    elif zero == "float":
        dense = (q - half).to(scale_dtype) * s + zeros[..., None]
    else:
        dense = (q - half).to(scale_dtype) * s
    assert torch.equal(weight.dequantize(), dense.reshape(n, k).t().float())
    assert (weight.in_features, weight.out_features, weight.group, weight.bits) == (k, n, 32, bits)


def test_colsum_and_fused_bias():
    u, scale, zeros = random_weight(4, 64, 40, 2, "integer")
    weight = packing.from_integers(u, scale, zeros, bits=4, signed=False)
    dense = packing.dequantize(weight.packed, weight.scale, weight.zero, 4, rounded=False, dtype=torch.float64)
    bias = torch.randn(40)
    torch.testing.assert_close(
        packing.fuse_bias(weight, bias, 0.25).double(), bias + 0.25 * dense.sum(0), rtol=1e-6, atol=1e-6
    )
    assert packing.fuse_bias(weight, None, 0.0) is None
    assert torch.equal(packing.fuse_bias(weight, bias, 0.0), bias)


@pytest.mark.parametrize("mode", ["INT8_SYM", "INT8_ASYM", "INT4_SYM", "INT4_ASYM"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nncf_decompressors_bit_exact(mode, dtype):
    nncf = pytest.importorskip("nncf")
    from nncf.torch.function_hook.wrapper import get_hook_storage

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = torch.nn.Linear(96, 40)

        def forward(self, x):
            return self.fc(x)

    options = {"group_size": 32, "ratio": 1.0, "all_layers": True} if "INT4" in mode else {}
    net = Net().to(dtype).eval()
    data = nncf.Dataset([torch.randn(2, 96).to(dtype)])
    net = nncf.compress_weights(net, mode=nncf.CompressWeightsMode[mode], dataset=data, **options)
    (decompressor,) = [m for m in net.modules() if type(m).__name__.endswith("WeightsDecompressor")]
    weight = packing.from_nncf(net.fc.weight, decompressor)
    dense = get_hook_storage(net).execute_post_function_hooks("fc:weight", 0, net.fc.weight)
    assert weight.dtype == dtype
    assert torch.equal(weight.dequantize(), dense.t())
    assert weight.group == (32 if "INT4" in mode else 96)


def test_nncf_conv1d_orientation():
    """A weight stored [K, N] (transformers' Conv1D) has its groups along axis 0."""

    class INT4SymmetricWeightsDecompressor:
        pass

    k, n, group = 64, 24, 32
    q = torch.randint(-8, 8, (k // group, group, n))
    scale = torch.rand(k // group, 1, n).half()
    stored = (q + 8).to(torch.uint8).reshape(-1, 2)
    decompressor = INT4SymmetricWeightsDecompressor()
    decompressor._scale, decompressor.compressed_weight_shape = scale, q.shape
    decompressor.result_dtype = torch.float32
    weight = packing.from_nncf(stored[:, :1] | (stored[:, 1:] << 4), decompressor)
    assert torch.equal(weight.dequantize(), (q.half() * scale).reshape(k, n).float())


def test_torchao_plain_tensors():
    n, k = 20, 64
    q = torch.randint(-128, 128, (n, k), dtype=torch.int8)
    scale = torch.rand(n).bfloat16()
    weight = packing.from_torchao(q, scale, torch.zeros(n, dtype=torch.int64), bits=8)
    assert weight.zero is None
    assert torch.equal(weight.dequantize(), (q.bfloat16() * scale[:, None]).t())
    u = torch.randint(0, 16, (n, k), dtype=torch.int32)
    scale, zero = torch.rand(n, 2).bfloat16(), torch.randn(n, 2).bfloat16()
    weight = packing.from_torchao(u, scale, zero, bits=4)  # tinygemm: floating zero points
    dense = (u.reshape(n, 2, -1) - 8).bfloat16() * scale[..., None] + zero[..., None]
    assert torch.equal(weight.dequantize(), dense.reshape(n, k).t())


def pack_int32(values, bits):
    """Neighbours along the last axis into int32, lowest bits first."""
    per = 32 // bits
    shifts = torch.arange(0, 32, bits)
    words = (values.to(torch.int64).reshape(*values.shape[:-1], -1, per) << shifts).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("checkpoint_format", ["gptq", "gptq_v2"])
def test_gptq(bits, checkpoint_format):
    k, n, groups = 64, 24, 2
    u = torch.randint(0, 2**bits, (k, n))
    zero = torch.randint(1, 2**bits, (groups, n))
    scales = torch.rand(groups, n).half()
    stored = zero - 1 if checkpoint_format == "gptq" else zero
    qweight = pack_int32(u.t().contiguous(), bits).t().contiguous()
    g_idx = torch.arange(k) // (k // groups)
    weight = packing.from_gptq(
        qweight, pack_int32(stored, bits), scales, g_idx.int(), bits=bits, checkpoint_format=checkpoint_format
    )
    dense = (u.reshape(groups, -1, n) - zero[:, None]).half() * scales[:, None]
    assert torch.equal(weight.dequantize(), dense.reshape(k, n))
    with pytest.raises(ValueError, match="desc_act"):
        packing.from_gptq(qweight, pack_int32(stored, bits), scales, g_idx.flip(0), bits=bits)


def test_awq():
    k, n, groups = 64, 32, 2
    u, zero, scales = torch.randint(0, 16, (k, n)), torch.randint(0, 16, (groups, n)), torch.rand(groups, n).half()
    order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])

    def pack(v):
        return pack_int32(v.reshape(v.shape[0], -1, 8)[:, :, order].reshape(v.shape[0], -1), 4)

    weight = packing.from_awq(pack(u), pack(zero), scales)
    dense = (u.reshape(groups, -1, n) - zero[:, None]).half() * scales[:, None]
    assert torch.equal(weight.dequantize(), dense.reshape(k, n))


@pytest.mark.parametrize("zero", [None, "integer", "float"])
def test_concatenate_outputs(zero):
    weights = []
    for n in (40, 17):
        u, scale, zeros = random_weight(4, 64, n, 2, zero)
        weights.append(packing.from_integers(u, scale, zeros, bits=4, signed=False))
    joined = packing.concatenate_outputs(weights)
    assert torch.equal(joined.dequantize(), torch.cat([w.dequantize() for w in weights], 1))
    other = packing.from_integers(*random_weight(8, 64, 8, 1), bits=8, signed=False)
    with pytest.raises(ValueError, match="can be joined only"):
        packing.concatenate_outputs([weights[0], other])


def test_bad_input_is_refused():
    u, scale, _ = random_weight(4, 64, 100, 2)
    with pytest.raises(ValueError, match=r"must lie in"):
        packing.from_integers(u + 1, scale, bits=4, signed=True)
    with pytest.raises(ValueError, match="bits"):
        packing.from_integers(u, scale, bits=3, signed=False)
    with pytest.raises(ValueError, match="scale must be"):
        packing.from_integers(u, scale[:, :1].repeat(1, 3), bits=4, signed=False)
    with pytest.raises(TypeError, match="decompressors"):
        packing.from_nncf(u, torch.nn.Linear(2, 2))
    good = packing.from_integers(u, scale, bits=4, signed=False)
    with pytest.raises(ValueError, match="words a row"):
        packing.Int8Weight(good.packed, good.scale, None)
    with pytest.raises(TypeError, match="int32"):
        packing.Int4Weight(good.packed.long(), good.scale, None)
