"""Methods on encoders of every family: identity, losslessness, counts, pooling, dense outputs."""

from collections.abc import Iterator
from typing import Any

import pytest
import tokencomp
import torch
from encoders import ALL, BY_NAME, DENSE, LAYERS, ROWS, Encoder
from layer_methods import Drop, Duplicates, Nothing, Pairs
from tokencomp import token_map
from torch import Tensor, nn

EVERY = ALL + DENSE
METHODS = (Pairs(3), Pairs((5, 0, 100, 2)), Drop(3), Duplicates(1))


def by_name(case: Any) -> str:
    return getattr(case, "name", None) or repr(case)


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def tensors(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def same(a: Any, b: Any) -> bool:
    return all(torch.equal(x, y) for x, y in zip(tensors(a), tensors(b), strict=True))


def distance(a: Any, b: Any) -> float:
    """The largest difference, in standard deviations of ``a``."""
    return max(float((x - y).abs().max() / x.std()) for x, y in zip(tensors(a), tensors(b), strict=True))


def without_positions(model: nn.Module) -> nn.Module:
    """Positions that do not tell patches 2i and 2i + 1 apart."""
    for name, parameter in model.named_parameters():
        if "pos_embed" in name or "position_embed" in name:
            parameter.zero_()
    for module in model.modules():
        if isinstance(getattr(module, "inv_freq", None), Tensor):
            tables = type(module).forward

            def paired(self: nn.Module, pixels: Tensor, tables: Any = tables) -> tuple[Tensor, ...]:
                return tuple(table[0::2].repeat_interleave(2, 0) for table in tables(self, pixels))

            module.__class__ = type("Paired", (type(module),), {"forward": paired})
    return model


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("encoder", EVERY, ids=by_name)
def test_nothing_reduced_is_bit_identical(encoder: Encoder, implementation: str) -> None:
    model, inputs = encoder.model(), encoder.inputs(3)
    if encoder.family != "timm":
        model.set_attn_implementation(implementation)
    before = encoder.result(model, inputs)
    seen: list[Any] = []
    with tokencomp.compress(model, Nothing(seen=seen)) as handle:
        assert same(encoder.result(model, inputs), before)
        report = handle.report()
    assert len(seen) == LAYERS
    assert len({view.q.data_ptr() for view in seen}) == LAYERS
    assert report.tokens == (report.token_map.shape[1],) * (LAYERS + 1)
    assert report.size is None
    assert encoder.family == "timm" or report.attention == implementation
    assert same(encoder.result(model, inputs), before)


@pytest.mark.parametrize("encoder", EVERY, ids=by_name)
def test_views_hold_what_the_attention_used(encoder: Encoder) -> None:
    """Softmax of q, k and scale, with the bias, reproduces the weights that eager attention returns."""
    model, inputs = encoder.model(), encoder.inputs(2)
    if encoder.family == "timm":
        pytest.skip("timm returns no weights; its q and k are checked below")
    model.set_attn_implementation("eager")
    seen: list[Any] = []

    class Watched(Pairs):
        def reduce(self, view: Any) -> Any:
            seen.append(view)
            return super().reduce(view)

    with tokencomp.compress(model, Watched(2)):
        weights = encoder.run(model, inputs, output_attentions=True)["attentions"]
    assert len(weights) == len(seen) == LAYERS
    for view, expected in zip(seen, weights, strict=True):
        bias = 0 if view.size is None else view.key_bias()[:, None, None]
        found = (view.q @ view.k.mT * view.scale + bias).softmax(-1)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert seen[-1].size is not None


@pytest.mark.parametrize("name", ["timm", "timm-distilled"])
def test_timm_shows_queries_and_keys_after_their_norms(name: str) -> None:
    encoder = BY_NAME[name]
    model, inputs, seen = encoder.model(), encoder.inputs(2), []
    with tokencomp.compress(model, Nothing(seen=seen)):
        encoder.run(model, inputs)
    block: Any = model.blocks[0]
    x = seen[0].x
    normed = block.norm1(
        torch.cat(
            [
                model.prefix.expand(2, -1, -1),
                model.patch_embed(inputs["pixel_values"]).flatten(2).mT + model.pos_embed,
            ],
            1,
        )
    )
    q, k, _ = block.attn.qkv(normed).reshape(2, x.shape[1], 3, 4, -1).permute(2, 0, 3, 1, 4)
    assert torch.equal(seen[0].q, block.attn.q_norm(q))
    assert torch.equal(seen[0].k, block.attn.k_norm(k))
    assert seen[0].scale == block.attn.scale


@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("encoder", EVERY, ids=by_name)
def test_merging_exact_duplicates_changes_nothing(encoder: Encoder, layer: int) -> None:
    """Merged duplicates with log sizes are the duplicates; without log sizes they are not."""
    model = without_positions(encoder.model()).double()
    inputs = encoder.inputs(2, duplicates=True)
    if encoder.text:
        ids = inputs["input_ids"]
        ids[:, 2::2] = ids[:, 1::2]
    else:
        inputs["pixel_values"] = inputs["pixel_values"].double()
    before = encoder.result(model, inputs)
    with tokencomp.compress(model, Duplicates(layer)) as handle:
        assert distance(before, encoder.result(model, inputs)) < 1e-6
        assert (
            handle.report().tokens[-1] == encoder.prefix + (handle.report().tokens[0] - encoder.prefix) // 2
        )
    with tokencomp.compress(model, Duplicates(layer, proportional=False)):
        changed = distance(before, encoder.result(model, inputs))
    # with every patch doubled only the prefix is outweighed; without a prefix there is nothing to see
    assert encoder.prefix == 0 or changed > 1e-5


@pytest.mark.parametrize("method", METHODS, ids=by_name)
@pytest.mark.parametrize("encoder", EVERY, ids=by_name)
def test_matrix(encoder: Encoder, method: Any) -> None:
    """Every method on every family: counts, sizes, maps, and the model afterwards."""
    model, inputs = encoder.model(), encoder.inputs(3)
    before = encoder.result(model, inputs)
    with tokencomp.compress(model, method) as handle:
        after = encoder.result(model, inputs)
        report = handle.report()
    assert [t.shape for t in tensors(after)] == [t.shape for t in tensors(before)]
    assert all(t.isfinite().all() for t in tensors(after))
    assert not same(after, before)
    assert same(encoder.result(model, inputs), before)
    family = report.family.removesuffix("-nested")  # as old transformers has them
    assert (report.prefix, family) == (encoder.prefix, encoder.family)
    assert report.grid == (None if encoder.text else (ROWS, ROWS))
    assert report.dense is encoder.dense
    assert sorted(report.tokens, reverse=True) == list(report.tokens)
    assert report.token_map.dtype == torch.int32
    assert report.token_map.shape == (3, report.tokens[0])
    assert torch.equal(
        report.token_map[:, : encoder.prefix], torch.arange(encoder.prefix).expand(3, -1).int()
    )
    counts = token_map.group_sizes(report.token_map, report.tokens[-1])
    assert (counts >= 1).all()
    assert report.key_bias is (report.size is not None and method.proportional)
    if report.size is None:
        assert counts.sum(1).tolist() == [report.tokens[-1]] * 3
    else:
        torch.testing.assert_close(report.size, counts)


@pytest.mark.parametrize(
    "name", ["vit", "dinov2-registers", "clip", "siglip", "dinov3", "bert", "timm-registers-avg"]
)
def test_batch_is_items_one_by_one(name: str) -> None:
    encoder = BY_NAME[name]
    model, inputs = encoder.model(), encoder.inputs(4)
    with tokencomp.compress(model, Pairs(5)) as handle:
        together = encoder.result(model, inputs)
        maps = handle.report().token_map
        for item in range(4):
            alone = encoder.result(model, {k: v[item : item + 1] for k, v in inputs.items()})
            torch.testing.assert_close(alone[0], together[item], atol=1e-5, rtol=1e-4)
            assert torch.equal(handle.report().token_map[0], maps[item])


# ---- what comes after the last layer ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "pooled"),
    [
        ("dinov2", "both"),
        ("dinov2-registers", "both"),
        ("clip", "mean"),
        ("siglip", "mean"),
        ("timm-registers-avg", "mean"),
    ],
)
def test_means_are_weighted_by_size(name: str, pooled: str) -> None:
    """A head on the mean of merged patches sees the mean of the unmerged ones."""
    encoder = BY_NAME[name]
    model, inputs = encoder.model(), encoder.inputs(2)
    head: Any = model.head if encoder.family == "timm" else model.classifier
    given: list[Tensor] = []
    hook = head.register_forward_pre_hook(lambda module, args: given.append(args[0]))
    with tokencomp.compress(model, Pairs(6)):
        encoder.run(model, inputs)
    with tokencomp.compress(model, Pairs(6), dense=True) as handle:
        encoder.run(model, inputs)
        assert handle.report().dense
    hook.remove()
    weighted, unmerged = given
    torch.testing.assert_close(weighted, unmerged, atol=1e-5, rtol=1e-4)
    with tokencomp.compress(model, Drop(6)):  # no sizes: the plain mean of what is kept
        encoder.run(model, inputs)


