"""Visual tokens as serving engines hold them between encoder and language model: embeddings to keep masks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokencomp import methods, ragged
from tokencomp._typed import typed
from tokencomp.methods.visual import VisualMethod, VisualView
from tokencomp.recipes.common import require

LAYERS = 1 << 10  # of the encoder as methods are told: every layer a method may name exists
Grid = tuple[int, int]


class KeptTokens(NamedTuple):
    """What stays of one item."""

    mask: Tensor  # [n] bool
    x: Tensor  # [k, C] the tokens that stay, in order, or what the method made of them


@dataclass(frozen=True)
class GivenEncoder:
    """``methods.visual.Encoder`` of tensors that the caller has, whatever layer is asked for."""

    op: str
    method: str
    given: Mapping[str, Tensor]
    layers: int = LAYERS
    asked: set[int] = field(default_factory=set)

    @property
    def has_cls(self) -> bool:
        """Whether attention of CLS is given."""
        return "cls" in self.given

    def cls(self, layer: int) -> Tensor:
        """``[M, N]``."""
        return self._get("cls" if self.has_cls or "columns" not in self.given else "columns", layer)

    def logits(self, layer: int) -> Tensor:
        """``[M, N]``."""
        return self._get("logits", layer)

    def columns(self, layer: int) -> Tensor:
        """``[M, N]``."""
        return self._get("columns", layer)

    def keys(self, layer: int) -> Tensor:
        """``[M, H, N, D]``."""
        return self._get("keys", layer)

    def features(self) -> Tensor:
        """``[M, N, Cv]``."""
        return self._get("features")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        raise ValueError(
            f"{self.op}: method {self.method} needs {name!r} of the vision encoder, which tensors alone do "
            "not give; use tokencomp.compress on the model"
        )

    def _get(self, name: str, layer: int | None = None) -> Tensor:
        if name not in self.given:
            raise ValueError(
                f"{self.op}: method {self.method} needs encoder={{{name!r}: one tensor an item}}, "
                f"got {sorted(self.given) or None}"
            )
        self.asked.update(() if layer is None else (layer,))
        if len(self.asked) > 1:
            raise ValueError(
                f"{self.op}: method {self.method} looks at several encoder layers, {sorted(self.asked)}; one "
                "was given; use tokencomp.compress on the model"
            )
        return self.given[name]


@typed
def visual_keep_masks(
    embeddings: Sequence[Tensor] | Tensor,
    method: str | VisualMethod = "todre",
    *,
    keep: float | None = None,
    frames: Sequence[int] | None = None,
    grids: Sequence[Grid] | None = None,
    overview: bool = False,
    encoder: Mapping[str, Sequence[Tensor]] | None = None,
    text: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """Which visual tokens of each image or video go into the prompt: embeddings in, keep masks out.

    What vLLM's and SGLang's multimodal paths ask of a selector: a pure function between encoder and language
    model. Every method on visual tokens is one (``python -m tokencomp methods``), as long as it keeps tokens
    as they are; those that look at nothing but embeddings (``todre``, ``divprune``, ``lexrank``, baselines)
    need no more. An item's mask depends on that item alone. Deterministic; ties go to the lower token.

    Args:
        embeddings: an item's tokens ``[n_i, C]`` each, as the projector made them; float32, float16 or
            bfloat16, any strides; n_i may differ and be 0. Or a batch ``[B, n, C]``.
        method: a name, or a method such as ``methods.ToDRE(keep=0.25)``.
        keep: with a name, share in (0, 1] (or count, an int) kept of an item; default: the method's own.
        frames: crops or video frames in each item, raster order one after the other; default 1 each. n_i is a
            multiple.
        grids: rows and columns of each item's frames, for methods that ask for them.
        overview: the first of several crops shows the whole image.
        encoder: what the vision encoder computed, a list with one tensor an item for each of ``cls``
            ``[frames, N]`` (attention of CLS to the patches), ``columns``, ``logits``, ``keys`` ``[frames, H,
            N, D]``, ``features`` ``[frames, N, Cv]``: see ``methods.visual.Encoder``; of the layer the method
            looks at.
        text: embeddings ``[T_i, C]`` of each item's question, for methods that read it.

    Returns:
        A bool mask ``[n_i]`` an item, on the device of its embeddings. Waits for a GPU once or twice for each
        size of items.

    Raises:
        ValueError: a method, shape or list that is not as above; a method that merges tokens (use
            ``visual_tokens``), or needs what was not given.
    """
    op = "visual_keep_masks"
    chosen = _method(op, method, keep)
    kept = _select(op, chosen, list(embeddings), frames, grids, overview, encoder, text)
    if any(merged is not None for _, merged in kept):
        raise ValueError(
            f"{op}: method must keep tokens as they are, got {chosen!r}, which merges: use visual_tokens"
        )
    return [mask for mask, _ in kept]


@typed
def visual_tokens(
    embeddings: Sequence[Tensor] | Tensor,
    method: str | VisualMethod = "todre",
    *,
    keep: float | None = None,
    frames: Sequence[int] | None = None,
    grids: Sequence[Grid] | None = None,
    overview: bool = False,
    encoder: Mapping[str, Sequence[Tensor]] | None = None,
    text: Sequence[Tensor] | None = None,
) -> list[KeptTokens]:
    """Like ``visual_keep_masks``, with the tokens that stay: also of methods that merge others into them.

    The mask says whose places in the prompt, and whose positions, the rows of ``x`` take.
    """
    op = "visual_tokens"
    kept = _select(op, _method(op, method, keep), list(embeddings), frames, grids, overview, encoder, text)
    return [
        KeptTokens(mask, x[mask] if merged is None else merged)
        for (mask, merged), x in zip(kept, embeddings, strict=True)
    ]


def _method(op: str, method: str | VisualMethod, keep: float | None) -> VisualMethod:
    if not isinstance(method, str):
        require(keep is None, op, "keep", "left out where method is an object, which has its own", keep)
        return method
    known = {entry.name: entry.cls for entry in methods.all_methods() if hasattr(entry.cls, "choose")}
    require(method in known, op, "method", f"one of {sorted(known)}", repr(method))
    made: VisualMethod = known[method]() if keep is None else known[method](keep=keep)
    return made


def _select(
    op: str,
    method: VisualMethod,
    embeddings: Sequence[Tensor],
    frames: Sequence[int] | None,
    grids: Sequence[Grid] | None,
    overview: bool,
    encoder: Mapping[str, Sequence[Tensor]] | None,
    text: Sequence[Tensor] | None,
) -> list[tuple[Tensor, Tensor | None]]:
    """Mask ``[n]`` of each item, and ``[k, C]`` what its kept tokens have become, None: what they were."""
    crops = [1] * len(embeddings) if frames is None else list(frames)
    _check(op, embeddings, crops, grids, encoder, text)
    groups: dict[Any, list[int]] = {}  # of items that make one view: frames of the same size
    for i, x in enumerate(embeddings):
        if x.shape[0]:
            grid = None if grids is None else tuple(grids[i])
            groups.setdefault((x.shape[0] // crops[i], grid, x.device), []).append(i)
    out: list[tuple[Tensor, Tensor | None]] = [
        (torch.zeros(x.shape[0], dtype=torch.bool, device=x.device), None) for x in embeddings
    ]
    for (tokens, grid, _), members in groups.items():
        counts = [crops[i] for i in members]
        x = torch.cat([embeddings[i].unflatten(0, (crops[i], tokens)) for i in members])
        given = {name: torch.cat([parts[i] for i in members]) for name, parts in (encoder or {}).items()}
        words, real = _padded([text[i] for i in members]) if text is not None else (None, None)
        view = VisualView(
            x, GivenEncoder(op, type(method).__name__, given), grid=grid, images=counts,
            overview=overview, text=words, text_mask=real,
        )  # fmt: skip
        kept = method.choose(view)
        masks = ragged.kept_mask(kept.index, tokens).split(counts)
        new = [None] * len(members) if kept.x is None else kept.x.split(counts)
        there = (kept.index >= 0).split(counts)
        for i, mask, rows, real_rows in zip(members, masks, new, there, strict=True):
            out[i] = mask.flatten(), None if rows is None else rows[real_rows]
    return out


def _padded(parts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """``[items, T, C]``, zeros behind shorter ones, and where words are."""
    words = torch.nn.utils.rnn.pad_sequence(list(parts), batch_first=True)
    lengths = torch.tensor([part.shape[0] for part in parts], device=words.device)
    return words, torch.arange(words.shape[1], device=words.device) < lengths[:, None]


def _check(
    op: str,
    embeddings: Sequence[Tensor],
    frames: Sequence[int],
    grids: Sequence[Grid] | None,
    encoder: Mapping[str, Sequence[Tensor]] | None,
    text: Sequence[Tensor] | None,
) -> None:
    items = len(embeddings)
    lists: dict[str, Sequence[Any] | None] = {"frames": frames, "grids": grids, "text": text}
    lists |= {f"encoder[{name!r}]": parts for name, parts in (encoder or {}).items()}
    for name, given in lists.items():
        if given is not None:
            require(
                len(given) == items, op, name, f"a list with one entry for each of {items} items", len(given)
            )
    for i, x in enumerate(embeddings):
        same = x.dim() == 2 and x.shape[1] == embeddings[0].shape[-1]
        width = embeddings[0].shape[-1] if embeddings[0].dim() else "C"
        require(same, op, f"embeddings[{i}]", f"[n, C={width}]", list(x.shape))
        require(frames[i] >= 1 and x.shape[0] % frames[i] == 0, op, f"frames[{i}]",
                f">= 1 and a divisor of n={x.shape[0]}", frames[i])  # fmt: skip
        each = (frames[i], x.shape[0] // frames[i])
        if grids is not None:
            product = grids[i][0] * grids[i][1]
            require(product == each[1], op, f"grids[{i}]", f"rows and columns of {each[1]} tokens", grids[i])
        for name, parts in (encoder or {}).items():
            tokens = parts[i].shape[2:3] if name == "keys" else parts[i].shape[1:2]
            fits = tuple(parts[i].shape[:1]) + tuple(tokens) == each
            require(
                fits,
                op,
                f"encoder[{name!r}][{i}]",
                f"of {each[0]} frames and {each[1]} tokens",
                list(parts[i].shape),
            )
        if text is not None:
            require(text[i].dim() == 2 and text[i].shape[1] == x.shape[1], op, f"text[{i}]",
                    f"[T, C={x.shape[1]}]", list(text[i].shape))  # fmt: skip
