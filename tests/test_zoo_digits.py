"""The digit models: the split, canvases, answers against an independent reading of the cells, cards."""

import sys

import pytest
import torch
from torch import Generator, Tensor

pytest.importorskip("sklearn", reason="the digits come with scikit-learn")

from tokencomp import zoo
from tokencomp.zoo import digits

DIGITS = {str(digit) for digit in range(10)}


def seeded(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def words(ids: Tensor) -> list[str]:
    return [digits.VOCABULARY[i] for i in ids.tolist()]


def answer(kind: str, question: list[str], cells: list[int]) -> str:
    """What the words ask of the nine cells, read again from the words."""
    held = [cell for cell in cells if cell != digits.EMPTY]
    if kind == "cell":
        value = cells[(int(question[3]) - 1) * 3 + int(question[5]) - 1]
        return "empty" if value == digits.EMPTY else str(value)
    if kind == "count":
        return str(len(held))
    if kind == "largest":
        return str(max(held))
    if kind == "is":
        return "yes" if int(question[3]) in held else "no"
    first = cells.index(int(question[1]))
    return str((first // 3 if kind == "row" else first % 3) + 1)


def test_the_splits_share_no_image() -> None:
    train, held_out = digits.bank("train"), digits.bank("held_out")
    assert (len(train.labels), len(held_out.labels)) == (1347, 450)
    assert sorted([*train.images.tolist(), *held_out.images.tolist()]) == list(range(1797))
    assert train.glyphs.shape == (1347, 1, 40, 40)
    assert held_out.labels.unique().tolist() == list(range(10))
    assert 0 <= train.glyphs.min() <= train.glyphs.max() <= 1


def test_labels_belong_to_their_images() -> None:
    """Averaged over the 4 x 4 pixels that each became, an enlarged digit is its scan again."""
    from sklearn.datasets import load_digits

    data, held_out = load_digits(), digits.bank("held_out")
    assert held_out.labels.tolist() == data.target[held_out.images].tolist()
    scans = torch.from_numpy(data.images)[held_out.images].float() / 16
    back = torch.nn.functional.avg_pool2d(held_out.glyphs[:, :, 4:36, 4:36], 4)[:, 0]
    assert (back - scans).abs().mean() < 0.05
    assert (back - scans.roll(1, 0)).abs().mean() > 0.2  # of the next image: the test can fail


def test_unknown_split_and_kind_name_the_known_ones() -> None:
    with pytest.raises(ValueError, match="train, held_out, got 'test'"):
        digits.bank("test")
    with pytest.raises(ValueError, match="cell, count, is, largest"):
        digits.ask(torch.full((1, 9), digits.EMPTY), "colour", seeded())


def test_missing_extra_is_named_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    digits.bank.cache_clear()
    with pytest.raises(ImportError, match=r"^digits need scikit-learn: pip install 'tokencomp\[demo\]'.*$"):
        digits.bank("train")


@pytest.mark.parametrize("kind", [*digits.KINDS, *digits.TRAINING_KINDS])
def test_answers_agree_with_the_cells(kind: str) -> None:
    _, cells = digits.vlm_canvases(300, seeded(1))
    question, said = digits.ask(cells, kind, seeded(2))
    for row, ids in enumerate(question):
        expected = answer(kind, words(ids), cells[row].tolist())
        assert digits.VOCABULARY[said[row]] == expected, (words(ids), cells[row])


def test_answers_are_not_lopsided() -> None:
    _, cells = digits.vlm_canvases(2000, seeded(3), "train")
    assert torch.bincount((cells != digits.EMPTY).sum(1), minlength=7).tolist()[0] == 0
    _, said = digits.ask(cells, "is", seeded())
    assert 0.45 < (said == digits.TOKEN["yes"]).float().mean() < 0.55
    _, said = digits.ask(cells, "cell", seeded())
    assert 0.25 < (said == digits.TOKEN["empty"]).float().mean() < 0.35


def test_cells_hold_what_is_drawn() -> None:
    """Only cells with a digit are brighter than the noise, for each shape of the grid."""
    for side in (2, 3):
        pixels, cells = digits.grid_canvases(digits.bank("train"), 40, seeded(4), side=side, most=side * side)
        tiles = (pixels + 1).view(40, 3, side, 32, side, 32).amax(1).mean((2, 4)).flatten(1)
        assert torch.equal(tiles > 0.15, cells != digits.EMPTY)


def test_a_digit_looks_like_its_label() -> None:
    """Whoever knows the mean training image of each digit reads most held-out canvases."""
    train = digits.bank("train")
    means = torch.stack([train.glyphs[train.labels == digit].mean(0) for digit in range(10)])
    means = means[:, 0, 4:36, 4:36].flatten(1)
    pixels, cells = digits.grid_canvases(digits.bank("held_out"), 100, seeded(5), fewest=9, most=9, jitter=0)
    tiles = pixels.mean(1).view(100, 3, 32, 3, 32).transpose(2, 3).reshape(900, -1)
    near = torch.corrcoef(torch.cat([means, tiles]))[10:, :10].argmax(1)
    assert (near == cells.flatten()).float().mean() > 0.6


@pytest.mark.parametrize("split", digits.SPLITS)
def test_canvases_take_digits_of_their_split_alone(split: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the other split's bank blank the canvases are unchanged; with their own blank they are."""
    banks = {name: digits.bank(name) for name in digits.SPLITS}
    makers = (digits.vit_canvases, digits.vlm_canvases)
    before = [maker(6, seeded(7), split)[0] for maker in makers]
    for blanked in digits.SPLITS:
        changed = dict(banks)
        blank = torch.zeros_like(banks[blanked].glyphs)
        changed[blanked] = digits.Bank(blank, banks[blanked].labels, banks[blanked].images)
        monkeypatch.setattr(digits, "bank", changed.__getitem__)
        after = [maker(6, seeded(7), split)[0] for maker in makers]
        same = [torch.equal(a, b) for a, b in zip(before, after, strict=True)]
        assert same == [blanked != split] * 2


def test_seeds_decide_everything() -> None:
    state = torch.random.get_rng_state()
    for make in (
        lambda seed: digits.vit_canvases(4, seeded(seed)),
        lambda seed: digits.vlm_canvases(4, seeded(seed)),
        lambda seed: digits.vlm_batch("cell", 4, seeded(seed)).prompts[:, 145:],
    ):
        one, again, other = make(0), make(0), make(1)
        for a, b in zip(one, again, strict=True):
            assert torch.equal(a, b)
        assert not torch.equal(one[0], other[0])
    assert torch.equal(state, torch.random.get_rng_state())


def test_vit_canvas_shapes_and_clutter() -> None:
    scene = digits.vit_scenes(digits.bank("train"), 32, seeded(8))
    assert scene.pixels.shape == (32, 3, 64, 64)
    assert scene.pixels.dtype == torch.float32
    assert scene.pixels.abs().max() <= 1
    half = scene.size[:, None] / 2
    assert ((scene.centre >= half) & (scene.centre <= 64 - half)).all()
    plain = digits.vit_scenes(digits.bank("train"), 32, seeded(8), clutter=0)
    assert scene.pixels.mean() > plain.pixels.mean() + 0.05
    middle = digits.vit_scenes(digits.bank("train"), 32, seeded(8), spread=0.0)
    assert torch.equal(middle.centre, torch.full((32, 2), 32.0))
    pixels, labels = digits.vit_canvases(5, seeded())
    assert (pixels.shape, labels.shape, labels.dtype) == ((5, 3, 64, 64), (5,), torch.int64)


def test_clutter_never_covers_the_digit() -> None:
    """Inside the digit's box a canvas without noise is the same with and without clutter."""
    train = digits.bank("train")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digits, "_finish", lambda image, noise, generator: image)
        full, plain = (digits.vit_scenes(train, 16, seeded(9), clutter=count) for count in (8, 0))
    for index in range(16):
        x, y = full.centre[index].tolist()
        half = full.size[index].item() / 2 - 2
        inner = (
            index,
            slice(None),
            slice(int(y - half) + 1, int(y + half)),
            slice(int(x - half) + 1, int(x + half)),
        )
        assert torch.equal(full.pixels[inner], plain.pixels[inner])
    assert not torch.equal(full.pixels, plain.pixels)


@pytest.mark.parametrize("kind", digits.KINDS)
def test_vlm_batches(kind: str) -> None:
    batch = digits.vlm_batch(kind, 6, seeded(10))
    assert batch.pixels.shape == (6, 3, 96, 96)
    assert batch.cells.shape == (6, 9)
    assert batch.prompts.shape == (6, 145 + len(digits.WORDS[kind].split()))
    assert batch.prompts[:, 0].tolist() == [digits.TOKEN["<bos>"]] * 6
    assert (batch.prompts == digits.TOKEN["<image>"]).sum(1).tolist() == [144] * 6
    shape = [word if word not in DIGITS else "0" for word in words(batch.prompts[0, 145:])]
    assert shape == digits.WORDS[kind].split()
    for row in range(6):
        expected = answer(kind, words(batch.prompts[row, 145:]), batch.cells[row].tolist())
        assert digits.VOCABULARY[batch.answers[row]] == expected


def test_exact_match_wants_the_answer_and_the_end() -> None:
    class Said:
        """Gives the answers, to all but the first ``wrong`` of a batch, and then ``last``."""

        def __init__(self, wrong: int, last: str) -> None:
            self.wrong, self.last = wrong, last

        def __call__(self, input_ids: Tensor, pixel_values: Tensor, logits_to_keep: int) -> "Said":
            assert logits_to_keep == 2
            ids = torch.stack(
                [input_ids[:, -1], torch.full_like(input_ids[:, 0], digits.TOKEN[self.last])], 1
            )
            ids[: self.wrong, 0] = digits.TOKEN["?"]
            self.logits = torch.nn.functional.one_hot(ids, len(digits.VOCABULARY)).float()
            return self

    assert digits.vlm_exact_match(Said(0, "<eos>"), "cell", 10, 0, batch=4) == 1.0
    assert digits.vlm_exact_match(Said(1, "<eos>"), "cell", 10, 0, batch=4) == 0.7
    assert digits.vlm_exact_match(Said(0, "?"), "is", 10, 0, batch=4) == 0.0


# ---- the models that ship ----------------------------------------------------------------------------------

SHIPPED = [name for name in zoo.names() if name.startswith("digits")]
SAMPLE = 96  # canvases of each score that is measured again


@pytest.mark.parametrize("name", SHIPPED)
def test_scores_are_those_of_the_card(name: str) -> None:
    """On other held-out canvases than the card's: within 4 sigma of a binomial."""
    pytest.importorskip("transformers", reason="the zoo needs the extra hf")
    model, _ = zoo.load(name)
    scores = {entry["task"]: entry["score"] for entry in zoo.card(name)["scores"]}
    if name == "digits-vit":
        found = {"digit": digits.vit_accuracy(model, SAMPLE, 11)}
    else:
        found = {kind: digits.vlm_exact_match(model, kind, SAMPLE, 11) for kind in digits.KINDS}
        assert scores["all"] == pytest.approx(sum(scores[kind] for kind in digits.KINDS) / 4)
    assert set(found) == set(scores) - {"all"}
    for task, share in found.items():
        margin = 4 * (max(scores[task] * (1 - scores[task]), 1 / SAMPLE) / SAMPLE) ** 0.5
        assert abs(share - scores[task]) <= margin, task


@pytest.mark.parametrize("name", [name for name in SHIPPED if name == "digits-vlm"])
def test_generate_agrees_with_the_score(name: str) -> None:
    """Free greedy generation says what ``vlm_matches`` counts, and blank images are not answered so well."""
    pytest.importorskip("transformers", reason="the zoo needs the extra hf")
    model, _ = zoo.load(name)
    batch = digits.vlm_batch("cell", 24, seeded(12))
    said = model.generate(
        input_ids=batch.prompts, pixel_values=batch.pixels, max_new_tokens=2, do_sample=False
    )[:, batch.prompts.shape[1] :]
    ended = said[:, 1] == digits.TOKEN["<eos>"]
    matches = digits.vlm_matches(model, batch)
    assert torch.equal((said[:, 0] == batch.answers) & ended, matches)
    blank = digits.VlmBatch(torch.full_like(batch.pixels, -1), batch.cells, batch.prompts, batch.answers)
    assert digits.vlm_matches(model, blank).sum() < matches.sum()
