"""Vision transformers made of timm's blocks, recognised by what they have; timm is not imported.

A block has ``norm1, attn, norm2, mlp`` and, where the version has them, ``ls1, ls2`` and ``drop_path1,
drop_path2``; its attention has ``qkv, num_heads, scale``. That the halves below are the block's forward
is checked when it is compressed, so blocks that only look alike (norm after attention, for instance) are
refused.
"""

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from tokencomp import merged, token_map
from tokencomp.adapters.families import Family, register, special_tokens
from tokencomp.adapters.patch import Patches
from tokencomp.adapters.run import Run

PLAIN_POOLS = ("", "token", "max")  # poolings of timm to which the size of a token does not matter


class Timm(Family):
    """timm's VisionTransformer and models built like it."""

    name = "timm"
    models = "timm VisionTransformer, DeiT, DINOv2 (blocks with norm1, attn.qkv, norm2, mlp)"
    attention = "attn"
    outputs = "features"

    def matches(self, layer: nn.Module) -> bool:
        attention = getattr(layer, "attn", None)
        block = all(hasattr(layer, name) for name in ("norm1", "norm2", "mlp"))
        return block and all(hasattr(attention, name) for name in ("qkv", "num_heads"))

    def accepts(self, root: nn.Module) -> bool:
        return hasattr(root, "forward_features") and hasattr(root, "forward_head")

    def prefix(self, root: nn.Module) -> int:
        return int(getattr(root, "num_prefix_tokens", special_tokens(root)))

    def distill(self, root: nn.Module) -> bool:
        return getattr(root, "dist_token", None) is not None

    def attend(self, layer: Any, run: Run, x: Tensor, attn_mask: Tensor | None = None, **kwargs: Any) -> Any:
        mask = run.key_mask(attn_mask)
        if mask is not None:
            kwargs["attn_mask"] = merged.as_bias(mask, x.dtype)
        y = layer.attn(layer.norm1(x), **kwargs)
        return x + _part(layer, "drop_path1", "drop_path")(_part(layer, "ls1")(y))

    def feed(self, layer: Any, x: Tensor) -> Any:
        y = layer.mlp(layer.norm2(x))
        return x + _part(layer, "drop_path2", "drop_path")(_part(layer, "ls2")(y))

    def show(self, patches: Patches, layer: nn.Module, stack: Any) -> None:
        attention: Any = layer.attn
        takes_mask = "attn_mask" in inspect.signature(attention.forward).parameters
        if stack.method.proportional and not takes_mask:
            raise ValueError(
                "compress: this attention takes no attn_mask, so log sizes cannot be added; use a newer timm "
                "or a method with proportional=False"
            )
        if hasattr(attention, "q_norm") and hasattr(attention, "k_norm"):
            for norm, side in ((attention.q_norm, "q"), (attention.k_norm, "k")):
                patches.add(norm, forward=_show_normed(type(norm).forward, stack, side, attention))
        else:
            patches.add(attention.qkv, forward=_show_qkv(type(attention.qkv).forward, stack, attention))

    def attention_name(self, layer: nn.Module) -> str:
        return "fused (SDPA)" if getattr(layer.attn, "fused_attn", False) else "plain"

    def patch_outputs(self, patches: Patches, root: Any, stack: Any, dense: bool) -> None:
        """Let ``forward_head`` pool by size, or undo the merge at the end of ``forward_features``."""
        if dense:
            patches.add(root, forward_features=_unmerged_features(type(root).forward_features, stack))
        else:
            patches.add(root, forward_head=_sized_head(type(root).forward_head, stack))


def _part(layer: nn.Module, *names: str) -> Callable[[Tensor], Tensor]:
    """The first of the submodules that the layer has; older versions lack some."""
    for name in names:
        if hasattr(layer, name):
            return getattr(layer, name)  # type: ignore[no-any-return]
    return lambda x: x


def _scale(attention: Any) -> float | None:
    scale = getattr(attention, "scale", None)
    return float(scale) if isinstance(scale, int | float) else None


def _show_normed(
    forward: Callable[..., Tensor], stack: Any, side: str, attention: Any
) -> Callable[..., Tensor]:
    def shown(self: nn.Module, x: Tensor) -> Tensor:
        y = forward(self, x)
        run = stack.run
        if side == "q":
            run.q = y
        else:
            run.saw(run.q, y, _scale(attention))
        return y

    return shown


def _show_qkv(forward: Callable[..., Tensor], stack: Any, attention: Any) -> Callable[..., Tensor]:
    def shown(self: nn.Module, x: Tensor) -> Tensor:
        y = forward(self, x)
        batch, tokens = y.shape[:2]
        q, k, _ = y.reshape(batch, tokens, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
        stack.run.saw(q, k, _scale(attention))
        return y

    return shown


def _sized_head(forward_head: Callable[..., Any], stack: Any) -> Callable[..., Any]:
    def head(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        run = stack.last(x)
        pool = getattr(self, "global_pool", "token") or ""
        if run is None or not run.reduced or pool in PLAIN_POOLS:
            return forward_head(self, x, *args, **kwargs)
        if pool == "avg" and run.size is not None:
            prefix = 0 if getattr(self, "pool_include_prefix", False) else run.prefix
            x = merged.weigh_rows(x, run.size, prefix)
        elif pool != "avg":
            x = token_map.unmerge(x, run.source)
        return forward_head(self, x, *args, **kwargs)

    return head


def _unmerged_features(forward_features: Callable[..., Any], stack: Any) -> Callable[..., Any]:
    def features(self: Any, *args: Any, **kwargs: Any) -> Any:
        x = forward_features(self, *args, **kwargs)
        run = stack.last(x)
        return x if run is None or not run.reduced else token_map.unmerge(x, run.source)

    return features


register(Timm())
