"""One layer's cache in plain tensors under a method: the oracle of caches, the bench of methods.

Every token's key and value is a row of a dense tensor, slots are moved one row at a time, attention is a full
matrix; what is quantized is replaced by what would come back (``kv_tiers``). Nothing is fast here.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tokencomp.methods.kv import Keep, KVMethod, KVView, MergeSpec
from tokencomp.reference.kv_tiers import Tiers
from tokencomp.reference.kvquant import hadamard

GARBAGE = 1e3  # what lies beyond a row's length, so that reading it shows
Held = list[list[list[int]]]  # original positions of the slots of each sequence and kv head


@dataclass
class Trace:
    """What became of a run."""

    output: Tensor  # [B, Hq, N, Dv], zeros at padding
    held: list[Held] = field(default_factory=list)  # after each forward
    kinds: list[Held] = field(default_factory=list)  # page types of the same slots
    evicted: list[int] = field(default_factory=list)  # forwards after which something went
    state: dict[str, Tensor] = field(default_factory=dict)  # of the method, at the end
    keys: Tensor | None = None  # [B, Hkv, S, D] as they are at the end
    values: Tensor | None = None


def run_policy(
    method: KVMethod,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    chunks: Sequence[int],
    valid: Tensor | None = None,
    steps: int = 1,
    hold: bool = False,
    give: bool = True,
    layer: int = 0,
    layers: int = 1,
    scale: float | None = None,
    softcap: float | None = None,
    inv_freq: Tensor | None = None,
    page: int = 1,
    dtype: torch.dtype = torch.float64,
) -> Trace:
    """Drive ``method`` over a sequence: chunks of a prompt, then decode steps.

    Quantized pages hold what the reference quantizer, in float32, makes of ``k`` and ``v`` as they are given;
    where the method rotates, both, and the trace's keys and values, are times a Hadamard matrix.

    Args:
        q, k, v: ``[B, Hq, N, D]``, ``[B, Hkv, N, D]`` and ``[B, Hkv, N, Dv]``; rotated already, unless
            ``inv_freq`` is given.
        chunks: sizes of prompts or their chunks; ``-n`` stands for n tokens that are decoded before the next
            one. The columns left over are decoded.
        valid: ``[B, N]`` bool, False at padding; in each chunk a sequence's tokens are consecutive.
        steps: tokens of a decode step.
        hold: chunks but the last are shown with ``more``; otherwise each may be evicted from.
        give: show ``lse`` and ``logits`` where the method asks for them; otherwise it has to compute them.
        inv_freq: ``[D / 2]``; rotates halves, by original positions or, where the method rerotates, by slots.
        dtype: of the attention.

    Raises:
        ValueError: chunks longer than N; a ``Keep`` that does not name slots in use in ascending order, or
            merges while some are quantized; ``inv_freq`` with a method that quantizes.
    """
    q, k, v = _rotated(method, q, k, v, inv_freq)
    if sum(map(abs, chunks)) > q.shape[2]:
        raise ValueError(f"run_policy: chunks must add up to N={q.shape[2]} at most, got {list(chunks)}")
    cache = _Cache(method, q, k, v, inv_freq, page)
    trace = Trace(torch.zeros(*q.shape[:3], v.shape[3], dtype=dtype))
    ok = torch.ones(q.shape[0], q.shape[2], dtype=torch.bool) if valid is None else valid
    step = 0
    forwards = list(_forwards(chunks, q.shape[2], steps))
    for number, (begin, end, is_step) in enumerate(forwards):
        part = slice(begin, end)
        cache.append(k[:, :, part], v[:, :, part], ok[:, part])
        step += is_step
        rotated = cache.rotated_queries(q[:, :, part], ok[:, part])
        out, lse, logits = cache.attend(rotated.to(dtype), ok[:, part], scale, softcap, dtype)
        trace.output[:, :, part] = out
        wants_lse = give and (method.needs_logits if is_step else method.needs_lse)
        ragged = valid is not None and not is_step
        view = KVView(
            layer=layer,
            layers=layers,
            lengths=cache.lengths.int(),
            size=int(cache.lengths.max()),
            position=cache.position.clone(),
            seen=cache.seen.tolist(),
            step=step,
            q=rotated,
            scale=q.shape[3] ** -0.5 if scale is None else scale,
            keys=cache.shown_keys,
            values=cache.values.clone,
            lse=lse.float() if wants_lse else None,
            logits=logits.float() if wants_lse and is_step else None,
            softcap=softcap,
            starts=ok[:, part].int().argmax(1).int() if ragged else None,
            counts=ok[:, part].sum(1).int() if ragged else None,
            state=cache.state,
            scratch=cache.scratch,
            more=hold and not is_step and not all(later[2] for later in forwards[number + 1 : number + 2]),
            page=page,
            slot_bytes=(k.shape[3] + v.shape[3]) * k.element_size(),
            kind=cache.tiers.kind.clone if method.formats else None,
        )
        keep = method.after_step(view) if is_step else method.after_prefill(view)
        if keep is not None:
            trace.evicted.append(len(trace.held))
            cache.compact(keep)
        trace.held.append(cache.held(cache.position))
        trace.kinds.append(cache.held(cache.tiers.kind))
    trace.state, trace.keys, trace.values = cache.state, cache.shown_keys(), cache.values
    if method.rotation == "both":
        trace.output = hadamard(trace.output, dtype=dtype)
    return trace


def _rotated(
    method: KVMethod, q: Tensor, k: Tensor, v: Tensor, inv_freq: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    if method.formats and inv_freq is not None:
        raise ValueError("run_policy: a method that quantizes takes keys that are rotated already")
    if method.rotation != "none":
        q, k = (hadamard(x, dtype=torch.float32).to(x.dtype) for x in (q, k))
    return q, k, hadamard(v, dtype=torch.float32).to(v.dtype) if method.rotation == "both" else v


def merge_row(k: Tensor, v: Tensor, index: Tensor, merge: MergeSpec, b: int, h: int) -> None:
    """Mix members of row (b, h) into kept slots of its ``k`` and ``v`` ``[S, D]``, in place."""
    member, target = merge.member[b, h].long(), merge.target[b, h]
    old_k, old_v = k.clone(), v.clone()
    for rank, slot in enumerate(index.tolist()):
        here = (target == rank) & (member >= 0)
        if slot < 0 or not here.any():
            continue
        w, a, i = merge.weight[b, h, here].to(k.dtype), merge.center[b, h, rank].to(k.dtype), member[here]
        if merge.values == "sum":
            v[slot] = old_v[slot] + w @ old_v[i]
        elif a + w.sum() > 0:
            v[slot] = _mean(a, old_v[slot], w, old_v[i])
        if merge.keys != "keep" and a + w.sum() > 0:
            k[slot] = _mean(a, old_k[slot], w, old_k[i])
        if merge.keys == "direction" and a + w.sum() > 0:
            unit = torch.nn.functional.normalize(old_k, dim=-1)
            norm = old_k.norm(dim=-1)
            k[slot] = _mean(a, unit[slot], w, unit[i]) * _mean(a, norm[slot], w, norm[i])


def _mean(a: Tensor, center: Tensor, w: Tensor, members: Tensor) -> Tensor:
    return (a * center + w @ members) / (a + w.sum())


def _forwards(chunks: Sequence[int], total: int, steps: int) -> Iterator[tuple[int, int, bool]]:
    begin = 0
    for size in [*chunks, sum(map(abs, chunks)) - total]:
        end = begin + abs(size)
        stride = size if size > 0 else steps
        for first in range(begin, end, stride):
            yield first, min(first + stride, end), size < 0
        begin = end


class _Cache:
    def __init__(
        self, method: KVMethod, q: Tensor, k: Tensor, v: Tensor, inv_freq: Tensor | None, page: int
    ) -> None:
        batch, heads, total = k.shape[:3]
        width = total + 3  # wider than ever needed, so that width and size differ
        self.method, self.inv_freq = method, inv_freq
        self.keys = torch.full((batch, heads, width, k.shape[3]), GARBAGE, dtype=k.dtype)
        self.values = torch.full((batch, heads, width, v.shape[3]), GARBAGE, dtype=v.dtype)
        self.position = torch.full((batch, heads, width), -1, dtype=torch.int32)
        self.lengths = torch.zeros(batch, heads, dtype=torch.long)
        self.seen = torch.zeros(batch, dtype=torch.long)
        self.sides = method.sides
        self.state = {
            name: torch.full((batch, heads, width), side.fill, dtype=side.dtype)
            for name, side in self.sides.items()
        }
        self.scratch: dict[str, Any] = {}
        self.tiers = Tiers(method.formats, (batch, heads, width), page)

    def rows(self) -> Iterator[tuple[int, int, int]]:
        for b in range(self.lengths.shape[0]):
            for h in range(self.lengths.shape[1]):
                yield b, h, int(self.lengths[b, h])

    def append(self, k: Tensor, v: Tensor, valid: Tensor) -> None:
        for b, h, length in self.rows():
            n = int(valid[b].sum())
            place = slice(length, length + n)
            self.keys[b, h, place], self.values[b, h, place] = k[b, h, valid[b]], v[b, h, valid[b]]
            self.position[b, h, place] = torch.arange(int(self.seen[b]), int(self.seen[b]) + n).int()
        self.lengths += valid.sum(1, keepdim=True)
        self.seen += valid.sum(1)

    def rotated_queries(self, q: Tensor, valid: Tensor) -> Tensor:
        if self.inv_freq is None:
            return q
        older = valid.flip(1).cumsum(1).flip(1)  # of row t: tokens of this forward from it on
        last = self.lengths[:, 0] if self.method.rerotates else self.seen
        return _rotate(q, (last[:, None] - older)[:, None], self.inv_freq)

    def shown_keys(self) -> Tensor:
        if self.inv_freq is None:
            return self.keys.clone()
        slot = torch.arange(self.keys.shape[2]).expand(self.position.shape)
        return _rotate(self.keys, slot if self.method.rerotates else self.position, self.inv_freq)

    def attend(
        self, q: Tensor, valid: Tensor, scale: float | None, softcap: float | None, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor]:
        group = q.shape[1] // self.lengths.shape[1]
        k = self.shown_keys().to(dtype).repeat_interleave(group, 1)
        logits = q @ k.mT * (q.shape[3] ** -0.5 if scale is None else scale)
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        later = valid.flip(1).cumsum(1).flip(1) - 1  # tokens of this forward after row t
        end = (self.lengths[:, :, None] - later[:, None]).repeat_interleave(group, 1)
        end = torch.where(valid[:, None], end, 0)
        logits = logits.masked_fill(torch.arange(k.shape[2]) >= end[..., None], -torch.inf)
        lse = logits.logsumexp(-1)
        p = torch.where(lse.isfinite()[..., None], (logits - lse[..., None]).exp(), 0.0)
        return p @ self.values.to(dtype).repeat_interleave(group, 1), lse, logits

    def compact(self, keep: Keep) -> None:
        for b, h, length in self.rows():
            index = keep.index[b, h]
            count = int(keep.count[b, h])
            kept = index[:count].long()
            if not (index[count:] == -1).all() or not (kept.diff() > 0).all() or (kept >= length).any():
                raise ValueError(f"run_policy: Keep must name slots in ascending order, then -1, got {index}")
            if keep.merge is not None:
                if self.tiers.kind[b, h].any():
                    raise ValueError("run_policy: Keep must not merge while slots are quantized")
                merge_row(self.keys[b, h], self.values[b, h], index, keep.merge, b, h)
            kept = self.tiers.quantize(self.keys[b, h], self.values[b, h], self.position[b, h], keep, b, h)
            for t, fill in self._arrays():
                taken = t[b, h, kept].clone()
                t[b, h] = fill
                t[b, h, : len(kept)] = taken
            self.lengths[b, h] = len(kept)

    def _arrays(self) -> Iterator[tuple[Tensor, float]]:
        yield from ((self.keys, GARBAGE), (self.values, GARBAGE), (self.position, -1))
        yield from ((self.tiers.kind, 0), (self.tiers.number, -1))
        yield from ((self.state[name], side.fill) for name, side in self.sides.items())

    def held(self, side: Tensor) -> Held:
        batch, heads = self.lengths.shape
        return [[side[b, h, : int(self.lengths[b, h])].tolist() for h in range(heads)] for b in range(batch)]


def _rotate(x: Tensor, position: Tensor, inv_freq: Tensor) -> Tensor:
    """Rotary embedding of halves of ``x`` ``[B, H, T, D]`` at ``position`` ``[B, H or 1, T]``."""
    angle = position[..., None].double() * inv_freq.double()
    cos, sin = angle.cos(), angle.sin()
    a, b = x.double().chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)
