"""``attn_implementation="tokencomp"``: tokens of sdpa, sums of eager, and models left as they were."""

import copy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import tokencomp
import torch
from tokencomp import zoo
from tokencomp.adapters import attention
from tokencomp.importance import importance_map, shares
from tokencomp.scores import forgetting_weights
from tokencomp.zoo import recall
from torch import Tensor

transformers = pytest.importorskip("transformers", reason="models need the extra hf")
from transformers import AttentionInterface, AttentionMaskInterface  # noqa: E402

LEFT = torch.ones(2, 20, dtype=torch.long)
LEFT[0, :5] = 0
RIGHT = LEFT.flip(1)


def llama(**options: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=8,
        num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.3, **options,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def using(model: Any, implementation: str) -> Any:
    model.set_attn_implementation(implementation)
    return model


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    """Each test registers for itself and leaves no name behind."""
    interfaces = (AttentionInterface, AttentionMaskInterface)
    before = [dict(interface._global_mapping) for interface in interfaces]
    tokencomp.register_attention()
    with torch.no_grad():
        yield
    for interface, mapping in zip(interfaces, before, strict=True):
        interface._global_mapping.clear()
        interface._global_mapping.update(mapping)


def prompt(length: int = 20) -> Tensor:
    return torch.randint(1, 128, (2, length), generator=torch.Generator().manual_seed(1))


def answer(model: Any, implementation: str, ids: Tensor, mask: Tensor, **options: Any) -> Tensor:
    using(model, implementation)
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, **options}
    if settings["do_sample"]:
        torch.manual_seed(3)
    out: Tensor = model.generate(ids, attention_mask=mask, **settings)
    return out


GENERATE = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "chunks": {"prefill_chunk_size": 8},
    "returned": {"num_return_sequences": 2, "do_sample": True},
    "static": {"cache_implementation": "static", "disable_compile": True},
}


@pytest.mark.parametrize("padded", [False, True], ids=["full", "left-padded"])
@pytest.mark.parametrize("options", GENERATE.values(), ids=GENERATE)
def test_tokens_are_those_of_sdpa(options: dict[str, Any], padded: bool) -> None:
    model, ids = llama(), prompt()
    mask = LEFT if padded else torch.ones_like(LEFT)
    assert torch.equal(
        answer(model, "sdpa", ids, mask, **options), answer(model, "tokencomp", ids, mask, **options)
    )


def test_recall_lm_answers_as_under_sdpa() -> None:
    model, _ = zoo.load("recall-lm")
    ids, _ = recall.recall(2, 128, 12, 4, torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    for options in GENERATE.values():
        assert torch.equal(
            answer(model, "sdpa", ids, mask, **options), answer(model, "tokencomp", ids, mask, **options)
        )


def test_without_the_mask_function_padding_is_seen() -> None:
    AttentionInterface.register("tokencomp_unmasked", attention.hf_attention)
    model, ids = llama(), prompt()
    logits = {
        name: using(model, name)(ids, attention_mask=LEFT).logits[0, -1]
        for name in ("sdpa", "tokencomp", "tokencomp_unmasked")
    }
    torch.testing.assert_close(logits["tokencomp"], logits["sdpa"], atol=1e-5, rtol=1e-5)
    assert (logits["tokencomp_unmasked"] - logits["sdpa"]).abs().max() > 1e-2


# ---- column sums -------------------------------------------------------------------------------------------


def eager_sums(model: Any, ids: Tensor, mask: Tensor | None, **inputs: Any) -> list[Tensor]:
    """Sums over real rows of eager attention; padding rows are uniform there and nothing here."""
    using(model, "eager")
    matrices = model(ids, attention_mask=mask, output_attentions=True, **inputs).attentions
    rows = torch.ones(ids.shape) if mask is None else mask[:, -ids.shape[1] :]
    return [(p * rows[:, None, :, None]).sum(2) for p in matrices]


def close(ours: Any, theirs: list[Tensor], tolerance: float = 1e-5) -> None:
    assert len(ours) == len(theirs) > 0
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=tolerance, rtol=1e-5)


@pytest.mark.parametrize("mask", [None, LEFT, RIGHT], ids=["full", "left", "right"])
def test_output_attentions_are_column_sums(mask: Tensor | None) -> None:
    model, ids = llama(), prompt()
    theirs = eager_sums(model, ids, mask)
    output = using(model, "tokencomp")(ids, attention_mask=mask, output_attentions=True)
    assert output.attentions[0].shape == (2, 8, 20)
    close(output.attentions, theirs)


