"""Certificates of EKs: honest chains are accepted; one change, and they are refused."""

from __future__ import annotations

import contextlib
import datetime
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import NameOID
from hypothesis import given
from hypothesis import strategies as st

from harness.attest import Public
from harness.certificates import EK_OID, PLATFORM_OID, verify_ek_chain, verify_vtpm_certificate
from harness.errors import CertificateRefused
from harness.tpm_templates import KeyTemplate
from harness.values import parse_agent_id
from tests.support.enrolment_parties import ek_public
from tests.support.soft_tpm import public_of

NOW = datetime.datetime(2026, 6, 1, tzinfo=datetime.UTC)
SECOND, DAY = datetime.timedelta(seconds=1), datetime.timedelta(days=1)
AGENT = parse_agent_id("a0bb03b7-39bb-4d7b-88e6-14a7e2004c8e")
URN = f"urn:uuid:{AGENT}"
BASIC = x509.BasicConstraints
UNKNOWN = x509.UnrecognizedExtension(x509.ObjectIdentifier("1.3.6.1.4.1.99999.1"), b"\x05\x00")
ED25519 = ed25519.Ed25519PrivateKey.generate()
Signer = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey


@cache
def signer(name: str) -> ec.EllipticCurvePrivateKey:
    """The key of a party."""
    return ec.generate_private_key(ec.SECP256R1())


@cache
def ek_key(name: str = "own") -> rsa.RSAPrivateKey:
    """The private part of an EK."""
    return rsa.generate_private_key(65537, 2048)


def usage(*names: str) -> x509.KeyUsage:
    """Key usage with these bits."""
    bits = (
        "digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement",
        "key_cert_sign", "crl_sign", "encipher_only", "decipher_only",
    )  # fmt: skip
    return x509.KeyUsage(**{bit: bit in names for bit in bits})


def uris(*values: str) -> x509.SubjectAlternativeName:
    """Names of type URI."""
    return x509.SubjectAlternativeName([x509.UniformResourceIdentifier(value) for value in values])


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """What a certificate says. ``extensions`` holds (extension, critical) in their order."""

    subject: str
    issuer: str
    key: Any
    signed_by: Signer
    extensions: tuple[tuple[x509.ExtensionType, bool], ...]
    begin: datetime.datetime = NOW - DAY
    end: datetime.datetime = NOW + DAY
    hash_alg: hashes.HashAlgorithm | None = field(default_factory=hashes.SHA256)

    def without(self, kind: type[x509.ExtensionType]) -> Form:
        """The form without this extension."""
        return replace(self, extensions=tuple(pair for pair in self.extensions if not isinstance(pair[0], kind)))

    def having(self, extension: x509.ExtensionType, *, critical: bool = False) -> Form:
        """The form with this extension instead of its own."""
        rest = self.without(type(extension)).extensions
        return replace(self, extensions=(*rest, (extension, critical)))

    def make(self) -> x509.Certificate:
        """The certificate."""
        subject, issuer = (
            x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)] if name else [])
            for name in (self.subject, self.issuer)
        )
        builder = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(self.key)
        builder = builder.serial_number(7).not_valid_before(self.begin).not_valid_after(self.end)
        for extension, critical in self.extensions:
            builder = builder.add_extension(extension, critical)
        return builder.sign(self.signed_by, self.hash_alg)  # type: ignore[arg-type]

    def der(self) -> bytes:
        """The certificate's bytes."""
        return self.make().public_bytes(serialization.Encoding.DER)


def ca(subject: str, issuer: str, *, path_length: int | None = None) -> Form:
    """An honest CA certificate."""
    return Form(
        subject=subject,
        issuer=issuer,
        key=signer(subject).public_key(),
        signed_by=signer(issuer),
        extensions=((BASIC(ca=True, path_length=path_length), True), (usage("key_cert_sign", "crl_sign"), True)),
    )


ROOT, ISSUING = ca("root", "root", path_length=1), ca("issuing", "root", path_length=0)
EK = ek_public(ek_key())
LEAF = Form(
    subject="", issuer="issuing", key=ek_key().public_key(), signed_by=signer("issuing"),
    extensions=(
        (BASIC(ca=False, path_length=None), True), (usage("key_encipherment"), True),
        (x509.ExtendedKeyUsage([EK_OID]), False),
        (x509.SubjectAlternativeName([x509.DirectoryName(x509.Name([]))]), True),
    ),
)  # fmt: skip
VTPM = replace(LEAF, issuer="vTPM CA", signed_by=signer("vTPM CA")).having(uris(URN))
CA_KEY = public_of(signer("vTPM CA"), KeyTemplate.CA_P256)


