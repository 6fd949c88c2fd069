"""The specification of the kvquant family against published numbers: worked examples, ratios of signal to
noise, identities that kernels use to keep steps and minima out of their inner loops.
"""

import math
from typing import Any

import pytest
import torch
from tokencomp import reference
from tokencomp.reference.kvquant_layout import pack, unpack
from torch import Tensor


def quantize(x: Tensor, bits: int, **options: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes as integers, steps, minima and the reconstruction of ``x`` [S, D]."""
    codes, params = reference.kv_quantize(x[None, None], bits, **options)
    options = {k: v for k, v in options.items() if k != "rounding"}
    back = reference.kv_dequantize(codes, params, bits, **options)
    step, minimum = params[0, 0].double().unbind(-1)
    return unpack(codes, bits, "linear")[0, 0], step, minimum, back[0, 0]


def roundtrip(x: Tensor, bits: int, **options: Any) -> Tensor:
    return quantize(x, bits, **options)[3]


def near(got: Tensor, want: Any, atol: float = 2e-3) -> None:
    torch.testing.assert_close(got.double(), torch.tensor(want).double(), atol=atol, rtol=1e-3)


# --- worked examples ----------------------------------------------------------------------------------------


def test_ties() -> None:
    x = torch.tensor([[0, 2.5, 7, 15]])
    assert quantize(x, 4, group=4)[0].tolist() == [[0, 2, 7, 15]]
    assert quantize(x, 4, group=4, rounding="away")[0].tolist() == [[0, 3, 7, 15]]
    for rounding in ("even", "away"):
        codes, step, _, _ = quantize(torch.tensor([[-1, 0.2, 0.5, 2]]), 2, group=4, rounding=rounding)
        assert codes.tolist() == [[0, 1, 2, 3]]
        assert step.tolist() == [[1]]


def test_kivi() -> None:
    k = torch.tensor([[0, 10], [1, 11], [2, 13], [3, 12.5]]).repeat(1, 2)  # a byte holds four channels
    codes, step, minimum, _ = quantize(k, 2, axis="channel", group=4)
    assert codes.T.tolist() == [[0, 1, 2, 3], [0, 1, 3, 2]] * 2
    assert (step.tolist(), minimum.tolist()) == ([[1, 1, 1, 1]], [[0, 10, 0, 10]])
    assert quantize(k, 2, axis="channel", group=4, rounding="away")[0].T.tolist()[1] == [0, 1, 3, 3]


ZIP = torch.tensor([[0, 1, 2, -8], [3, -1, 0, 8], [1.5, 2, -2, 4], [-3, 0.5, 1, -4]])
IMPORTANT, REST = [0, 3], [1, 2]


def zip_bytes(codes: Tensor, bits: int) -> list[int]:
    """Bytes of quarters or halves of each row, lowest first: the published packing is ``linear``."""
    return pack(codes, bits, "linear").flatten().tolist()


def test_zipcache_keys() -> None:
    codes, step, minimum, back = quantize(ZIP[IMPORTANT], 4, axis="channel", group=2)
    assert zip_bytes(codes, 4) == [255, 15, 0, 240]
    near(step[0], [0.2, 0.03333, 0.06667, 0.26667])
    near(minimum[0], [-3, 0.5, 1, -8])
    near(back, ZIP[IMPORTANT].tolist())
    codes, step, minimum, back = quantize(ZIP[REST], 2, axis="channel", group=2)
    assert zip_bytes(codes, 2) == [243, 12]
    near(step[0], [0.5, 1, 0.66667, 1.33333])
    near(minimum[0], [1.5, -1, -2, 4])
    near(back, ZIP[REST].tolist())


def test_zipcache_values() -> None:
    scale = ZIP.abs().amax(0).sqrt()
    near(scale, [1.73205, 1.41421, 1.41421, 2.82843])
    options = {"group": 4, "pre_scale": 1 / scale[None, None]}
    codes, step, minimum, back = quantize(ZIP[IMPORTANT], 4, **options)
    tie = (ZIP[0, 1] / scale[1] + 8**0.5) / (8**0.5 / 10)
    near(tie, 12.5)  # published as 13; steps and minima rounded to fp16 move it below the tie
    assert zip_bytes(codes, 4) == [250, 13 - 1, 240, 45]
    near(minimum[:, 0], [-2.82843, -1.73205])
    near(step[:, 0], [0.28284, 0.16261])
    near(back, [[0, 1.2 - 0.4, 2, -8], [-3, 0.5401, 1, -3.9791]], 5e-3)
    codes, step, minimum, back = quantize(ZIP[REST], 2, **options)
    assert zip_bytes(codes, 2) == [210, 206]
    near(minimum[:, 0], [-0.70711, -1.41421])
    near(step[:, 0], [1.17851, 0.94281])
    near(back, [[2.8577, -1, 0.6667, 8], [0.8165, 2, -2, 4]], 5e-3)


def test_mikv() -> None:
    k, q, balance = (
        torch.tensor([[1.0, 16, -1, 2]]),
        torch.tensor([8.0, 1, 1, -2]),
        torch.tensor([2, 0.25, 1, 1]),
    )
    codes, step, _, back = quantize(k, 2, group=4, pre_scale=balance[None, None])
    assert codes.tolist() == [[2, 3, 0, 2]]
    near(step, [[5 / 3]])
    near(back[0], [7 / 6, 16, -1, 7 / 3], 5e-3)
    near(back[0] @ q.double(), 19.667, 1e-2)
    codes, _, _, back = quantize(k, 2, group=4)
    assert codes.tolist() == [[0, 3, 0, 1]]
    near(back[0] @ q.double(), -2.333, 1e-2)


def test_hadamard() -> None:
    x = torch.tensor([4.0, 0, 0, 1])
    assert reference.hadamard(x).tolist() == [2.5, 1.5, 1.5, 2.5]
    torch.testing.assert_close(reference.hadamard(reference.hadamard(x)), x.double())


def test_large_minimum_survives() -> None:
    """A range of 0.1 around 30: a zero point would be near 4500, where fp16 has steps of 4."""
    x = 30 + 0.05 * (2 * torch.rand(16, 128) - 1)
    error = (roundtrip(x, 4, group=128) - x).abs().max()
    assert error <= 0.1 / 15 / 2 + 2**-11 * 31


# --- bounds, degenerate groups ------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("size", [1e-6, 1e-3, 1.0, 300.0])
def test_error_bound(bits: int, size: float) -> None:
    x, levels = torch.randn(64, 128) * size, 2**bits - 1
    _, step, minimum, back = quantize(x, bits, group=32)
    bound = step / 2 + 2**-11 * (minimum.abs() + 2 * levels * step) + levels * 2**-24
    error = (back - x).abs().reshape(64, 4, 32).amax(-1)
    assert (error <= bound).all()


def test_groups_that_fp16_cannot_hold_are_nan() -> None:
    x = torch.randn(7, 64)
    x[1, 3], x[2, 40], x[3, 0], x[4, 63], x[5] = math.nan, math.inf, -7e4, 1e7, 5.0
    codes, step, minimum, back = quantize(x, 3, group=32)
    lost = torch.zeros(7, 2, dtype=torch.bool)
    lost[1, 0] = lost[2, 1] = lost[3, 0] = lost[4, 1] = True
    assert torch.equal(step.isnan(), lost)
    assert torch.equal(minimum.isnan(), lost)
    assert torch.equal(back.isnan().reshape(7, 2, 32).all(-1), lost)
    assert (codes.reshape(7, 2, 32)[lost] == 0).all()
    assert (step[5] == 0).all()
    assert (back[5] == 5).all()


# --- how much is kept: decibels -----------------------------------------------------------------------------


def decibels(x: Tensor, back: Tensor) -> float:
    x = x.double()
    return float(10 * torch.log10(x.square().sum() / (back - x).square().sum()))


GAUSSIAN = {
    128: {2: 6.0, 3: 13.4, 4: 20.0, 8: 44.6},
    64: {2: 6.9, 3: 14.3, 4: 21.0, 8: 45.6},
    32: {2: 8.1, 3: 15.5, 4: 22.1, 8: 46.7},
}


@pytest.mark.parametrize("axis", ["token", "channel"])
@pytest.mark.parametrize("group", GAUSSIAN)
def test_noise_of_gaussian_rows(group: int, axis: str) -> None:
    x = torch.randn(2048, 128)
    for bits, want in GAUSSIAN[group].items():
        assert abs(decibels(x, roundtrip(x, bits, group=group, axis=axis)) - want) < 0.15


def test_noise_of_fp8() -> None:
    """A plain cast gives 31.5; steps that move the largest of a token to 448 gain a little."""
    x = torch.randn(2048, 128)
    assert abs(decibels(x, x.to(torch.float8_e4m3fn).double()) - 31.5) < 0.15
    assert 31.5 < decibels(x, roundtrip(x, 8, group=128, kind="fp8")) < 32


def outliers() -> Tensor:
    """Keys with four channels that have a mean, as key biases make them."""
    x = torch.randn(2048, 128)
    x[:, [5, 37, 70, 101]] += torch.tensor([12.0, -9, 15, -7])
    return x


def test_noise_of_keys_with_outlier_channels() -> None:
    """Without the means, or with a grid a channel, what is left is Gaussian, against a larger signal."""
    x, more = outliers(), 10 * math.log10(1 + (12**2 + 9**2 + 15**2 + 7**2) / 128)
    mean = x.mean(0)[None, None]
    for bits, want in GAUSSIAN[128].items():
        assert abs(decibels(x, roundtrip(x, bits, group=128, pre_bias=mean)) - (want + more)) < 0.15
    for group, row in GAUSSIAN.items():
        for bits, want in row.items():
            got = decibels(x, roundtrip(x, bits, group=group, axis="channel"))
            assert abs(got - (want + more)) < 0.15, (group, bits, got)
    for bits, want in {2: 10.1, 3: 17.6, 4: 24.1, 8: 48.8}.items():  # published
        got = decibels(x, roundtrip(x, bits, group=-1, axis="channel"))
        assert want - 0.1 < got < GAUSSIAN[128][bits] + more
    for bits, want in {2: 2.8, 3: 6.7, 4: 13.6, 8: 38.2}.items():  # published
        assert abs(decibels(x, roundtrip(x, bits, group=128)) - want) < 0.3


# --- identities that keep the grid out of inner loops -------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_folding(bits: int) -> None:
    k, v, q = torch.randn(64, 128), torch.randn(64, 128), torch.randn(4, 128).double()
    for x, axis, group in ((k, "token", 32), (k, "channel", 16)):
        codes, step, minimum, back = quantize(x, bits, group=group, axis=axis)
        want, c = q @ back.T, codes.double()
        if axis == "token":
            cut = (4, 128 // group, group)
            dots = torch.einsum("qgd,tgd->qtg", q.reshape(cut), c.reshape(64, *cut[1:]))
            logits = (dots * step + q.reshape(cut).sum(-1)[:, None] * minimum).sum(-1)
        else:
            blocks = [
                (q * step[i]) @ c[group * i : group * (i + 1)].T + (q @ minimum[i])[:, None]
                for i in range(64 // group)
            ]
            logits = torch.cat(blocks, 1)
        torch.testing.assert_close(logits, want, rtol=1e-9, atol=1e-9)
    p = torch.randn(4, 64).double().softmax(-1)
    codes, step, minimum, back = quantize(v, bits, group=128)
    out = (p * step[:, 0]) @ codes.double() + (p @ minimum[:, 0])[:, None]
    torch.testing.assert_close(out, p @ back, rtol=1e-9, atol=1e-9)
    codes, step, minimum, back = quantize(v, bits, group=64, axis="channel")
    out = step[0] * (p @ codes.double()) + minimum[0] * p.sum(-1, keepdim=True)
    torch.testing.assert_close(out, p @ back, rtol=1e-9, atol=1e-9)


def test_one_vector_off_all_keys_changes_no_attention() -> None:
    k, q, mean = torch.randn(50, 64).double(), torch.randn(3, 64).double(), torch.randn(64).double()
    plain, shifted = q @ k.T, q @ (k - mean).T
    torch.testing.assert_close(plain.softmax(-1), shifted.softmax(-1))
    torch.testing.assert_close(plain.logsumexp(-1), shifted.logsumexp(-1) + q @ mean)


def test_statistics() -> None:
    x = torch.tensor([[[[1.0, -5], [3, 2], [9, 9]]]])
    absmax, smallest, largest, mean = reference.channel_stats(x, lengths=torch.tensor([2]))
    assert absmax.flatten().tolist() == [3, 5]
    assert smallest.flatten().tolist() == [1, -5]
    assert largest.flatten().tolist() == [3, 2]
    assert mean.flatten().tolist() == [2, -1.5]
