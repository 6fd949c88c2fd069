"""Fewer patches between the layers of the vision encoder of a vision-language model.

What an ``EncoderMethod`` cuts is really gone from later layers. Behind the encoder its rows are there again,
as zeros, so that a model packs and checks its visual tokens as ever; ``survivors`` says which rows count, and
only those go on.
"""

import functools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tokencomp.adapters.patch import Patches
from tokencomp.adapters.vit_attention import show_attention
from tokencomp.methods.encoder import EncoderMethod, EncoderView


class _Watch:
    """Stands where ``vit_attention`` expects a stack and its run: it keeps what one layer attended with."""

    reduced = False

    def __init__(self) -> None:
        self.seen: list[tuple[Tensor, Tensor, Tensor, float]] = []

    @property
    def run(self) -> "_Watch":
        return self

    def saw(self, query: Tensor, key: Tensor, scaling: float | None, value: Tensor | None = None) -> None:
        assert value is not None
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        self.seen.append((query.detach(), key.detach(), value.detach(), scale))

    def taken(self) -> tuple[Tensor, Tensor, Tensor, float]:
        """``q``, ``k``, ``v`` of all calls side by side; forgets them."""
        parts, scale = list(zip(*self.seen, strict=True)), self.seen[0][3]
        self.seen.clear()
        q, k, v = (torch.cat(tensors, 2) for tensors in parts[:3])
        return q, k, v, scale


@dataclass
class Cut:
    """An encoder with a method between its layers; the base of the two ways encoders hold their patches.

    Attributes:
        tower: the encoder.
        attentions: those of its layers, in order.
        last: the layer whose output becomes the features.
        prefix: tokens in front of the patches of a crop.
        groups: patches of a visual token where they lie side by side, or a function of the number of all that
            names them, ``[N, g]``.
    """

    tower: Any
    attentions: list[nn.Module]
    method: EncoderMethod
    last: int
    prefix: int = 0
    groups: Any = 1
    watches: dict[int, _Watch] = field(default_factory=dict)

    def attach(self, patches: Patches) -> list[Any]:
        """Patch the attention of the layers; returns hooks to remove at the end."""
        layers = layers_of(self.tower, self.attentions)
        self.watches = {number: _Watch() for number in self.method.cuts_after(self.last)}
        for number, watch in self.watches.items():
            show_attention(patches, self.attentions[number], watch)
        hooks = [self.tower.register_forward_pre_hook(self._begin)]
        for number, layer in enumerate(layers):
            hooks += self._hooks(number, layer)
        return hooks + self._behind()

    def survivors(self) -> list[Tensor] | Tensor:
        """The visual tokens that got through the last pass."""
        raise NotImplementedError

    def _begin(self, module: nn.Module, args: Any) -> None:
        raise NotImplementedError

    def _hooks(self, number: int, layer: nn.Module) -> list[Any]:
        raise NotImplementedError

    def _behind(self) -> list[Any]:
        raise NotImplementedError

    def _token_of(self, patches: int, device: torch.device) -> Tensor | None:
        """``[N]`` int64: the visual token of each patch; None where each is one."""
        if isinstance(self.groups, int):
            return None if self.groups == 1 else torch.arange(patches, device=device) // self.groups
        groups: Tensor = self.groups(patches).to(device)
        number = torch.arange(len(groups), device=device)[:, None].expand_as(groups)
        return torch.empty(patches, dtype=torch.long, device=device).scatter(
            0, groups.flatten(), number.flatten()
        )


