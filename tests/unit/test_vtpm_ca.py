"""The vTPM CA: what a request may hold, when a certificate is issued, and what it says."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID

from harness.certificates import EK_OID, PLATFORM_OID, verify_vtpm_certificate
from harness.errors import (
    CertificateRefused,
    CloneSuspected,
    Conflict,
    DeviceUnavailable,
    GuestNotHere,
    HarnessError,
    MalformedMessage,
    NotReady,
)
from harness.provider.journal import ECC_EK, PLATFORM, RSA_EK, Journal
from harness.provider.tables import HOST_SCHEMA, HostBase
from harness.provider.vtpm_ca import IssueRequest, VtpmCa, parse_issue_request, spki_digest
from harness.store import open_store
from harness.values import AgentId
from tests.support.enrolment_parties import SoftVtpm
from tests.support.pendings import agent
from tests.support.vtpm_host import SoftCa

GUEST, OTHER = agent(0xABC), agent(0xABD)
NOW = datetime(2026, 6, 1, tzinfo=UTC)
VTPM, STRANGER = SoftVtpm(), SoftVtpm()
MODULUS = f"{VTPM.ek_key.public_key().public_numbers().n:0512x}"
POINT = ec.generate_private_key(ec.SECP384R1()).public_key().public_numbers()
ECC = f"x={POINT.x:096x},y={POINT.y:096x},id=secp384r1"
TPM = {"manufacturer": "id:00001014", "model": "swtpm", "version": "id:20191023"}


def members(**changes: Any) -> dict[str, Any]:
    """What the tool sends, with members changed."""
    return {"type": "ek", "ek": MODULUS, "vmid": f"vm-1:{GUEST}", "tpm": TPM} | changes


def request(agent_id: AgentId = GUEST, **changes: Any) -> IssueRequest:
    return parse_issue_request(members(vmid=f"vm-1:{agent_id}", **changes))


# --- requests -------------------------------------------------------------------------------------------------


def test_a_request_for_an_rsa_ek_is_taken_as_it_is() -> None:
    """Key, guest, name and what the TPM says of itself."""
    parsed = parse_issue_request(members())
    assert parsed.key == VTPM.ek_key.public_key()
    assert (parsed.kind, parsed.agent_id, parsed.name, parsed.tpm) == (RSA_EK, GUEST, "vm-1", TPM)


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"ek": MODULUS.upper()}, RSA_EK),
        ({"ek": ECC}, ECC_EK),
        ({"type": "platform"}, PLATFORM),
        ({"type": "platform", "ek": ECC}, PLATFORM),
    ],
)
def test_the_kind_follows_from_type_and_key(changes: dict[str, str], kind: str) -> None:
    """A platform certificate is one whatever the key."""
    assert parse_issue_request(members(**changes)).kind == kind


@pytest.mark.parametrize(
    ("vmid", "name"),
    [
        (f":{GUEST}", ""),
        (f"{GUEST}", ""),
        (f"a:b:{GUEST}", "a:b"),
        (f"vm:{str(GUEST).upper()}", "vm"),
    ],
)
def test_a_vmid_is_a_name_and_a_uuid(vmid: str, name: str) -> None:
    """The UUID is what stands behind the last colon, in either case."""
    parsed = parse_issue_request(members(vmid=vmid))
    assert (parsed.agent_id, parsed.name) == (GUEST, name)


BAD: list[dict[str, Any]] = [
    {"type": None},
    {"type": "EK"},
    {"type": "tpm"},
    {"type": ["ek"]},
    {"ek": None},
    {"ek": 5},
    {"ek": ""},
    {"ek": MODULUS[:-1]},
    {"ek": MODULUS + "0"},
    {"ek": MODULUS + "\n"},
    {"ek": "0x" + MODULUS[2:]},
    {"ek": "0" * 512},
    {"ek": "7" + MODULUS[1:]},
    {"ek": "0" * 256 + MODULUS[:255] + "1"},
    {"ek": MODULUS[:-1] + "2"},
    {"ek": ECC.replace("secp384r1", "secp256k1")},
    {"ek": ECC.replace("secp384r1", "secp256r1")},
    {"ek": f"x={POINT.x:x},y={POINT.y ^ 1:x},id=secp384r1"},
    {"ek": "x=0,y=0,id=secp256r1"},
    {"ek": ECC + " "},
    {"ek": ECC + "\n"},
    {"vmid": None},
    {"vmid": 5},
    {"vmid": ""},
    {"vmid": "vm-1"},
    {"vmid": f"{GUEST}:vm-1"},
    {"vmid": f"vm-1:{{{GUEST}}}"},
    {"vmid": f"vm-1:{GUEST}\n"},
    {"vmid": f"vm-1:{GUEST.hex}"},
    {"tpm": None},
    {"tpm": []},
    {"tpm": {"model": 5}},
]


@pytest.mark.parametrize("changes", BAD, ids=range(len(BAD)))
def test_a_malformed_request_is_refused(changes: dict[str, Any]) -> None:
    """Unknown type, no EK of swtpm, no UUID: nothing of it is guessed."""
    with pytest.raises(MalformedMessage):
        parse_issue_request(members(**changes))


@pytest.mark.parametrize("text", ["", "x" * 65, "a\nb", "ä", "\x00"])
def test_what_the_tpm_says_of_itself_is_left_out_when_it_is_not_plain(text: str) -> None:
    """It is informative; the certificate is issued without it."""
    assert parse_issue_request(members(tpm=TPM | {"model": text, "else": "x"})).tpm == {
        "manufacturer": TPM["manufacturer"],
        "version": TPM["version"],
    }


# --- issuing --------------------------------------------------------------------------------------------------


class Domains:
    """Knows which guests may be manufactured; the others get ``refusal``."""

    def __init__(self) -> None:
        self.off = {GUEST, OTHER}
        self.refusal: HarnessError = GuestNotHere("it runs")

    def check_manufacturing(self, agent_id: AgentId) -> None:
        if agent_id not in self.off:
            raise self.refusal


class Host:
    """A CA on a soft key, with a journal in memory."""

    def __init__(self, journal: Journal) -> None:
        self.soft = SoftCa()
        self.domains = Domains()
        self.journal = journal
        self.ca = self.ca_of("host-1")

    def ca_of(self, name: str) -> VtpmCa:
        return VtpmCa(self.soft.public, self.soft.sign, self.journal, self.domains, host=name, now=lambda: NOW)

    async def issue(self, wanted: IssueRequest | None = None) -> x509.Certificate:
        return x509.load_der_x509_certificate(await self.ca.issue(wanted or request()))


@pytest.fixture
async def host(tmp_path: Path) -> AsyncIterator[Host]:
    url = f"sqlite+aiosqlite:///{tmp_path / 'agent.db'}"
    store = await open_store(url, HostBase.metadata, component="host-agent", version=HOST_SCHEMA)
    try:
        yield Host(Journal(store))
    finally:
        await store.close()


async def test_a_certificate_is_accepted_by_the_tenants_check(host: Host) -> None:
    """For this guest, this EK and this CA key; changing one of them is refused."""
    data = await host.ca.issue(request())
    honest: dict[str, Any] = {"ca": host.soft.public, "agent_id": GUEST, "ek": VTPM.ek, "now": NOW}
    verify_vtpm_certificate(data, **honest)
    for lie in ({"ca": SoftCa().public}, {"agent_id": OTHER}, {"ek": STRANGER.ek}, {"now": NOW + timedelta(days=3651)}):
        with pytest.raises(CertificateRefused):
            verify_vtpm_certificate(data, **(honest | lie))


async def test_what_an_ek_certificate_says(host: Host) -> None:
    """No CA, for EKs, key encipherment, the guest's URN and the TPM's own words; issuer and key id of the CA."""
    certificate = await host.issue()
    get = certificate.extensions.get_extension_for_class
    assert not get(x509.BasicConstraints).value.ca
    assert get(x509.BasicConstraints).critical
    assert list(get(x509.ExtendedKeyUsage).value) == [EK_OID]
    usage = get(x509.KeyUsage).value
    assert usage.key_encipherment
    assert [usage.digital_signature, usage.key_agreement, usage.key_cert_sign] == [False] * 3
    names = get(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.UniformResourceIdentifier) == [f"urn:uuid:{GUEST}"]
    [identity] = names.get_values_for_type(x509.DirectoryName)
    assert {attribute.value for attribute in identity} == set(TPM.values())
    assert certificate.issuer == x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "vTPM CA of host-1")])
    assert certificate.subject == x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "vm-1")])


async def test_an_ecc_ek_is_for_key_agreement(host: Host) -> None:
    """It cannot encipher."""
    usage = (await host.issue(request(ek=ECC))).extensions.get_extension_for_class(x509.KeyUsage).value
    assert usage.key_agreement
    assert not usage.key_encipherment


async def test_a_platform_certificate_never_passes_for_an_ek_certificate(host: Host) -> None:
    """Same key, same CA: it is refused by the tenant's check, and names no guest at all."""
    data = await host.ca.issue(request(type="platform"))
    with pytest.raises(CertificateRefused, match="not one for an EK"):
        verify_vtpm_certificate(data, ca=host.soft.public, agent_id=GUEST, ek=VTPM.ek, now=NOW)
    extensions = x509.load_der_x509_certificate(data).extensions
    assert list(extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) == [PLATFORM_OID]
    assert str(GUEST).encode() not in data


