"""Service certificates, and who their owners are."""

from __future__ import annotations

import datetime
import errno
import ipaddress
import os
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID

from harness.errors import AccessDenied, ConfigError
from harness.pki import TENANT_ROLES, URN, Authority, Issued, Role, load_certificate, load_issued, load_key, renew
from harness.private_file import write_private
from harness.tls import Identities, certificate_requester

AT = datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC)


def der(issued: Issued) -> bytes:
    return issued.certificate.public_bytes(Encoding.DER)


def test_roles_are_those_of_the_contract() -> None:
    """The roles on the wire are a closed list."""
    assert {role.value for role in Role} == {
        *("host-agent", "provider-verifier", "provider-registrar", "provider-operator"),
        *("tenant-registrar", "tenant-verifier", "tenant-operator", "guest-agent"),
    }


def test_a_certificate_says_who_and_where() -> None:
    """A leaf is no CA, serves as both ends, and names its role, addresses, key and authority's key."""
    authority = Authority.create("alice", at=AT)
    leaf = authority.issue(
        Role.TENANT_VERIFIER, "v1", hosts=["10.0.0.1", "::1", "v.example"], at=AT, days=2
    ).certificate
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.UniformResourceIdentifier) == [f"{URN}tenant-verifier:v1"]
    assert names.get_values_for_type(x509.DNSName) == ["v.example"]
    assert names.get_values_for_type(x509.IPAddress) == [ipaddress.ip_address("10.0.0.1"), ipaddress.ip_address("::1")]
    assert leaf.extensions.get_extension_for_class(x509.BasicConstraints).value.ca is False
    assert set(leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) == {
        ExtendedKeyUsageOID.SERVER_AUTH,
        ExtendedKeyUsageOID.CLIENT_AUTH,
    }
    own = authority.certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value.digest
    assert leaf.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value.key_identifier == own
    assert leaf.not_valid_after_utc == AT + datetime.timedelta(days=2)
    assert isinstance(leaf.public_key(), ec.EllipticCurvePublicKey)
    leaf.verify_directly_issued_by(authority.certificate)


def test_an_authority_signs_leaves_only() -> None:
    """An authority's path length is 0: it cannot make further authorities."""
    constraints = Authority.create("a").certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
    assert (constraints.ca, constraints.path_length) == (True, 0)


def test_renewal_keeps_the_key(tmp_path: Path) -> None:
    """A renewed certificate has another serial number and the same requester (DESIGN 3.2)."""
    authority = Authority.create("alice")
    old = authority.issue(Role.TENANT_VERIFIER, "v")
    kept = load_issued(*old.write(tmp_path, "v"))
    new = authority.issue(Role.TENANT_VERIFIER, "v", key=kept.key)
    assert new.certificate.serial_number != old.certificate.serial_number
    assert certificate_requester(new.certificate) == certificate_requester(old.certificate)
    assert certificate_requester(authority.issue(Role.TENANT_VERIFIER, "v").certificate) != certificate_requester(
        old.certificate
    )


def test_files_are_private_and_whole(tmp_path: Path) -> None:
    """Certificates and keys are written with mode 0600 whatever the umask is, and leave nothing beside them."""
    before = os.umask(0)
    try:
        Authority.create("alice").write(tmp_path / "pki")
        Authority.create("alice").write(tmp_path / "pki")
    finally:
        os.umask(before)
    files = sorted((tmp_path / "pki").iterdir())
    assert [file.name for file in files] == ["ca.key", "ca.pem"]
    assert {file.stat().st_mode & 0o777 for file in files} == {0o600}
    assert (tmp_path / "pki").stat().st_mode & 0o777 == 0o700


