"""Quality, bytes and times of compressed models, beside the baselines every method has to beat.

``model, tasks = zoo.load("recall-lm"); eval.evaluate(model, tasks["recall"], ["ends"]).print()``, or
``python -m tokencomp eval --model recall-lm``. ``register`` adds a compressor. Plots need matplotlib and
tables rich: ``pip install 'tokencomp[eval]'``.
"""

from tokencomp.eval import baselines, encoders, kv, visual  # noqa: F401  (they register theirs)
from tokencomp.eval.compressors import Compressor, Handle, Report, known, register
from tokencomp.eval.run import BUDGETS, evaluate
from tokencomp.eval.statistics import Bootstrap, Estimate
from tokencomp.eval.table import Row, Table

__all__ = [
    "BUDGETS",
    "Bootstrap",
    "Compressor",
    "Estimate",
    "Handle",
    "Report",
    "Row",
    "Table",
    "evaluate",
    "known",
    "register",
]