async def test_a_platform_certificate_without_words_of_the_tpm_has_no_names(host: Host) -> None:
    """An empty subjectAltName would be malformed."""
    extensions = (await host.issue(request(type="platform", tpm={}))).extensions
    with pytest.raises(x509.ExtensionNotFound):
        extensions.get_extension_for_class(x509.SubjectAlternativeName)


@pytest.mark.parametrize("name", ["", "x" * 500, "é" * 63, "\ud800", "a\x00b", "日本" * 40], ids=ascii)
async def test_any_name_of_a_domain_makes_a_certificate(host: Host, name: str) -> None:
    """The name is for people: it is cut or replaced, never a reason to fail."""
    certificate = await host.issue(parse_issue_request(members(vmid=f"{name}:{GUEST}")))
    [subject] = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    assert 0 < len(str(subject.value).encode()) <= 64
    assert str(subject.value)[:4] == (name or str(GUEST)).replace("\ud800", "?")[:4]


async def test_the_longest_name_of_a_host_makes_a_certificate(host: Host) -> None:
    """The issuer's name is cut, too: what counts is the key."""
    data = await host.ca_of("h" * 63).self_certificate()
    assert x509.load_der_x509_certificate(data).public_key() == host.soft.key.public_key()


async def test_the_ca_certificate_is_self_signed_and_for_certificates_only(host: Host) -> None:
    """A CA without CAs below it."""
    certificate = x509.load_der_x509_certificate(await host.ca.self_certificate())
    certificate.verify_directly_issued_by(certificate)
    get = certificate.extensions.get_extension_for_class
    assert (get(x509.BasicConstraints).value.ca, get(x509.BasicConstraints).value.path_length) == (True, 0)
    assert get(x509.KeyUsage).value.key_cert_sign
    assert not get(x509.KeyUsage).value.digital_signature


