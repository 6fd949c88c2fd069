"""Visual tokens left out between decoder layers: equal to masked columns, in every step and with the rest."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import tokencomp
import torch
from decoder_oracle import masked, share
from tiny_models import state
from tiny_vlms import FAMILIES, IMAGE, make
from tokencomp import methods
from tokencomp.methods.decoder import DecoderKeep, DecoderView, Pruning
from torch import Tensor

STEPS, CLOSE = 4, 1e-4


@dataclass(frozen=True)
class Given(Pruning):
    """Leaves on the columns that a test says, behind the layers it says; remembers what it saw."""

    stays: dict[int, Tensor]  # [B, S] bool of the prompt, by the first layer that gets them
    freed: tuple[int, ...] = ()
    seen: list[DecoderView] = field(default_factory=list)

    def acts_after(self, layers: int) -> tuple[int, ...]:
        return tuple(layer - 1 for layer in self.stays)

    def frees(self, layers: int) -> tuple[int, ...]:
        return self.freed

    def prune(self, view: DecoderView) -> DecoderKeep:
        self.seen.append(view)
        stays = self.stays[view.layer + 1].expand(len(view.column), -1)
        return DecoderKeep(stays.gather(1, view.column.clamp(min=0)))


def by_layer(stays: dict[int, Tensor], layers: int) -> dict[int, Tensor]:
    """Columns of every layer, where they get fewer from some layers on."""
    found: dict[int, Tensor] = {}
    for number in range(layers):
        if number in stays:
            found[number] = stays[number] & found.get(number - 1, torch.tensor(True))
        elif number - 1 in found:
            found[number] = found[number - 1]
    return found


def layers_of(model: Any) -> int:
    return len(model.model.language_model.layers)


def said_by(model: Any, made: dict[str, Any], **options: Any) -> tuple[Tensor, Tensor]:
    """Greedy tokens ``[B, STEPS]`` and the logits they came from."""
    out = model.generate(
        **made, max_new_tokens=STEPS, do_sample=False, suppress_tokens=[IMAGE], eos_token_id=63,
        output_logits=True, return_dict_in_generate=True, **options,
    )  # fmt: skip
    return out.sequences[:, made["input_ids"].shape[1] :], torch.stack(out.logits, 1)


def check(
    model: Any, exact: Any, made: dict[str, Any], stays: dict[int, Tensor], *more: Any, mask: Any = None
) -> Any:
    """What is generated under ``Given`` and other methods equals the oracle; returns the report."""
    told = {} if mask is None else {"attention_mask": mask}
    with tokencomp.compress(model, Given(stays), *more) as handle:
        said, logits = said_by(model, made, **told)
        report = handle.report()
    double = made | {"pixel_values": made["pixel_values"].double()}
    expected = masked(exact, double, said[:, :-1], by_layer(stays, layers_of(model)), mask)
    expected = expected[:, made["input_ids"].shape[1] - 1 :]
    torch.testing.assert_close(logits.double(), expected, atol=CLOSE, rtol=0)
    return report


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_equals_masked_columns(family: str) -> None:
    """Two stops, rows that keep different numbers; on Qwen3-VL features are added behind both stops."""
    (model, made), (exact, _) = make(family, torch.float32), make(family)
    model.generate(**made, max_new_tokens=1)
    before, ids = state(model), made["input_ids"]
    stays = {1: share(ids, 2), 2: share(ids, 4)}
    report = check(model, exact, made, stays)
    assert state(model) == before
    double = made | {"pixel_values": made["pixel_values"].double()}
    one, other = (masked(exact, double, ids[:, :0], columns)[:, -1] for columns in ({}, {2: stays[2]}))
    assert float((one - other).abs().max()) > 100 * CLOSE  # the oracle sees what is left out
    visual = ids == IMAGE
    for number, columns in by_layer(stays, layers_of(model)).items():
        assert report.tokens[number] == columns.sum(1).tolist()
        assert report.visual[number] == (columns & visual).sum(1).tolist()
        held = report.cache.layers[number].tokens
        assert held == [[n + STEPS - 1] * 2 for n in columns.sum(1).tolist()]
    assert report.cache.seen == [ids.shape[1] + STEPS - 1] * 2
    first = [column for column in report.columns[2][0].tolist() if column >= 0]
    assert first == by_layer(stays, 3)[2][0].nonzero()[:, 0].tolist()


@torch.no_grad()
def test_padding_and_a_stop_before_the_first_layer() -> None:
    (model, made), (exact, _) = make("llava", torch.float32), make("llava")
    front = torch.zeros(2, 4, dtype=torch.long)
    made["input_ids"] = torch.cat([front, made["input_ids"]], 1)
    mask = torch.ones_like(made["input_ids"])
    mask[0, :4], mask[1, :1] = 0, 0
    ids = made["input_ids"]
    check(model, exact, made, {0: share(ids, 2), 2: share(ids, 6)}, mask=mask)
    check(model, exact, made, {1: share(ids, 3)}, methods.SnapKV(budget=100, window=4), mask=mask)


@torch.no_grad()
def test_nothing_and_everything_left_out() -> None:
    (model, made), (exact, _) = make("llava", torch.float32), make("llava")
    none = torch.ones_like(made["input_ids"], dtype=torch.bool)
    report = check(model, exact, made, {1: none})
    assert report.saved == 0
    report = check(model, exact, made, {1: made["input_ids"] != IMAGE})
    assert report.visual[1:] == ([0, 0], [0, 0])
    last = made["input_ids"].clone()
    last[:, -1] = IMAGE  # a prompt whose last token is visual: it stays
    last[:, 0] = 7
    made["input_ids"] = torch.cat([last[:, :3], last[:, 4:]], 1)[:, : 3 + 15 + 5]
    image = made["input_ids"] == IMAGE
    assert int(image.sum()) == 32
    report = check(model, exact, made, {1: ~image | (torch.arange(image.shape[1]) == image.shape[1] - 1)})
    assert report.visual[1] == [1, 1]


@torch.no_grad()
def test_two_images_in_a_prompt_and_one_in_another() -> None:
    (model, made), (exact, _) = make("llava", torch.float32), make("llava")
    image, text = torch.full((1, 16), IMAGE), made["input_ids"][:1, :3]
    two = torch.cat([text, image, text, image, text], 1)
    one = torch.cat([text.repeat(1, 7)[:, :19], image, text.repeat(1, 2)], 1)
    made = {
        "input_ids": torch.cat([two, one]),
        "pixel_values": torch.cat([made["pixel_values"], made["pixel_values"][:1] * 2]),
    }
    check(model, exact, made, {1: share(made["input_ids"], 3), 2: share(made["input_ids"], 6)})


TURN = torch.tensor([[9, 8, 7, 6, 5, 4, 3, 11, 12, 13]])  # more than a decode step


@pytest.mark.parametrize("chained", [False, True])
@torch.no_grad()
def test_turns_with_other_images(chained: bool) -> None:
    """An image, text, one more image on the same cache, a step: as if it had been one prompt."""
    (model, made), (exact, _) = make("llava", torch.float32), make("llava")
    first, pixels = made["input_ids"][:1], made["pixel_values"]
    second = made["input_ids"][1:]
    whole = torch.cat([first, TURN, second], 1)
    stays = {1: share(whole, 3), 2: share(whole, 6)}
    more = [methods.SnapKV(budget=100, window=4)] if chained else []
    parts = [(first, pixels[:1]), (TURN, None), (second, pixels[1:]), (torch.tensor([[5]]), None)]
    said, begin, cache = [], 0, None
    with tokencomp.compress(model, Given({}), *more) as handle:
        cache = handle.new_cache()
        handle._stack.stops = frozenset({0, 1})
        for ids, image in parts:
            part = slice(begin, begin + ids.shape[1])
            handle._stack.method = Given({number: s[:, part] for number, s in stays.items()})
            given = {} if image is None else {"pixel_values": image}
            said.append(model(input_ids=ids, past_key_values=cache, **given).logits[:, -1])
            begin += ids.shape[1]
        report = handle.report()
    exact_made = {"input_ids": whole, "pixel_values": pixels.double()}
    expected = masked(exact, exact_made, torch.tensor([[5]]), by_layer(stays, 3))
    ends = torch.tensor([ids.shape[1] for ids, _ in parts]).cumsum(0) - 1
    torch.testing.assert_close(torch.cat(said).double(), expected[0, ends], atol=CLOSE, rtol=0)
    assert report.cache.layers[2].tokens == [[int(by_layer(stays, 3)[2].sum()) + 1] * 2]


@torch.no_grad()
def test_without_a_cache_and_beams_and_rollback() -> None:
    (model, made), (exact, _) = make("llava", torch.float32), make("llava")
    ids = made["input_ids"]
    stays = {1: share(ids, 2)}
    double = made | {"pixel_values": made["pixel_values"].double()}
    step = torch.tensor([[5], [6]])
    expected = masked(exact, double, step, by_layer(stays, 3))
    with tokencomp.compress(model, Given(stays)) as handle:
        output = model(**made, use_cache=False)
        assert output.past_key_values is None
        torch.testing.assert_close(output.logits[:, -1].double(), expected[:, -2], atol=CLOSE, rtol=0)
        alone = said_by(model, made)[0]
        output = model(**made, use_cache=True)
        cache = output.past_key_values
        for _ in range(2):  # three tokens that are taken back do not matter
            model(input_ids=torch.cat([step] * 3, 1), past_key_values=cache)
            cache.crop(-3)
        cache.batch_select_indices(torch.tensor([1, 0]))
        found = model(input_ids=step.flip(0), past_key_values=cache).logits[:, -1]
        torch.testing.assert_close(found.flip(0).double(), expected[:, -1], atol=CLOSE, rtol=0)
        handle._stack.method = Given({1: stays[1].repeat_interleave(3, 0)})
        best = model.generate(**made, max_new_tokens=STEPS, num_beams=3, do_sample=False, eos_token_id=63)
        assert best.shape[0] == len(alone) == 2


@torch.no_grad()
def test_rollback_into_the_prompt() -> None:
    (model, made), (exact, _) = make("llava", torch.float32), make("llava")
    ids = made["input_ids"]
    stays, end = {1: share(ids, 2), 2: share(ids, 4)}, ids.shape[1]
    with tokencomp.compress(model, Given(stays)):
        cache = model(**made, use_cache=True).past_key_values
        cache.crop(-6)  # four words, and two image tokens, which every row may have or not
        assert cache.get_seq_length() == end - 6
        text = torch.tensor([[5, 6], [7, 8]])
        found = model(input_ids=text, past_key_values=cache).logits
    short = torch.cat([ids[:, : end - 6]], 1)
    double = {"input_ids": torch.cat([short, ids[:, end - 6 : end - 4]], 1)}
    double["pixel_values"] = made["pixel_values"].double()
    hidden = torch.zeros_like(ids[:, :2], dtype=torch.bool)
    columns = {
        layer: torch.cat([columns[:, : end - 6], hidden], 1)
        for layer, columns in ({0: torch.ones_like(ids, dtype=torch.bool)} | by_layer(stays, 3)).items()
    }
    place = torch.cat([torch.arange(end - 4), torch.arange(end - 6, end - 4)]).expand(2, -1)
    expected = masked(exact, double, text, columns, position=place)[:, -2:]
    torch.testing.assert_close(found.double(), expected, atol=CLOSE, rtol=0)


@torch.no_grad()
def test_caches_of_early_layers_let_go() -> None:
    (model, made), (exact, _) = make("llava", torch.float32), make("llava")
    ids = made["input_ids"]
    stays = {1: share(ids, 2), 2: share(ids, 4)}
    final = by_layer(stays, 3)[2]
    step = torch.tensor([[5], [6]])
    for more in ([], [methods.SnapKV(budget=100, window=4)]):
        with tokencomp.compress(model, Given(stays, freed=(0, 1)), *more) as handle:
            output = model(**made)
            held = [[row[0] for row in layer.tokens] for layer in handle.report().cache.layers]
            found = model(input_ids=step, past_key_values=output.past_key_values).logits[:, -1]
        assert held == [final.sum(1).tolist()] * 3
        double = made | {"pixel_values": made["pixel_values"].double()}
        whole = by_layer(stays, 3)
        prompt = masked(exact, double, step[:, :0], whole)[:, -1]
        torch.testing.assert_close(output.logits[:, -1].double(), prompt, atol=CLOSE, rtol=0)
        assert not torch.equal(found, output.logits[:, -1])


@torch.no_grad()
def test_with_all_kinds_of_methods() -> None:
    (model, made), (exact, _) = make("llava", torch.float32), make("llava")
    ids = made["input_ids"]
    stays = {1: share(ids, 2), 2: share(ids, 4)}
    check(model, exact, made, stays, methods.Quest(k=1000))
    chain = (
        methods.Uniform(), methods.Tiered(), methods.SnapKV(budget=14, window=4),
        methods.KIVI(), methods.A2SF(budget=0.5, sinks=1, recent=2), methods.PrefixKV(budget=0.5),
    )  # fmt: skip
    for method in chain:
        with tokencomp.compress(model, method, Given(stays), methods.Quest(k=32), page=16) as handle:
            said_by(model, made)
            report = handle.report()
        assert report.visual[2] == (by_layer(stays, 3)[2] & (ids == IMAGE)).sum(1).tolist()
        most = [max(max(row) for row in layer.tokens) for layer in report.cache.layers]
        assert most[2] <= int(by_layer(stays, 3)[2].sum(1).max()) + STEPS - 1
        assert min(most) > 0


@torch.no_grad()
def test_behind_a_method_on_visual_tokens() -> None:
    """What goes on in front, then less between layers: columns are those of the shortened prompt."""
    (model, made), (exact, _) = make("llava", torch.float32), make("llava")
    ids = made["input_ids"]
    image = ids == IMAGE
    number = image.long().cumsum(1) - 1
    front = ~image | (number % 2 == 0)  # StrideVisual below keeps these
    later = front & (~image | (number % 6 == 0))
    short = torch.stack([later[b][front[b]] for b in range(2)])

    class Even:
        def looks_at(self, layers: int) -> tuple[int, ...]:
            return ()

        def choose(self, view: Any) -> Any:
            index = torch.arange(0, view.x.shape[1], 2, dtype=torch.int32)
            return methods.VisualKeep(index.repeat(view.x.shape[0], 1))

    with tokencomp.compress(model, Given({2: short}), Even(), methods.SnapKV(budget=100)) as handle:
        said, logits = said_by(model, made)
        report = handle.report()
    double = made | {"pixel_values": made["pixel_values"].double()}
    expected = masked(exact, double, said[:, :-1], {0: front, 1: front, 2: later})
    torch.testing.assert_close(logits.double(), expected[:, ids.shape[1] - 1 :], atol=CLOSE, rtol=0)
    assert report.chosen.kept == 16
    assert report.visual == ([8, 8], [8, 8], [3, 3])
