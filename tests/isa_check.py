"""The CPU kernels of one instruction-set level against the reference; run by test_isa.py.

The level is fixed when the library is loaded (TOKENCOMP_CPU_ISA), so each needs a process. Prints what it
did.
"""

import sys

import torch
from backends import make_backend
from cases import KCENTER_CASES, KCENTER_EXACT
from cases_decode import DECODE_CASES, STATES_CASES
from cases_decode_types import LINEAR_CASES as LINEAR_TYPES_CASES
from cases_decode_types import TYPES_CASES
from cases_kvcache import KV_CASES
from cases_kvquant import QUANT_CASES, DequantCase
from cases_linear import LINEAR_CASES
from cases_merge import ENERGY_CASES, MATCH_CASES, MATCH_EXACT
from cases_merge_map import MERGE_CASES
from cases_prefill import PREFILL_CASES
from cases_prefill_pages import PAGED_CASES
from cases_score import SCORE_CASES, ScoreCase
from cases_topk import TOPK_CASES
from decode_yardstick import assert_attention, assert_close
from kvcache_yardstick import check_all
from linear_yardstick import check_case as check_linear
from merge_yardstick import assert_energies, assert_matches, assert_merged
from prefill_yardstick import assert_attention as assert_prefill
from prefill_yardstick import check_case
from tokencomp import cpu_features, ops, reference
from yardstick import assert_agrees, assert_scores

WORK_LIMIT = 8_000_000


def merge_family() -> int:
    judges = (
        (ops.cosine_match, assert_matches, MATCH_CASES),
        (ops.energy_score, assert_energies, ENERGY_CASES),
        (ops.merge_tokens, assert_merged, MERGE_CASES),
    )
    count = 0
    for operator, judge, cases in judges:
        for case in cases:
            if case.slow or case.work > WORK_LIMIT:
                continue
            call = case.inputs()
            result = operator(*call.arguments, **call.options)
            try:
                judge(call, *(result if isinstance(result, tuple) else (result,)))
            except AssertionError as error:
                raise AssertionError(f"{case.name}: {error}") from error
            count += 1
    for case in MATCH_EXACT:
        call = case.inputs()
        got = ops.cosine_match(*call.arguments, **call.options)
        want = reference.cosine_match(*call.arguments, **call.options, dtype=torch.float32)
        assert all(torch.equal(*pair) for pair in zip(got, want, strict=True)), case.name
    return count + len(MATCH_EXACT)


def kvquant_family() -> int:
    cases = [case for case in QUANT_CASES if not case.slow]
    for case in cases:
        arguments, options = case.arguments()
        got = ops.kv_quantize(*arguments, **options)
        want = reference.kv_quantize(*arguments, **options, dtype=torch.float32)
        assert torch.equal(got[0], want[0]), f"{case.name}: codes"
        assert torch.allclose(got[1], want[1], rtol=0, atol=0, equal_nan=True), f"{case.name}: params"
        arguments, options = DequantCase(case).arguments()
        back = ops.kv_dequantize(*arguments, **options)
        dtype = options.pop("dtype")
        exact = reference.kv_dequantize(*arguments, **options, dtype=torch.float32).to(dtype)
        assert torch.allclose(back, exact, rtol=0, atol=0, equal_nan=True), f"{case.name}: x"
    for size in (4, 64, 256):
        x = torch.randn(1, 2, 21, size)
        exact = reference.hadamard(x)
        assert_scores(ops.hadamard(x), exact, reference.hadamard(x, dtype=torch.float32), what="hadamard")
        stats, wanted = ops.channel_stats(x), reference.channel_stats(x)
        assert all(
            torch.allclose(a, b.float(), rtol=1e-5, atol=1e-6) for a, b in zip(stats, wanted, strict=True)
        )
    return len(cases)


