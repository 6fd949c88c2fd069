"""One forward pass of a compressed encoder: what has become of its tokens so far."""

from typing import Any

import torch
from torch import Tensor

from tokencomp import merged, token_map
from tokencomp.methods.layers import LayerMethod, LayerView, Reduced
from tokencomp.ops import _check

# An additive mask holds 0, or a number at which nothing is left of a key.
_MASKED = -1000.0


class Run:
    """The tokens of one forward pass. Made by the first layer, read by what comes after the last."""

    def __init__(
        self, method: LayerMethod, layers: int, x: Tensor, prefix: int, distill: bool, grid: Any
    ) -> None:
        self.method, self.layers = method, layers
        self.prefix, self.distill = prefix, distill
        batch, tokens = x.shape[:2]
        known = grid is not None and grid[0] * grid[1] == tokens - prefix
        self.grid: tuple[int, int] | None = grid if known else None
        self.tokens = [tokens]
        self.source = token_map.identity(batch, tokens, device=x.device)
        self.sources: list[Tensor | None] = [None]  # after each layer; None: nothing has happened yet
        self.size: Tensor | None = None
        self.mask: Tensor | None = None
        self.bias: Tensor | None = None
        self.reduced = False
        self.state: dict[str, Any] = {}
        self.q: Tensor | None = (
            None  # of the attention that was last computed, until the method has seen them
        )
        self.k: Tensor | None = None
        self.scale = 1.0
        self._rotation: tuple[Tensor, Tensor] | None = None
        method.begin(_rows(x), prefix, self.grid, self.state)

    @property
    def next_layer(self) -> int:
        return len(self.tokens) - 1

    def key_mask(self, given: Tensor | None) -> Tensor | None:
        """The mask that a layer's attention takes: the model's own one as long as nothing was reduced."""
        if self.next_layer == 0 and given is not None:
            self.mask = padding_mask(given, *self.source.shape)
        return self.bias if self.reduced else given

    def rotation(self, given: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor] | None:
        """The rotary tables of the tokens that there are now, from those of all patches."""
        if given is None or not self.reduced:
            return given
        if self._rotation is None:
            self._rotation = merged.merge_rotation(*given, self.source, self.tokens[-1], self.prefix)
        return self._rotation

    def saw(self, q: Tensor, k: Tensor, scale: float | None, v: Tensor | None = None) -> None:
        """Queries and keys ``[B, H, N, D]`` as the attention of the current layer uses them."""
        self.q, self.k = q, k
        self.scale = q.shape[-1] ** -0.5 if scale is None else float(scale)

    def reduce(self, x: Tensor) -> Tensor:
        """Let the method work on ``x`` ``[B, N, C]`` between attention and MLP."""
        if self.q is None or self.k is None:
            raise RuntimeError("compress: the layer's attention did not show its queries and keys")
        view = LayerView(
            layer=self.next_layer,
            layers=self.layers,
            x=_rows(x),
            q=self.q,
            k=self.k,
            scale=self.scale,
            size=self.size,
            source=self.source,
            prefix=self.prefix,
            distill=self.distill,
            grid=self.grid,
            mask=self.mask,
            state=self.state,
        )
        self.q = self.k = None
        reduced = self.method.reduce(view)
        if view.layer == self.layers - 1:
            self.state = {}  # graphs and the like are not held until the next pass
        if reduced is None:
            self.tokens.append(x.shape[1])
            self.sources.append(self.source if self.reduced else None)
            return x
        self._check(x, reduced)
        self._take(reduced)
        return reduced.x

    def _take(self, reduced: Reduced) -> None:
        tokens = reduced.x.shape[1]
        self.source = token_map.compose(self.source, reduced.token_map)
        self.size = reduced.size
        if self.mask is not None:
            self.mask = merged.merge_mask(self.mask, reduced.token_map, tokens)
        self.bias = merged.key_bias(self.size if self.method.proportional else None, self.mask)
        self._rotation = None
        self.reduced = True
        self.tokens.append(tokens)
        self.sources.append(self.source)

    def _check(self, x: Tensor, reduced: Reduced) -> None:
        """Refuse a result that does not fit; the values of the map are looked at where that is free."""
        name = f"{type(self.method).__name__} at layer {self.next_layer}"
        batch, tokens, channels = x.shape
        kept = reduced.x.shape[1]
        shapes = {
            "x": (reduced.x, (batch, kept, channels), x.dtype),
            "token_map": (reduced.token_map, (batch, tokens), torch.int32),
            "size": (reduced.size, (batch, kept), torch.float32),
        }
        for field, (tensor, shape, dtype) in shapes.items():
            if tensor is not None and (tuple(tensor.shape), tensor.dtype) != (shape, dtype):
                raise ValueError(
                    f"{name}: {field} must be {list(shape)} {dtype}, got {list(tensor.shape)} {tensor.dtype}"
                )
        if not self.prefix <= kept <= tokens:
            raise ValueError(f"{name}: must leave {self.prefix} to {tokens} tokens, got {kept}")
        if _check.checked(reduced.token_map):
            self._check_values(name, reduced.token_map, kept)

    def _check_values(self, name: str, found: Tensor, kept: int) -> None:
        if bool(((found < -1) | (found >= kept)).any()):
            raise ValueError(f"{name}: token_map must be in [-1, {kept}), got {found.min()} to {found.max()}")
        place = torch.arange(self.prefix, device=found.device)
        in_place = bool((found[:, : self.prefix] == place).all())
        if not in_place or bool(
            ((found[:, self.prefix :] >= 0) & (found[:, self.prefix :] < self.prefix)).any()
        ):
            raise ValueError(
                f"{name}: the {self.prefix} prefix tokens must stay in place, merged with nothing"
            )


def _rows(x: Tensor) -> Tensor:
    """``x`` with contiguous channels, as operators want it; SigLIP's embeddings leave them strided."""
    return x if x.stride(-1) == 1 else x.contiguous()


def padding_mask(given: Tensor, batch: int, tokens: int) -> Tensor:
    """``[B, N]`` bool, False at padding, from the mask that a model hands to its layers.

    Args:
        given: ``[B, N]``, or ``[B | 1, H | 1, N | 1, N]`` with all queries alike, bool or additive.
        batch: B.
        tokens: N.

    Raises:
        ValueError: another shape, or a mask that differs from query to query (seen on the CPU only): merged
            tokens have no single row or column of it.
    """
    if given.dim() not in (2, 4) or given.shape[-1] != tokens:
        raise ValueError(
            f"compress: attention_mask must be [B, N] or [B, H, N, N] with N={tokens}, "
            f"got {list(given.shape)}"
        )
    allowed = given > _MASKED if given.is_floating_point() else given.bool()
    row = allowed if given.dim() == 2 else allowed[:, 0, 0]
    if (
        given.dim() == 4
        and _check.checked(given)
        and not torch.equal(allowed, row[:, None, None].expand_as(allowed))
    ):
        raise ValueError("compress: attention_mask must be the same for all queries and heads (padding only)")
    return row.expand(batch, tokens)
