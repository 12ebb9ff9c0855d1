"""Every test begins with the same random state, so that it passes or fails whatever ran before it."""

import pytest

from toys import seed_everything


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    seed_everything(0)
