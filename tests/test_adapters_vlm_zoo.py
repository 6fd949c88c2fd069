"""Methods of every kind in one call, on a vision-language model that was trained."""

from typing import Any

import pytest
import tokencomp
import torch
from tokencomp import methods, zoo

pytest.importorskip("transformers", reason="models need the extra hf")
pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
QUESTIONS = 64
BYTES = 4 * 2 * 64 * 4  # a token's keys and values in four layers, float32
TIERED = methods.Tiered(
    methods.A2SF(1.0), {16: 0.25, 8: 0.25, 4: 0.25, "evict": 0.25}, sinks=2, recent=8, edges=0, every=1
)  # fmt: skip
PIPELINES: dict[str, tuple[Any, ...]] = {
    "tiers": (methods.ToDRE(keep=0.5), methods.ToDREStage2(), TIERED),
    "ZipCache": (
        methods.ToDRE(keep=0.5),
        methods.ZipCache(sinks=2, recent=8, edges=0),
        methods.Quest(k=32),
    ),
    "A2SF": (methods.FasterVLM(keep=0.5), methods.PyramidDrop(keep=(0.5,), layers=(2,)), methods.A2SF(40)),
}


@pytest.mark.parametrize("name", PIPELINES)
@torch.no_grad()
def test_pipelines_answer_nearly_as_well(name: str) -> None:
    """Which digit is in a cell: all tokens answer 63 of 64, and half of the bytes or less at least 58."""
    model, _ = zoo.load("digits-vlm")
    batch = zoo.digits.vlm_batch("cell", QUESTIONS, torch.Generator().manual_seed(0))

    def right() -> int:
        said = model.generate(batch.prompts, pixel_values=batch.pixels, max_new_tokens=3, do_sample=False)
        return int((said[:, batch.prompts.shape[1]] == batch.answers).sum())

    assert right() == 63
    with tokencomp.compress(model, *PIPELINES[name], page=16) as handle:
        assert right() >= 58
        cache = handle.report().cache
    assert cache.memory.used < batch.prompts.numel() * BYTES / 2
    assert right() == 63
