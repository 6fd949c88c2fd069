"""What fits: bytes of weights and caches of a model, from the constants of the code that allocates them.

``shapes.find`` reads a model's sizes, ``cache_bytes.paged`` says what a ``PagedKVCache`` of a method holds,
``plan.make`` compares; ``python -m tokencomp plan`` prints that.
"""

from tokencomp.planning import command
from tokencomp.planning.cache_bytes import Bytes, models_own, paged
from tokencomp.planning.plan import CHOICES, Choice, Line, Plan, Request, evicting, make
from tokencomp.planning.shapes import NAMED, Shape, find

__all__ = [
    "CHOICES",
    "NAMED",
    "Bytes",
    "Choice",
    "Line",
    "Plan",
    "Request",
    "Shape",
    "command",
    "evicting",
    "find",
    "make",
    "models_own",
    "paged",
]
