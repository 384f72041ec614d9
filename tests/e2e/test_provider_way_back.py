"""The provider operator's way back: hosts removed and replaced, guests moved, tenants removed; each act audited."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from harness.errors import AccessDenied, ChallengeFailed, Conflict, NotFound
from harness.pki import Role
from harness.values import HostId
from tests.e2e import test_provider_registrar as base
from tests.e2e.test_provider_registrar import GUEST, HOST, OTHER, OTHER_HOST, STRANGERS, Site, register
from tests.support.enrolment_parties import SoftVtpm
from tests.support.pendings import allow
from tests.support.provider_lab import Pki

NEW = OTHER_HOST
WHO = "provider/provider-operator/x"
ANNOUNCED = {"name": "host-1", "url": "https://host-1:2"}


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with base.registrar(tmp_path, Pki.make(tmp_path / "pki", "alice", "bob")) as running:
        await running.fill()
        yield running


async def call(site: Site, method: str, path: str, body: object = None) -> Any:
    return await site.client("provider", Role.PROVIDER_OPERATOR).call(method, path, body=body)


async def acts(site: Site) -> list[tuple[str, str, str]]:
    entries = (await call(site, "GET", "/v1/audit"))["entries"]
    assert {entry["who"] for entry in entries} == {WHO}
    return [(entry["action"], entry["subject"], entry["reason"]) for entry in entries]


async def replace(site: Site) -> Any:
    """The host's agent has announced its new TPM; the operator knows of it."""
    with pytest.raises(Conflict):
        await site.host_agent().put(f"/v1/hosts/{NEW}", ANNOUNCED)
    body = {"host_id": str(NEW), "reason": "the mainboard was replaced"}
    return await call(site, "PUT", f"/v1/hosts/{HOST}/replace", body)


# --- hosts ------------------------------------------------------------------------------------------------


async def test_a_host_without_guests_is_removed_with_its_allowlists(site: Site) -> None:
    """409 while guests are defined on it; afterwards nothing of it is left, and its agent may announce itself anew."""
    await site.operator.allow("alice", HOST, allow([0]))
    with pytest.raises(Conflict, match="guests are defined"):
        await call(site, "DELETE", f"/v1/hosts/{HOST}?reason=sold")
    for agent_id in (GUEST, OTHER, STRANGERS):
        await site.operator.remove_guest(agent_id)
    await call(site, "DELETE", f"/v1/hosts/{HOST}?reason=sold")
    assert await site.operator.hosts() == []
    assert (await site.operator.tenants())[0]["allowlists"] == {}
    assert (await acts(site))[-1] == ("host-remove", str(HOST), "sold")
    with pytest.raises(NotFound):
        await call(site, "DELETE", f"/v1/hosts/{HOST}?reason=sold")
    await site.host_agent().put(f"/v1/hosts/{HOST}", ANNOUNCED)
    assert [host["host_id"] for host in await site.operator.hosts()] == [str(HOST)]


async def test_a_new_tpm_under_a_known_name_is_refused_and_shown(site: Site) -> None:
    """The refusal names the command; the host shows which id its agent announces, until it announces the known one."""
    with pytest.raises(Conflict, match=f"harness provider host replace {HOST} {NEW}"):
        await site.host_agent().put(f"/v1/hosts/{NEW}", ANNOUNCED)
    [shown] = await site.operator.hosts()
    assert (shown["host_id"], shown["replacement"], shown["url"]) == (str(HOST), str(NEW), "https://host-1:1")
    await site.host_agent().put(f"/v1/hosts/{HOST}", ANNOUNCED)
    assert (await site.operator.hosts())[0]["replacement"] is None