@dataclass
class Crops:
    """What is left of M crops while an encoder runs."""

    tokens: int  # that each began with
    token: Tensor | None  # [N] int64, of each patch it began with; None: each is one
    kept: Tensor  # [M, left] int64, visual tokens
    patch: Tensor  # [M, n] int64, patches
    scratch: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def all(cls, crops: int, patches: int, token: Tensor | None, device: torch.device) -> "Crops":
        """Nothing is cut yet."""
        tokens = patches if token is None else int(token.max()) + 1
        kept, patch = (torch.arange(n, device=device).expand(crops, -1) for n in (tokens, patches))
        return cls(tokens, token, kept, patch)

    def rank(self) -> Tensor | None:
        """``[M, n]``: the place of each patch's token among those left."""
        if self.token is None:
            return None
        return torch.searchsorted(self.kept.contiguous(), self.token[self.patch])

    def view(self, layer: int, last: int, x: Tensor, seen: Any, prefix: int) -> EncoderView:
        """Behind ``layer``, whose output is ``x`` ``[M, P + n, C]``."""
        q, k, v, scale = seen
        left = self.kept.shape[1]
        return EncoderView(
            layer, last, x, q, k, v, scale, prefix, self.tokens, left, self.rank(), self.scratch
        )

    def cut(self, index: Tensor) -> Tensor:
        """Leaves only the tokens ``index`` ``[M, K]`` of those left; returns ``[M, n']``, their patches among
        those there were.
        """
        rank, index = self.rank(), index.long()
        row = index
        if rank is not None:
            stays = torch.zeros_like(self.kept, dtype=torch.bool).scatter(1, index, True).gather(1, rank)
            row = stays.nonzero()[:, 1].view(len(index), -1)
        self.kept, self.patch = self.kept.gather(1, index), self.patch.gather(1, row)
        return row


@dataclass
class CropCut(Cut):
    """Encoders that hold patches as ``[M, P + N, C]``: CLIP, SigLIP, ViT and InternVL's."""

    crops: Crops | None = None
    steps: list[Tensor | None] = field(default_factory=list)  # [M, n] patches behind each layer

    def survivors(self) -> Tensor:
        """``[M, K]`` int32."""
        assert self.crops is not None
        return self.crops.kept.int()

    def _begin(self, module: nn.Module, args: Any) -> None:
        self.crops, self.steps = None, []

    def _hooks(self, number: int, layer: nn.Module) -> list[Any]:
        return [layer.register_forward_hook(functools.partial(self._after, number))]

    def _behind(self) -> list[Any]:
        return [self.tower.register_forward_hook(self._whole)]

    def _after(self, number: int, module: nn.Module, args: Any, output: Any) -> Any:
        x = output[0] if isinstance(output, tuple) else output
        patches = x.shape[1] - self.prefix
        if self.crops is None:
            token = self._token_of(patches, x.device)
            self.crops = Crops.all(x.shape[0], patches, token, x.device)
        watch, row = self.watches.get(number), None
        if watch is not None:
            view = self.crops.view(number, self.last, x.detach(), watch.taken(), self.prefix)
            with torch.no_grad():
                index = self.method.cut(view)
            row = None if index is None else self.crops.cut(index)
        self.steps.append(self.crops.patch)
        if row is None:
            return None
        front = torch.arange(self.prefix, device=x.device).expand(len(row), -1)
        at = torch.cat([front, row + self.prefix], 1)[..., None].expand(-1, -1, x.shape[2])
        shorter = x.gather(1, at)
        return (shorter, *output[1:]) if isinstance(output, tuple) else shorter

    def _whole(self, module: nn.Module, args: Any, output: Any) -> Any:
        """All rows again in the states a model may take its features from."""
        assert self.crops is not None
        count = len(self.crops.token) if self.crops.token is not None else self.crops.tokens
        output.last_hidden_state = self._spread(output.last_hidden_state, self.steps[-1:], count)
        if output.get("hidden_states") is not None:
            states = output.hidden_states
            output.hidden_states = tuple(
                x
                if x is None or depth == 0
                else self._spread(x, self.steps[max(0, depth - 2) : depth], count)
                for depth, x in enumerate(states)
            )
        return output

    def _spread(self, x: Tensor, steps: list[Tensor | None], count: int) -> Tensor:
        """``x`` in its places among ``prefix + count`` rows, zeros elsewhere.

        ``steps``: where it may be from, since a state is taken before or behind the hook that cuts.
        """
        patches = x.shape[1] - self.prefix
        patch = next((p for p in reversed(steps) if p is not None and p.shape[1] == patches), None)
        if patch is None or patches == count:
            return x
        whole = x.new_zeros(x.shape[0], self.prefix + count, x.shape[2])
        whole[:, : self.prefix] = x[:, : self.prefix]
        at = (patch + self.prefix)[..., None].expand(-1, -1, x.shape[2])
        return whole.scatter(1, at, x[:, self.prefix :])


