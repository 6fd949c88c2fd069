"""The CPU kernels of one instruction-set level against the reference; run by test_isa.py.

The level is fixed when the library is loaded (TOKENCOMP_CPU_ISA), so each needs a process. Prints what it
did.
"""

import sys

import torch
from cases import KCENTER_CASES, KCENTER_EXACT
from tokencomp import cpu_features, ops, reference
from yardstick import assert_agrees

WORK_LIMIT = 8_000_000


def main(level: str) -> None:
    active = cpu_features()["active"]
    assert active == level, f"asked for {level}, the library runs {active}"
    exact = [case for case in KCENTER_EXACT if not case.slow]
    for case in exact:
        call = case.inputs()
        got = ops.kcenter_greedy(call.x, call.k, **call.options)
        want = reference.kcenter_greedy(call.x, call.k, **call.options, dtype=torch.float32)
        assert torch.equal(got[0], want[0]), f"{case.name}: picks"
        assert torch.equal(got[1], want[1]), f"{case.name}: values"
    close = [case for case in KCENTER_CASES if not case.slow and case.work <= WORK_LIMIT]
    for case in close:
        call = case.inputs()
        try:
            assert_agrees(call, *ops.kcenter_greedy(call.x, call.k, **call.options))
        except AssertionError as error:
            raise AssertionError(f"{case.name}: {error}") from error
    print(f"{level}: {len(exact)} exact and {len(close)} close cases")


if __name__ == "__main__":
    main(sys.argv[1])
