"""How one guest, and a list of them, is shown: whether it is attested, by which chain of keys, and what to do if not.

Invariants:
    1. A guest is shown as attested only when the verifier says so now and its keys are pinned now.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from harness import cli_policy_view, cli_show
from harness.cli_advice import step_for, with_tenant
from harness.tenant.states import STOPPED_NAMES

Entry = Mapping[str, Any]

_FINGERPRINT = 16
_COLUMNS = ("guest", "name", "state", "attested", "payload", "why")
_WIDE_COLUMNS = ("guest", "name", "host", "state", "attested", "rounds", "payload", "why")
_VERDICT_COLUMNS = ("when", "verdict", "layer", "check", "error")
_DELIVERS = "PROVIDE_V"


def whole(found: Entry, policy: Entry | None) -> dict[str, Any]:
    """The object that `guest show --json` prints: guest, attestation, chain and policy."""
    guest = {name: value for name, value in found.items() if name not in {"attestation", "chain"}}
    return {
        "guest": guest,
        "attestation": found.get("attestation"),
        "chain": found.get("chain") or [],
        "policy": policy,
    }


def is_attested(guest: Entry, attestation: Entry | None) -> bool:
    """Whether a guest is attested now."""
    return guest.get("state") == "active" and (attestation or {}).get("attested") is True


# --- one guest --------------------------------------------------------------------------------------------


def draw(shown: Entry, name: str | None, tenant: str | None = None) -> None:
    """Print one guest for people.

    Args:
        shown: from `whole`.
        name: of the guest, if it is known.
        tenant: its tenant, where commands must state it.
    """
    from rich.text import Text

    from harness.console import console, print_table

    guest, attestation = shown["guest"], shown["attestation"]
    out = console()
    good = is_attested(guest, attestation)
    out.print(Text(lead(shown, name or guest["agent_id"], time.time()), style="green" if good else "bold red"))
    step = None if good else what_to_do(shown, name or guest["agent_id"])
    if step is not None:
        out.print(Text(f"What to do: {with_tenant(step, tenant)}"))
    print()
    for line in chain_lines(shown["chain"]):
        out.print(Text(line), overflow="ellipsis", no_wrap=True)
    if not shown["chain"]:
        print("no chain of keys: it has not registered")
    if attestation is not None:
        print()
        rows = [_verdict(verdict, time.time()) for verdict in attestation.get("last_verdicts") or ()]
        print_table(_VERDICT_COLUMNS, rows, empty="no verdict yet")
        print()
        for line in _facts(guest, attestation, shown["policy"]):
            out.print(Text(line))


def lead(shown: Entry, name: str, now: float) -> str:
    """The sentence that says how a guest stands."""
    guest, attestation = shown["guest"], shown["attestation"]
    if is_attested(guest, attestation):
        due = attestation.get("next_round_at")
        soon = "" if due is None else f"; next round in {max(0.0, due - now):.0f} s"
        return f"{name} is attested: last success {cli_show.ago(_success(attestation), now)}{soon}"
    return f"{name} is NOT attested: {_why(guest, attestation, now)}"


def _why(guest: Entry, attestation: Entry | None, now: float) -> str:
    refused = guest.get("refused")
    if guest.get("state") != "active":
        if refused:
            return f"its registration was refused, {refused.get('error')}: {refused.get('detail')}"
        return "it is stated and has not registered"
    if attestation is None:
        return "it has registered and is not under attestation"
    state, found = cli_show.text(attestation.get("state")), finding(attestation)
    if state in STOPPED_NAMES or found:
        detail = attestation.get("detail")
        return f"{state}{', ' if found else ''}{found}" + (f": {detail}" if detail else "")
    success = _success(attestation)
    return f"{state}, " + ("no verdict yet" if success is None else f"last success {cli_show.ago(success, now)}")


def finding(attestation: Entry) -> str:
    """What was found, such as ``host evidence failed check 9 (ReferenceValueMismatch)``; empty when nothing was."""
    layer, check, error = (attestation.get(name) for name in ("layer", "failed_check", "error"))
    if check:
        return f"{layer or 'the'} evidence failed check {check}" + (f" ({error})" if error else "")
    return str(error) if error else ""


def brief(layer: object, check: object, error: object) -> str:
    """The same in a cell of an overview, such as ``host, check 9: ReferenceValueMismatch``."""
    where = ", ".join(str(part) for part in (layer, f"check {check}") if part) if check else ""
    return ": ".join(str(part) for part in (where, error) if part)


def what_to_do(shown: Entry, name: str) -> str | None:
    """The step that brings a guest back, with the command to type."""
    guest, attestation = shown["guest"], shown["attestation"]
    host = str(guest.get("host_id"))
    if guest.get("state") != "active":
        refused = guest.get("refused") or {}
        start = f"start it with `harness provider guest start {name}`, then `harness tenant guest add {name}`"
        return step_for(refused.get("error"), guest=name, host=host) or start
    if attestation is None:
        return f"`harness tenant guest add {name}` puts it under attestation"
    state = attestation.get("state")
    if state not in STOPPED_NAMES:
        return None  # the verifier goes on by itself
    step = step_for(attestation.get("error"), guest=name, host=host)
    return step if step and name in step else step_for(state, guest=name, host=host)  # a guest that stopped is resumed


def chain_lines(chain: Sequence[Entry]) -> list[str]:
    """From the vendor's root to the guest's AK, one step deeper each, with short fingerprints."""
    return [
        f"{'  ' * depth}{'└ ' if depth else ''}{link.get('what')} {str(link.get('sha256'))[:_FINGERPRINT]}  "
        f"{cli_show.text(link.get('name'))}"
        for depth, link in enumerate(chain)
    ]


def _success(attestation: Entry) -> object:
    return attestation.get("last_successful_attestation")


def _verdict(verdict: Entry, now: float) -> tuple[str, ...]:
    return (
        cli_show.ago(verdict.get("at"), now),
        "accepted" if verdict.get("accepted") else "refused",
        *(cli_show.text(verdict.get(name)) for name in ("layer", "failed_check", "error")),
    )


def _facts(guest: Entry, attestation: Entry, policy: Entry | None) -> list[str]:
    quotes = "no quotes of the host"
    if attestation.get("need_provider_quote"):
        number = attestation.get("provider_quote_interval")
        rounds = "each round" if number == 1 else f"every {number}th round"
        quotes = f"a host quote in {rounds} from {attestation.get('provider_verifier')}"
    lines = [
        f"guest {guest.get('agent_id')} on host {guest.get('host_id')}",
        f"agent at {attestation.get('ip')}:{attestation.get('port')}; {quotes}",
        f"{_payload(attestation, 'payload released', 'payload not released')}; {_rounds(attestation)} accepted",
    ]
    return lines + ([cli_policy_view.summary(policy, layer) for layer in cli_policy_view.LAYERS] if policy else [])


def _payload(attestation: Entry, released: str, locked: str) -> str:
    if attestation.get("payload_released"):
        return released
    # one that is there is on its way as soon as a guest is attested
    attested = attestation.get("attested") is True and attestation.get("state") != _DELIVERS
    return "no payload" if attested else locked


def _rounds(attestation: Entry) -> str:
    number = attestation.get("attestation_count")
    return "1 round" if number == 1 else f"{cli_show.text(number)} rounds"


# --- a list -----------------------------------------------------------------------------------------------


def draw_list(guests: list[Mapping[str, Any]], names: Mapping[str, str], *, as_json: bool) -> None:
    """Print guests: as the services answered them for programs, as a table for people."""
    wide = cli_show.is_wide()
    short = cli_show.shortener((guest.get(name) for guest in guests for name in ("agent_id", "host_id")), wide=wide)

    def row(guest: Entry) -> tuple[str, ...]:
        session = guest.get("attestation") or {}
        refused = guest.get("refused") or session
        cells = {
            "guest": short(guest["agent_id"]),
            "name": names.get(guest["agent_id"], "-"),
            "host": short(guest.get("host_id")),
            "state": cli_show.text(
                session.get("state") or ("registered" if guest.get("state") == "active" else "stated")
            ),
            "attested": cli_show.text(is_attested(guest, session)),
            "rounds": cli_show.text(session.get("attestation_count")),
            "payload": _payload(session, "released", "locked"),
            "why": " ".join(cli_show.text(refused[name]) for name in ("error", "detail") if refused.get(name)),
        }
        return tuple(cells[column] for column in (_WIDE_COLUMNS if wide else _COLUMNS))

    columns = _WIDE_COLUMNS if wide else _COLUMNS
    cli_show.show(guests, row, columns, as_json=as_json, empty="no guest is stated")
