"""The method that evicts nothing: a paged cache and no more."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from tokencomp.methods.kv import Keep, KVView, PageSpec, Side


@dataclass(frozen=True)
class KeepAll:
    """Every token stays. See ``KVMethod`` for the members."""

    needs_logits: bool = False
    needs_lse: bool = False
    queries: int = 0
    rerotates: bool = False
    formats: Sequence[PageSpec] = ()
    rotation: Literal["none", "keys", "both"] = "none"

    @property
    def sides(self) -> Mapping[str, Side]:
        """None."""
        return {}

    def resolve(
        self, tokens: int, layers: int, *, rows: int = 1, slot_bytes: int = 0, page: int = 1
    ) -> tuple[int, ...]:
        """All tokens in every layer."""
        return (tokens,) * layers

    def after_prefill(self, view: KVView) -> Keep | None:
        """All stay."""

    def after_step(self, view: KVView) -> Keep | None:
        """All stay."""

    def evict(self, view: KVView) -> Keep | None:
        """All stay."""