@pytest.mark.parametrize("name", ["siglip-vision"])
def test_attention_pooling_counts_sizes(name: str) -> None:
    """SigLIP's pooling over merged tokens is pooling over the unmerged ones."""
    encoder = BY_NAME[name]
    model, inputs = encoder.model(), encoder.inputs(2)
    with tokencomp.compress(model, Pairs(6)) as handle:
        result = encoder.run(model, inputs)
        unmerged = handle.unmerge(result.last_hidden_state)
    head = getattr(model, "vision_model", model).head  # a level deeper in transformers 5.4
    torch.testing.assert_close(result.pooler_output, head(unmerged), atol=1e-5, rtol=1e-4)
    with tokencomp.compress(model, Pairs(6, proportional=False)):
        assert distance(head(unmerged), encoder.run(model, inputs).pooler_output) > 1e-3


@pytest.mark.parametrize(
    "name", ["vit-model", "dinov2-swiglu", "dinov3", "clip-vision", "siglip-vision", "roberta"]
)
def test_hidden_states_and_unmerge(name: str) -> None:
    encoder = BY_NAME[name]
    model, inputs = encoder.model(), encoder.inputs(2)
    with tokencomp.compress(model, Pairs(4)) as handle:
        merged = encoder.run(model, inputs, output_hidden_states=True)
        report = handle.report()
        unmerged = handle.unmerge(merged.last_hidden_state)
        with pytest.raises(ValueError, match="unmerge: y must be"):
            handle.unmerge(merged.last_hidden_state[:, 1:])
    assert tuple(state.shape[1] for state in merged.hidden_states) == report.tokens
    with tokencomp.compress(model, Pairs(4), dense=True):
        dense = encoder.run(model, inputs, output_hidden_states=True)
        as_tuple = encoder.run(model, inputs, output_hidden_states=True, return_dict=False)
    assert torch.equal(dense.last_hidden_state, unmerged)
    first = 1 if name == "clip-vision" else 0  # the projected embedding comes first
    assert torch.equal(as_tuple[first], unmerged)
    assert {state.shape[1] for state in dense.hidden_states} == {report.tokens[0]}
    assert all(torch.equal(a, b) for a, b in zip(as_tuple[-1], dense.hidden_states, strict=True))
    assert torch.equal(dense.hidden_states[0], merged.hidden_states[0])
    rows = report.token_map.long()[..., None].expand(-1, -1, merged.hidden_states[-1].shape[2])
    assert torch.equal(dense.hidden_states[-1], merged.hidden_states[-1].gather(1, rows))


