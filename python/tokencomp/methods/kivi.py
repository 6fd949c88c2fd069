"""KIVI: keys by channel, values by token, the newest tokens as they are (arXiv 2402.02750)."""

from dataclasses import dataclass, field

from tokencomp.methods import base, quantizing
from tokencomp.methods.kv import PageSpec


@base.register("kivi", paper="2402.02750", stage="kv-quant")
@dataclass(frozen=True)
class KIVI(quantizing.Quantizing):
    """2 or 4 bits: grids of 32 tokens of a key channel, and of 32 channels of a value.

    The paper quantizes keys in batches of ``recent`` tokens, of which 0 to ``recent - 1`` are exact, and
    values one by one, of which ``recent`` are. Here both leave the window together, in pages: ``recent`` to
    ``recent + page - 1`` tokens (and ``every`` more between two times) are exact. Groups are cut to a page.
    It has neither sinks nor edges: ``sinks=0, edges=0`` is the paper's.
    """

    bits: int = field(default=2, metadata={"help": "2 (many kv heads) or 4 (grouped-query attention)"})
    group: int = field(default=32, metadata={"help": "tokens of a key's grid, channels of a value's"})

    @property
    def specs(self) -> tuple[PageSpec, ...]:
        """The one."""
        return (quantizing.page_spec(self.bits, k_group=self.group, v_group=self.group),)
