"""Prints how long a lab takes to recover from ``kill -9`` of each service and swtpm: ``python -m tests.soak.recovery``.

A lab with the default chip, two tenants and three guests, a round every five seconds. For each process: seconds until
it is back, and until every guest was attested by evidence that was asked for after the kill. The second figure
contains what is left of the interval in which the kill fell.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

from tests.support.running_lab import RunningLab, running_lab

TOPOLOGY = """\
hosts: {host1: }
tenants:
  alice: {payload: secret, guests: {alice-vm1: , alice-vm2: }}
  bob: {guests: {bob-vm1: }}
"""


DEADLINE_S = 120.0


def measure(lab: RunningLab, name: str, pid_now: Callable[[], int | None]) -> str:
    """One line of the table."""
    before, pinned = pid_now(), lab.pinned()
    if before is None:
        raise SystemExit(f"{name} is not running")
    began = time.monotonic()
    os.kill(before, signal.SIGKILL)
    back = None
    since = time.time()
    while time.monotonic() - began < DEADLINE_S:
        if back is None and pid_now() not in (None, before):
            back = time.monotonic() - began
        views = lab.attestations().values()
        if back is not None and all(
            view.get("attested") and view["last_successful_attestation"] > since for view in views
        ):
            break
        time.sleep(0.05)
    else:
        return f"| {name} | {back} | not after {DEADLINE_S:g} s | |"
    kept = "yes" if lab.pinned() == pinned else "NO"
    return f"| {name} | {back or 0:.1f} | {time.monotonic() - began:.1f} | {kept} |"


def main() -> None:
    """Prints the table."""
    with running_lab(TOPOLOGY) as lab:
        lab.until_attested(count=3)
        print("| killed | back after s | all attested again after s | same keys |\n|---|---|---|---|")
        for service in lab.pids():
            print(measure(lab, service, lambda service=service: lab.pids().get(service)), flush=True)  # type: ignore[misc]
        for swtpm in sorted(lab.swtpms()):
            label = "swtpm of a guest" if "/guests/" in swtpm else "swtpm of the host"
            print(measure(lab, label, lambda swtpm=swtpm: lab.swtpms().get(swtpm)), flush=True)  # type: ignore[misc]


if __name__ == "__main__":
    main()