def test_a_failed_write_changes_nothing(tmp_path: Path) -> None:
    """A file that cannot be put in place leaves neither a half file nor a changed target."""
    (tmp_path / "taken" / "inside").mkdir(parents=True)
    with pytest.raises(OSError):
        write_private(tmp_path / "taken", b"x")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_a_full_disk_is_told_with_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system names none when a descriptor is written to; the file that was there is whole."""

    def refuse(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    write_private(tmp_path / "file", b"old")
    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError) as caught:
        write_private(tmp_path / "file", b"new")
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(tmp_path / "file"))
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("file", b"old")]


def test_an_authority_comes_back_from_its_files(tmp_path: Path) -> None:
    """A loaded authority issues certificates that its certificate verifies."""
    authority = Authority.create("alice")
    authority.write(tmp_path)
    again = Authority.load(tmp_path)
    again.issue(Role.GUEST_AGENT, "g").certificate.verify_directly_issued_by(authority.certificate)


def test_the_key_of_another_authority_is_refused(tmp_path: Path) -> None:
    """An authority's files must belong together, else it would issue certificates that nobody accepts."""
    Authority.create("alice").write(tmp_path / "a")
    Authority.create("alice").write(tmp_path / "b")
    (tmp_path / "a" / "ca.key").write_bytes((tmp_path / "b" / "ca.key").read_bytes())
    with pytest.raises(ConfigError, match=r"ca\.key: is not the key of"):
        Authority.load(tmp_path / "a")


