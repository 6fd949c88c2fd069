"""Methods inside an encoder under the evaluation: rates for a budget, what is reported, and that they pay."""

import pytest
from tokencomp import adapters, zoo
from tokencomp.eval import Table, encoders, evaluate, known

pytest.importorskip("transformers", reason="the zoo needs the extra hf")
pytest.importorskip("sklearn", reason="the digits come with scikit-learn")

LAYERS, TOKENS, SAMPLES, BUDGET = 4, 256, 24, 0.5


@pytest.mark.parametrize("budget", [1.0, 0.9, 0.75, 0.5, 0.36])
def test_rates_meet_the_budget_and_nothing_slower_does(budget: float) -> None:
    r = encoders.count_for(budget, LAYERS, TOKENS)
    share = encoders.share_for(budget, LAYERS, TOKENS)
    limit = budget * LAYERS * TOKENS
    assert sum(encoders.left_by_count(r, LAYERS, TOKENS)) <= limit
    assert sum(encoders.left_by_share(share, LAYERS, TOKENS)) <= limit
    if budget < 1.0:
        assert sum(encoders.left_by_count(r - 1, LAYERS, TOKENS)) > limit
        assert sum(encoders.left_by_share(share + 0.01, LAYERS, TOKENS)) > limit


def test_a_budget_out_of_reach_gives_the_least_there_is() -> None:
    halves = [128, 64, 32, 16]
    assert encoders.left_by_count(encoders.count_for(0.01, LAYERS, TOKENS), LAYERS, TOKENS) == halves
    assert encoders.left_by_share(encoders.share_for(0.01, LAYERS, TOKENS), LAYERS, TOKENS) == halves


@pytest.fixture(scope="module")
def table() -> Table:
    model, tasks = zoo.load("digits-vit")
    names = [name for name in known("patches") if name in encoders._MAKERS]
    assert len(names) == len(encoders._MAKERS)
    return evaluate(model, tasks["digits"], names, [BUDGET], samples=SAMPLES, name="digits-vit", show=False)


def test_every_method_keeps_about_the_budget(table: Table) -> None:
    rows = {row.method: row for row in table.rows}
    for name in encoders._MAKERS:
        row = rows[name]
        assert len(row.kept_per_layer) == LAYERS
        assert row.tokens_total == TOKENS
        assert 0.47 * TOKENS <= row.tokens_kept <= 0.505 * TOKENS, name


def test_operations_are_those_of_fewer_tokens(table: Table) -> None:
    """Half of the tokens: about half of the operations where they go before the first layer."""
    rows = {row.method: row for row in table.rows}
    full = rows["none"].flops
    model, _ = zoo.load("digits-vit")
    in_layers = adapters.encoder_flops(model, [TOKENS + 1] * (LAYERS + 1))
    assert in_layers < full < 1.05 * in_layers
    assert 0.4 * full < rows["random"].flops == rows["stride"].flops < 0.53 * full
    assert rows["random"].flops < rows["tome"].flops < 0.7 * full


def test_merging_beats_random_keep_at_the_same_number_of_tokens(table: Table) -> None:
    """Half of the tokens; random keep loses about a quarter of the answers here, these methods a few."""
    rows = {row.method: row for row in table.rows}
    for name in ("tome", "mctf", "zerotprune", "gtp"):
        assert rows[name].score.mean > rows["random"].score.mean, name
