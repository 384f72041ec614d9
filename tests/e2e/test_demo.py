"""The demo as a user runs it: one command, real processes, and a refusal for every way to cheat."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from harness.lab_plan import TAMPER_CASES
from tests.support.processes import left_by

pytestmark = pytest.mark.needs_swtpm
_DEADLINE_S = 600
_MOST_QUOTES = 3

REFUSALS: dict[str, tuple[str, int | None, str]] = {
    "host-kernel": ("host", 9, "ReferenceValueMismatch"),
    "guest-kernel": ("guest", 9, "ReferenceValueMismatch"),
    "swap-vtpm": ("enrolment", None, "CertificateRefused"),
    "decoy": ("host", None, "GuestNotHere"),
    "wrong-ak": ("host", 6, "QuoteSignatureInvalid"),
    "replay": ("host", 5, "QualifyingDataMismatch"),
    "strip": ("host", 5, "QualifyingDataMismatch"),
    "reboot": ("host", 10, "HostRebooted"),
}
"""Layer, check and error that must refuse each case."""
ONE_GUEST_ONLY = {"guest-kernel", "swap-vtpm", "decoy"}


def demo(*options: str) -> tuple[int, dict[str, Any]]:
    command = [sys.executable, "-m", "harness", "demo", "--json", *options]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_DEADLINE_S, check=False
    )
    assert done.stdout.count("\n") == 1, done.stderr
    return done.returncode, json.loads(done.stdout)


@pytest.mark.timeout(_DEADLINE_S)
def test_an_honest_lab_attests_every_guest_with_few_quotes() -> None:
    """Two tenants with three guests each are accepted, their payload is released, and at most three quotes are made."""
    code, shown = demo()
    assert (code, shown["accepted"]) == (0, True)
    assert len(shown["guests"]) == 6
    assert {guest["tenant"] for guest in shown["guests"]} == {"alice", "bob"}
    assert all(guest["payload_released"] and guest["error"] is None for guest in shown["guests"])
    assert "PROVIDE_V" not in {guest["state"] for guest in shown["guests"]}
    assert sum(batch["requests"] for batch in shown["batches"]) >= 6
    assert sum(batch["tpm_quotes"] for batch in shown["batches"]) <= _MOST_QUOTES
    assert shown["timings_s"]["total"] > 0


def test_every_tamper_case_has_an_expected_refusal() -> None:
    """The table above covers exactly the cases that the command offers."""
    assert set(REFUSALS) == set(TAMPER_CASES)


@pytest.mark.timeout(_DEADLINE_S)
@pytest.mark.parametrize("case", sorted(REFUSALS))
def test_a_tampered_lab_is_refused_where_it_must_be(case: str) -> None:
    """The case exits 1, is refused by the expected layer and check, and the refused guest's payload stays locked."""
    code, shown = demo("--tenants", "2", "--guests", "1", "--tamper", case)
    assert (code, shown["accepted"]) == (1, False)
    refused = [guest for guest in shown["guests"] if guest["error"] is not None]
    assert {(guest["layer"], guest["failed_check"], guest["error"]) for guest in refused} == {REFUSALS[case]}
    assert not any(guest["payload_released"] for guest in refused)
    accepted = [guest for guest in shown["guests"] if guest not in refused]
    assert len(accepted) == (1 if case in ONE_GUEST_ONLY else 0)
    assert all(guest["payload_released"] for guest in accepted)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--tenants", "0"], "a lab has 1 to 8 tenants"),
        (["--guests", "1000"], "a tenant has 1 to 64 guests"),
        (["--tamper", "everything"], "not one of host-kernel"),
        (["--chip", "abacus"], "--chip abacus: "),
        (["--lab", "/proc/lab"], "--lab /proc/lab: cannot be made: "),
    ],
)
def test_options_that_make_no_lab_are_refused_at_once(options: list[str], said: str) -> None:
    """What cannot be a lab, or has no place, ends with code 2 and one sentence, before anything is set up."""
    command = [sys.executable, "-m", "harness", "demo", *options]
    with tempfile.TemporaryDirectory(prefix="h") as name:  # short enough for a socket
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
            env={**os.environ, "TMPDIR": name},
        )
        assert (done.returncode, os.listdir(name)) == (2, []), done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.timeout(_DEADLINE_S)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_an_interrupted_demo_leaves_neither_files_nor_processes(number: signal.Signals) -> None:
    """Ctrl-C and SIGTERM stop every service, and no folder with keys stays behind."""
    command = [sys.executable, "-m", "harness", "demo", "--json"]
    with tempfile.TemporaryDirectory(prefix="h") as name:  # short: UNIX socket paths hold 107 bytes
        folder = Path(name)
        environment = {**os.environ, "TMPDIR": name}
        with subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment) as demo:
            try:
                _until_manufacturing(folder, demo)
                demo.send_signal(number)
                _, said = demo.communicate(timeout=240)
            finally:
                demo.kill()
        assert (demo.returncode, list(folder.iterdir()), left_by(folder)) == (130, [], {}), said


def _until_manufacturing(folder: Path, demo: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + 60
    while not list(folder.glob("hl*/h/*/guests/*/.tpm-new")):
        assert demo.poll() is None
        assert time.monotonic() < until, "no vTPM is being manufactured"
        time.sleep(0.01)
