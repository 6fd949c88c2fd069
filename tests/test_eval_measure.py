"""Intervals cover what they claim, bytes are those of storages, peaks those of what lives at once."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from tokencomp.eval import Bootstrap, Estimate, measure

# ---- statistics --------------------------------------------------------------------------------------------


def test_intervals_cover_the_mean_as_often_as_they_claim() -> None:
    """Of 400 draws of 40 skewed numbers: 95 % up to what 400 draws and a small sample leave open."""
    drawn = np.random.default_rng(0).exponential(size=(400, 40))
    resampling = Bootstrap(40, 1, resamples=1000)
    found = [resampling.mean(row) for row in drawn]
    covered = np.mean([estimate.low <= 1.0 <= estimate.high for estimate in found])
    assert 0.90 < covered < 0.97
    half = Bootstrap(40, 1, resamples=1000, level=0.5)
    covered = np.mean([e.low <= 1.0 <= e.high for e in map(half.mean, drawn)])
    assert 0.42 < covered < 0.56
    width = np.mean([estimate.high - estimate.low for estimate in found])
    assert width == pytest.approx(2 * 1.96 / math.sqrt(40), rel=0.1)


def test_differences_are_paired() -> None:
    """A constant lead over a noisy base has no uncertainty; without pairing it would."""
    base = np.random.default_rng(0).normal(size=30)
    resampling = Bootstrap(30, 0)
    lead = resampling.difference(base + 0.125, base)
    assert (lead.mean, lead.low, lead.high) == pytest.approx((0.125, 0.125, 0.125))
    assert resampling.mean(base).high - resampling.mean(base).low > 0.4


def test_bootstrap_is_seeded_and_checks_its_samples() -> None:
    scores = np.random.default_rng(0).normal(size=12)
    assert Bootstrap(12, 3).mean(scores) == Bootstrap(12, 3).mean(scores)
    assert Bootstrap(12, 3).mean(scores) != Bootstrap(12, 4).mean(scores)
    assert Bootstrap(5, 0).mean(np.ones(5)) == Estimate(1.0, 1.0, 1.0)
    with pytest.raises(ValueError, match="count must be >= 2 samples, got 1"):
        Bootstrap(1, 0)
    with pytest.raises(ValueError, match=r"scores must be \[12\], got \[3\]"):
        Bootstrap(12, 0).mean(scores[:3])


# ---- measuring ---------------------------------------------------------------------------------------------


class Layer:
    def __init__(self, *tensors: Any) -> None:
        self.keys, self.values, *rest = tensors
        self.more = {"nested": rest}
        self.length = 3


class FakeCache:
    def __init__(self, *layers: Layer) -> None:
        self.layers = layers


def test_cache_bytes_are_those_of_storages() -> None:
    whole = torch.zeros(2, 100)
    assert measure.cache_bytes(FakeCache(Layer(whole[:, :5], whole[:, 5:9]))) == 800  # views free nothing
    assert measure.cache_bytes(FakeCache(Layer(whole[:, :5].clone(), whole[:, :5].clone()))) == 80
    codes = torch.zeros(10, dtype=torch.uint8)
    assert measure.cache_bytes(FakeCache(Layer(codes, None, torch.zeros(3)), Layer(codes, codes))) == 22
    owner = FakeCache()
    owner.memory = lambda: 123  # type: ignore[attr-defined]
    assert measure.cache_bytes(owner) == 123


def test_peak_counts_what_lives_at_once() -> None:
    device, weights = torch.device("cpu"), torch.ones(50_000)

    def one_after_the_other() -> None:
        for _ in range(3):
            x = weights + 1  # 200 kB, released before the next
            del x

    def together() -> list[torch.Tensor]:
        return [weights + 1 for _ in range(3)]

    assert measure.peak_bytes(one_after_the_other, device) == 200_000
    assert measure.peak_bytes(together, device) == 600_000
    assert measure.peak_bytes(lambda: weights.view(5, -1).T, device) == 0
    assert measure.peak_bytes(lambda: weights.add_(0), device) == 0


def test_meter_times_tokens() -> None:
    meter = measure.Meter()
    for tokens in (1, 2):
        with meter.phase("decode", tokens), meter.phase("prefill", 9):
            pass
    assert len(meter.seconds["decode"]) == len(meter.seconds["prefill"]) == 2
    assert meter.kv_bytes is None
