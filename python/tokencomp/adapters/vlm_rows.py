"""Between crops, which methods know, and packed rows of visual tokens, which models know."""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from tokencomp.adapters.vlm_families import Encoded, Image
from tokencomp.methods.visual import VisualKeep, VisualView

Newlines = Literal["rows", "all", "none"]


class Rows(NamedTuple):
    """The packed rows of an image, or of all images of a prompt, in order."""

    kept: Tensor  # [n] bool, those that go on
    values: Tensor  # [n, C] what all of them have become
    key: Tensor | None  # [n] bool, see ``VisualKeep.key``; None where the method names none


def view_of(encoded: Encoded, images: list[Image], text: Tensor, text_mask: Tensor) -> VisualView:
    """What a method sees of ``images`` of a pass, and the text beside them."""
    crops = [crop for image in images for crop in image.crops]
    whole = crops == list(range(encoded.x.shape[0]))
    encoder: Any = encoded.encoder if whole else _InOrder(encoded.encoder, crops)
    x = encoded.x if whole else encoded.x[crops]
    return VisualView(
        x, encoder, encoded.grid, [len(image.crops) for image in images], encoded.overview,
        [image.tiles for image in images], text, text_mask,
    )  # fmt: skip


class _InOrder:
    """An encoder pass with its crops in another order, or several times (beams)."""

    def __init__(self, encoder: Any, order: list[int]) -> None:
        self._encoder, self._order = encoder, order

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._encoder, name)
        if name not in ("cls", "logits", "columns", "keys", "cls_query", "features", "survivors"):
            return value

        def ordered(*args: Any) -> Any:
            found = value(*args)
            return tuple(t[self._order] for t in found) if isinstance(found, tuple) else found[self._order]

        return ordered


def rows_of(image: Image, keep: VisualKeep, crops: slice, x: Tensor, newlines: Newlines) -> Rows:
    """The rows of ``image``, whose crops are these of ``keep`` and of the tokens ``x`` ``[M, N, C]``."""
    index, x = keep.index[crops], x[crops]
    place = torch.where(index < 0, x.shape[1], index).long()
    kept = _at_source(image, _marked(place, torch.ones_like(place, dtype=torch.bool), x))
    key = None if keep.key is None else _at_source(image, _marked(place, keep.key[crops], x))
    values = image.features
    if keep.x is not None:
        wide = torch.cat([x, x.new_zeros(x.shape[0], 1, x.shape[2])], 1)
        wide = wide.scatter(1, place[..., None].expand(-1, -1, x.shape[2]), keep.x[crops])[:, :-1]
        changed = wide.flatten(0, 1)[image.source.clamp(min=0)]
        values = torch.where((image.source >= 0)[:, None], changed, values)
    return Rows(kept | _newlines(image, kept, x.shape[1], newlines), values, key)


def joined(rows: list[Rows]) -> Rows:
    """Those of all images of a prompt, in order."""
    named = [row.kept.new_zeros(len(row.kept)) if row.key is None else row.key for row in rows]
    key = torch.cat(named) if any(row.key is not None for row in rows) else None
    return Rows(torch.cat([row.kept for row in rows]), torch.cat([row.values for row in rows]), key)


def _marked(place: Tensor, values: Tensor, x: Tensor) -> Tensor:
    """``values`` ``[crops, K]`` bool at their places among the tokens of ``x``, those at N nowhere."""
    empty = torch.zeros(x.shape[0], x.shape[1] + 1, dtype=torch.bool, device=x.device)
    return empty.scatter(1, place, values)[:, :-1]


def _at_source(image: Image, marked: Tensor) -> Tensor:
    """``[n]`` bool: rows whose token is ``marked`` ``[crops, N]``."""
    return marked.flatten()[image.source.clamp(min=0)] & (image.source >= 0)


def _newlines(image: Image, kept: Tensor, tokens: int, newlines: Newlines) -> Tensor:
    """``[n]`` bool: newline rows that stay, given the others that do."""
    newline = image.source < 0
    if newlines == "rows" and bool(newline.any()):
        line = newline.long().cumsum(0) - newline.long()  # the rows before a newline are its line
        if image.tiles != (0, 0):
            overview = (image.source < tokens) & ~newline  # which has none
            line = torch.where(overview, -1, line)
        alive = torch.zeros(int(line.max()) + 2, dtype=torch.bool, device=kept.device)
        alive[line[kept] + 1] = True
        return newline & alive[line + 1]
    return newline if newlines == "all" else torch.zeros_like(newline)