def test_output_attentions_of_generate() -> None:
    model, ids = using(llama(), "tokencomp"), prompt()
    output = model.generate(
        ids, attention_mask=LEFT, max_new_tokens=3, do_sample=False, pad_token_id=0, output_attentions=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    assert [step[0].shape[-1] for step in output.attentions] == [20, 21, 22]
    assert len(output.attentions[0]) == 3


@pytest.mark.parametrize("mask", [None, LEFT], ids=["full", "left"])
def test_softcap(mask: Tensor | None) -> None:
    torch.manual_seed(0)
    config = transformers.Gemma2Config(
        vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=2, head_dim=8, sliding_window=6, attn_logit_softcapping=2.0,
        query_pre_attn_scalar=8, initializer_range=0.3,
    )  # fmt: skip
    model, ids = transformers.Gemma2ForCausalLM(config).eval(), prompt()
    theirs, logits = eager_sums(model, ids, mask), model(ids, attention_mask=mask).logits
    output = using(model, "tokencomp")(ids, attention_mask=mask, output_attentions=True)
    torch.testing.assert_close(output.logits[:, -1], logits[:, -1], atol=1e-4, rtol=1e-4)
    close(output.attentions, theirs)


def test_sinks() -> None:
    torch.manual_seed(0)
    config = transformers.GptOssConfig(
        vocab_size=128, hidden_size=64, intermediate_size=32, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=2, head_dim=8, num_local_experts=2, num_experts_per_tok=1, sliding_window=6,
        initializer_range=0.3, pad_token_id=0,
    )  # fmt: skip
    model, ids = transformers.GptOssForCausalLM(config).eval(), prompt()
    theirs, logits = eager_sums(model, ids, LEFT), model(ids, attention_mask=LEFT).logits
    output = using(model, "tokencomp")(ids, attention_mask=LEFT, output_attentions=True)
    torch.testing.assert_close(output.logits[:, -1], logits[:, -1], atol=1e-4, rtol=1e-4)
    close(output.attentions, theirs)


def test_encoders_see_both_ways() -> None:
    model, images = tiny_models.vit("eager"), tiny_models.pixels()
    theirs = [p.sum(2) for p in model(images, output_attentions=True).attentions]
    with tokencomp.attention_scores(model) as scores:
        model(images)
    close(scores.last, theirs)


@pytest.mark.parametrize("implementation", ["sdpa", "eager", "tokencomp"])
def test_attention_scores_in_chunks_with_weights(implementation: str) -> None:
    model, ids = llama(), prompt()
    using(model, "eager")
    matrices = model(ids, attention_mask=LEFT, output_attentions=True).attentions
    using(model, implementation)
    with tokencomp.attention_scores(model, lambda rows: forgetting_weights(rows, 0.9), "kv_mean") as scores:
        first = model(ids[:, :12], attention_mask=LEFT[:, :12], use_cache=True)
        model(ids[:, 12:], attention_mask=LEFT, past_key_values=first.past_key_values)
    assert [len(layers) for layers in scores.forwards] == [3, 3]
    for part, rows in zip(scores.forwards, (slice(0, 12), slice(12, 20)), strict=True):
        keys, weights = rows.stop, forgetting_weights(rows.stop - rows.start, 0.9)
        for ours, p in zip(part, matrices, strict=True):
            weighted = p[:, :, rows, :keys] * (weights * LEFT[:, rows])[:, None, :, None]
            close([ours], [weighted.sum(2).unflatten(1, (2, 4)).mean(2)])


def test_bfloat16() -> None:
    model, ids = llama().bfloat16(), prompt()
    with tokencomp.attention_scores(model) as scores:
        model(ids, attention_mask=LEFT)
    for layer in scores.last:
        assert layer.dtype == torch.float32
        rows = LEFT.sum(1)[:, None].expand(2, 8).float()
        torch.testing.assert_close(layer.sum(-1), rows, atol=1e-3, rtol=0)


def test_a_mask_notes_the_padding_of_its_own_rows_and_keys() -> None:
    padded = LEFT[:, :13].bool().clone()
    padded[:, 6] = False
    mask = attention.hf_mask(2, 3, 8, q_offset=10, kv_offset=5, attention_mask=padded)
    note = getattr(mask, attention.PADDING)
    assert torch.equal(note.rows, padded[:, 10:13])
    assert torch.equal(note.keys, padded[:, 5:13])
    moved = attention.hf_mask(2, 3, 8, q_offset=0, attention_mask=LEFT[:, :3].bool())
    assert not hasattr(moved, attention.PADDING)  # rows are not the last keys: a static cache


def test_a_mask_of_another_sequence_notes_nothing() -> None:
    """In cross attention the padding is that of the keys, even where there are as many queries."""
    both_ways = transformers.masking_utils.bidirectional_mask_function
    mask = attention.hf_mask(
        2, 20, 20, mask_function=both_ways, attention_mask=LEFT.bool(), allow_is_causal_skip=False,
        allow_is_bidirectional_skip=True,
    )  # fmt: skip
    assert mask is not None
    assert not hasattr(mask, attention.PADDING)


# ---- models are left as they were --------------------------------------------------------------------------


def test_attention_scores_writes_nothing_into_shared_configurations() -> None:
    model = llama()
    twin = type(model)(model.config).eval()
    assert twin.config is model.config
    before, ids = tiny_models.state(model), prompt()
    plain = twin(ids).logits
    with tokencomp.attention_scores(model) as scores:
        assert model.config._attn_implementation == "tokencomp"
        assert twin.config._attn_implementation == "sdpa"
        assert torch.equal(twin(ids).logits, plain)
        assert scores.forwards == []
        model(ids)
    assert tiny_models.state(model) == before
    assert type(model) is type(twin)
    assert len(scores.forwards) == 1
    model(ids)
    assert len(scores.forwards) == 1


def test_attention_scores_restores_after_exceptions() -> None:
    model = llama()
    before = tiny_models.state(model)
    with pytest.raises(KeyError, match="mine"), tokencomp.attention_scores(model):
        raise KeyError("mine")
    with pytest.raises(ValueError, match="column_weights"), tokencomp.attention_scores(model, torch.ones(3)):
        model(prompt())
    assert tiny_models.state(model) == before
    with tokencomp.attention_scores(model):
        inside = tiny_models.state(model)
        with pytest.raises(ValueError, match="already"), tokencomp.attention_scores(model):
            pass
        assert tiny_models.state(model) == inside
    assert tiny_models.state(model) == before


def test_attention_scores_refuses_what_has_no_attention_to_choose() -> None:
    with (
        pytest.raises(ValueError, match="Linear is not a Hugging Face model"),
        tokencomp.attention_scores(torch.nn.Linear(2, 2)),
    ):
        pass
    with tokencomp.attention_scores(llama()) as scores, pytest.raises(RuntimeError, match="no forward"):
        _ = scores.last


def test_a_model_with_our_attention_copies() -> None:
    model, ids = using(llama(), "tokencomp"), prompt()
    assert torch.equal(copy.deepcopy(model)(ids).logits, model(ids).logits)


# ---- registration ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("tokencomp_flash", "imports flash-attn"),
        ("tokencomp/attention", "kernel of the Hub"),
        ("paged|tokencomp", "kernel of the Hub or a paged one"),
        ("eager", "cannot be registered"),
        ("", "cannot be registered"),
        ("sdpa", "taken by another attention function"),
    ],
)
def test_names_that_are_refused(name: str, why: str) -> None:
    before = dict(AttentionInterface._global_mapping), dict(AttentionMaskInterface._global_mapping)
    with pytest.raises(ValueError, match=f"register_attention: .*{why}"):
        tokencomp.register_attention(name)
    assert before == (AttentionInterface._global_mapping, AttentionMaskInterface._global_mapping)


