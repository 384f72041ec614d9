"""How many connections an authority may have: whose a certificate is, and what is counted."""

from __future__ import annotations

from cryptography.hazmat.primitives.serialization import Encoding

from harness.door import Bounds
from harness.pki import Authority, Role
from harness.tls import Identities
from harness.web_connection import Shares


def certificate(authority: Authority, role: Role = Role.TENANT_VERIFIER, name: str = "v") -> bytes:
    return authority.issue(role, name).certificate.public_bytes(Encoding.DER)


def shares(bounds: Bounds, **authorities: Authority) -> Shares:
    """Shares at a service of the provider."""
    identities = Identities({"provider": authorities.pop("provider", Authority.create("provider")).certificate})
    for name, authority in authorities.items():
        identities.add(name, authority.certificate)
    return Shares(identities, lambda: "provider", bounds, lambda _: None)


def test_connections_count_for_the_authority_whatever_role_they_state() -> None:
    """Many certificates of one tenant, also with roles that it cannot give, have one share."""
    alice, bob = Authority.create("alice"), Authority.create("bob")
    made = shares(Bounds(per_authority=2), alice=alice, bob=bob)
    roles = (Role.TENANT_VERIFIER, Role.GUEST_AGENT, Role.PROVIDER_OPERATOR, Role.TENANT_REGISTRAR)
    entered = [made.enter(certificate(alice, role, f"n{number}")) for number, role in enumerate(roles)]
    assert entered == [("alice", 0), ("alice", 0), ("alice", 1), ("alice", 2)]
    assert made.enter(certificate(bob)) == ("bob", 0)
    for authority, _ in entered[:3]:
        made.leave(authority)
    assert made.enter(certificate(alice)) == ("alice", 0)


def test_who_has_no_known_authority_shares_with_all_of_those() -> None:
    """A removed tenant, whose handshake still succeeds, does not escape by being unknown; nor does what is no DER."""
    mallory, eve = Authority.create("mallory"), Authority.create("eve")
    made = shares(Bounds(per_authority=1))
    assert made.enter(certificate(mallory)) == (None, 0)
    assert made.enter(certificate(eve)) == (None, 1)
    assert made.enter(b"no certificate") == (None, 2)


def test_the_services_own_authority_has_no_bound_of_its_own() -> None:
    """The door's bound on all connections holds for it."""
    provider = Authority.create("provider")
    made = shares(Bounds(per_authority=1), provider=provider)
    assert [made.enter(certificate(provider, Role.PROVIDER_OPERATOR)) for _ in range(3)] == [("provider", 0)] * 3


def test_whose_key_signed_a_certificate_follows_the_authorities() -> None:
    """An authority that is added or removed is so at once, also for certificates that were seen before."""
    alice = Authority.create("alice")
    identities = Identities({"provider": Authority.create("provider").certificate})
    leaf = certificate(alice)
    assert identities.authority(leaf) is None
    identities.add("alice", alice.certificate)
    assert identities.authority(leaf) == "alice"
    identities.add("alice", Authority.create("alice").certificate)
    assert identities.authority(leaf) is None, "an authority is its key, not its name"