def test_backbones_get_maps_of_patches() -> None:
    for encoder in DENSE[:2]:
        model = encoder.model()
        with tokencomp.compress(model, Pairs(4)) as handle:
            maps = encoder.run(model, encoder.inputs(2))["feature_maps"]
            source = handle.report().token_map[:, encoder.prefix :].view(2, ROWS, ROWS)
        assert [m.shape[2:] for m in maps] == [(ROWS, ROWS)] * 2
        first = maps[-1].flatten(2).mT[0]
        flat = source[0].flatten()
        assert flat.unique().numel() < flat.numel()
        for group in flat.unique():
            rows = first[flat == group]
            assert (rows == rows[0]).all()


def test_unknown_surroundings_get_every_patch() -> None:
    """A module of the user's own may reshape to the grid, or take a plain mean: it sees all tokens."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = BY_NAME["vit-model"].model()

        def forward(self, pixel_values: Tensor) -> Tensor:
            return self.encoder(pixel_values=pixel_values).last_hidden_state[:, 1:].mean(1)

    model, inputs = Net(), BY_NAME["vit-model"].inputs(2)
    with tokencomp.compress(model, Pairs(4)) as handle:
        mean = model(**inputs)
        assert handle.report().dense
    with tokencomp.compress(model.encoder, Pairs(4)) as handle:
        rows = model.encoder(**inputs).last_hidden_state
        size = handle.report().size[:, 1:, None]
    torch.testing.assert_close(mean, (rows[:, 1:] * size).sum(1) / size.sum(1), atol=1e-5, rtol=1e-4)


def test_mask_of_a_padded_text_is_respected() -> None:
    """Padding is shown to the method, never attended to, and stays padding through every merge."""
    for name in ("bert", "roberta", "distilbert", "electra"):
        for implementation in ("sdpa", "eager"):
            encoder = BY_NAME[name]
            model, inputs = encoder.model(), encoder.inputs(3)
            model.set_attn_implementation(implementation)
            lengths = torch.tensor([33, 20, 27])
            mask = torch.arange(33) < lengths[:, None]
            seen: list[Any] = []

            class Watched(Pairs):
                def reduce(self, view: Any, seen: Any = seen) -> Any:
                    seen.append(view)
                    return super().reduce(view)

            with tokencomp.compress(model, Watched(3)):
                padded = encoder.result(model, {**inputs, "attention_mask": mask.long()})
                other = {**inputs, "input_ids": torch.where(mask, inputs["input_ids"], 7)}
                changed = encoder.result(model, {**other, "attention_mask": mask.long()})
                alone = encoder.result(model, {k: v[1:2, :20] for k, v in inputs.items()})
            for view in seen[:LAYERS]:
                assert view.mask.dtype == torch.bool
                counts = token_map.group_sizes(view.source, view.tokens, mask.float())
                assert torch.equal(view.mask, counts > 0)  # a token is padding iff all its members are
                mixed = (counts > 0) & (counts != view.sizes())
                assert not mixed.any()
            torch.testing.assert_close(padded, changed, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(padded[1], alone[0], atol=1e-5, rtol=1e-4)
