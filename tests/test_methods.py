"""Methods: the papers' worked examples, budgets, raggedness. One row of METHOD_CASES per published number."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from backends import Backend
from decoder_views import DECODER_METHODS
from kv_methods import KV_METHODS
from merging import BLOCK_CASES, LAYER_CASES
from method_cases import LAYER_METHOD_CASES, TENSOR_METHOD_CASES
from quant_methods import QUANT_METHODS
from sparse_methods import DRAFT_METHODS, SPARSE_METHODS
from sparse_prompts import PROMPT_METHODS
from tokencomp import methods
from tokencomp.methods import DivPrune, ToDRE, base
from visual_views import ENCODER_METHODS, VISUAL_METHODS


def e1(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Six directions in the plane at 0, 10, 25, 90, 130, 200 degrees; norms must not matter."""
    angle = torch.tensor([0.0, 10, 25, 90, 130, 200], dtype=torch.float64) * math.pi / 180
    norm = torch.tensor([1, 2, 1, 3, 1, 0.5], dtype=torch.float64)
    return (torch.stack([angle.cos(), angle.sin()], dim=-1) * norm[:, None])[None].to(dtype)


PIVOT_1 = {"pivot": torch.tensor([1])}
BASELINES = {
    "random",
    "stride",
    "random_kv",
    "stride_kv",
    "random_visual",
    "stride_visual",
}  # without a paper

CLS_1 = {"cls_score": torch.tensor([[0.1, 0.5, 0.1, 0.1, 0.5, float("nan")]])}

# method, what it is told beside the tokens, kept tokens in pick order
METHOD_CASES: list[tuple[Any, dict[str, torch.Tensor], list[int]]] = [
    (DivPrune(keep=4), {}, [5, 2, 4, 3]),
    (DivPrune(keep=0.66), {}, [5, 2, 4, 3]),
    (ToDRE(keep=4), PIVOT_1, [1, 5, 3, 0]),
    (ToDRE(keep=4, objective="max_min"), PIVOT_1, [1, 5, 3, 4]),
    (ToDRE(keep=4), CLS_1, [1, 5, 3, 0]),
    (ToDRE(keep=4, objective="max_min"), CLS_1, [1, 5, 3, 4]),
    (ToDRE(keep=2, fallback="index0"), {}, [0, 5]),
    (ToDRE(keep=1, fallback="centroid"), {}, [2]),
]


@pytest.mark.parametrize(("method", "given", "picks"), METHOD_CASES, ids=str)
def test_worked_example(
    backend: Backend, method: Any, given: dict[str, torch.Tensor], picks: list[int]
) -> None:
    given = {key: t.to(backend.device) for key, t in given.items()}
    with backend.active():
        x = e1().to(backend.device)
        assert method.picks(x, **given).tolist() == [picks]
        assert method.select(x, **given).tolist() == [sorted(picks)]


def test_every_method_has_a_case() -> None:
    """Selectors have a row above; those of encoders, blocks and caches have tables of their own."""
    layers = {type(method) for method in LAYER_CASES.values()} | {
        type(case[0]) for case in LAYER_METHOD_CASES
    }
    others = {type(case[0]) for case in [*METHOD_CASES, *BLOCK_CASES, *TENSOR_METHOD_CASES]}
    caches = (KV_METHODS, QUANT_METHODS, SPARSE_METHODS, PROMPT_METHODS)
    others |= {type(method) for cases in caches for method in cases.values()}
    others |= {type(method) for method in DRAFT_METHODS}
    others |= {type(method) for method in [*VISUAL_METHODS, *ENCODER_METHODS, *DECODER_METHODS]}
    everything = {entry.cls for entry in methods.all_methods()}
    assert layers | others == everything
    assert layers == {cls for cls in everything if hasattr(cls, "reduce")}


def test_registry_describes_every_knob() -> None:
    for entry in methods.all_methods():
        assert methods.get(entry.name) is entry
        assert entry.cls.__dataclass_params__.frozen
        assert entry.paper or entry.name in BASELINES | {"uniform", "tiered"}
        assert entry.stage
        assert entry.summary.endswith(".")
        assert [k.name for k in entry.knobs] == [f.name for f in dataclasses.fields(entry.cls)]
        assert all(k.help for k in entry.knobs)
    with pytest.raises(
        KeyError, match=r"got name 'tomb' \(did you mean 'tome'\?\), expected one of .* divprune,"
    ):
        methods.get("tomb")
    with pytest.raises(ValueError, match="method name must be new, got 'divprune'"):
        base.register("divprune", paper="", stage="")(DivPrune)


