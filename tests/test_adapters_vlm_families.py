"""Visual tokens of every make of vision-language model: what goes on equals masked columns, in every step."""

from typing import Any

import pytest
import torch
from test_adapters_vlm import Given, compressed
from tiny_models import state
from tiny_vlms import FAMILIES, IMAGE, VIDEO, VIDEO_FAMILIES, encode, make, visual_mask
from tokencomp import methods
from tokencomp.adapters.vlm_families import way_of
from torch import Tensor

STEPS = 3


def positions(model: Any, made: dict[str, Any], tokens: int) -> Tensor:
    """Of all tokens and those that follow, as without compression: ``[B, S]`` or ``[3, B, S]``."""
    ids = made["input_ids"]
    rest = torch.arange(tokens - ids.shape[1])
    if not hasattr(model.model, "get_rope_index"):
        return torch.arange(tokens).expand(len(ids), -1)
    given = {"input_ids": ids} | {name: x for name, x in made.items() if name.endswith("_grid_thw")}
    position, _ = model.model.get_rope_index(**given, mm_token_type_ids=made["mm_token_type_ids"])
    return torch.cat([position, position[:, :, -1:] + 1 + rest], 2)


@torch.no_grad()
def oracle(model: Any, made: dict[str, Any], stays: Tensor, said: Tensor) -> Tensor:
    """Logits of the last prompt token and those of ``said`` ``[B, T]``, all at once, with masked columns."""
    ids = torch.cat([made["input_ids"], said], 1)
    mask = torch.cat([stays, torch.ones_like(said, dtype=torch.bool)], 1).long()
    more: dict[str, Any] = {"position_ids": positions(model, made, ids.shape[1])}
    if "mm_token_type_ids" in made:
        more["mm_token_type_ids"] = torch.cat([made["mm_token_type_ids"], torch.zeros_like(said).int()], 1)
    logits = model(**made | {"input_ids": ids, "attention_mask": mask} | more).logits
    return logits[:, made["input_ids"].shape[1] - 1 :]  # type: ignore[no-any-return]


class Some:
    """Keeps every third token of each crop, from 1 on; remembers what it saw."""

    def __init__(self, looks: tuple[int, ...] = ()) -> None:
        self.looks, self.seen = looks, []  # type: ignore[var-annotated]

    def looks_at(self, layers: int) -> tuple[int, ...]:
        return self.looks

    def choose(self, view: Any) -> Any:
        self.seen.append(view)
        index = torch.arange(1, view.x.shape[1], 3, dtype=torch.int32)
        return methods.VisualKeep(index.repeat(view.x.shape[0], 1))


@pytest.mark.parametrize("family", [*FAMILIES, *VIDEO_FAMILIES])
@torch.no_grad()
def test_equals_masked_columns(family: str) -> None:
    model, made = make(family)
    model.generate(**made, max_new_tokens=1)
    before = state(model)
    with compressed(model, Some(), newlines="all") as stack:
        features = encode(model, made)
        _, passed = stack.passes.waiting.pop()
        out = model.generate(
            **made,
            max_new_tokens=STEPS,
            do_sample=False,
            suppress_tokens=[IMAGE, VIDEO],
            output_logits=True,
            return_dict_in_generate=True,
        )
    assert state(model) == before
    images = [image for encoded in passed for image in encoded.images]
    tokens = [encoded.x.shape[1] for encoded in passed for _ in encoded.images]
    rows = []
    for image, n in zip(images, tokens, strict=True):
        token = image.source % n
        rows.append((image.source < 0) | ((token % 3 == 1) & (image.source >= 0)))
    assert [len(image.features) for image in images] == [len(f) for f in features]
    mask = visual_mask(made["input_ids"])
    stays = (~mask).masked_scatter(mask, torch.cat(rows))
    said = out.sequences[:, made["input_ids"].shape[1] :]
    expected = oracle(model, made, stays, said[:, :-1])
    found = torch.stack(out.logits, 1)
    torch.testing.assert_close(found, expected[:, : found.shape[1]].to(found.dtype), atol=1e-4, rtol=0)
    assert stack.report.kept == int(torch.cat(rows).sum())
    assert stack.report.tokens == int(mask.sum())


