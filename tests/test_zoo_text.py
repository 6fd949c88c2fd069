"""Text of the standard library: what is in it, the split by module, windows by a seed, and their loss."""

import asyncio
import inspect
import math
import pathlib
import sysconfig
import time
from typing import Any

import pytest
import torch
from tokencomp.zoo import recall, text
from torch import Generator, Tensor


def seeded(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def content(split: str) -> str:
    return text.corpus(split).numpy().tobytes().decode()


def test_docstrings_are_in_the_split_of_their_module() -> None:
    """Read from imported objects, not from source: a module, a class, a method and a function."""
    assert text.split_of("pathlib") == "held_out"
    assert text.split_of("asyncio") == text.split_of("inspect") == "train"
    for thing, split in (
        (pathlib.PurePath, "held_out"),
        (pathlib.PurePath.as_posix, "held_out"),
        (inspect, "train"),
        (asyncio.Queue, "train"),  # in a submodule of a package
        (asyncio.Queue.join, "train"),  # an async method
        (inspect.cleandoc, "train"),
    ):
        doc = inspect.getdoc(thing)
        assert doc
        other = text.SPLITS[split == "train"]
        assert doc in content(split)
        assert doc not in content(other)


def test_splits_are_disjoint_and_of_the_stated_size() -> None:
    names = text.module_names()
    assert names == sorted(set(names))
    held_out = [name for name in names if text.split_of(name) == "held_out"]
    assert {text.split_of(name) for name in names} == set(text.SPLITS)
    assert 0.05 < len(held_out) / len(names) < 0.2
    sizes = [len(text.corpus(split)) for split in text.SPLITS]
    assert sum(sizes) > 1_000_000
    assert 0.05 < sizes[1] / sum(sizes) < 0.25
    whole = [text.module_text(name) for name in held_out]
    assert content("held_out") == text.SEPARATOR.join(filter(None, whole))


def test_the_split_does_not_depend_on_the_python_version() -> None:
    """Pinned for names of old and new modules; a change would put training text into the held-out split."""
    held_out = ("pathlib", "typing", "importlib", "http", "urllib", "turtledemo", "encodings")
    train = ("LICENSE", "tkinter", "email", "asyncio", "tomllib", "distutils", "compression")
    assert {text.split_of(name) for name in held_out} == {"held_out"}
    assert {text.split_of(name) for name in train} == {"train"}


def test_tests_of_the_library_are_left_out(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A library of our own: nesting, both kinds of module, a licence, tests, and another encoding."""
    (tmp_path / "ast.py").write_text('"""Module."""\nif x:\n    def f():\n        """In if."""\n')
    (tmp_path / "LICENSE.txt").write_text("  Licence.\n")
    package = tmp_path / "json"
    (package / "tests").mkdir(parents=True)
    (package / "__init__.py").write_text(
        'class C:\n    "Class."\n    async def f(self):\n        "Method."\n        def g(): "Inner."\n'
    )
    (package / "b.py").write_bytes('# coding: latin-1\n"""Caf\xe9."""\n'.encode("latin-1"))
    (package / "tests" / "a.py").write_text('"""A test."""\n')
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    assert text.module_text("ast") == "Module.\n\nIn if."
    assert text.module_text("json") == "Class.\n\nMethod.\n\nInner.\n\nCafé."
    assert text.module_text("LICENSE") == "Licence."
    assert text.module_text("sys") == ""
    (tmp_path / "ast.py").unlink()
    with pytest.raises(RuntimeError, match="no source files of the standard library in"):
        text.module_text("json")


def test_corpus_is_read_once_and_quickly() -> None:
    text.corpus.cache_clear()
    begin = time.process_time()
    first = [text.corpus(split) for split in text.SPLITS]
    assert time.process_time() - begin < 15  # about 3 s; a guard against something quadratic
    assert all(text.corpus(split) is made for split, made in zip(text.SPLITS, first, strict=True))
    assert all(made.dtype == torch.uint8 and made.ndim == 1 for made in first)


def test_windows_are_pieces_of_the_text() -> None:
    for split in text.SPLITS:
        tokens, labels = text.windows(8, 65, seeded(), split)
        assert tokens.shape == labels.shape == (8, 65)
        assert tokens.dtype == labels.dtype == torch.int64
        assert (tokens[:, 0] == recall.BOS).all()
        assert (labels[:, 0] == recall.IGNORE).all()
        assert torch.equal(labels[:, 1:], tokens[:, 1:])
        assert tokens[:, 1:].min() >= recall.BYTES
        assert tokens.max() < recall.VOCABULARY
        whole = text.corpus(split).numpy().tobytes()
        pieces = {bytes((row[1:] - recall.BYTES).tolist()) for row in tokens}
        assert len(pieces) == 8
        assert all(piece in whole for piece in pieces)
    held_out, _ = text.windows(8, 65, seeded())
    assert torch.equal(held_out, tokens)  # the default split


def test_windows_reach_both_ends_of_the_text() -> None:
    everything = len(text.corpus("held_out"))
    tokens, _ = text.windows(2, everything + 1, seeded())
    assert torch.equal(tokens[1, 1:] - recall.BYTES, text.corpus("held_out").long())
    tokens, _ = text.windows(20, everything, seeded())  # starts at 0 or 1
    assert {int(row[1]) - recall.BYTES for row in tokens} == set(text.corpus("held_out")[:2].tolist())


def test_windows_are_functions_of_the_generator() -> None:
    torch.manual_seed(1)
    first = text.windows(4, 64, seeded(3))
    torch.manual_seed(2)
    again, other = text.windows(4, 64, seeded(3)), text.windows(4, 64, seeded(4))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])


@pytest.mark.parametrize(
    ("batch", "length", "split", "message"),
    [
        (1, 64, "test", "split must be one of train, held_out, got 'test'"),
        (0, 64, "train", "batch must be >= 1 .*got 0 and 64"),
        (1, 1, "train", r"length in \[2, \d+\], got 1 and 1$"),
        (1, 1 << 30, "train", r"length in \[2, \d+\], got 1 and 1073741824"),
    ],
)
def test_windows_refuse_what_there_is_not(batch: int, length: int, split: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        text.windows(batch, length, seeded(), split)


def test_loss_is_that_of_the_bytes() -> None:
    """A model that knows nothing pays log(V) for every byte, one that is sure of all but one for that one."""

    def model(logits: Tensor) -> Any:
        return type("Output", (), {"logits": logits})

    def ignorant(input_ids: Tensor, use_cache: bool) -> Any:
        return model(torch.zeros(*input_ids.shape, recall.VOCABULARY))

    def sure(input_ids: Tensor, use_cache: bool) -> Any:
        wanted = torch.roll(input_ids, -1, dims=1)
        logits = torch.nn.functional.one_hot(wanted, recall.VOCABULARY) * 1e3
        logits[:, 4] = 0
        return model(logits.bfloat16())

    nothing = math.log(recall.VOCABULARY)
    assert text.text_loss(ignorant, 64, 3, 5) == pytest.approx(nothing)
    rows = text.row_losses(sure, 64, 3, 5)
    assert rows.tolist() == pytest.approx([nothing / 63] * 3)
    assert text.text_loss(sure, 64, 3, 5) == pytest.approx(nothing / 63)


def test_more_rows_begin_with_the_same_windows() -> None:
    seen: list[Tensor] = []

    def model(input_ids: Tensor, use_cache: bool) -> Any:
        seen.append(input_ids)
        return type("Output", (), {"logits": torch.zeros(*input_ids.shape, recall.VOCABULARY)})

    text.row_losses(model, 32, 2, 7)
    text.row_losses(model, 32, 3, 7)
    assert all(torch.equal(a, b) for a, b in zip(seen[:2], seen[2:4], strict=True))
    text.row_losses(model, 32, 2, 8)
    assert not torch.equal(seen[0], seen[5])
