"""Compress an encoder between the attention and the MLP of its layers.

``attach`` finds the layers, gives each a subclass whose forward is the family's two halves with the
method between them, and makes what comes after the last layer fit: means weighted by size, a key bias
for attention pooling, unmerged tokens for whoever wants one token a patch.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tokencomp.adapters import outputs
from tokencomp.adapters.families import Family, families, layer_width, patch_convolution, plain_name
from tokencomp.adapters.patch import Patches, all_or_nothing, is_patched, original_class
from tokencomp.adapters.run import Run
from tokencomp.methods.layers import LayerMethod, LayerView, Reduced

CHECK_TOKENS = 6


@dataclass(frozen=True)
class Place:
    """Where in a model an encoder was found."""

    family: Family
    name: str  # of the list of layers
    layers: tuple[nn.Module, ...]
    around: tuple[nn.Module, ...]  # the modules around the list, outermost first

    @property
    def owner(self) -> nn.Module:
        """The module that runs through the layers."""
        return self.around[-1]

    @property
    def root(self) -> nn.Module | None:
        """The innermost module around the layers that also has the embeddings."""
        for module in reversed(self.around):
            if hasattr(module, "embeddings") or hasattr(module, "patch_embed"):
                return module
        return None


class Stack:
    """A compressed encoder."""

    def __init__(self, place: Place, root: nn.Module, method: LayerMethod) -> None:
        self.place, self.family, self.method = place, place.family, method
        self.layers, self.root = place.layers, root
        self.prefix, self.distill = self.family.prefix(root), self.family.distill(root)
        # Each thread's current or last pass. torch.compile traces a plain threading.local and writes it back;
        # of a ContextVar it does neither, of a subclass of local only the first.
        self._threads = threading.local()
        self.patches = Patches()
        self.dense = False

    @property
    def run(self) -> Run:
        """This thread's forward pass. Raises RuntimeError outside of one."""
        run = self.pass_seen
        if run is None:
            raise RuntimeError("compress: a layer was called outside of a forward pass of its encoder")
        return run

    @property
    def pass_seen(self) -> Run | None:
        """This thread's last forward pass, or the current one."""
        return getattr(self._threads, "run", None)

    def last(self, x: Tensor) -> Run | None:
        """The pass that ``x`` ``[B, M, C]`` is the result of, None where it cannot be."""
        run = self.pass_seen
        fits = run is not None and x.shape[:2] == (run.source.shape[0], run.tokens[-1])
        return run if fits else None

    def forward(self, index: int, layer: Any, x: Tensor, args: Any, kwargs: Any) -> Any:
        """One layer with the method at work."""
        replayed = (
            getattr(layer, "gradient_checkpointing", False),
            getattr(self.root, "grad_checkpointing", False),
        )
        if layer.training and any(replayed):
            raise RuntimeError("compress: gradient checkpointing would merge twice; switch it off")
        if index == 0:
            self.begin(x)
        run = self.run
        if run.next_layer != index or x.shape[:2] != (run.source.shape[0], run.tokens[-1]):
            raise RuntimeError(
                f"compress: layer {index} was called with {list(x.shape[:2])} tokens where layer "
                f"{run.next_layer} with {[run.source.shape[0], run.tokens[-1]]} was next; "
                "layers must run in order"
            )
        x = self.family.attend(layer, run, x, *args, **kwargs)
        return self.family.feed(layer, run.reduce(x))

    def saw_grid(self, rows: int, columns: int) -> None:
        """The patches of the pass that is about to begin."""
        self._threads.grid = (rows, columns)

    def forget(self) -> None:
        """Nothing of any pass is left, in any thread."""
        self._threads = threading.local()

    def begin(self, x: Tensor, method: LayerMethod | None = None) -> None:
        """A new forward pass begins with the tokens ``[B, N0, C]``; nothing of the last one is left."""
        grid = getattr(self._threads, "grid", None)
        self._threads.grid = None
        if x.dim() != 3 or x.shape[1] < self.prefix:
            raise ValueError(
                f"compress: tokens must be [B, N >= prefix={self.prefix}, C], got {list(x.shape)}"
            )
        self._threads.run = Run(method or self.method, len(self.layers), x, self.prefix, self.distill, grid)


def find(model: nn.Module) -> list[Place]:
    """Every encoder in ``model`` of a known family."""
    places = []
    modules = dict(model.named_modules())
    for name, module in modules.items():
        if not isinstance(module, nn.ModuleList | nn.Sequential) or len(module) == 0:
            continue
        family = next((f for f in families() if all(f.matches(layer) for layer in module)), None)
        if family is None:
            continue
        path = name.split(".") if name else []
        around = tuple(modules[".".join(path[:depth])] for depth in range(len(path)))
        place = Place(family, name, tuple(module), around)
        if place.root is None or family.accepts(place.root):
            places.append(place)
    return places


