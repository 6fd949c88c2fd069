"""FlowCut's second stage: by hand, by heads, and on a model."""

from dataclasses import dataclass, field, replace

import pytest
import tokencomp
import torch
from decoder_views import causal, random_view, view_of
from test_methods_decoder import kept
from tiny_vlms import make
from tokencomp import methods
from tokencomp.methods.decoder import DecoderKeep, DecoderView
from tokencomp.methods.flowcut_stage2 import flow


def test_worked_example() -> None:
    """By hand: ``r = (.4, .3, .2, .05, .05)``, ``v_last . v / sqrt 2 = (1, 2, .5, 3, 0)`` and so ``w = (.083,
    .225, .050, .612, .030)``, ``|v| = (2, 2, 1, 4, 1)``.
    """
    rows = causal(8, r7=(0.5, 0.2, 0.15, 0.1, 0.025, 0.025))
    v = torch.tensor([[0.0, 9], [1, -1], [2, 0], [0.5, 0.5], [3, -1], [0, 1], [7, 7], [2**0.5, 0]])
    view = view_of([1, 2, 3, 4, 5], 8, rows, value=v[None, None])
    found = flow(view.own.products(view.last)[:, :, 0], v[None, None], view.last, view.visual)
    expected = torch.tensor([0.96554, 1.04998, 0.25020, 2.64636, 0.08045])
    torch.testing.assert_close(found[0, 1:6], expected, atol=1e-4, rtol=0)
    assert kept(methods.FlowCutStage2(keep=1), view) == [4]
    assert kept(methods.FlowCutStage2(keep=3), view) == [1, 2, 4]
    assert kept(methods.FastV(keep=1), view) == [1]
    assert methods.FlowCutStage2().acts_after(28) == (1,)
    with pytest.raises(ValueError, match="FlowCutStage2: the view must have values, got none"):
        methods.FlowCutStage2().prune(replace(view, value=None))


def test_groups_of_heads() -> None:
    """Sequences of 9 and 6 visual tokens, four heads on two: heads repeated, as the authors' code does."""
    view = random_view()
    assert view.value is not None
    q, k, v = view.own.q, *(t.repeat_interleave(2, 1) for t in (view.own.k, view.value))
    found = flow(view.own.products(view.last)[:, :, 0], view.value, view.last, view.visual)
    for row in (0, 1):
        at, last = view.visual[row].nonzero()[:, 0], int(view.last[row].nonzero()[0])
        r = torch.stack([(k[row, h, at] @ q[row, h, last] / 8**0.5).softmax(0) for h in range(4)]).mean(0)
        w = torch.stack([(v[row, h, at] @ v[row, h, last] / 8**0.5).softmax(0) for h in range(4)]).mean(0)
        expected = (r / r.sum() + w / w.sum()) * v[row][:, at].mean(0).abs().sum(1)
        torch.testing.assert_close(found[row, at], expected)


@dataclass(frozen=True)
class Shown(methods.FlowCutStage2):
    seen: list[DecoderView] = field(default_factory=list)

    def prune(self, view: DecoderView) -> DecoderKeep:
        self.seen.append(view)
        return super().prune(view)


@torch.no_grad()
def test_behind_the_first_stage() -> None:
    """Values are those the layer attends with; half of what the encoder left goes on."""
    model, made = make("llava", torch.float32)
    layer, values = model.model.language_model.layers[1].self_attn, []
    method = Shown(keep=0.5)
    with tokencomp.compress(model, methods.FlowCut(keep=8), method) as handle:
        hook = layer.v_proj.register_forward_hook(lambda module, args, output: values.append(output))
        model(**made)
        hook.remove()
        report = handle.report()
    assert report.visual == ([8, 8], [8, 8], [4, 4])
    value = method.seen[0].value
    assert value is not None
    assert torch.equal(value, values[0].view(2, 15, 2, 8).transpose(1, 2))
    assert report.saved > report.chosen.saved > 0
