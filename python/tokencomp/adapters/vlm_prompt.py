"""Which images and videos a prompt has, and where: passes of the encoder that wait for their prompt."""

from typing import Any, TypeAlias

import torch
from torch import Tensor

from tokencomp.adapters.vlm_families import Encoded, Image

Chosen: TypeAlias = list[tuple[Encoded, Image]]  # of each image or video of a prompt, in order
KINDS = ("image", "video")


class Passes:
    """What the encoder computed and no prompt has used yet, by kind."""

    def __init__(self) -> None:
        self.waiting: list[tuple[str, list[Encoded]]] = []
        self.flops = (0, 0)  # of the encoder in all passes of the last prompt, and without a cut
        self._spent: list[tuple[int, int]] = []  # in those that wait

    def add(self, kind: str, encoded: list[Encoded], flops: tuple[int, int]) -> None:
        """One more pass; ``flops`` as in the attribute."""
        self.waiting.append((kind, encoded))
        self._spent.append(flops)

    def rename(self, kind: str) -> None:
        """The last pass was of this kind."""
        self.waiting[-1] = kind, self.waiting[-1][1]

    def of(self, base: Any, ids: Tensor | None, outputs: Any) -> Chosen | None:
        """The images and videos of a prompt with ``ids`` ``[B, S]``, in order; None without any.

        ``outputs``: encoder outputs that the model was given, by kind, as ``generate`` does. Raises
        ValueError for some that were computed before the model was compressed.
        """
        if ids is None:
            return None
        found: list[tuple[int, tuple[Encoded, Image]]] = []
        for kind in KINDS:
            units = self._of_kind(kind, (outputs or {}).get(kind))
            if units:
                at = _places(base, kind, ids).flatten().nonzero()[:, 0]
                first = torch.tensor([0, *(len(image.features) for _, image in units[:-1])]).cumsum(0)
                found += zip(at[first.to(at.device)].tolist(), units, strict=True)
        self.flops = sum(done for done, _ in self._spent), sum(dense for _, dense in self._spent)
        self.waiting.clear()
        self._spent.clear()
        return [unit for _, unit in sorted(found, key=lambda entry: entry[0])] or None

    def _of_kind(self, kind: str, given: Any) -> Chosen:
        mine = [encoded for name, encoded in self.waiting if name == kind]
        if given is None:
            return [(encoded, image) for encoded in (mine or [[]])[-1] for image in encoded.images]
        known = [(encoded, image) for one in mine for encoded in one for image in encoded.images]
        return [_same(feature, known) for feature in given.pooler_output]


def placeholders(base: Any, ids: Tensor) -> Tensor:
    """``[B, S]`` bool: where visual tokens of any kind stand."""
    return _places(base, "image", ids) | _places(base, "video", ids)


def _places(base: Any, kind: str, ids: Tensor) -> Tensor:
    token = getattr(base.config, f"{kind}_token_id", None)
    return torch.zeros_like(ids, dtype=torch.bool) if token is None else torch.eq(ids, token)


def _same(feature: Tensor, known: Chosen) -> tuple[Encoded, Image]:
    """The image with these features; generation with beams repeats them, and may copy."""
    for e, image in known:
        if image.features is feature or image.features.data_ptr() == feature.data_ptr():
            return e, image
    for e, image in known:
        if image.features.shape == feature.shape and torch.equal(image.features, feature):
            return e, image
    raise ValueError("compress: these images were encoded before the model was compressed")