@pytest.mark.parametrize("family", [*FAMILIES, *VIDEO_FAMILIES])
@torch.no_grad()
def test_steps_by_hand_and_all_kept(family: str) -> None:
    """Positions that nobody gives go on behind all tokens, also those that were dropped."""
    model, made = make(family)

    class All(Some):
        def choose(self, view: Any) -> Any:
            index = torch.arange(view.x.shape[1], dtype=torch.int32)
            return methods.VisualKeep(index.repeat(view.x.shape[0], 1))

    def run() -> Tensor:
        output = model(**made, use_cache=True)
        step = torch.tensor([[5], [6]])
        later = model(input_ids=step, past_key_values=output.past_key_values, use_cache=True)
        return torch.cat([output.logits[:, -1:], later.logits], 1)

    expected = run()
    with compressed(model, All()):
        torch.testing.assert_close(run(), expected, atol=1e-10, rtol=0)
    with compressed(model, Some(), newlines="all"):
        output = model(**made, use_cache=True)
        step = torch.tensor([[5], [6]])
        found = model(input_ids=step, past_key_values=output.past_key_values, use_cache=True).logits
        by_hand = model.generate(**made, max_new_tokens=1, output_logits=True, return_dict_in_generate=True)
    torch.testing.assert_close(output.logits[:, -1].float(), by_hand.logits[0].float(), atol=1e-5, rtol=0)
    assert found.shape[1] == 1


@pytest.mark.parametrize("family", [*FAMILIES, *VIDEO_FAMILIES])
@torch.no_grad()
def test_what_methods_see(family: str) -> None:
    """A token's score is the mean of its patches' in eager attention, found by undoing the model's order."""
    model, made = make(family, torch.float32)
    some = Some(looks=(1,))
    with compressed(model, some):
        model(**made)
    for view in some.seen:
        column = view.encoder.columns(1)
        assert column.shape == view.x.shape[:2]
        patches = view.encoder.patches()
        share = view.x.shape[1] / patches
        if not view.encoder.has_cls:
            torch.testing.assert_close(column.sum(1), torch.full((len(column),), share), atol=1e-4, rtol=0)
        else:
            assert bool((column.sum(1) < share).all())
        assert view.grid is None or view.grid[0] * view.grid[1] == view.x.shape[1]
    assert way_of(model.model) is not None


@torch.no_grad()
def test_qwen_scores_are_in_the_order_of_tokens() -> None:
    """A patch block that alone differs is the token that alone is different, windows or not."""
    for family in ("qwen2_5_vl", "qwen3_vl"):
        model, made = make(family, torch.float32)
        some = Some(looks=(1,))
        with compressed(model, some):
            model(**made)
            plain = [view.encoder.keys(1).clone() for view in some.seen]
            some.seen.clear()
            changed = made["pixel_values"].clone()
            changed[4 * 5 : 4 * 6] += 3  # the four patches of token 5
            model(**made | {"pixel_values": changed})
        before, after = plain[0], some.seen[0].encoder.keys(1)
        assert int((before - after).norm(dim=3).sum(1)[0].argmax()) == 5


@torch.no_grad()
def test_frames_of_a_video_are_crops_of_one_image() -> None:
    """The third frame of the first video alone changes its own view, and a budget of frames is theirs."""
    for family, frames in (("onevision_video", 3), ("qwen2_vl_video", 3), ("qwen3_vl_video", 3)):
        model, made = make(family, torch.float32)
        some = Some(looks=(0,))
        with compressed(model, some):
            model(**made)
            plain = [(view.x.clone(), view.encoder.columns(0)) for view in some.seen]
            assert [n for view in some.seen for n in view.counts] == [frames, frames]
            some.seen.clear()
            changed = made["pixel_values_videos"].clone()
            (changed[0, 2] if family == "onevision_video" else changed[48:72]).add_(3)
            model(**made | {"pixel_values_videos": changed})
        x, column = some.seen[0].x, some.seen[0].encoder.columns(0)
        moved = [f for f in range(len(x)) if not torch.allclose(x[f], plain[0][0][f], atol=1e-6)]
        assert moved == [2]
        assert [f for f in range(len(x)) if not torch.allclose(column[f], plain[0][1][f], atol=1e-7)] == [2]

        def third(view: Any) -> Tensor:
            return torch.tensor([0.0, 0.0, 1.0] * len(view.counts))

        with compressed(model, methods.QuoTA(third, keep=1 / 3)) as stack:
            model(**made)
        kept = [(row >= 0).sum().item() for index in stack.report.index for row in index]
        assert kept[0:2] == [0, 0]
        assert kept[2] >= 4