@dataclass
class PackedCut(Cut):
    """Encoders that hold the patches of all images one behind the other, ``[S, C]``, and attend chunk by
    chunk: Qwen2-VL's and Qwen3-VL's. A chunk, an image or a frame, is cut by itself.
    """

    chunks: list[Crops] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)  # patches each chunk began with
    begun: Any = None  # cu_seqlens of the pass
    cut_yet: bool = False

    def survivors(self) -> list[Tensor]:
        """Of each chunk ``[K]`` int32."""
        return [crop.kept[0].int() for crop in self.chunks]

    def _begin(self, module: nn.Module, args: Any) -> None:
        self.chunks, self.lengths, self.begun, self.cut_yet = [], [], None, False

    def _hooks(self, number: int, layer: nn.Module) -> list[Any]:
        return [
            layer.register_forward_pre_hook(self._before, with_kwargs=True),
            layer.register_forward_hook(functools.partial(self._after, number)),
        ]

    def _behind(self) -> list[Any]:
        mergers = [self.tower.merger, *(getattr(self.tower, "deepstack_merger_list", None) or [])]
        return [merger.register_forward_hook(self._whole) for merger in mergers]

    def _before(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        if self.begun is None:
            self.begun = kwargs["cu_seqlens"]
            self.lengths = self.begun.diff().tolist()
            for n in self.lengths:
                token = self._token_of(n, self.begun.device)
                self.chunks.append(Crops.all(1, n, token, self.begun.device))
        if not self.cut_yet:
            return None
        patch, counts = self._patch(), torch.tensor([0, *(c.patch.shape[1] for c in self.chunks)])
        kwargs = {**kwargs, "cu_seqlens": counts.cumsum(0).to(self.begun)}
        if kwargs.get("max_seqlen") is not None:
            kwargs["max_seqlen"] = counts.max().to(kwargs["max_seqlen"]) if isinstance(
                kwargs["max_seqlen"], Tensor
            ) else int(counts.max())  # fmt: skip
        if kwargs.get("position_embeddings") is not None:
            kwargs["position_embeddings"] = tuple(t[patch] for t in kwargs["position_embeddings"])
        if kwargs.get("rotary_pos_emb") is not None:
            kwargs["rotary_pos_emb"] = kwargs["rotary_pos_emb"][patch]
        return args, kwargs

    def _after(self, number: int, module: nn.Module, args: Any, output: Any) -> Any:
        watch = self.watches.get(number)
        if watch is None:
            return None
        q, k, v, scale = watch.taken()
        sizes = [crop.patch.shape[1] for crop in self.chunks]
        parts = zip(
            self.chunks, output.detach().split(sizes), *(t.split(sizes, 2) for t in (q, k, v)), strict=True
        )
        rows, first = [], 0
        for crop, x, *seen in parts:
            with torch.no_grad():
                index = self.method.cut(crop.view(number, self.last, x[None], (*seen, scale), 0))
            own = torch.arange(len(x), device=x.device) if index is None else crop.cut(index)[0]
            rows.append(own + first)
            first += len(x)
        row = torch.cat(rows)
        if len(row) == len(output):
            return None
        self.cut_yet = True
        return output[row]

    def _patch(self) -> Tensor:
        """``[S']`` int64: the patches left, among all of the pass."""
        first, found = 0, []
        for crop, n in zip(self.chunks, self.lengths, strict=True):
            found.append(crop.patch[0] + first)
            first += n
        return torch.cat(found)

    def _whole(self, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        """A row for every token again, zeros for those that are gone."""
        if not self.cut_yet:
            return None
        token = self._patch().view(-1, self.groups)[:, 0] // self.groups
        whole = output.new_zeros(sum(self.lengths) // self.groups, output.shape[1])
        return whole.index_copy(0, token, output)


def layers_of(tower: nn.Module, attentions: list[nn.Module]) -> list[nn.Module]:
    """The layers of ``tower`` that hold ``attentions``, one each. Raises ValueError where there are none."""
    for module in tower.modules():
        if not isinstance(module, nn.ModuleList) or len(module) != len(attentions):
            continue
        if all(a in set(layer.modules()) for a, layer in zip(attentions, module, strict=True)):
            return list(module)
    raise ValueError(
        f"compress: {type(tower).__name__} must have one list of layers with an attention each to leave "
        "patches out between them"
    )
