"""What a plan says against what caches hold."""

import argparse
import json
from pathlib import Path
from typing import Any

import decoders
import pytest
import tokencomp
import torch
from tokencomp import cli, methods, planning
from tokencomp.planning import Request, Shape, cache_bytes, plan, shapes

STEPS = 40
LAYERS, HEADS, KV_HEADS, DIM = 6, 8, 4, 64  # two layers at each end have other tiers
TINY = Shape("tiny", 0, LAYERS, HEADS, KV_HEADS, DIM, 64, 4096)

METHODS = {
    "int8": methods.Uniform(bits=8),
    "int4, short window": methods.Uniform(bits=4, recent=32),
    "int2": methods.Uniform(bits=2),
    "kivi": methods.KIVI(2),
    "tiered": methods.Tiered(methods.KeyDiff(1.0)),
    "tiered, short window": methods.Tiered(methods.KeyDiff(1.0), recent=32, sinks=2),
    "slots": methods.SnapKV(budget=128),
    "share": methods.SnapKV(budget=0.5),
    "evicting in decode": methods.StreamingLLM(budget=64, every=8),
}


@pytest.fixture(scope="module")
def model() -> Any:
    return decoders.decoder(
        num_hidden_layers=LAYERS, num_attention_heads=HEADS, num_key_value_heads=KV_HEADS,
        hidden_size=HEADS * DIM, intermediate_size=64, max_position_embeddings=4096,
    ).bfloat16()  # fmt: skip


def forward(model: Any, cache: Any, tokens: int, batch: int) -> None:
    with torch.no_grad():
        model(input_ids=decoders.prompt(batch, tokens), past_key_values=cache, logits_to_keep=1)


@pytest.mark.parametrize("page", [16, 64])
@pytest.mark.parametrize("name", METHODS)
def test_bytes_are_those_of_a_cache(model: Any, name: str, page: int) -> None:
    prompt, batch = 400, 2
    said = cache_bytes.paged(TINY, METHODS[name], prompt, STEPS, batch, torch.bfloat16, page=page)
    with tokencomp.compress(model, METHODS[name], page=page) as handle:
        cache = handle.new_cache()
        forward(model, cache, prompt, batch)
        held = cache.memory()
        assert (held.used, held.capacity, held.side, held.other) == (said.pages, said.pages, said.side, 0)
        assert held.bits == pytest.approx(said.bits, abs=1e-9)
        most = 0
        for _ in range(STEPS):
            forward(model, cache, 1, batch)
            most = max(most, cache.memory().held)
    assert most <= said.most
    assert said.most <= 4 * most  # pages half full weigh most in prompts as short as this


@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 1000])
def test_bytes_of_prompts_of_any_length(model: Any, tokens: int) -> None:
    for method in (METHODS["int4, short window"], METHODS["tiered"]):
        said = cache_bytes.paged(TINY, method, tokens, 0, 1, torch.bfloat16, page=32)
        with tokencomp.compress(model, method, page=32) as handle:
            forward(model, cache := handle.new_cache(), tokens, 1)
            held = cache.memory()
        assert (held.capacity, held.side) == (said.pages, said.side)
        assert said.most == said.held == held.held


def test_prompts_in_chunks_stay_below_the_most(model: Any) -> None:
    for method in (METHODS["int4, short window"], METHODS["slots"]):
        said = cache_bytes.paged(TINY, method, 512, 8, 1, torch.bfloat16, page=32, chunk=128)
        with tokencomp.compress(model, method, page=32) as handle:
            cache, most = handle.new_cache(), 0
            for tokens in (128, 128, 128, 128, *(8 * [1])):
                forward(model, cache, tokens, 1)
                most = max(most, cache.memory().held)
        assert most <= said.most


def test_sliding_layers_and_the_models_own_cache() -> None:
    model = decoders.decoder("gemma3", sliding_window=64).bfloat16()
    shape = shapes._of_config(pytest.importorskip("transformers"), "gemma3", model.config)
    assert (shape.layers, shape.sliding, shape.window, shape.head_dim) == (1, 2, 64, 16)
    with tokencomp.compress(model, METHODS["int8"], page=32) as handle:
        forward(model, cache := handle.new_cache(), 300, 2)
        held = cache.memory()
    said = cache_bytes.paged(shape, METHODS["int8"], 300, 0, 2, torch.bfloat16, page=32)
    assert (held.capacity, held.side) == (said.pages, said.side)
    assert 0 <= held.other - said.other <= 8 * shape.sliding  # such a layer may count tokens in a tensor
    own = model(input_ids=decoders.prompt(2, 300), use_cache=True).past_key_values
    bytes_held = sum(t.nbytes for layer in own.layers for t in (layer.keys, layer.values))
    said = planning.models_own(shape, 300, 0, 2, torch.bfloat16)
    assert said.held == said.pages + said.other == bytes_held


# --- shapes -------------------------------------------------------------------------------------------------


def test_shapes_from_folders_and_configurations(model: Any, tmp_path: Path) -> None:
    model.config.save_pretrained(tmp_path)
    counted = shapes.find(str(tmp_path / "config.json"))
    assert counted.parameters == sum(p.numel() for p in model.parameters())
    assert (counted.layers, counted.heads, counted.kv_heads, counted.head_dim) == (
        LAYERS,
        HEADS,
        KV_HEADS,
        DIM,
    )
    model.save_pretrained(tmp_path)
    measured = shapes.find(str(tmp_path))
    assert measured.weight_bytes(torch.bfloat16) == counted.weight_bytes(torch.bfloat16)


