"""The stored form of a registrar snapshot: JSON text, so that a restarted verifier believes what it believed before.

Invariants:
    1. `decode_snapshot` gives back exactly what `encode_snapshot` was given.
"""

from __future__ import annotations

import json
from dataclasses import asdict, fields

from harness.errors import StoreError
from harness.tenant.agent_request import Snapshot
from harness.values import ClockBaseline, parse_host_id


def encode_snapshot(snapshot: Snapshot) -> str:
    """JSON text; bytes as hex."""
    members = {field.name: getattr(snapshot, field.name) for field in fields(snapshot)}
    members["host_id"] = str(snapshot.host_id)
    members["host_baseline"] = asdict(snapshot.host_baseline)
    return json.dumps({name: value.hex() if isinstance(value, bytes) else value for name, value in members.items()})


def decode_snapshot(text: str) -> Snapshot:
    """Snapshot from its stored form.

    Raises:
        StoreError: the row was not written by this program.
    """
    try:
        members = json.loads(text)
        return Snapshot(
            host_id=parse_host_id(members["host_id"]),
            guest_ek=bytes.fromhex(members["guest_ek"]),
            guest_ak=bytes.fromhex(members["guest_ak"]),
            mtls_cert=members["mtls_cert"],
            host_ak=bytes.fromhex(members["host_ak"]),
            host_ak_qualified_name=bytes.fromhex(members["host_ak_qualified_name"]),
            host_baseline=ClockBaseline(**members["host_baseline"]),
            host_enrolled_at=members["host_enrolled_at"],
            ip=members.get("ip"),
            port=members.get("port"),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreError("a stored snapshot cannot be read") from error
