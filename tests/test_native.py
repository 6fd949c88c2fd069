"""The native module: one file for every Python, and what it says of wrong arguments."""

import abi_check
import pytest
import tokencomp
from tokencomp import _native, native


def test_one_file_for_every_python() -> None:
    assert _native.__file__.endswith("_native.abi3.so")
    assert any("PyArg_ParseTuple" in line for line in abi_check.undefined(abi_check.NATIVE))
    assert abi_check.private_symbols() == []


def test_build_info_and_features_are_texts() -> None:
    info = tokencomp.build_info()
    assert info["stable_abi_target"] == "2.10"
    features = tokencomp.cpu_features()
    assert features["active"] in features["available"]
    assert set(features["available"]) <= set(features["compiled"])


def test_wrong_arguments_are_refused() -> None:
    plan = {"B": 1, "N": 8, "k": 2, "item_bytes": 64, "threads": 1}
    with pytest.raises(ValueError, match=r"objective must be one of 'max_min', 'max_sum', got 'max'"):
        native.kcenter_cpu_plan(objective="max", **plan)
    with pytest.raises(TypeError):
        native.kcenter_cpu_plan(objective="max_min", **{**plan, "N": 8.5})
    with pytest.raises(TypeError, match="takes memory, count, low and limit"):
        _native.all_within(0, 1)
    with pytest.raises(TypeError):
        _native.PagePool(4).free([1, 2])
    with pytest.raises(TypeError):
        native.PagePool("4")


def test_a_pool_goes_with_its_last_name() -> None:
    import gc

    class Watched(_native.PagePool):
        gone = 0

        def __del__(self) -> None:
            Watched.gone += 1

    for _ in range(3):
        Watched(1 << 16).allocate(5)
    gc.collect()
    assert Watched.gone == 3