async def test_issued_certificates_chain_to_the_ca_certificate(host: Host) -> None:
    """Stock verifiers keep that one in their store."""
    issuer = x509.load_der_x509_certificate(await host.ca.self_certificate())
    for wanted in (request(), request(ek=ECC), request(type="platform")):
        (await host.issue(wanted)).verify_directly_issued_by(issuer)


@pytest.mark.parametrize("refusal", [GuestNotHere("it runs"), NotReady("not known")])
async def test_a_domain_that_is_not_off_gets_nothing(host: Host, refusal: HarnessError) -> None:
    """Neither signed nor recorded."""
    host.domains.off.remove(GUEST)
    host.domains.refusal = refusal
    with pytest.raises(type(refusal)):
        await host.issue()
    assert host.soft.signed == 0
    assert await host.journal.rsa_eks() == {}


async def test_the_journal_has_the_key_before_it_is_signed(host: Host) -> None:
    """A TPM that fails leaves a record, never a certificate without one; another try is for the operator to allow."""
    host.soft.fault = DeviceUnavailable("away")
    with pytest.raises(DeviceUnavailable):
        await host.issue()
    assert await host.journal.rsa_eks() == {GUEST: spki_digest(VTPM.ek_key.public_key())}
    host.soft.fault = None
    with pytest.raises(Conflict):
        await host.issue()
    await host.journal.release(GUEST, "the TPM failed", who="uid 0")
    await host.issue()


async def test_one_key_of_each_kind_per_guest(host: Host) -> None:
    """RSA EK, ECC EK and platform are one each; another EK of a kind is refused until the operator releases them."""
    wanted = [request(), request(ek=ECC), request(type="platform")]
    for each in wanted:
        await host.issue(each)
    for each in [*wanted, replace(wanted[0], key=STRANGER.ek_key.public_key())]:
        with pytest.raises(Conflict, match=str(GUEST)):
            await host.issue(each)
    assert host.soft.signed == 3
    await host.journal.release(GUEST, "made anew", who="uid 0")
    await host.issue(replace(wanted[0], key=STRANGER.ek_key.public_key()))


@pytest.mark.parametrize("kind", ["ek", "platform"])
async def test_one_guest_per_key(host: Host, kind: str) -> None:
    """A clone's EK is not certified for another guest, as EK or for its platform."""
    await host.issue()
    with pytest.raises(CloneSuspected, match=str(GUEST)):
        await host.issue(request(OTHER, type=kind))
    assert host.soft.signed == 1


def test_the_digest_of_a_key_is_that_of_its_spki() -> None:
    """The same as in a leaf."""
    key = VTPM.ek_key.public_key()
    assert isinstance(key, rsa.RSAPublicKey)
    der = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    assert spki_digest(key) == hashlib.sha256(der).digest() == VTPM.ek.spki_digest()
