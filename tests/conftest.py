"""What every test shares: bounded threads, repeatable random tests, and the switch that rewrites golden files."""

from __future__ import annotations

import os

# Read when torch is first imported, so it stands before any import that may bring torch in.
# Beside other test workers each has one thread: spinning on each other's cores is slower than waiting.
os.environ.setdefault("OMP_NUM_THREADS", "1" if "PYTEST_XDIST_WORKER" in os.environ else "2")

import hypothesis
import pytest

# No test measures time, and a failure must come back on the next run.
hypothesis.settings.register_profile("dsv3c", deadline=None, derandomize=True)
hypothesis.settings.load_profile("dsv3c")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden", action="store_true", help="rewrite what the golden tests expect (refused under CI)"
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--update-golden") and os.environ.get("CI"):
        raise pytest.UsageError("--update-golden is refused under CI: run it on your machine and commit the diff")


@pytest.fixture
def update_golden(request: pytest.FixtureRequest) -> bool:
    """Whether golden files are to be rewritten instead of compared."""
    return bool(request.config.getoption("--update-golden"))
