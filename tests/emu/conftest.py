"""``device``: where a conformance test runs. ``race`` is the emulator under the race and bounds checker."""

import pytest
from libraries import Device, make_device


@pytest.fixture(params=["emu", "race", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> Device:
    return make_device(request.param)