def test_registering_again_and_under_a_foreign_mask() -> None:
    assert tokencomp.register_attention() == tokencomp.register_attention("tokencomp") == "tokencomp"
    assert AttentionInterface._global_mapping["tokencomp"] is attention.hf_attention
    AttentionMaskInterface.register("theirs", lambda **_: None)
    with pytest.raises(ValueError, match="'theirs' is taken by another mask function"):
        tokencomp.register_attention("theirs")
    assert "theirs" not in AttentionInterface._global_mapping


def test_importing_tokencomp_imports_no_transformers() -> None:
    code = (
        "import sys, tokencomp\n"
        "assert 'transformers' not in sys.modules; sys.modules['transformers'] = None\n"
        "try: tokencomp.register_attention()\n"
        "except ImportError as error: assert 'tokencomp[hf]' in str(error), error\n"
        "else: raise AssertionError"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", ["position_bias", "cache"])
def test_what_is_not_supported_says_so(name: str) -> None:
    q = torch.zeros(1, 2, 3, 4)
    with pytest.raises(ValueError, match="does not support"):
        attention.hf_attention(torch.nn.Identity(), q, q, q, None, **{name: q})


@pytest.mark.parametrize("outputs", [False, True])
def test_compiles_whole_with_a_static_cache(outputs: bool) -> None:
    model, ids = using(llama(), "tokencomp"), prompt()

    def step(ids: Tensor, cache: Any, mask: Tensor) -> Any:
        return model(ids, past_key_values=cache, attention_mask=mask, output_attentions=outputs)

    logits = []
    torch.compiler.reset()
    for run in (step, torch.compile(step, fullgraph=True, backend="eager")):
        cache = transformers.StaticCache(config=model.config, max_cache_len=32)
        mask = torch.nn.functional.pad(LEFT, (0, 12))
        mask[:, 20] = 1
        step(ids, cache, mask)
        output = run(ids[:, :1], cache, mask)
        logits.append((output.logits, *(output.attentions or ())))
    for one, other in zip(*logits, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


# ---- the picture -------------------------------------------------------------------------------------------


def test_importance_map_writes_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="pictures need the extra eval")
    layers = [torch.rand(1, 2, 9) for _ in range(3)]
    path = importance_map(layers, tmp_path / "map.png", marks=[(4, "here")], title="three layers")
    assert path.read_bytes()[1:4] == b"PNG"
    with pytest.raises(ValueError, match="got none"):
        shares([])


def test_shares_of_a_layer_sum_to_one() -> None:
    layers = [torch.tensor([[[1.0, 0.0, 3.0], [1.0, 2.0, 1.0]], [[9.0, 9.0, 9.0], [9.0, 9.0, 9.0]]])]
    torch.testing.assert_close(shares(layers), torch.tensor([[0.25, 0.25, 0.5]]))
