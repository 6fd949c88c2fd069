"""``PagedKVCache``: pages, rows and methods as a cache of transformers."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer

from tokencomp import ragged
from tokencomp.cache.forward import Forward, Rule, forward_of
from tokencomp.cache.layer import Layer
from tokencomp.cache.memory import LayerMemory, Memory, give_back, of_layer, of_pools
from tokencomp.cache.narrow import Absent, narrowed
from tokencomp.cache.pool import Ints
from tokencomp.cache.sparse import Reader, reorder, to_device
from tokencomp.cache.state import Plan, State


class PagedLayer(CacheLayerMixin):
    """One layer, as transformers sees it. The length it tells is that of all columns seen, as positions and
    masks need it; what it holds is in ``layer.store``.
    """

    is_sliding = False
    is_compileable = False
    supports_early_init = False

    def __init__(self, state: State, layer: Layer, number: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.state, self.layer, self.number = state, layer, number

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        """Whether a rollback leaves no trace: nothing was or will be evicted."""
        return self.layer.idle

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the store is made by the first forward."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Keys and values of a forward; stored here, or by the attention function that is called next."""
        return self.state.update(self, key_states, value_states)

    def get_seq_length(self) -> int:
        """Columns seen, padding and evicted tokens included."""
        return self.state.columns

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        """Width and offset of masks: what ``update`` returns lies at the end of all columns."""
        rows = query_length if isinstance(query_length, int) else query_length.shape[0]
        seen, store = self.state.columns, self.layer.store
        held = seen if self.state.plan.store_only else 0 if store is None else store.size
        return held + rows, seen - held

    def get_max_length(self) -> int:
        """None."""
        return -1

    get_max_cache_shape = get_max_length  # its name before transformers 5.20

    def offload(self) -> None:
        """Refused."""
        raise NotImplementedError("PagedKVCache: pages are not offloaded; use cache.to(device)")

    def prefetch(self) -> None:
        """Refused."""
        self.offload()

    def reset(self) -> None:
        """Forget everything; ``PagedKVCache.reset`` calls this."""
        self.layer.reset()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Sequences become copies of others, sharing pages."""
        self.layer.select(beam_idx)

    batch_select_indices = reorder_cache

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every sequence ``repeats`` times."""
        store = self.layer.store
        if store is not None:
            self.reorder_cache(torch.arange(store.host_lengths.shape[0]).repeat_interleave(repeats))