@dataclass(frozen=True, slots=True, kw_only=True)
class Chain:
    """An honest chain in its parts."""

    leaf: Form | bytes = LEAF
    between: tuple[Form | bytes, ...] = (ISSUING,)
    roots: tuple[Form, ...] = (ROOT,)
    ek: Public = EK
    now: datetime.datetime = NOW

    def verify(self) -> None:
        """What the tenant does with it; the issuers that it relied upon are a chain from the leaf to a pinned root."""
        leaf, *between = (form if isinstance(form, bytes) else form.der() for form in (self.leaf, *self.between))
        roots = [root.make() for root in self.roots]
        issuers = verify_ek_chain(leaf, between, roots, self.ek, self.now)
        assert issuers[-1] in roots
        for signed, issuer in itertools.pairwise((x509.load_der_x509_certificate(leaf), *issuers)):
            signed.verify_directly_issued_by(issuer)
            assert issuer.not_valid_before_utc <= self.now <= issuer.not_valid_after_utc


def line(count: int) -> tuple[Form, ...]:
    """So many CAs between root and "issuing", the lowest first."""
    names = ["issuing", *(f"ca {number}" for number in range(count - 1)), "root"]
    return tuple(ca(subject, issuer) for subject, issuer in itertools.pairwise(names))


# --- hardware TPMs ----------------------------------------------------------------------------------------------------

OLD_ROOT = replace(ROOT, begin=NOW - 3 * DAY, end=NOW - 2 * DAY)
OPEN_ROOT = ca("root", "root")
FOREIGN_ROOT, CROSS_SIGNED = ca("foreign", "foreign"), ca("issuing", "foreign")
"""The issuing CA, certified by another root as well."""


@pytest.mark.parametrize(
    "chain",
    [
        pytest.param(Chain(), id="one-ca-between"),
        pytest.param(
            Chain(leaf=replace(LEAF, issuer="root", signed_by=signer("root")), between=()), id="no-ca-between"
        ),
        pytest.param(Chain(roots=(ISSUING,), between=()), id="issuing-ca-pinned"),
        pytest.param(Chain(roots=(ca("other", "other"), ROOT)), id="one-of-two-roots"),
        pytest.param(Chain(roots=(OLD_ROOT, ROOT)), id="root-renewed-with-its-key"),
        pytest.param(Chain(between=(replace(ISSUING, end=NOW - SECOND), ISSUING)), id="ca-renewed-with-its-key"),
        pytest.param(Chain(between=(CROSS_SIGNED, ISSUING)), id="ca-cross-signed"),
        pytest.param(Chain(between=(CROSS_SIGNED, FOREIGN_ROOT, ISSUING)), id="ca-cross-signed-with-the-other-root"),
        pytest.param(Chain(roots=(OLD_ROOT, FOREIGN_ROOT), between=(ISSUING, CROSS_SIGNED)), id="one-of-two-ways"),
        pytest.param(Chain(between=(ROOT, ca("other", "root"), ISSUING)), id="others-around"),
        pytest.param(Chain(between=line(8)[::-1], roots=(OPEN_ROOT,)), id="eight-between-in-another-order"),
        pytest.param(Chain(leaf=LEAF.without(BASIC)), id="no-basic-constraints-in-the-leaf"),
        pytest.param(Chain(between=(ISSUING.without(x509.KeyUsage),)), id="no-key-usage-in-the-ca"),
        pytest.param(
            Chain(leaf=LEAF.having(x509.ExtendedKeyUsage([x509.ObjectIdentifier("1.2.3"), EK_OID]))), id="more-uses"
        ),
        pytest.param(Chain(leaf=LEAF.having(UNKNOWN)), id="unknown-extension"),
        pytest.param(Chain(leaf=replace(LEAF, begin=NOW, end=NOW)), id="ends-of-validity"),
    ],
)
def test_an_honest_chain_is_accepted(chain: Chain) -> None:
    """The forms that vendors use."""
    chain.verify()


def shifted(form: Form, by: datetime.timedelta) -> Form:
    """The form with another validity."""
    return replace(form, begin=form.begin + by, end=form.end + by)