@torch.no_grad()
def test_images_and_videos_in_one_prompt() -> None:
    """A video in front of an image: each unit's tokens are found in their own places."""
    model, made = make("qwen2_vl", torch.float32)
    _, video = make("qwen2_vl_video", torch.float32)
    image_ids, video_ids = made["input_ids"][:1], video["input_ids"][:1]
    ids = torch.cat([video_ids, image_ids], 1)
    kinds = (ids == IMAGE).int() + 2 * (ids == VIDEO).int()
    given = {
        "input_ids": ids, "mm_token_type_ids": kinds, "image_grid_thw": made["image_grid_thw"][:1],
        "pixel_values": made["pixel_values"][:64], "video_grid_thw": video["video_grid_thw"][:1],
        "pixel_values_videos": video["pixel_values_videos"][:72],
    }  # fmt: skip
    some = Some()
    with compressed(model, some) as stack:
        found = model(**given, use_cache=True).logits[:, -1]
        said = model.generate(**given, max_new_tokens=1, output_logits=True, return_dict_in_generate=True)
    assert stack.report.images == 2
    assert [view.x.shape[:2] for view in some.seen[:2]] == [(3, 6), (1, 16)]
    keeps = torch.cat([torch.arange(18) % 6 % 3 == 1, torch.arange(16) % 3 == 1])
    stays = (~visual_mask(ids)).masked_scatter(visual_mask(ids), keeps)
    position, _ = model.model.get_rope_index(
        ids, mm_token_type_ids=kinds, image_grid_thw=given["image_grid_thw"],
        video_grid_thw=given["video_grid_thw"],
    )  # fmt: skip
    expected = model(**given, attention_mask=stays.long(), position_ids=position).logits[:, -1]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(said.logits[0], expected, atol=1e-4, rtol=0)


@torch.no_grad()
def test_windows_are_refused() -> None:
    model, made = make("qwen2_5_vl", torch.float32)
    with (
        compressed(model, Some(looks=(0,))),
        pytest.raises(ValueError, match="encoder layer 0 attends in windows"),
    ):
        model(**made)


@torch.no_grad()
def test_tiles_and_newlines() -> None:
    model, made = make("llava_next", torch.float32)
    some = Some()
    with compressed(model, some, newlines="none") as stack:
        model(**made)
        none = stack.report.kept
    view = some.seen[0]
    assert view.counts == [3, 5]
    assert view.overview
    assert list(view.tiles) == [(1, 2), (2, 2)]
    kept = {}
    for newlines in ("all", "rows"):
        with compressed(model, Given(torch.zeros(8, 1, dtype=torch.int32)), newlines=newlines) as stack:
            model(**made)
            kept[newlines] = stack.report.kept
    with compressed(model, Given(torch.zeros(8, 1, dtype=torch.int32)), newlines="none") as stack:
        model(**made)
    alone = stack.report.kept
    assert alone < kept["rows"] < kept["all"]
    assert none > alone


FEATURES = {"VisPruner", "Scope", "ZOOPrune"}  # they read the features of the encoder by token


@pytest.mark.parametrize("family", [*FAMILIES, *VIDEO_FAMILIES])
@torch.no_grad()
def test_methods_on_every_make(family: str) -> None:
    model, made = make(family, torch.float32)
    chosen = [
        methods.ToDRE(keep=0.3), methods.DivPrune(keep=0.3), methods.FasterVLM(keep=0.3),
        methods.FoPru(keep=0.3), methods.VisionZip(keep=0.3), methods.CDPruner(keep=0.3),
        methods.SliME(p=0.3), methods.GlobalCom2(keep=0.3), methods.PruMerge(),
        methods.VisPruner(keep=0.3), methods.StrideVisual(keep=0.3, average=True),
    ]  # fmt: skip
    for method in chosen:
        missing = "qwen" in family and type(method).__name__ in FEATURES | {"GlobalCom2"}
        with compressed(model, method) as stack:
            if missing:
                with pytest.raises(ValueError, match="features of the encoder are not to be had"):
                    model(**made)
                continue
            tokens = model.generate(**made, max_new_tokens=2, do_sample=False)
        assert tokens.shape[0] == 2
        assert 0 < stack.report.kept < stack.report.tokens
