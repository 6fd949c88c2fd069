"""A process of a tensor-parallel run: ``torchrun --nproc-per-node 2 tests/tensor_parallel.py FOLDER``."""

import sys
from pathlib import Path

import tokencomp
import torch
from cache_methods import KeepAll
from decoders import left, prompt, steps
from tokencomp import methods
from torch import distributed
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers import LlamaForCausalLM

METHODS = {
    "all": KeepAll(),
    "h2o": methods.H2O(12, every=3, recent=4),
    "snapkv": methods.SnapKV(12, window=4, every=3),
    "tova": methods.TOVA(12, every=3),
    "prefixkv": methods.PrefixKV(0.4, recent=2),
    "critic": methods.CRITIC(12, every=3),
    "streaming": methods.StreamingLLM(12, every=3),
    "quantized": methods.Uniform(bits=8),
    "adakv": methods.AdaKV(methods.SnapKV(12, window=4)),  # its heads compete: with those of their process
}


def run(model: object) -> dict[str, torch.Tensor]:
    """Logits of a padded batch under each method, and the positions kept in the first layer."""
    found = {}
    with torch.no_grad():
        for name, method in METHODS.items():
            with tokencomp.compress(model, method, page=16) as handle:  # type: ignore[call-overload]
                found[name] = steps(model, prompt(2, 40), left(2, 40), [28, *[1] * 12])
                store = handle.cache.paged[0].layer.store
                found[f"{name} position"] = store.position()[..., : store.size].contiguous()
                found[f"{name} lengths"] = store.lengths.contiguous()
    return found


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    distributed.init_process_group("gloo")
    model = LlamaForCausalLM.from_pretrained(folder).eval()
    mesh = distributed.init_device_mesh("cpu", (2,))
    # transformers' own plan for Llama, which it carries out only where accelerate is installed
    styles = {"colwise": ColwiseParallel, "rowwise": RowwiseParallel}
    plan = {
        f"model.{name}": styles[style]()
        for name, style in model.config.base_model_tp_plan.items()
        if style in styles
    }
    assert len(plan) == 7
    parallelize_module(model, mesh, plan)
    found = run(model)
    torch.save(found, folder / f"rank{distributed.get_rank()}.pt")
    distributed.barrier()
    distributed.destroy_process_group()
