"""Two processes with half of the heads each say what one process says (gloo, on the CPU)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from backends import ROOT
from decoders import decoder

pytest.importorskip("transformers", reason="models need the extra hf")


def test_two_processes_are_as_one(tmp_path: Path) -> None:
    import tensor_parallel

    model = decoder()
    model.save_pretrained(tmp_path)
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        str(ROOT / "tests" / "tensor_parallel.py"), str(tmp_path),
    ]  # fmt: skip
    paths = os.pathsep.join([str(ROOT / "python"), str(ROOT / "tests")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    expected = tensor_parallel.run(model)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    for name, alone in expected.items():
        method, _, what = name.partition(" ")
        if method == "adakv":
            continue
        if what:  # positions and numbers of slots: to the bit
            assert all(rank[name].shape[1] == 1 for rank in ranks)  # one of two kv heads
            assert torch.equal(torch.cat([rank[name] for rank in ranks], 1), alone)
        else:
            for rank in ranks:
                torch.testing.assert_close(rank[name], alone, atol=1e-4, rtol=1e-4)
    heads_compete_with_those_of_their_process(expected["adakv lengths"], ranks)


def heads_compete_with_those_of_their_process(
    alone: torch.Tensor, ranks: list[dict[str, torch.Tensor]]
) -> None:
    """AdaKV: 12 slots a head and 12 steps in all; the only head of a process has no one to take from."""
    assert (alone.sum(1) == 2 * (12 + 12)).all()
    assert (alone[:, 0] != alone[:, 1]).any()
    assert all((rank["adakv lengths"] == 12 + 12).all() for rank in ranks)
