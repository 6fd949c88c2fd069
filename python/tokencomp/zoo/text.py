"""Real text that is on any machine: the docstrings and the licence of the Python standard library, as bytes.

Top-level modules are split by a hash of their name into ``train`` and ``held_out`` (about 1/8); the licence
counts as a module ``LICENSE``. The text differs a little from one Python version to the next, the split of a
module does not. Byte b is token ``recall.BYTES + b`` of recall-lm.
"""

import ast
import hashlib
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor

from tokencomp.zoo.recall import BOS, BYTES, IGNORE

SPLITS = ("train", "held_out")
HELD_OUT = 8  # one module in so many
TEST_FOLDERS = {"test", "tests", "idle_test"}
SEPARATOR = "\n\n"


def split_of(module: str) -> str:
    """``train`` or ``held_out``, for any name of a top-level module."""
    return SPLITS[hashlib.sha256(module.encode()).digest()[0] % HELD_OUT == 0]


@lru_cache(maxsize=len(SPLITS))
def corpus(split: str) -> Tensor:
    """All text of a split, ``[bytes]`` uint8 (UTF-8), modules in sorted order. Cached: do not write to it.

    Raises:
        ValueError: unknown split.
        RuntimeError: the standard library has no source files here.
    """
    if split not in SPLITS:
        raise ValueError(f"text: split must be one of {', '.join(SPLITS)}, got {split!r}")
    texts = [module_text(name) for name in module_names() if split_of(name) == split]
    return torch.frombuffer(bytearray(SEPARATOR.join(filter(None, texts)).encode()), dtype=torch.uint8)


def module_names() -> list[str]:
    """Top-level modules of the standard library and ``LICENSE``, sorted."""
    return sorted({*sys.stdlib_module_names, "LICENSE"})


def module_text(name: str) -> str:
    """All docstrings of a top-level module, tests excluded; empty where it has none or is not Python source.

    Raises RuntimeError where the standard library has no source files.
    """
    library = Path(sysconfig.get_paths()["stdlib"])
    if not (library / "ast.py").is_file():
        raise RuntimeError(f"text: no source files of the standard library in {library}")
    if name == "LICENSE":
        return _license(library)
    single = library / f"{name}.py"
    files = [single] if single.is_file() else sorted((library / name).rglob("*.py"))
    kept = (file for file in files if not TEST_FOLDERS & set(file.relative_to(library).parts[:-1]))
    return SEPARATOR.join(text for file in kept for text in _docstrings(ast.parse(file.read_bytes())))


def windows(batch: int, length: int, generator: Generator, split: str = "held_out") -> tuple[Tensor, Tensor]:
    """Pieces of text from random places: ``(tokens, labels)``, both ``[batch, length]`` int64.

    A row is BOS and ``length - 1`` bytes; every byte is labelled.

    Raises ValueError for an unknown split, ``batch < 1``, ``length < 2`` or a length beyond the text.
    """
    text = corpus(split)
    if batch < 1 or not 2 <= length <= len(text) + 1:
        raise ValueError(
            f"windows: batch must be >= 1 and length in [2, {len(text) + 1}], got {batch} and {length}"
        )
    start = torch.randint(0, len(text) - length + 2, (batch, 1), generator=generator)
    tokens = torch.full((batch, length), BOS)
    tokens[:, 1:] = text[start + torch.arange(length - 1)].long() + BYTES
    labels = tokens.clone()
    labels[:, 0] = IGNORE
    return tokens, labels


@torch.no_grad()
def row_losses(
    model: Callable[..., Any], length: int, rows: int, seed: int, split: str = "held_out"
) -> Tensor:
    """Loss of a causal language model on each of ``rows`` windows, nats per byte, ``[rows]`` float64.

    The mean negative log-likelihood of a row's bytes. One row at a time, so that the same seed with more rows
    begins with the same windows.
    """
    generator = Generator().manual_seed(seed)
    losses = []
    for _ in range(rows):
        tokens, labels = windows(1, length, generator, split)
        logits = model(input_ids=tokens, use_cache=False).logits.float()
        losses.append(torch.nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:]).double())
    return torch.stack(losses)


def text_loss(model: Callable[..., Any], length: int, rows: int, seed: int, split: str = "held_out") -> float:
    """Mean of ``row_losses``, nats per byte."""
    return row_losses(model, length, rows, seed, split).mean().item()


def _license(library: Path) -> str:
    """What ``license()`` prints: the first file that there is, beside the library or one folder up."""
    for folder in (library, library.parent):
        for name in ("LICENSE.txt", "LICENSE"):
            if (folder / name).is_file():
                return (folder / name).read_text(encoding="utf-8", errors="replace").strip()
    return ""


def _docstrings(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[str]:
    text = ast.get_docstring(node)
    if text:
        yield text
    yield from _definitions(node.body)


def _definitions(body: Iterable[ast.AST]) -> Iterator[str]:
    """Docstrings of what is defined in these statements, under ``if``, ``try`` and ``with`` too."""
    for node in body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from _docstrings(node)
        else:
            for field in ("body", "orelse", "handlers", "finalbody"):
                inner = getattr(node, field, None)
                if isinstance(inner, list):
                    yield from _definitions(inner)