def paged_prefill() -> int:
    cases = [case for case in PAGED_CASES if case.work <= WORK_LIMIT]
    for case in cases:
        arguments, options = case.call()
        try:
            assert_prefill(ops.flash_prefill(*arguments, **options), arguments, options)
        except AssertionError as error:
            raise AssertionError(f"{case.name}: {error}") from error
    return len(cases)


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
    selections = [case for case in TOPK_CASES if not case.slow]
    for case in selections:
        args, options = case.arguments()
        got, want = (getattr(where, case.op)(*args, **options) for where in (ops, reference))
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True)), case.name
    attention = [case for case in SCORE_CASES if not case.slow and case.work <= WORK_LIMIT]
    for case in attention:
        try:
            check_scores(case)
        except AssertionError as error:
            raise AssertionError(f"{case.name}: {error}") from error
    decoded = decode_family()
    merged = merge_family()
    cached = [case for case in KV_CASES if not case.slow][::3]
    for case in cached:
        check_all(make_backend("cpu"), case)
    exact_count = len(exact) + len(selections) + kvquant_family()
    prefills = [case for case in PREFILL_CASES if not case.slow and case.work <= WORK_LIMIT]
    for case in prefills:
        try:
            check_case(ops.flash_prefill, case)
        except AssertionError as error:
            raise AssertionError(f"{case.name}: {error}") from error
    linears = [case for case in LINEAR_CASES if not case.slow and case.work <= WORK_LIMIT]
    for case in linears:
        check_linear(ops.decay_linear_attention, case)
    families = {
        "merge": merged, "score": len(attention), "kvcache": len(cached), "decode": decoded,
        "prefill": len(prefills),
        "paged prefill": paged_prefill(),
        "linear": len(linears),
    }  # fmt: skip
    counts = ", ".join(f"{number} of the {family} family" for family, number in families.items())
    print(f"{level}: {counts}, {exact_count} exact and {len(close)} close cases")


def decode_family() -> int:
    cases = [
        c for c in DECODE_CASES + TYPES_CASES + LINEAR_TYPES_CASES if not c.slow and c.work <= WORK_LIMIT
    ]
    for case in cases:
        arguments, options = case.call()
        try:
            assert_attention(case, *ops.paged_decode(*arguments, **options))
        except AssertionError as error:
            raise AssertionError(f"{case.name}: {error}") from error
    for case in STATES_CASES:
        (out, lse), _ = case.call()
        exact, torch32 = (reference.merge_states(out, lse, dtype=d) for d in (torch.float64, torch.float32))
        assert_close(
            ops.merge_states(out, lse)[0], exact[0], torch32[0].to(out.dtype).float(), what=case.name
        )
    return len(cases) + len(STATES_CASES)


def check_scores(case: ScoreCase) -> None:
    c = case.call()
    for name, arguments, options in (
        ("attention_lse", (c.q, c.k), c.sight),
        ("column_score", (c.q, c.k, c.lse), c.sight | c.rows),
        ("diagonal_score", (c.q, c.k, c.lse), c.sight | {"heads": case.heads}),
    ):
        want = [
            getattr(reference, name)(*arguments, **options, dtype=dtype)
            for dtype in (torch.float64, torch.float32)
        ]
        assert_scores(getattr(ops, name)(*arguments, **options), *want, what=name)
    if case.T == 0 or case.bad:
        return
    query, options = c.q[:, :, 0], {"scale": 1.0, "lengths": c.sight.get("lengths")}
    scores, lse = ops.qk_scores(query, c.k, **options)
    want = [reference.qk_scores(query, c.k, **options, dtype=d) for d in (torch.float64, torch.float32)]
    assert_scores(scores, want[0][0], want[1][0], what="qk_scores")
    vote = [
        reference.head_vote(scores, lse, groups=case.Hkv, dtype=d) for d in (torch.float64, torch.float32)
    ]
    assert_scores(ops.head_vote(scores, lse, groups=case.Hkv), *vote, what="head_vote")
    score = torch.ones(case.B, case.Hkv, case.S)
    states = [score.double(), score.clone()]
    ops.decay_score_(score, scores, lse, gamma=0.5)
    for state in states:
        reference.decay_score_(state, scores, lse, gamma=0.5)
    assert_scores(score, *states, what="decay_score_")


if __name__ == "__main__":
    main(sys.argv[1])
