"""Stock Keylime's appraisal of one quote, timed: a program for the environment ``.keylime``, which has no harness.

It reads one JSON object (``{name: {"nonce", "quote", "ak", "policy", "clock"}}``), then lines ``NAME COUNT``, and
answers each with the CPU seconds that COUNT appraisals took. Each is what Keylime's verifier does with one answer: the
signature, PCR values and policy of the quote, and its clock against the one before.

Invariants:
    1. What is timed accepts the quote; a program that times refusals ends instead.
    2. Standard library and Keylime only; Keylime's log is kept to warnings, which is to its advantage.

Spec: Keylime 7.14.3, ``Tpm.check_quote`` (called by ``cloud_verifier_common.process_quote_response``).
"""

from __future__ import annotations

import importlib
import json
import logging
import sys
import time
from typing import Any


class Appraisal:
    """Keylime's appraisal of one quote.

    Args:
        case: nonce and quote as text, AK as base64 of TPM2B_PUBLIC, the policy as JSON text, and the clock before.
    """

    def __init__(self, case: dict[str, Any]) -> None:
        self._tpm = importlib.import_module("keylime.tpm.tpm_main").Tpm()
        self._state = importlib.import_module("keylime.agentstates").AgentAttestState("bench")
        self._clock_info = importlib.import_module("keylime.agentstates").TPMClockInfo.from_dict(case["clock"])
        self._sha256 = importlib.import_module("keylime.common.algorithms").Hash.SHA256
        self._case = case

    def once(self) -> bool:
        """Whether the quote is accepted."""
        case = self._case
        self._state.set_tpm_clockinfo(self._clock_info)
        failure = self._tpm.check_quote(
            self._state, case["nonce"], None, case["quote"], case["ak"], case["policy"], hash_alg=self._sha256
        )
        return not failure

    def cpu_s(self, count: int) -> float:
        """Seconds of CPU for so many appraisals."""
        before = time.process_time()
        for _ in range(count):
            self.once()
        return time.process_time() - before


def main() -> int:
    """Entry point of the program; 1 when Keylime does not accept a quote."""
    importlib.import_module("keylime.mba.mba").load_imports(skip_custom_policies=True)  # as its verifier does
    logging.disable(logging.INFO)
    appraisals = {name: Appraisal(case) for name, case in json.loads(sys.stdin.readline()).items()}
    refused = [name for name, appraisal in appraisals.items() if not appraisal.once()]
    if refused:
        print(f"refused {' '.join(refused)}", flush=True)
        return 1
    print("ready", flush=True)
    for line in sys.stdin:
        name, count = line.split()
        print(appraisals[name].cpu_s(int(count)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
