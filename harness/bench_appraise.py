"""``harness bench appraise``: one answer appraised, beside stock Keylime's appraisal of an equal quote.

Ours is all of DESIGN 3.5: strict parsing, the leaf and its path in the tree, signature, values, policy, clock, binding.
Keylime's is `Tpm.check_quote` of the release in ``.keylime``, in a process of that environment, in turns with ours: the
same key, the same PCRs, a policy with the same values. Its nonce is compared with extraData; it has no tree.

Invariants:
    1. What is timed accepts; both sides begin with what their JSON parser gives them.
    2. Without ``.keylime`` the rows have no ratio, say which command makes it, and are not ok.

Spec: docs/performance.md, method.
"""

from __future__ import annotations

import base64
import json
import subprocess
import time
import uuid
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness
from harness import protocol
from harness.bench import BenchOptions, Measured, Result, Row, Sample, at_most, reported
from harness.bench_soft import BANK, SoftTpm
from harness.errors import SimulationError
from harness.keylime_wire import GuestEvidence, encode_quote
from harness.merkle import MerkleTree, leaf_hash
from harness.messages import encode_proof, encode_shared
from harness.protocol import QuoteRequest, leaf_data, qualifying_data
from harness.tenant.appraisal import (
    Accepted,
    GuestTrust,
    HostTrust,
    SentRequest,
    Verdict,
    appraise_guest,
    appraise_host,
)
from harness.tenant.policy import Policy
from harness.tpm_templates import KeyTemplate
from harness.values import AgentId, Nonce, PcrSelection, mask_of