@pytest.mark.parametrize("content", [None, b"", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"])
def test_unusable_files_are_named(tmp_path: Path, content: bytes | None) -> None:
    """A missing, an empty and a broken file: the error names it."""
    path = tmp_path / "x.pem"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"x\.pem: "):
        load_certificate(path)
    with pytest.raises(ConfigError, match=r"x\.pem: "):
        load_key(path)


# --- who a peer is ------------------------------------------------------------------------------------------


def forged(authority: Authority, *names: x509.GeneralName) -> bytes:
    """A certificate with the authority's name as issuer and these names, signed by a key of our own choice."""
    key = ec.generate_private_key(ec.SECP256R1())
    builder = (
        x509.CertificateBuilder()
        .subject_name(authority.certificate.subject)
        .issuer_name(authority.certificate.subject)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(AT)
        .not_valid_after(AT + datetime.timedelta(days=9000))
    )
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    return builder.sign(signing_key(authority), hashes.SHA256()).public_bytes(Encoding.DER)


def signing_key(authority: Authority) -> ec.EllipticCurvePrivateKey:
    return authority._own.key


def uri(text: str) -> x509.GeneralName:
    return x509.UniformResourceIdentifier(text)


def test_the_authority_is_the_key_that_signed() -> None:
    """Two authorities with the same name are told apart by their keys."""
    alice, bob = Authority.create("tenant"), Authority.create("tenant")
    assert alice.certificate.subject == bob.certificate.subject
    identities = Identities({"alice": alice.certificate, "bob": bob.certificate})
    leaf = bob.issue(Role.TENANT_VERIFIER, "v")
    peer = identities.peer(der(leaf))
    assert (peer.authority, peer.role, peer.name) == ("bob", Role.TENANT_VERIFIER, "v")
    assert peer.requester == certificate_requester(leaf.certificate)
    assert len(peer.requester) == 32


def test_an_unknown_key_with_a_known_name_is_refused() -> None:
    """The issuer's name proves nothing."""
    identities = Identities({"alice": Authority.create("tenant").certificate})
    with pytest.raises(AccessDenied, match="no authority"):
        identities.peer(der(Authority.create("tenant").issue(Role.TENANT_VERIFIER, "v")))


ROLES: list[tuple[list[x509.GeneralName], bool]] = [
    ([uri(f"{URN}guest-agent:g")], True),
    ([uri(f"{URN}guest-agent:g"), x509.DNSName("g.example")], True),
    ([uri(f"{URN}guest-agent:a:b")], True),
    ([], False),
    ([x509.DNSName("g.example")], False),
    ([uri(f"{URN}guest-agent:g"), uri(f"{URN}provider-operator:g")], False),
    ([uri(f"{URN}guest-agent:g"), uri("https://g.example")], False),
    ([uri("urn:uuid:guest-agent:g")], False),
    ([uri(f"{URN}Guest-Agent:g")], False),
    ([uri(f"{URN}root:g")], False),
    ([uri(f"{URN}guest-agent:")], False),
    ([uri(f"{URN}guest-agent")], False),
    ([uri(f"{URN}:g")], False),
]


@pytest.mark.parametrize(("names", "honest"), ROLES)
def test_exactly_one_uri_states_role_and_name(names: list[x509.GeneralName], honest: bool) -> None:
    """No, a second, an unknown or a nameless role in a certificate: its owner may do nothing."""
    authority = Authority.create("alice")
    identities = Identities({"alice": authority.certificate})
    certificate = forged(authority, *names)
    if honest:
        assert identities.peer(certificate).role is Role.GUEST_AGENT
    else:
        with pytest.raises(AccessDenied):
            identities.peer(certificate)


def test_authorities_come_and_go() -> None:
    """An authority that was added is known at once; one that was removed is forgotten, cached peers included."""
    alice, bob = Authority.create("alice"), Authority.create("bob")
    identities = Identities({"alice": alice.certificate})
    leaf = der(bob.issue(Role.TENANT_REGISTRAR, "r"))
    with pytest.raises(AccessDenied):
        identities.peer(leaf)
    identities.add("bob", bob.certificate)
    assert identities.peer(leaf).authority == "bob"
    assert identities.names == {"alice", "bob"}
    identities.remove("bob")
    with pytest.raises(AccessDenied):
        identities.peer(leaf)
    identities.remove("bob")


@pytest.mark.parametrize("role", list(Role))
def test_a_tenant_cannot_give_the_providers_roles(role: Role) -> None:
    """An authority that was added while the server runs vouches for tenants' roles only; one from the settings for
    all. (A tenant that signs itself a provider-operator would else be one.)"""
    provider, alice = Authority.create("provider"), Authority.create("alice")
    identities = Identities({"provider": provider.certificate})
    identities.add("alice", alice.certificate)
    assert identities.peer(der(provider.issue(role, "x"))).role is role
    certificate = der(alice.issue(role, "x"))
    if role in TENANT_ROLES:
        assert identities.peer(certificate).authority == "alice"
    else:
        with pytest.raises(AccessDenied, match=f"alice cannot make anybody a {role.value}"):
            identities.peer(certificate)


def test_the_tenants_roles_are_a_closed_list() -> None:
    """No role of the provider's is among those that a tenant may give."""
    assert {role for role in Role if role.value.startswith(("tenant-", "guest-"))} == TENANT_ROLES


def test_a_renewal_keeps_key_role_name_and_addresses() -> None:
    """The requester stays what it was; only serial number and validity are new."""
    authority = Authority.create("alice")
    old = authority.issue(Role.GUEST_AGENT, "g", hosts=("127.0.0.1", "g.example", "::1"), days=1)
    new = renew(authority, old, days=100)
    assert certificate_requester(new.certificate) == certificate_requester(old.certificate)
    assert new.key is old.key
    before, after = (
        set(issued.certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value)
        for issued in (old, new)
    )
    assert before == after
    assert new.certificate.serial_number != old.certificate.serial_number
    assert new.certificate.not_valid_after_utc - old.certificate.not_valid_after_utc > datetime.timedelta(days=98)


def test_what_another_authority_made_is_not_renewed() -> None:
    """An authority of the same name renews only what it signed itself, and only owners with a role."""
    mine, other = Authority.create("alice"), Authority.create("alice")
    with pytest.raises(ConfigError):
        renew(mine, other.issue(Role.GUEST_AGENT, "g"))
    with pytest.raises(ConfigError):
        renew(mine, Issued(certificate=mine.certificate, key=mine.issue(Role.GUEST_AGENT, "g").key))
