"""Rules for every test run: what may be skipped, how seeds are shown, and when a run is not green.

* ``needs_swtpm`` skips on a machine without swtpm, and **fails** where ``HARNESS_REQUIRE`` names ``swtpm``
  (the tox env ``e2e`` and CI do).
* Every other marker ``needs_NAME`` (`requirements.NEEDS`) does the same by its own name;
  ``HARNESS_REQUIRE=swtpm,postgres`` requires two of them. Nothing else is skipped.
* The seed of the run is in the header; ``HARNESS_SEED=N`` repeats it. Tests take their randomness from the
  fixture ``rng``. A test that takes ``seed`` runs ``HARNESS_SEEDS`` times (20 in CI, 3 elsewhere), and each time its
  ``rng`` is another one.
* Hypothesis has no deadline (the machine may be busy) and draws the same examples in CI on each run.
* A run in which every test was skipped is not green.
"""

from __future__ import annotations

import os
import random
import secrets
import signal

import hypothesis
import pytest

from tests.support import requirements
from tests.support.databases import database_url, postgres, store_url

__all__ = ["database_url", "postgres", "store_url"]

# A shell that starts a run in the background has SIGINT ignored, and what tests interrupt would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

SEED = int(os.environ.get("HARNESS_SEED") or secrets.randbelow(2**32))
SEEDS = int(os.environ.get("HARNESS_SEEDS") or (20 if os.environ.get("CI") else 3))

hypothesis.settings.register_profile("laptop", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "laptop")


def pytest_report_header() -> str:
    """Show what a second run needs to be the same run."""
    require = os.environ.get("HARNESS_REQUIRE") or "nothing"
    return f"harness: seed {SEED} (repeat with HARNESS_SEED={SEED}), {SEEDS} seeds a case, required: {require}"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Runs a test that takes ``seed`` once for each of the run's seeds."""
    if "seed" in metafunc.fixturenames:
        metafunc.parametrize("seed", range(SEEDS), ids=lambda seed: f"seed{seed}")


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> random.Random:
    """Random numbers that follow from the run's seed and the test's name, whatever ran before."""
    return random.Random(f"{SEED}:{request.node.nodeid}")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip, or fail where the machine is said to have it, what this machine cannot run."""
    for name, (missing, step) in requirements.NEEDS.items():
        if item.get_closest_marker(f"needs_{name}") is not None:
            _require(name, missing(), step)


def _require(name: str, missing: tuple[str, ...], step: str) -> None:
    if not missing:
        return
    reason = f"{', '.join(missing)} not found; {step}"
    if name in requirements.required(os.environ):
        pytest.fail(f"HARNESS_REQUIRE names {name}, but: {reason}", pytrace=False)
    pytest.skip(reason)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Turn a run that skipped everything into a failure: nothing was shown to work."""
    if hasattr(session.config, "workerinput"):  # a worker of pytest-xdist sees a part only
        return
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None or session.exitstatus != pytest.ExitCode.OK:
        return
    counts = {key: len(reports) for key, reports in reporter.stats.items()}
    if requirements.skipped_everything(counts):
        reporter.write_line("every test was skipped: this run shows nothing and is not green", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