LEAF_LIES: list[tuple[str, Callable[[Form], Form | bytes]]] = [
    ("other-key", lambda leaf: replace(leaf, key=ek_key("other").public_key())),
    ("key-of-another-type", lambda leaf: replace(leaf, key=signer("x").public_key())),
    ("key-of-an-unknown-type", lambda leaf: replace(leaf, key=ED25519.public_key())),
    ("is-a-ca", lambda leaf: leaf.having(BASIC(ca=True, path_length=None), critical=True)),
    ("no-extended-key-usage", lambda leaf: leaf.without(x509.ExtendedKeyUsage)),
    ("for-platforms", lambda leaf: leaf.having(x509.ExtendedKeyUsage([PLATFORM_OID]))),
    ("for-both", lambda leaf: leaf.having(x509.ExtendedKeyUsage([EK_OID, PLATFORM_OID]))),
    ("for-any-use", lambda leaf: leaf.having(x509.ExtendedKeyUsage([x509.ObjectIdentifier("2.5.29.37.0")]))),
    ("expired", lambda leaf: replace(leaf, end=NOW - SECOND)),
    ("not-yet-valid", lambda leaf: replace(leaf, begin=NOW + SECOND)),
    ("unknown-critical-extension", lambda leaf: leaf.having(UNKNOWN, critical=True)),
    ("signed-by-another-key", lambda leaf: replace(leaf, signed_by=signer("other"))),
    ("signed-by-its-own-key", lambda leaf: replace(leaf, signed_by=ek_key())),
    ("signed-by-an-unknown-type", lambda leaf: replace(leaf, signed_by=ED25519, hash_alg=None)),
    ("not-der", lambda _: b"no certificate"),
    ("empty", lambda _: b""),
    ("pem", lambda leaf: leaf.make().public_bytes(serialization.Encoding.PEM)),
    ("trailing-byte", lambda leaf: leaf.der() + b"\x00"),
    ("cut", lambda leaf: leaf.der()[:-1]),
    ("too-large", lambda leaf: leaf.having(replace_value(bytes(9000))).der()),
    ("unknown-version", lambda leaf: leaf.der().replace(b"\xa0\x03\x02\x01\x02", b"\xa0\x03\x02\x01\x05", 1)),
    ("repeated-extension", lambda leaf: twice(leaf)),
    ("unreadable-extension", lambda leaf: leaf.der().replace(b"\x06\x03\x55\x1d\x13", b"\x06\x03\x55\x1d\x20", 1)),
]  # fmt: skip


def replace_value(value: bytes) -> x509.UnrecognizedExtension:
    """An extension of this size."""
    return x509.UnrecognizedExtension(UNKNOWN.oid, value)


def twice(form: Form) -> bytes:
    """DER in which the extended key usage is repeated: a second one, its OID changed after signing."""
    stand_in = x509.UnrecognizedExtension(x509.ObjectIdentifier("2.5.29.99"), b"\x30\x00")
    return form.having(stand_in).der().replace(b"\x06\x03\x55\x1d\x63", b"\x06\x03\x55\x1d\x25", 1)


@pytest.mark.parametrize("lie", [pytest.param(lie, id=name) for name, lie in LEAF_LIES])
def test_a_leaf_that_says_or_is_something_else_is_refused(lie: Callable[[Form], Form | bytes]) -> None:
    """Each of the statements counts, for a hardware TPM and for a vTPM; unreadable bytes are one refusal more."""
    with pytest.raises(CertificateRefused):
        Chain(leaf=lie(LEAF)).verify()
    with pytest.raises(CertificateRefused):
        verify_vtpm(lie(VTPM))


