"""How many tokens each layer merges: one count, a slope, or one count a layer (ToMe, arXiv 2210.09461)."""

from typing import TypeAlias

Rate: TypeAlias = int | tuple[int, float] | list[int]

HELP = "tokens merged per layer: a count, a pair (count, inflection in [-1, 1]) or a list of counts"


def check_rate(method: str, r: Rate) -> None:
    """Raise ValueError unless ``r`` is a count >= 0, a pair (count, inflection) or a list of counts."""
    if isinstance(r, tuple):
        ok = len(r) == 2 and _is_count(r[0]) and isinstance(r[1], int | float) and -1 <= r[1] <= 1
    else:
        ok = all(map(_is_count, r)) if isinstance(r, list) else _is_count(r)
    if not ok:
        raise ValueError(
            f"{method}: r must be a count >= 0, a pair (count, inflection in [-1, 1]) or a list of counts, "
            f"got {r!r}"
        )


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def per_layer(r: Rate, layers: int) -> list[int]:
    """The counts of all ``layers``.

    A count is the same everywhere. A pair ``(r, inflection)`` is a straight line with mean r from
    ``lo = int(r (1 - inflection))`` to ``2 r - lo``, truncated: ``int(lo + l (hi - lo) / (layers - 1))``;
    (r, -1) is the paper's decreasing schedule. The truncation loses tokens: (16, -1) merges 187 in 12 layers,
    16 merges 192. A list is taken as it is, 0 beyond its end.
    """
    if isinstance(r, list):
        return (r + [0] * layers)[:layers]
    if isinstance(r, int) or layers == 1:
        return [r if isinstance(r, int) else r[0]] * layers
    low = int(r[0] * (1.0 - r[1]))
    step = (2 * r[0] - low - low) / (layers - 1)
    return [int(low + step * layer) for layer in range(layers)]


def cap(r: int, tokens: int, prefix: int) -> int:
    """``r`` in [0, floor((tokens - prefix) / 2)]: half of the mergeable tokens at most go in one step."""
    return max(min(r, (tokens - prefix) // 2), 0)