class PagedKVCache(Cache):
    """A cache whose full-attention layers hold the tokens a method keeps, in pages; sliding and other layers
    are those of transformers.

    Made by ``tokencomp.compress`` where the model makes its own, or by ``handle.new_cache()``. It works with
    the model it was made for, while that is compressed. A forward that fails leaves it as it was before,
    except that layers may have evicted already.

    Args:
        layers: one a layer of the model; those of class ``DynamicLayer`` become pages.
        plan: what to do with them.
    """

    state: State

    def __init__(self, layers: list[Any], plan: Plan) -> None:
        super().__init__(layers=layers)
        self._make(plan)

    def _make(self, plan: Plan) -> None:
        self.state = State(plan)
        places = [i for i, layer in enumerate(self.layers) if type(layer) is DynamicLayer]
        if not places:
            raise ValueError("compress: this model has no full-attention layer whose cache could be paged")
        self.paged: list[PagedLayer] = []
        for i, place in enumerate(places):
            layer = Layer(i, len(places), plan.method, plan.chunks)
            layer.inv_freq, layer.across = plan.inv_freq.get(place), plan.across
            if plan.sparse is not None:
                rotary = plan.rotary.get(place)
                layer.reader = Reader(plan.sparse, i, len(places), self.state.shared, rotary)
            self.paged.append(PagedLayer(self.state, layer, place))
            self.layers[place] = self.paged[-1]

    @classmethod
    def adopt(cls, cache: Any, plan: Plan, config: Any) -> "PagedKVCache":
        """``cache`` as one of ours: an empty ``DynamicCache``, the same object, becomes one.

        Raises ValueError for what cannot.
        """
        if isinstance(cache, PagedKVCache):
            if not plan.fits(cache.state.plan):
                raise ValueError(
                    "compress: this cache was made for another model, method or setting "
                    f"({cache.state.plan.name}); start with a new one"
                )
            cache.state.plan = plan
            return cache
        if type(cache) is not DynamicCache or cache.offloading:
            raise ValueError(
                f"compress: past_key_values must be a PagedKVCache or an empty DynamicCache, got "
                f"{cache!r:.80}; leave cache_implementation unset"
            )
        if cache.get_seq_length() > 0:
            raise ValueError(
                f"compress: this DynamicCache holds {cache.get_seq_length()} tokens stored without "
                "compression; start with an empty one"
            )
        if not cache.layers:
            cache.layers, cache.layer_class_to_replicate = DynamicCache(config=config).layers, None
        cache.__class__ = cls  # type: ignore[assignment]
        assert isinstance(cache, PagedKVCache)
        cache._make(plan)
        return cache

    # ---- a forward ---------------------------------------------------------------------------------------

    @contextmanager
    def forward(
        self, tokens: int, batch: int, mask: Tensor | None, device: torch.device
    ) -> Iterator[Forward]:
        """The context of one forward of ``tokens`` columns, of which ``mask`` ``[B, T]`` names the real ones.

        Raises ValueError for another batch size, MemoryError where a decode step finds no room; then, and
        where the forward fails, the cache is what it was.
        """
        if self.state.columns and len(self.state.seen) != batch:
            raise ValueError(f"PagedKVCache: it holds {len(self.state.seen)} sequences, got {batch}")
        seen = self.state.seen if self.state.columns else np.zeros(batch, np.int32)
        what = forward_of(tokens, batch, self.state.columns, seen, self.state.steps, mask, device)
        if what.step:
            self._reserve(what)
        others = [(layer, dict(vars(layer))) for layer in self.layers if type(layer) is not PagedLayer]
        self.state.current, self.state.pending = what, None
        absent = self.state.absent
        try:
            yield what
            self.state.check_consumed()
        except BaseException:
            self.state.absent = absent
            self._undo(seen, others)
            raise
        finally:
            self.state.current = self.state.pending = None
        if not self.state.columns:
            self.state.prompt = what.seen
        if not what.step:
            give_back([*self.state.pools.values()], [paged.layer for paged in self.paged])
        if what.packing is not None:
            self.state.padding.append((self.state.columns, what.packing.real))
        self.state.seen, self.state.columns, self.state.steps = (
            what.seen,
            self.state.columns + tokens,
            what.number,
        )

    def attend(self, layer: PagedLayer, q: Tensor, k: Tensor, v: Tensor, rule: Rule) -> Tensor:
        """What the attention function of ``layer`` returns, ``[B, Hq, T, Dv]``; stores ``k`` and ``v``."""
        assert self.state.current is not None
        self.state.pending = None
        what = self.state.absent.of_layer(layer.number, self.state.current)
        return layer.layer.forward(q, k, v, what, rule, self.state.pool(layer, k, v))

    def narrow(self, whole: Forward, columns: Tensor, first: int) -> None:
        """From layer ``first`` on, the forward that is going on has no more tokens than ``columns``.

        Later layers number the tokens they get: to them the sequence is shorter. What the cache as a whole
        counts, ``seen`` and columns, stays.

        Args:
            whole: what ``forward`` gave.
            columns: ``[B, W]`` int64 of the forward's columns, ascending, -1 in front of shorter rows;
                subsets of those that earlier calls in this forward left.
            first: layer of the model.

        Raises ValueError in decode steps, or where a layer from there on has no pages.
        """
        later = [paged.number for paged in self.paged if paged.number >= first]
        if whole.step or len(later) != len(self.layers) - first:
            raise ValueError("PagedKVCache: only prompts, in layers that all have pages, get narrower")
        self.state.current, gone = narrowed(whole, columns)
        self.state.absent = self.state.absent.with_gone(later, gone)

    def release(self, numbers: Collection[int], columns: Mapping[int, Tensor], left: Tensor) -> None:
        """After a prompt: layers let go of those of its tokens that are not left.

        Args:
            numbers: of the layers.
            columns: of each ``[B, W]``, the columns of the prompt that it got, ascending, -1 elsewhere.
            left: ``[B, T]`` bool, the columns that stay.
        """
        for paged in self.paged:
            if paged.number in numbers and paged.layer.store is not None:
                index, there, counts = ragged.compact_rows(columns[paged.number] >= 0)
                column = columns[paged.number].gather(1, index.clamp(min=0).long()).clamp(min=0)
                stays = left.gather(1, column) & there
                seen = self.state.absent.seen_by(paged.number, self.state.seen)
                paged.layer.keep_only(stays, seen - counts.cpu().numpy(), seen)

    def mask_of_held(self, mask: Tensor | None, tokens: int) -> Tensor | None:
        """``[B, columns + tokens]`` for attention that is handed all keys: 0 where a row has none.

        Raises ValueError where one mask cannot be right for all layers and heads.
        """
        stores = [paged.layer.store for paged in self.paged if paged.layer.store is not None]
        if not self.state.columns or not stores:
            return mask
        first = stores[0].host_lengths
        if mask is None and tokens == 1 and all((s.host_lengths == s.size).all() for s in stores):
            return None  # the one row sees all that its layer holds
        if any((store.host_lengths != first[:, :1]).any() for store in stores):
            raise ValueError(
                "compress: layers or heads hold different numbers of tokens, and attention='model' has one "
                "mask for all; use attention='paged'"
            )
        held, given = stores[0].size, mask
        every = torch.ones(len(first), self.state.columns + tokens, dtype=torch.bool)
        mask = every if mask is None else mask.clone()
        rows = torch.from_numpy(first[:, :1]).to(mask.device)
        there = torch.arange(held, device=mask.device) >= held - rows
        mask[:, self.state.columns - held : self.state.columns] = there.to(mask.dtype)
        if len(self.paged) < len(self.layers) and given is not None and not torch.equal(mask, given):
            raise ValueError("compress: padding and sliding layers together need attention='paged'")
        return mask

    def _reserve(self, what: Forward) -> None:
        """Find pages for all layers of a decode step before the first one stores anything."""
        grown: int | Ints = what.tokens if what.counts is None else what.counts[:, None]
        wanted: dict[int, int] = {}
        for paged in self.paged:
            store = paged.layer.store
            if store is not None and (store.shared or what.tokens > store.room):
                wanted[id(store.pool)] = wanted.get(id(store.pool), 0) + store.pages_for(grown)
        for pool in self.state.pools.values():
            if id(pool) in wanted:
                pool.reserve(wanted[id(pool)], slack=True)

    def _undo(self, seen: Ints, others: list[tuple[Any, dict[str, Any]]]) -> None:
        for layer, state in others:
            vars(layer).clear()
            vars(layer).update(state)
        for paged in self.paged:
            if self.state.columns:
                paged.layer.crop(self.state.absent.seen_by(paged.number, seen))
            else:
                paged.layer.reset()

    # ---- what transformers calls -------------------------------------------------------------------------

    def reset(self) -> None:
        """Empty, as at first; the pools keep their memory."""
        super().reset()  # type: ignore[no-untyped-call]
        self.state.columns, self.state.steps, self.state.seen = 0, 0, np.zeros(0, np.int32)
        self.state.padding.clear()
        self.state.shared.clear()
        self.state.absent = Absent()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Sequence i becomes a copy of sequence ``beam_idx[i]``; pages are shared until written."""
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]
        self._select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only the sequences ``indices``, a list of numbers or a mask of bools."""
        rows = indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices
        super().batch_select_indices(rows)
        self._select(rows)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every sequence ``repeats`` times; pages are shared until written."""
        super().batch_repeat_interleave(repeats)
        self._select(torch.arange(len(self.state.seen)).repeat_interleave(repeats))

    def _select(self, rows: Tensor) -> None:
        if self.state.columns:
            order = rows.cpu()
            reorder(self.state.shared, rows)
            self.state.seen = self.state.seen[order.numpy()]
            self.state.padding = [(first, real[order.to(real.device)]) for first, real in self.state.padding]
            self.state.absent = self.state.absent.select(order.numpy())

    def crop(self, tokens_to_remove: int) -> None:
        """Let the last ``-tokens_to_remove`` columns go; what was evicted meanwhile does not come back.

        As in the transformers installed, where a number >= 0 may be a length instead.
        """
        from tokencomp.adapters import compat

        count = compat.columns_to_remove(tokens_to_remove, self.state.columns)
        if count > self.state.columns:
            raise ValueError(f"crop: cannot remove {count} of {self.state.columns} columns")
        left = self.state.columns - count
        gone = np.full(len(self.state.seen), count, np.int32)
        kept = []
        for first, real in self.state.padding:
            gone -= (~real[:, max(left - first, 0) :]).sum(1).cpu().numpy().astype(np.int32)
            if first < left:
                kept.append((first, real[:, : left - first]))
        for layer in self.layers:
            if type(layer) is not PagedLayer:
                layer.crop(tokens_to_remove)  # type: ignore[union-attr]
        if count:
            self.state.columns, self.state.seen, self.state.padding = left, self.state.seen - gone, kept
            for paged in self.paged:
                paged.layer.crop(self.state.absent.seen_by(paged.number, self.state.seen))
            self.state.absent = self.state.absent.before(self.state.seen)

    def to(self, device: torch.device | str) -> "PagedKVCache":
        """Move everything to ``device``, in place."""
        target = torch.device(device)
        to_device(self.state.shared, target)
        moved = self.state.move(target)
        for paged in self.paged:
            if paged.layer.store is not None:
                paged.layer.store = paged.layer.store.on(moved[id(paged.layer.store.pool)])
            if paged.layer.reader is not None:
                paged.layer.reader.to(target)
        for layer in self.layers:
            if type(layer) is not PagedLayer:
                for name, value in vars(layer).items():
                    if isinstance(value, Tensor):
                        setattr(layer, name, value.to(target))
        return self

    # ---- what it holds -----------------------------------------------------------------------------------

    def memory(self) -> Memory:
        """Bytes, measured from pools and tensors; ``int()`` of it is what is held allocated."""
        other = 0
        for layer in self.layers:
            if type(layer) is not PagedLayer:
                tensors = [value for value in vars(layer).values() if isinstance(value, Tensor)]
                other += sum(t.numel() * t.element_size() for t in tensors)
        return of_pools(list(self.state.pools.values()), [paged.layer for paged in self.paged], other)

    def layer_memory(self) -> list[LayerMemory]:
        """The same of each paged layer."""
        return [of_layer(paged.layer) for paged in self.paged]