CHAIN_LIES = [
    pytest.param(Chain(roots=()), id="no-root"),
    pytest.param(Chain(roots=(ca("root", "root"), ), between=()), id="no-intermediate"),
    pytest.param(Chain(roots=(replace(ROOT, key=signer("x").public_key()),)), id="root-of-another-key"),
    pytest.param(Chain(roots=(replace(ROOT, subject="Root"),)), id="root-of-another-name"),
    pytest.param(Chain(roots=(OLD_ROOT,)), id="root-expired"),
    pytest.param(Chain(roots=(shifted(ROOT, 2 * DAY),)), id="root-not-yet-valid"),
    pytest.param(Chain(roots=(ROOT.having(BASIC(ca=False, path_length=None), critical=True),)), id="root-is-no-ca"),
    pytest.param(Chain(roots=(ROOT.having(usage("crl_sign"), critical=True),)), id="root-may-not-sign"),
    pytest.param(Chain(roots=(ca("root", "root", path_length=0),)), id="root-allows-no-ca-below"),
    pytest.param(Chain(roots=(LEAF,)), id="only-the-leaf-pinned"),
    pytest.param(Chain(between=(shifted(ISSUING, -2 * DAY),)), id="ca-expired"),
    pytest.param(Chain(between=(shifted(ISSUING, 2 * DAY),)), id="ca-not-yet-valid"),
    pytest.param(Chain(between=(ISSUING.without(BASIC),)), id="ca-without-basic-constraints"),
    pytest.param(Chain(between=(ISSUING.having(BASIC(ca=False, path_length=None)),)), id="ca-is-no-ca"),
    pytest.param(Chain(between=(ISSUING.having(usage("digital_signature"), critical=True),)), id="ca-may-not-sign"),
    pytest.param(Chain(between=(ISSUING.having(UNKNOWN, critical=True),)), id="ca-with-an-unknown-critical-extension"),
    pytest.param(
        Chain(between=(ISSUING.having(x509.NameConstraints([x509.DNSName("x")], None), critical=True),)),
        id="ca-with-constraints-that-nobody-checks",
    ),
    pytest.param(Chain(between=(replace(ISSUING, signed_by=signer("other")),)), id="ca-of-another-root"),
    pytest.param(Chain(between=(ca("issuing", "issuing"),)), id="ca-signs-itself"),
    pytest.param(
        Chain(between=(ca("issuing", "a"), ca("a", "b"), ca("b", "a"), ca("a", "a"))), id="ring-of-cas"
    ),
    pytest.param(Chain(between=line(2)), id="longer-than-the-root-allows"),
    pytest.param(Chain(between=line(9), roots=(OPEN_ROOT,)), id="nine-between"),
    pytest.param(Chain(between=(ISSUING, *(ca("x", "x") for _ in range(8)))), id="nine-given"),
    pytest.param(Chain(between=(b"junk", ISSUING)), id="junk-between"),
    pytest.param(Chain(ek=ek_public(ek_key("other"))), id="certificate-of-another-tpm"),
    pytest.param(Chain(ek=replace(EK, modulus=EK.modulus >> 1)), id="ek-is-no-key"),
    pytest.param(Chain(now=NOW + 2 * DAY), id="all-expired"),
    pytest.param(Chain(now=NOW - 2 * DAY), id="none-valid-yet"),
]  # fmt: skip


@pytest.mark.parametrize("chain", CHAIN_LIES)
def test_a_chain_with_one_bad_part_is_refused(chain: Chain) -> None:
    """Roots, CAs, their order, their time and the key at the end."""
    with pytest.raises(CertificateRefused):
        chain.verify()


def test_the_leaf_of_another_chain_is_no_ca() -> None:
    """Whoever holds the private part of a certified EK certifies nothing with it."""
    holder = replace(LEAF, subject="holder", key=signer("holder").public_key())
    below = replace(LEAF, issuer="holder", signed_by=signer("holder"))
    with pytest.raises(CertificateRefused, match="not that of a CA"):
        Chain(leaf=below, between=(holder, ISSUING), roots=(OPEN_ROOT,)).verify()


# --- vTPMs ------------------------------------------------------------------------------------------------------------


def verify_vtpm(form: Form | bytes, **changes: Any) -> None:
    """What the tenant's registrar does with a vTPM's certificate."""
    data = form if isinstance(form, bytes) else form.der()
    expected: dict[str, Any] = {"ca": CA_KEY, "agent_id": AGENT, "ek": EK, "now": NOW}
    verify_vtpm_certificate(data, **(expected | changes))


@pytest.mark.parametrize(
    "form",
    [
        pytest.param(VTPM, id="rsa"),
        pytest.param(VTPM.having(usage("key_agreement")), id="key-agreement"),
        pytest.param(VTPM.without(BASIC), id="no-basic-constraints"),
        pytest.param(replace(VTPM, issuer="any words"), id="issuer-name-is-no-matter"),
        pytest.param(
            VTPM.having(
                x509.SubjectAlternativeName(
                    [x509.UniformResourceIdentifier(URN), x509.DirectoryName(x509.Name([])), x509.DNSName("vm")]
                ),
                critical=True,
            ),
            id="other-kinds-of-names",
        ),
    ],
)
def test_an_honest_vtpm_certificate_is_accepted(form: Form) -> None:
    """Signed by the pinned key, for this guest and this EK; names of CAs prove nothing and are not asked for."""
    verify_vtpm(form)


