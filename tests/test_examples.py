"""The examples run, on models that ship and on a folder of Hugging Face, and draw pictures."""

import runpy
import sys
from pathlib import Path
from typing import Any

import decoders
import pytest
import torch
from backends import ROOT

EXAMPLES = {
    "shrink_kv_cache": (["--questions", "1", "--tokens", "512"], 1),
    "quantize_kv_cache": (["--questions", "1", "--tokens", "512"], 1),
    "long_prompts": (["--questions", "1", "--tokens", "512"], 1),
    "visual_tokens": ([], 3),
    "merge_vit": ([], 2),
}


class Run:
    """Runs an example in this process: importing what it needs takes longer than the rest."""

    def __init__(self, patch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path) -> None:
        self.patch, self.capsys, self.folder = patch, capsys, folder

    def __call__(self, name: str, *given: str) -> str:
        script = ROOT / "examples" / f"{name}.py"
        self.patch.chdir(self.folder)
        self.patch.syspath_prepend(str(script.parent))
        self.patch.setattr("sys.argv", [str(script), *given])
        runpy.run_path(str(script), run_name="__main__")
        return self.capsys.readouterr().out


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    for package in ("transformers", "matplotlib", "PIL", "sklearn"):
        pytest.importorskip(package)
    return Run(monkeypatch, capsys, tmp_path)


def pictures(said: str, folder: Path) -> list[Path]:
    return [folder / line.removeprefix("picture: ") for line in said.splitlines() if "picture: " in line]


def test_every_example_is_here() -> None:
    scripts = {path.stem for path in (ROOT / "examples").glob("*.py")}
    assert scripts == {*EXAMPLES, "shared"}


@pytest.mark.parametrize("name", EXAMPLES)
def test_example(run: Run, name: str, tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    given, count = EXAMPLES[name]
    said = run(name, *given)
    assert "right" in said
    drawn = pictures(said, tmp_path)
    assert len(drawn) == count
    for path in drawn:
        with image.open(path) as picture:
            assert len(picture.convert("RGB").getcolors(1 << 24)) > 20


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in EXAMPLES if "vi" not in name])
def test_example_with_its_own_settings(run: Run, name: str, tmp_path: Path) -> None:
    assert pictures(run(name), tmp_path)


def test_what_is_not_there_is_said_in_one_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match=r"^shrink_kv_cache: .*no/folder/of/models"):
        run("shrink_kv_cache", "--model", "no/folder/of/models")
    with pytest.raises(SystemExit, match=r"^merge_vit: --image "):
        run("merge_vit", "--model", "no/folder/of/models")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(
        SystemExit, match=r"^shrink_kv_cache: zoo needs transformers: pip install 'tokencomp\[hf\]'"
    ):
        run("shrink_kv_cache")


def test_language_model_of_a_folder(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    decoders.decoder(vocab_size=300).save_pretrained(folder)
    _tokenizer().save_pretrained(folder)
    said = run("shrink_kv_cache", "--model", str(folder), "--questions", "1", "--tokens", "300")
    assert "SnapKV: 0 of 1 right" in said
    assert pictures(said, tmp_path)[0].is_file()


def _tokenizer() -> Any:
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    letters = {chr(code): code - 28 for code in range(32, 127)} | {"\n": 99, "<unk>": 0}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(letters, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex("."), "isolated")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def test_image_classifier_of_a_folder(run: Run, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    image = pytest.importorskip("PIL.Image")
    folder = tmp_path / "model"
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        image_size=64,
        patch_size=8,
    )
    transformers.ViTForImageClassification(config).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(
        '{"image_processor_type": "ViTImageProcessor", "size": {"height": 64, "width": 64}}'
    )
    image.radial_gradient("L").convert("RGB").save(tmp_path / "picture.png")
    said = run("merge_vit", "--model", str(folder), "--image", "picture.png")
    assert "LABEL_" in said
    assert len(pictures(said, tmp_path)) == 2