@pytest.mark.parametrize(
    ("keep", "n", "kept"),
    [
        (0.098, 576, 56),
        (0.1, 2880, 288),
        (0.25, 2880, 720),
        (0.5, 5, 2),
        (0.5, 7, 4),
        (0.01, 3, 1),
        (9, 4, 4),
        (1.0, 7, 7),
    ],
)
def test_budget(keep: float, n: int, kept: int) -> None:
    """Published budgets, halves to even, never nothing and never more than there is."""
    assert base.budget(keep, n) == kept
    assert DivPrune(keep=keep).select(torch.randn(1, n, 3)).shape == (1, kept)
    assert ToDRE(keep=keep).select(torch.randn(1, n, 3)).shape == (1, kept)


@pytest.mark.parametrize("keep", [0, 0.0, -1, 1.5, -0.1, float("nan"), True])
@pytest.mark.parametrize("method", [DivPrune, ToDRE])
def test_bad_keep(method: Any, keep: Any) -> None:
    with pytest.raises(
        ValueError, match=rf"{method.__name__}: keep must be a ratio in \(0, 1\] or a count >= 1, got"
    ):
        method(keep=keep)


@pytest.mark.parametrize(
    "method", [DivPrune(keep=0.3), ToDRE(keep=0.3), ToDRE(keep=0.3, objective="max_min")], ids=str
)
def test_ragged_items_get_their_own_budget(backend: Backend, method: Any) -> None:
    x, lengths = torch.randn(4, 40, 9).to(backend.device), [40, 17, 1, 0]
    with backend.active():
        index = method.select(x, lengths=torch.tensor(lengths, device=backend.device)).tolist()
        for b, n in enumerate(lengths[:3]):
            own = method.select(x[b : b + 1, :n]).tolist()[0]
            assert index[b] == own + [-1] * (12 - len(own))
    assert index[3] == [-1] * 12


def test_cls_score_ignores_padding_and_takes_the_lowest_of_ties(cpu_backend: Backend) -> None:
    score = torch.tensor([[0.0, 1.0, 1.0, 9.0], [float("nan"), float("nan"), 5.0, 5.0], [1.0, 2.0, 3.0, 4.0]])
    with cpu_backend.active():
        picks = ToDRE(keep=1).picks(torch.randn(3, 4, 5), cls_score=score, lengths=torch.tensor([3, 2, 0]))
    assert picks.tolist() == [[1], [0], [-1]]


def test_todre_refuses_two_pivots_and_bad_tau() -> None:
    with pytest.raises(ValueError, match="ToDRE: cls_score and pivot must not both be given"):
        ToDRE().select(e1(), **PIVOT_1, **CLS_1)
    with pytest.raises(ValueError, match=r"kcenter_greedy: seed must be in \[0, N=6\), got 6"):
        ToDRE().select(e1(), pivot=torch.tensor([6]))
    with pytest.raises(ValueError, match=r"ToDRE: tau must be in \[0, 1\], got 1.5"):
        ToDRE(tau=1.5)


def test_todre_stage_2() -> None:
    """The rule on a causal example, S = {0}, V = {1, 2}, T = {3, 4}: T spends 5 % of its attention on V."""
    attention = torch.tensor(
        [[1, 0, 0, 0, 0], [0.4, 0.6, 0, 0, 0], [0.3, 0.3, 0.4, 0, 0]], dtype=torch.float64
    )
    text = torch.tensor([[0.80, 0.02, 0.03, 0.15, 0], [0.70, 0.04, 0.01, 0.05, 0.20]], dtype=torch.float64)
    a = torch.cat([attention, text])
    text_to_visual = a[3:, 1:3].sum() / a[3:].sum()
    visual_to_text = a[1:3, 3:].sum() / a[1:3].sum()
    assert text_to_visual.item() == pytest.approx(0.05)
    assert bool(ToDRE().stage2_prune(text_to_visual, visual_to_text))
    assert not bool(ToDRE(tau=0.04).stage2_prune(text_to_visual, visual_to_text))
    both = ToDRE().stage2_prune(torch.tensor([0.05, 0.2, 0.05, 0.1]), torch.tensor([0.05, 0.0, 0.2, 0.0]))
    assert both.tolist() == [True, False, False, False]
    assert [ToDRE.probe_layer(n) for n in (32, 40, 28)] == [28, 35, 24]
