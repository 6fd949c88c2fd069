"""LazyEviction: tokens whose attention recurs are not evicted too early (arXiv 2506.15969)."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from tokencomp import recipes
from tokencomp.methods import base, eviction, kv_attention
from tokencomp.methods.kv import KVView, Side
from tokencomp.recipes.common import require


@base.register("lazy_eviction", paper="2506.15969", stage="kv")
@dataclass(frozen=True)
class LazyEviction(eviction.Eviction):
    """Evicts every W decode steps by when a slot was last attended to and how often that recurs.

    A slot is active where a query head gives it ``alpha`` or more; the official code tracks query heads
    apart, we kv heads by the strongest of the group. ``every`` is the window W, whose tokens always stay.
    Nothing is evicted at the end of a prompt, whose tokens later compete like all others: a row may hold the
    prompt and ``every``, or the budget and ``every - 1`` slots. ``alpha`` is absolute: suit it to the length.
    """

    every: int = field(default=64, metadata={"help": "steps between evictions; as many last slots stay"})
    alpha: float = field(default=5e-4, metadata={"help": "attention from which a slot is active"})
    form: Literal["code", "paper"] = field(default="code", metadata={"help": "of the importance"})

    def __post_init__(self) -> None:
        require(self.every >= 1, "LazyEviction", "every", ">= 1", self.every)
        require(self.alpha > 0, "LazyEviction", "alpha", "> 0", self.alpha)
        require(self.form in ("code", "paper"), "LazyEviction", "form", "'code' or 'paper'", repr(self.form))
        super().__post_init__()

    @property
    def needs_logits(self) -> bool:
        """Of every step."""
        return True

    @property
    def queries(self) -> int:
        """How many there are, and where logits are not given what they are."""
        return 1

    @property
    def sides(self) -> Mapping[str, Side]:
        """Step of the last activation, largest interval between two."""
        return {"last": Side(torch.int32, 0), "interval": Side(torch.int32, 0)}

    @property
    def evicts_prompts(self) -> bool:
        """Never."""
        return False

    def protected(self, slots: int) -> tuple[int, int]:
        """The window."""
        return 0, self.every

    def record_prompt(self, view: KVView) -> None:
        """A prompt's tokens were last active now."""
        _start_(view, view.q.shape[2] if view.counts is None else view.counts[:, None, None], view.step)

    def record_step(self, view: KVView) -> None:
        """Moves the clocks of the slots this step is active at; the new one starts a step before."""
        _start_(view, view.q.shape[2], view.step - 1)
        unused = torch.zeros(view.state["last"].shape, device=view.q.device)
        clocks: dict[str, Any] = {"last": view.state["last"], "interval": view.state["interval"]}
        kv_attention.accumulate_step_(
            view, unused, heads="kv_max", step=view.step, alpha=self.alpha, **clocks
        )

    def score(self, view: KVView) -> Tensor:
        """``recipes.recurrence_importance``; exactly 0 where never active."""
        last, interval = view.state["last"], view.state["interval"]
        return recipes.recurrence_importance(last, interval, view.step, form=self.form)


def _start_(view: KVView, new: int | Tensor, step: int) -> None:
    """Clocks of the ``new`` last slots of each row."""
    slot = torch.arange(view.state["last"].shape[2], device=view.lengths.device)
    end = view.lengths[..., None]
    fresh = (slot < end) & (slot >= end - new)
    view.state["last"].masked_fill_(fresh, step)
    view.state["interval"].masked_fill_(fresh, 0)