def the_one(model: nn.Module) -> tuple[Place, nn.Module]:
    """The encoder of ``model`` and its root. Raises ValueError unless there is exactly one."""
    places = find(model)
    if not places:
        known = "; ".join(f"{family.name}: {family.models}" for family in families())
        raise ValueError(
            f"compress: found no encoder to compress in {plain_name(model)}. Known families: {known}. "
            "For another one hand a subclass of tokencomp.adapters.Family to tokencomp.adapters.register"
        )
    if len(places) > 1:
        names = ", ".join(f"{place.name} ({place.family.name})" for place in places)
        raise ValueError(
            f"compress: found {len(places)} encoders in {plain_name(model)}: {names}; "
            "pass the part to compress"
        )
    place = places[0]
    if place.root is None:
        raise ValueError(
            f"compress: {plain_name(model)} holds layers but no embeddings, so its prefix tokens are not "
            "known; pass the model around it"
        )
    if len(set(place.layers)) != len(place.layers):
        raise ValueError(f"compress: {place.name} uses a layer twice; shared layers cannot be compressed")
    return place, place.root


@all_or_nothing()
def attach(model: nn.Module, method: LayerMethod, *, dense: bool | None = None) -> Stack:
    """Compress the one encoder in ``model`` until ``detach``; see ``tokencomp.compress``."""
    if any(is_patched(module) for module in model.modules()):
        raise ValueError(f"compress: this {plain_name(model)} is compressed already; remove() that first")
    place, root = the_one(model)
    stack = Stack(place, root, method)
    for index, layer in enumerate(stack.layers):
        _show(stack, layer, index)
        stack.patches.add(layer, forward=_layer_forward(type(layer).forward, stack, index))
    convolution = patch_convolution(root)
    if convolution is not None:
        stack.patches.add(convolution, forward=_grid_forward(type(convolution).forward, stack))
    outputs.patch(stack.patches, stack, place.around, root, dense)
    check_halves(stack)
    return stack


def _show(stack: Stack, layer: nn.Module, index: int) -> None:
    try:
        stack.family.show(stack.patches, layer, stack)
    except AttributeError as error:
        raise _unknown_forward(stack, layer, index, f" ({error})") from error


def _unknown_forward(stack: Stack, layer: nn.Module, index: int, why: str = "") -> ValueError:
    return ValueError(
        f"compress: the forward of this {plain_name(layer)} (layer {index}) is not the one that the adapter "
        f"{stack.family.name!r} knows{why}; register a family for it"
    )


def detach(stack: Stack) -> None:
    """Give the model its own classes back."""
    stack.forget()
    stack.patches.restore()


def _layer_forward(forward: Callable[..., Any], stack: Stack, index: int) -> Callable[..., Any]:
    def compressed(self: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return stack.forward(index, self, hidden_states, args, kwargs)

    return outputs.signed(compressed, forward)


def _grid_forward(forward: Callable[..., Any], stack: Stack) -> Callable[..., Any]:
    def seen(self: nn.Module, x: Tensor) -> Tensor:
        patches: Tensor = forward(self, x)
        stack.saw_grid(patches.shape[-2], patches.shape[-1])
        return patches

    return outputs.signed(seen, forward)


class _Nothing:
    """A method that leaves every layer as it is."""

    proportional = False

    def begin(self, x: Tensor, prefix: int, grid: Any, state: dict[str, Any]) -> None: ...

    def reduce(self, view: LayerView) -> Reduced | None:
        return None


@torch.no_grad()
def check_halves(stack: Stack) -> None:
    """Raise ValueError unless the family's two halves give, bit for bit, what the layer's own forward gives.

    On a few random tokens, for the first layer of each class. A version of the model that computes something
    else, or a block that only looks like one of the family, is found here and not in its results.
    """
    known: set[type[nn.Module]] = set()
    for index, layer in enumerate(stack.layers):
        weight = next((p for p in layer.parameters() if p.is_floating_point()), None)
        if original_class(layer) in known or weight is None or weight.device.type == "meta":
            continue
        known.add(original_class(layer))
        try:
            agree = _halves_agree(stack, layer, weight)
        except (AttributeError, TypeError) as error:
            raise _unknown_forward(stack, layer, index, f" ({error})") from error
        if not agree:
            raise _unknown_forward(stack, layer, index)
    stack.forget()


def _halves_agree(stack: Stack, layer: nn.Module, weight: Tensor) -> bool:
    shape = (1, stack.prefix + CHECK_TOKENS, layer_width(layer))
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    x = noise.to(weight.device, weight.dtype)
    arguments = stack.family.sample(layer, x, stack.prefix)
    devices = [weight.device] if weight.device.type == "cuda" else []
    results = []
    for forward in (_by_halves(stack), original_class(layer).forward):
        stack.begin(x, _Nothing())
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(0)
            results.append(forward(layer, x, **arguments))
    return isinstance(results[1], Tensor) and torch.equal(*results)


def _by_halves(stack: Stack) -> Callable[..., Any]:
    def forward(layer: Any, x: Tensor, **arguments: Any) -> Any:
        run = stack.run
        return stack.family.feed(layer, run.reduce(stack.family.attend(layer, run, x, **arguments)))

    return forward