def test_quantized_weights_are_measured_or_asked_for(tmp_path: Path) -> None:
    config = {"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4}
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**config, "quantization_config": {"quant_method": "awq"}}))
    with pytest.raises(ValueError, match=r"weights .* are quantized .* --weights"):
        shapes.find(str(path))
    tensors = pytest.importorskip("safetensors.torch")
    tensors.save_file(
        {"a": torch.zeros(8, 8, dtype=torch.int32), "b": torch.zeros(8, dtype=torch.half)},
        tmp_path / "model.safetensors",
    )
    found = shapes.find(str(tmp_path))
    assert (found.parameters, found.fixed_bytes) == (8, 256)


def test_names() -> None:
    llama = shapes.find("meta-llama/Meta-Llama-3.1-8B-Instruct")
    assert llama is planning.NAMED["llama-3.1-8b"]
    assert llama.weight_bytes(torch.bfloat16) == 16_060_522_496
    with pytest.raises(ValueError, match=r"did you mean llama-3.1-8b"):
        shapes.find("llama-3.1-8bb")
    with pytest.raises(ValueError, match="it has no model_type"):
        shapes.find(_written({}))


def _written(config: dict[str, Any]) -> str:
    import tempfile

    with tempfile.NamedTemporaryFile("w", suffix=".json", delete=False) as file:
        json.dump(config, file)
    return file.name


# --- plans --------------------------------------------------------------------------------------------------

LLAMA = planning.NAMED["llama-3.1-8b"]


def asked(**options: Any) -> Request:
    return Request(**{"shape": LLAMA, "context": 32768, "memory": 24 * 10**9, **options})


def test_what_fits_is_the_first_that_does() -> None:
    found = planning.make(asked())
    assert found.best is not None
    assert found.best.choice.name == "int8" or found.best.choice.name == "the model's own"
    assert [line.need <= 24 * 10**9 for line in found.lines] == [line.fits for line in found.lines]
    roomy = planning.make(asked(memory=80 * 10**9))
    assert roomy.best is not None
    assert (roomy.best.choice.method, roomy.code) == (None, "")


def test_longest_context_fits_and_one_more_does_not() -> None:
    found = planning.make(asked(context=8192))
    for line in found.lines:
        assert plan._fits(asked(context=line.longest), line.choice.method)
        assert not plan._fits(asked(context=line.longest + 1), line.choice.method)
    longest = [
        line.longest
        for line in found.lines
        if line.choice.name in ("the model's own", "int8", "int4", "int2")
    ]
    assert longest == sorted(longest)


def test_where_shares_do_not_fit_a_number_of_slots_does() -> None:
    found = planning.make(asked(context=1 << 20, memory=18 * 10**9, chunk=4096))
    assert found.best is found.lines[-1]
    assert found.best.choice.method.budget % 64 == 0
    more = planning.make(
        asked(context=1 << 20, memory=18 * 10**9, chunk=4096), [found.best.choice.method.budget + 64]
    )
    assert not more.lines[-1].fits


def test_the_call_is_one_that_works(model: Any) -> None:
    request = Request(TINY, 1520, 9 * 10**6, new=20, page=32, reserve=0, weights=1)
    found = planning.make(request)
    assert found.code.startswith("tokencomp.compress(model, tokencomp.methods.")
    with eval(found.code, {"tokencomp": tokencomp, "model": model}) as handle:
        said = model.generate(decoders.prompt(1, 1500), max_new_tokens=20, do_sample=False, pad_token_id=0)
        assert said.shape == (1, 1520)
        assert handle.cache.memory().held <= found.best.bytes.most


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": 0}, r"plan: --context must be >= 1, got 0"),
        ({"context": 100}, r"plan: --new must be in \[0, context=100\), got 256"),
        ({"chunk": 0}, r"plan: --chunk must be >= 1, got 0"),
    ],
)
def test_requests_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        asked(**options)


# --- the command --------------------------------------------------------------------------------------------


def command(*options: str) -> int:
    return cli.main(["plan", "--model", "llama-3.1-8b", "--context", "131072", *options])


def test_command_prints_a_table_and_the_call(capsys: pytest.CaptureFixture[str]) -> None:
    assert command("--memory", "40GB", "--chunk", "8192") == 0
    said = capsys.readouterr().out
    assert "llama-3.1-8b: weights 16.06 GB; 1 x 131,072 tokens each, 256 of them generated" in said
    assert said.count("  yes") >= 1
    assert "\x1b" not in said


def test_command_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert command("--memory", "30GB", "--json", "--chunk", "8192", "--budgets", "1024, 4096") == 0
    said = json.loads(capsys.readouterr().out)
    assert [choice["name"] for choice in said["choices"]][-2:] == ["1024 tokens", "4096 tokens"]
    best = next(choice for choice in said["choices"] if choice["fits"])
    assert said["best"] == best["name"]
    assert best["need"] == said["weights"] + said["reserve"] + max(
        best["after_prompt"] + said["activations"], best["most"]
    )


def test_command_where_nothing_fits(capsys: pytest.CaptureFixture[str]) -> None:
    assert command("--memory", "16GB") == 1
    assert "The weights alone leave no room." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--memory", "lots"), "plan: --memory must look like 24GB, 16GiB or 300MB, got 'lots'"),
        (
            ("--memory", "24GB", "--budgets", "1,x"),
            "plan: --budgets must be counts separated by commas, got '1,x'",
        ),
        (("--memory", "24GB", "--budgets", "8"), "SnapKV: budget must be >= 32 slots"),
        (("--memory", "24GB", "--model", "nonsense"), "plan: --model must be a name, a config.json"),
    ],
)
def test_command_says_what_is_wrong(
    options: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(*options) == 2
    assert message in capsys.readouterr().err


def test_all_options_have_help() -> None:
    parser = argparse.ArgumentParser()
    planning.command.add_arguments(parser)
    assert all(action.help for action in parser._actions)
