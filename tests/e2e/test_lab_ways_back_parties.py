"""Tenants that leave and come back, and a host whose TPM is another one: every party's commands, in a lab that runs."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from tests.support.ways_back import WaysBack, raises, ways_back

pytestmark = [pytest.mark.needs_swtpm, pytest.mark.timeout(900)]

TOPOLOGY = """\
hosts: {host1: {chip: swtpm}}
tenants:
  alice: {quote_interval_s: 1, guests: {vm1: }}
  bob: {quote_interval_s: 1, guests: {vm2: }}
"""


@pytest.fixture(scope="module")
def lab() -> Iterator[WaysBack]:
    """A lab with two tenants; tests leave the guests of both attested."""
    with ways_back(TOPOLOGY) as running:
        yield running


def _host_id(lab: WaysBack) -> str:
    """Id of the host as the provider knows it now."""
    return str(next(host["host_id"] for host in lab.json("provider", "host", "list") if host["name"] == "host1"))


@raises("KeyChanged")
def test_a_tenant_that_is_removed_and_onboarded_again(lab: WaysBack) -> None:
    """Not while it has guests; then its certificates are refused, the other tenant goes on, and it can come back."""
    since = time.time()
    refused = lab.act("provider", "tenant", "remove", "bob", code=1)
    assert "has guests" in refused.stderr
    lab.act("provider", "guest", "remove", "vm2")
    lab.act("provider", "tenant", "remove", "bob")
    lab.see("vm2 not attested", lambda shown: not shown["vm2"]["attested"])
    lab.until("bob refused", lambda: lab.run("tenant", "host", "add", "--tenant", "bob").returncode == 1)
    lab.attested("vm1")

    lab.act("provider", "tenant", "add", "bob", "--ca", ".lab/pki/bob/ca.pem")
    lab.act("provider", "tenant", "allow", "bob", "--pcrs", "0-15")
    lab.act("provider", "guest", "release", lab.ids["vm2"], "--host", "host1")
    lab.do("provider", "guest", "define", "vm2", "--uuid", lab.ids["vm2"], "--tenant", "bob")
    lab.do("provider", "guest", "start", "vm2")
    lab.until("KeyChanged", lambda: "KeyChanged" in lab.alarms("bob"))
    lab.act("tenant", "guest", "re-enrol", "vm2", "--tenant", "bob")
    lab.settled("KeyChanged")
    acts = {"tenant-add", "tenant-remove", "allowlist-set", "guest-remove", "vtpm-release"}
    assert lab.acts(None, since) == acts
    assert lab.acts("alice", since) == set()


def test_a_host_with_guests_is_not_removed(lab: WaysBack) -> None:
    """The provider's registrar says which guests it is about, and every guest goes on."""
    refused = lab.act("provider", "host", "remove", "host1", code=1)
    assert "guests are defined on host" in refused.stderr
    lab.attested()


@raises(perhaps=("WrongHost", "GuestNotHere", "CertificateRefused", "KeyChanged", "NotYourGuest", "PeerUnreachable"))
def test_a_host_whose_tpm_was_replaced(lab: WaysBack) -> None:
    """Its guests are attested again under the new id after provider, host and each tenant have done their parts."""
    since, old = time.time(), _host_id(lab)
    lab.of_host({"op": "replace"})
    lab.do("lab", "restart", "host1-agent")  # the host was off meanwhile
    new = str(lab.until("another TPM", lambda: lab.json("provider", "host", "list")[0]["replacement"], 60))
    assert new[:8] in lab.do("provider", "host", "list").stdout
    lab.see("nobody attested", lambda shown: not any(guest["attested"] for guest in shown.values()))
    lab.act("provider", "host", "replace", "host1", new)
    lab.until("the new id", lambda: _host_id(lab) == new)
    for guest, tenant in (("vm1", "alice"), ("vm2", "bob")):
        lab.act("provider", "guest", "release", guest)
        lab.new_vtpm(guest, tenant)
        lab.do("tenant", "host", "add", "--tenant", tenant)
        lab.act("tenant", "host", "remove", old, "--tenant", tenant, code=1)
        lab.act("tenant", "guest", "re-enrol", guest, "--host", new[:8], "--tenant", tenant)
        lab.act("tenant", "host", "remove", old, "--tenant", tenant)
    kinds = {*lab.alarms("alice"), *lab.alarms("bob")}
    lab.settled(*kinds)
    assert lab.acts(None, since) == {"host-replace", "vtpm-release", "guest-remove"}
    wanted = {"guest-re-enrol", "agent-remove", "host-remove", "alarm-acknowledge"}
    assert lab.acts("alice", since) | {"alarm-acknowledge"} == wanted
