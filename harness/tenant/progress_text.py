"""The stored form of a session's progress: JSON text that later versions of the program still read.

Invariants:
    1. Decoding gives back exactly what was encoded.
    2. A member that an earlier version did not write has the value that it had then: nothing.

Spec: docs/protocol.md (tenant verifier).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from harness.errors import MalformedMessage, StoreError
from harness.tenant.ports import PastVerdict, Progress, Reboot, Seen
from harness.tenant.states import State
from harness.values import ClockBaseline, HashAlg, PcrValues

_MEMBERS = [each.name for each in fields(Progress) if each.name not in {"state", "seen"}]
"""Members that have none of their own and share this one."""
_BUILT = {"host_baseline", "refused_reboot", "verdicts"}


def encode_progress(progress: Progress) -> str:
    """JSON text of everything but the state and the PCR values."""
    members = {name: getattr(progress, name) for name in _MEMBERS}
    reboot = progress.refused_reboot
    members |= {
        "host_baseline": _encode_clock(progress.host_baseline),
        "verdicts": [_members(verdict) for verdict in progress.verdicts],
        "refused_reboot": None
        if reboot is None
        else {
            "ak_name": reboot.ak_name.hex(),
            "old": _encode_clock(reboot.old),
            "new": _encode_clock(reboot.new),
        },
    }
    return json.dumps(members)


def decode_progress(text: str, state: State) -> Progress:
    """Progress from its stored form.

    Args:
        text: of this or an earlier version.
        state: from its own column.

    Raises:
        StoreError: the row was not written by this program.
    """
    try:
        members: dict[str, Any] = json.loads(text)
        members.pop("state", None)
        reboot = members.get("refused_reboot")
        return Progress(
            state=state,
            host_baseline=_decode_clock(members.get("host_baseline")),
            verdicts=tuple(PastVerdict(**each) for each in members.get("verdicts", ())),
            refused_reboot=None if reboot is None else _decode_reboot(reboot),
            **{name: value for name, value in members.items() if name not in _BUILT},
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreError("a stored progress cannot be read") from error


def pcrs_as_json(pcrs: PcrValues) -> dict[str, dict[str, str]]:
    """``{bank: {index: hex}}``, as in a quote's answer."""
    return {bank.text: {str(pcr): value.hex() for pcr, value in values.items()} for bank, values in pcrs.items()}


def encode_seen(seen: Mapping[str, Seen]) -> str | None:
    """JSON text of the PCR values seen, by layer; None when there are none."""
    if not seen:
        return None
    return json.dumps({layer: {"at": each.at, "pcrs": pcrs_as_json(each.pcrs)} for layer, each in seen.items()})


def decode_seen(text: str | None) -> dict[str, Seen]:
    """PCR values from their stored form.

    Raises:
        StoreError: the row was not written by this program.
    """
    try:
        members: dict[str, Any] = {} if text is None else json.loads(text)
        return {layer: Seen(at=each["at"], pcrs=_decode_pcrs(each["pcrs"])) for layer, each in members.items()}
    except (MalformedMessage, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreError("stored PCR values cannot be read") from error


def _decode_pcrs(banks: Mapping[str, Mapping[str, str]]) -> PcrValues:
    return {
        HashAlg.parse(bank): {int(pcr): bytes.fromhex(value) for pcr, value in values.items()}
        for bank, values in banks.items()
    }


def _encode_clock(baseline: ClockBaseline | None) -> dict[str, Any] | None:
    return None if baseline is None else _members(baseline)


def _members(value: PastVerdict | ClockBaseline) -> dict[str, Any]:
    """As `dataclasses.asdict`, which copies deeply what is plain here: each round encodes this."""
    return {name: getattr(value, name) for name in value.__slots__}


def _decode_clock(members: dict[str, Any] | None) -> ClockBaseline | None:
    return None if members is None else ClockBaseline(**members)


def _decode_reboot(members: Mapping[str, Any]) -> Reboot:
    return Reboot(
        ak_name=bytes.fromhex(members["ak_name"]),
        old=_decode_clock(members["old"]),
        new=ClockBaseline(**members["new"]),
    )