OTHER_URN = "urn:uuid:11111111-1111-4111-8111-111111111111"
VTPM_LIES = [
    pytest.param(VTPM.without(x509.KeyUsage), {}, id="no-key-usage"),
    pytest.param(VTPM.having(usage("digital_signature")), {}, id="key-usage-signs"),
    pytest.param(VTPM.having(usage("data_encipherment")), {}, id="key-usage-of-data"),
    pytest.param(VTPM.without(x509.SubjectAlternativeName), {}, id="no-names"),
    pytest.param(VTPM.having(uris(OTHER_URN)), {}, id="other-guest"),
    pytest.param(VTPM.having(uris(URN, OTHER_URN)), {}, id="two-guests"),
    pytest.param(VTPM.having(uris(URN, URN)), {}, id="named-twice"),
    pytest.param(VTPM.having(uris(URN.upper())), {}, id="in-capitals"),
    pytest.param(VTPM.having(uris(str(AGENT))), {}, id="without-urn"),
    pytest.param(VTPM.having(uris(URN + "#x")), {}, id="with-a-tail"),
    pytest.param(VTPM.having(x509.SubjectAlternativeName([x509.DNSName(str(AGENT))])), {}, id="as-a-dns-name"),
    pytest.param(replace(VTPM, signed_by=signer("other")), {}, id="ca-of-another-host"),
    pytest.param(replace(VTPM, hash_alg=hashes.SHA384()), {}, id="signed-with-another-hash"),
    pytest.param(VTPM, {"ca": replace(CA_KEY, point=(1, 1))}, id="pinned-key-is-unusable"),
    pytest.param(VTPM, {"ca": EK}, id="pinned-key-is-an-rsa-key"),
    pytest.param(VTPM, {"ek": ek_public(ek_key("other"))}, id="other-ek"),
    pytest.param(VTPM, {"agent_id": parse_agent_id(OTHER_URN[9:])}, id="asked-for-another-guest"),
    pytest.param(VTPM, {"now": NOW + 2 * DAY}, id="expired"),
    pytest.param(VTPM, {"now": NOW - 2 * DAY}, id="not-yet-valid"),
]


@pytest.mark.parametrize(("form", "changes"), VTPM_LIES)
def test_a_vtpm_certificate_with_one_lie_is_refused(form: Form, changes: dict[str, Any]) -> None:
    """Guest, EK, CA key, use, names and time."""
    with pytest.raises(CertificateRefused):
        verify_vtpm(form, **changes)


def test_a_ca_below_the_ca_key_certifies_no_vtpm() -> None:
    """Directly: a CA that the vTPM CA key itself certified is none for vTPMs."""
    verify_vtpm(VTPM)
    with pytest.raises(CertificateRefused, match="not signed by the vTPM CA key"):
        verify_vtpm(replace(VTPM, issuer="below", signed_by=signer("below")))


# --- any bytes --------------------------------------------------------------------------------------------------------

HONEST = VTPM.der()
# How many bits of the signature's last byte are padding: not signed, and the library looks at whole bytes.
PADDING_AT = len(HONEST) - len(x509.load_der_x509_certificate(HONEST).signature) - 1


# The library warns of what it will refuse later (a negative serial number): today that is a byte like any other.
@pytest.mark.filterwarnings("ignore::cryptography.utils.CryptographyDeprecationWarning")
@given(st.integers(0, len(HONEST) - 1).filter(lambda at: at != PADDING_AT), st.integers(1, 255))
def test_a_flipped_byte_is_refused(at: int, flip: int) -> None:
    """Anywhere in what is signed, and in the signature; nothing but CertificateRefused is raised."""
    spoilt = bytearray(HONEST)
    spoilt[at] ^= flip
    with pytest.raises(CertificateRefused):
        verify_vtpm(bytes(spoilt))
    with contextlib.suppress(CertificateRefused):
        Chain(between=(bytes(spoilt), ISSUING)).verify()


@given(st.binary(max_size=64))
def test_any_bytes_are_refused(data: bytes) -> None:
    """As a leaf and as an intermediate certificate."""
    for chain in (Chain(leaf=data), Chain(between=(data,))):
        with pytest.raises(CertificateRefused):
            chain.verify()