async def test_a_new_tpm_is_told_once_among_the_events(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    """However often the agent tries."""
    for _ in range(3):
        with pytest.raises(Conflict):
            await site.host_agent().put(f"/v1/hosts/{NEW}", ANNOUNCED)
    told = [line for line in "".join(capsys.readouterr()).splitlines() if '"host_replaced"' in line]
    assert len(told) == 1
    assert str(NEW) in told[0]


async def test_a_replaced_host_keeps_its_guests_and_allowlists(site: Site) -> None:
    """In one step; the agent's next announcement is taken, and the old TPM's is not."""
    await site.operator.allow("alice", HOST, allow([0, 7]))
    await register(site)
    answer = await replace(site)
    assert (answer["host_id"], sorted(answer["guests"])) == (
        str(NEW),
        sorted(str(each) for each in (GUEST, OTHER, STRANGERS)),
    )
    await site.host_agent().put(f"/v1/hosts/{NEW}", ANNOUNCED)
    assert await site.operator.hosts() == [{**ANNOUNCED, "host_id": str(NEW), "replacement": None}]
    assert (await site.operator.tenants())[0]["allowlists"] == {str(NEW): {"sha256": [0, 7]}}
    assert {guest["host_id"] for guest in await site.operator.guests()} == {str(NEW)}
    assert (await acts(site))[-1] == ("host-replace", f"{HOST} by {NEW}", "the mainboard was replaced")
    with pytest.raises(Conflict):
        await site.host_agent().put(f"/v1/hosts/{HOST}", ANNOUNCED)


async def test_guests_of_a_replaced_host_register_anew(site: Site) -> None:
    """Their vTPMs are manufactured anew: other keys are no changed keys then, and a challenge of before is void."""
    await register(site)
    assert (await site.guest())["registered"]
    await replace(site)
    assert not (await site.guest())["registered"]
    await register(site)  # a vTPM of its own
    assert (await site.guest())["registered"]


async def test_what_a_tenant_may_see_of_the_new_host_is_not_replaced(site: Site) -> None:
    """An allowlist that was set for the new id beforehand stays."""
    await site.operator.allow("alice", HOST, allow([0, 7]))
    await site.operator.allow("alice", NEW, allow([1]))
    await site.operator.allow("bob", HOST, allow([2]))
    await replace(site)
    shown = {tenant["name"]: tenant["allowlists"] for tenant in await site.operator.tenants()}
    assert shown == {"alice": {str(NEW): {"sha256": [1]}}, "bob": {str(NEW): {"sha256": [2]}}}


async def test_a_host_becomes_only_the_one_that_its_own_agent_announces(site: Site) -> None:
    """409 before anything was announced, for another id, and when the agent announced the known TPM again meanwhile."""
    third = HostId(uuid.uuid4())
    path, reason = f"/v1/hosts/{HOST}/replace", "the mainboard was replaced"
    before = (await site.operator.guests(), await acts(site))
    with pytest.raises(Conflict, match="has not announced"):
        await call(site, "PUT", path, {"host_id": str(NEW), "reason": reason})
    with pytest.raises(Conflict):
        await site.host_agent().put(f"/v1/hosts/{NEW}", ANNOUNCED)
    with pytest.raises(Conflict, match="has not announced"):
        await call(site, "PUT", path, {"host_id": str(third), "reason": reason})
    await site.host_agent().put(f"/v1/hosts/{HOST}", ANNOUNCED)
    with pytest.raises(Conflict, match="has not announced"):
        await call(site, "PUT", path, {"host_id": str(NEW), "reason": reason})
    assert (await site.operator.guests(), await acts(site)) == before
    assert [host["host_id"] for host in await site.operator.hosts()] == [str(HOST)]


async def test_a_host_takes_the_place_of_no_known_one(site: Site) -> None:
    """Nor of one that is not there; nothing has changed then."""
    await site.host_agent("host-2").put(f"/v1/hosts/{NEW}", {"name": "host-2", "url": "https://h"})
    before = (await site.operator.hosts(), await site.operator.guests(), await acts(site))
    with pytest.raises(Conflict, match=str(NEW)):
        await replace(site)
    body = {"host_id": str(HOST), "reason": "x"}
    with pytest.raises(NotFound):
        await call(site, "PUT", f"/v1/hosts/{GUEST}/replace", body)
    assert (await site.operator.hosts(), await site.operator.guests(), await acts(site)) == before


# --- guests -----------------------------------------------------------------------------------------------


async def test_a_guest_is_moved_and_registers_anew(site: Site) -> None:
    """Onto a known host, which is another one; the old host may be removed when its guests have left."""
    await site.host_agent("host-2").put(f"/v1/hosts/{NEW}", {"name": "host-2", "url": "https://h"})
    await register(site)
    body = {"host_id": str(NEW), "reason": "host-1 is sold"}
    await call(site, "PUT", f"/v1/guests/{GUEST}/host", body)
    moved = await site.guest()
    assert (moved["host_id"], moved["registered"], moved["ip"], moved["state"]) == (str(NEW), False, None, None)
    assert (await acts(site))[-1] == ("guest-move", str(GUEST), "host-1 is sold")
    await register(site)
    with pytest.raises(Conflict):
        await call(site, "PUT", f"/v1/guests/{GUEST}/host", body)
    with pytest.raises(NotFound):
        await call(site, "PUT", f"/v1/guests/{GUEST}/host", body | {"host_id": str(GUEST)})
    with pytest.raises(NotFound):
        await call(site, "PUT", f"/v1/guests/{HOST}/host", body)
    assert (await site.guest())["registered"]


async def test_a_moved_guests_open_challenge_is_void(site: Site) -> None:
    """It was made for a vTPM of the old host."""
    await site.host_agent("host-2").put(f"/v1/hosts/{NEW}", {"name": "host-2", "url": "https://h"})
    tag = await base.challenge(site, SoftVtpm())
    await call(site, "PUT", f"/v1/guests/{GUEST}/host", {"host_id": str(NEW), "reason": "x"})
    with pytest.raises(ChallengeFailed):
        await base.answer(site, tag)


# --- the audit trail --------------------------------------------------------------------------------------


async def test_every_act_is_in_the_audit_trail_once(site: Site) -> None:
    """With who and why, where one was given; what changes nothing has no entry."""
    assert [act[0] for act in await acts(site)] == ["tenant-add"] * 2 + ["guest-define"] * 3
    await site.operator.add_tenant("alice", site.pki.pem("alice"))
    await site.operator.define_guest(GUEST, "alice", HOST, "web")
    assert len(await acts(site)) == 5
    await call(site, "PUT", f"/v1/tenants/alice/allowlists/{HOST}?reason=more%20PCRs", {"sha256": [0]})
    await call(site, "DELETE", f"/v1/guests/{STRANGERS}?reason=left")
    await site.operator.remove_tenant("bob")
    assert (await acts(site))[5:] == [
        ("allowlist-set", f"alice on {HOST}", "more PCRs"),
        ("guest-remove", str(STRANGERS), "left"),
        ("tenant-remove", "bob", "(not stated)"),
    ]


async def test_a_refused_act_is_not_in_the_audit_trail(site: Site) -> None:
    """Neither one that conflicts, nor one of somebody who may not."""
    before = await acts(site)
    with pytest.raises(Conflict):
        await call(site, "DELETE", "/v1/tenants/alice?reason=x")
    with pytest.raises(NotFound):
        await call(site, "DELETE", f"/v1/guests/{NEW}?reason=x")
    with pytest.raises(AccessDenied):
        await site.host_agent().call("DELETE", f"/v1/guests/{GUEST}")
    assert await acts(site) == before