ENVIRONMENT = Path(harness.__file__).parents[1] / ".keylime"
COMMAND = "make keylime"
_PROGRAM = Path(harness.__file__).parent / "bench_keylime.py"
_LEAVES, _PLACE = 256, 77
_PCRS = tuple(range(8))
_NONCE = "Abcdefghij0123456789"
_COUNT, _QUICK_COUNT = 400, 10
_START_S = 60.0
_KEYS = {"RSA-2048": KeyTemplate.AK_RSA2048, "P-256": KeyTemplate.AK_P256}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One quote of each kind by one key.

    Args:
        host: appraises a host's answer, ours.
        guest: appraises a guest's answer, ours.
        keylime: what stock Keylime needs for an equal quote.
    """

    host: Callable[[], Verdict]
    guest: Callable[[], Verdict]
    keylime: dict[str, Any]


def make_case(template: KeyTemplate) -> Case:
    """Quotes by a new key."""
    tpm = SoftTpm(template)
    selection = PcrSelection.of(BANK, mask_of(_PCRS))
    before = tpm.baseline
    policy = Policy.of(BANK, {pcr: tpm.pcrs[pcr] for pcr in _PCRS})
    attest, signature = tpm.quote(_NONCE.encode(), selection)
    evidence = GuestEvidence(attest=attest, signature=signature, pcrs=tpm.values(selection))
    trust = GuestTrust(ak=tpm.ak, policy=policy, baseline=before)
    host_trust = HostTrust(
        host_id=protocol.host_id_of(tpm.ak.name),
        ak=tpm.ak,
        ak_qualified_name=tpm.ak_qualified_name,
        policy=policy,
        baseline=before,
    )
    sent = _sent(selection)
    results = _answer(tpm, sent, host_trust)
    binding = sent.request.binding
    return Case(
        host=lambda: appraise_host(results, sent, host_trust, guest_binding=binding),
        guest=lambda: appraise_guest(evidence, _NONCE.encode(), trust, selection),
        keylime={
            "nonce": _NONCE,
            "quote": encode_quote(attest, signature, evidence.pcrs),
            "ak": base64.b64encode(tpm.ak.marshal()).decode(),
            "policy": json.dumps({str(pcr): [tpm.pcrs[pcr].hex()] for pcr in _PCRS} | {"mask": "0xff"}),
            "clock": {
                "clock": before.clock,
                "resetcount": before.reset_count,
                "restartcount": before.restart_count,
                "safe": 1,
            },
        },
    )


def _sent(selection: PcrSelection) -> SentRequest:
    request = QuoteRequest(
        nonce=Nonce(bytes(range(32))),
        bank=BANK,
        mask=selection.mask(BANK),
        agent_id=AgentId(uuid.UUID(int=1)),
        binding=protocol.guest_binding(b"\x00\x0b" + bytes(32), b"guest evidence"),
    )
    return SentRequest(request=request, requester=bytes(32), vtpm_ek=bytes(32))


def _answer(tpm: SoftTpm, sent: SentRequest, trust: HostTrust) -> object:
    leaf = leaf_hash(leaf_data(sent.request, requester=sent.requester, vtpm_ek=sent.vtpm_ek))
    others = [leaf_hash(bytes([place])) for place in range(_LEAVES)]
    tree = MerkleTree([*others[:_PLACE], leaf, *others[_PLACE + 1 :]])
    attest, signature = tpm.quote(qualifying_data(tree.size, tree.root), sent.request.selection)
    shared = encode_shared(
        host_id=trust.host_id,
        attest=attest,
        signature=signature,
        pcrs=tpm.values(sent.request.selection),
        batch_id="1",
        sealed_at="2026-01-01T00:00:00Z",
    )
    return json.loads(json.dumps(shared | {"proof": encode_proof(tree.proof(_PLACE))}))


class Keylime:
    """Keylime's appraisals in their own environment; a context manager.

    Args:
        cases: by name.
    """

    def __init__(self, cases: dict[str, Case]) -> None:
        self._cases = cases

    def __enter__(self) -> Keylime:
        self._process = subprocess.Popen(
            [str(ENVIRONMENT / "bin" / "python"), "-I", str(_PROGRAM)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        said = self._ask(json.dumps({name: case.keylime for name, case in self._cases.items()}))
        if said != "ready":
            self.__exit__()
            raise SimulationError(f"Keylime cannot be measured ({said or 'it ended'}); {COMMAND} makes it anew")
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def cpu_s(self, name: str, count: int) -> float:
        """Seconds of CPU per appraisal. Raises SimulationError when it ended."""
        said = self._ask(f"{name} {count}")
        try:
            return float(said) / count
        except ValueError:
            raise SimulationError("Keylime's process ended while it was measured") from None

    def _ask(self, line: str) -> str:
        stdin, stdout = self._process.stdin, self._process.stdout
        if stdin is None or stdout is None:
            raise RuntimeError("the process was started with pipes")
        try:
            stdin.write(line + "\n")
            stdin.flush()
        except BrokenPipeError:
            return ""
        return stdout.readline().strip()


def run(options: BenchOptions) -> Result:
    """Times all appraisals, ours and Keylime's in turns.

    Raises:
        SimulationError: ``.keylime`` is there and cannot be used.
    """
    count = _QUICK_COUNT if options.quick else _COUNT
    cases = {name: make_case(template) for name, template in _KEYS.items()}
    _must_accept(cases)
    present = (ENVIRONMENT / ".ready").exists()
    result = Result(benchmark="appraise", method=_method(count, present=present))
    with ExitStack() as stack:
        keylime = stack.enter_context(Keylime(cases)) if present else None
        for name, case in cases.items():
            options.say(f"appraising quotes signed with {name}")
            ours: list[float] = []
            guests: list[float] = []
            theirs: list[float] = []
            for turn in range(options.repetitions + 1):
                timed = (_cpu_s(case.host, count), _cpu_s(case.guest, count))
                baseline = None if keylime is None else keylime.cpu_s(name, count)
                if turn:  # the first one warms up
                    ours.append(timed[0])
                    guests.append(timed[1])
                    theirs += [] if baseline is None else [baseline]
            result.add(*_rows(name, ours, guests, theirs))
    return result


def _rows(name: str, ours: list[float], guests: list[float], theirs: list[float]) -> list[Measured]:
    host, guest = Sample.of(ours).scaled(1e6), Sample.of(guests).scaled(1e6)
    titles = f"appraisal of one host answer, {name}", f"appraisal of one guest answer, {name}"
    if not theirs:
        return [_without_baseline(title, sample) for title, sample in zip(titles, (host, guest), strict=True)]
    baseline = Sample.of(theirs).scaled(1e6)
    of = "Keylime's check_quote"
    return [
        at_most(titles[0], host, unit="µs", limit=1.0, baseline=baseline, of=of),
        at_most(titles[1], guest, unit="µs", limit=1.0, baseline=baseline, of=of),
    ]


def _without_baseline(name: str, sample: Sample) -> Measured:
    measured = reported(name, sample, unit="µs")
    row = measured.row
    target = f"<= 1 x Keylime's check_quote, which is missing here: {COMMAND}"
    return Measured(row=Row(name=row.name, target=target, value=row.value, unit=row.unit, ok=False), sample=sample)


def _must_accept(cases: dict[str, Case]) -> None:
    for name, case in cases.items():
        for verdict in (case.host(), case.guest()):
            if not isinstance(verdict, Accepted):
                raise SimulationError(f"a quote signed with {name} was not accepted: {verdict.detail}")


def _cpu_s(act: Callable[[], object], count: int) -> float:
    before = time.process_time()
    for _ in range(count):
        act()
    return (time.process_time() - before) / count


def _method(count: int, *, present: bool) -> list[str]:
    method = [
        f"one quote over PCR 0 to 7 of the SHA-256 bank, all in the policy; a tree of {_LEAVES} leaves; CPU time of "
        f"{count} appraisals in a row, ours and Keylime's in turns, each in its own process",
        "both sides begin with parsed JSON: ours with the results of an answer, Keylime's with its quote string",
    ]
    if present:
        versions = (Path(harness.__file__).parents[1] / "tools" / "keylime.txt").read_text(encoding="utf-8")
        release = next(line for line in versions.splitlines() if line.startswith("keylime=="))
        method.append(f"Keylime is the stock release {release} in .keylime, its log kept to warnings")
    return method
