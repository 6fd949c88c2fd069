"""What patches received in a vision encoder, from the queries and keys of its layers; no matrix is formed."""

from collections.abc import Callable
from typing import Any, TypeAlias

from torch import Tensor, nn
from torch.func import functional_call

from tokencomp import ops

Seen: TypeAlias = tuple[Tensor, Tensor, float]  # queries and keys [M, H, P + N, D], scale


class _Unhooked(nn.Module):
    """A module without the hooks on it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Any:
        return self.inner.forward(x)


class SeenEncoder:
    """``methods.visual.Encoder`` of one pass: tensors of the layers a method looks at, nothing else.

    ``groups`` ``[N, g]`` names the patches of each token where it stands for several: scores and keys are
    their means. ``pool``, ``[M, patches, C] -> [M, N, C]``, is the model's own way to make fewer of them
    behind the projector; scores, keys and features go that way too. ``left`` ``[M, K]`` names the tokens that
    a method left in the encoder, ``present`` the patches ``[M, n]`` that were in a layer, of so many: others
    have scores and keys of 0.
    """

    def __init__(
        self, layers: int, prefix: int, projector: nn.Module, seen: dict[int, Seen], features: Tensor | None
    ) -> None:
        self.layers, self.prefix = layers, prefix
        self.groups: Tensor | None = None
        self.pool: Callable[[Tensor], Tensor] | None = None
        self.left: Tensor | None = None
        self.present: dict[int, tuple[Tensor, int]] = {}
        self.projector, self._seen, self._features = projector, seen, features
        self._weights: dict[str, Tensor] = {}  # of the projector, in the dtype of what it was given
        self._missing = ""

    @property
    def has_cls(self) -> bool:
        """Whether the first token is none of the patches."""
        return self.prefix > 0

    def patches(self) -> int | None:
        """Their number, None where no layer was looked at."""
        here = {layer: key.shape[2] - self.prefix for layer, (_, key, _) in self._seen.items()}
        return next((self.present[n][1] if n in self.present else here[n] for n in here), None)

    def cls(self, layer: int) -> Tensor:
        """See ``Encoder``."""
        if not self.has_cls:
            return self.columns(layer)
        return self._tokens(layer, self._products(layer).softmax(-1).mean(1)[:, self.prefix :])

    def logits(self, layer: int) -> Tensor:
        """See ``Encoder``."""
        return self._tokens(layer, self._products(layer).mean(1)[:, self.prefix :])

    def columns(self, layer: int) -> Tensor:
        """See ``Encoder``."""
        query, key, scale = self._of(layer)
        lse = ops.attention_lse(query, key, scale=scale, causal=False)
        total = ops.column_score(query, key, lse, scale=scale, causal=False, heads="mean")
        return self._tokens(layer, total[:, 0, self.prefix :] / query.shape[2])

    def keys(self, layer: int) -> Tensor:
        """See ``Encoder``."""
        key = self._placed(layer, self._of(layer)[1][:, :, self.prefix :], 2)
        if self.pool is not None:
            heads, width = key.shape[1], key.shape[3]
            pooled = self.pool(key.transpose(1, 2).flatten(2))
            return pooled.view(*pooled.shape[:2], heads, width).transpose(1, 2)
        return key if self.groups is None else key[:, :, self.groups].mean(3)

    def cls_query(self, layer: int) -> tuple[Tensor, Tensor]:
        """See ``Encoder``."""
        query, key, _ = self._of(layer)
        if not self.has_cls:
            return query.float().mean(2).to(query.dtype), key[:, :, :0]
        return query[:, :, 0], key[:, :, :1]

    def features(self) -> Tensor:
        """See ``Encoder``."""
        if self._features is None or self._missing:
            raise ValueError(
                f"compress: features of the encoder are not to be had: {self._missing or 'none seen'}"
            )
        return self._features if self.pool is None else self.pool(self._features)

    def project(self, features: Tensor) -> Tensor:
        """See ``Encoder``; in the dtype of the features."""
        if any(weight.dtype != features.dtype for weight in self._weights.values()) or not self._weights:
            own = self.projector.named_parameters(prefix="inner")
            self._weights = {name: weight.detach().to(features.dtype) for name, weight in own}
        projected: Tensor = functional_call(_Unhooked(self.projector), self._weights, (features,))
        return projected

    def survivors(self) -> Tensor:
        """See ``Encoder``."""
        if self.left is None:
            raise ValueError("compress: nothing was left out between the layers of the encoder")
        return self.left

    def forget(self, why: str) -> None:
        """Refuse from now on, saying why."""
        self._missing = why

    def _placed(self, layer: int, x: Tensor, dim: int) -> Tensor:
        """``x`` of the patches that were in ``layer``, zeros where there were others before."""
        if layer not in self.present:
            return x
        patch, whole = self.present[layer]
        if patch.shape[1] == whole:
            return x
        shape = [1] * x.dim()
        shape[0], shape[dim] = patch.shape
        size = [*x.shape[:dim], whole, *x.shape[dim + 1 :]]
        return x.new_zeros(size).scatter(dim, patch.view(shape).expand_as(x), x)

    def _tokens(self, layer: int, score: Tensor) -> Tensor:
        """``[M, N]``: of tokens, from that of patches."""
        score = self._placed(layer, score, 1)
        if self.pool is not None:
            return self.pool(score[..., None])[..., 0]
        return score if self.groups is None else score[:, self.groups].mean(2)

    def _products(self, layer: int) -> Tensor:
        """``[M, H, P + N]`` float32: scaled products of the first query (the mean one without CLS)."""
        query, key, scale = self._of(layer)
        first = query[:, :, :1].float() if self.has_cls else query.float().mean(2, keepdim=True)
        return (first @ key.float().mT)[:, :, 0] * scale

    def _of(self, layer: int) -> Seen:
        if self._missing:
            raise ValueError(f"compress: attention of the encoder is not to be had: {self._missing}")
        if layer not in self._seen:
            raise RuntimeError(f"compress: encoder layer {layer} was not looked at; say so in looks_at()")
        return self._seen[layer]
