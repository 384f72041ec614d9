"""Our parsers beside the TSS's own marshalling, and keys of many kinds in a real swtpm."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.attest import (
    CertifyInfo,
    EcdsaSignature,
    QuoteInfo,
    RsassaSignature,
    SelectionEntry,
    owner_qualified_name,
    parse_attest,
    parse_public,
    parse_signature,
    verify_signature,
)
from harness.credential import check_ak, check_ek, make_credential
from harness.errors import QuoteSignatureInvalid, UnacceptableKey
from harness.values import ClockInfo, HashAlg, PcrSelection, mask_of
from tests.support.forge import AK_ATTRIBUTES, NULL, P384, SHA256, SHA384, SHA512, ecc_key, rsa_key, u16
from tests.support.soft_tpm import sized
from tests.support.tpms import blank_swtpm, short_folder

pytestmark = pytest.mark.needs_swtpm

NAMES = st.binary(max_size=68)
WORDS, LONG_WORDS, SHORT_WORDS = (st.integers(0, (1 << bits) - 1) for bits in (32, 64, 16))
PCRS = st.sets(st.integers(0, 23), max_size=24)
HASHES = st.sampled_from(list(HashAlg))


def attest_of(fields: dict[str, Any]) -> Any:
    """TPMS_ATTEST of the TSS, without what is attested."""
    from tpm2_pytss import TPMS_ATTEST  # type: ignore[import-untyped]

    attest = TPMS_ATTEST(magic=fields["magic"], firmwareVersion=fields["firmware"])
    attest.qualifiedSigner.name = fields["signer"]
    attest.extraData.buffer = fields["extra_data"]
    attest.clockInfo.clock, attest.clockInfo.safe = fields["clock"], fields["safe"]
    attest.clockInfo.resetCount, attest.clockInfo.restartCount = fields["resets"], fields["restarts"]
    return attest


ATTESTS = st.fixed_dictionaries(
    {
        "magic": WORDS, "firmware": LONG_WORDS, "signer": NAMES, "extra_data": st.binary(max_size=64),
        "clock": LONG_WORDS, "safe": st.booleans(), "resets": WORDS, "restarts": WORDS,
    }
)  # fmt: skip


def same(parsed: Any, fields: dict[str, Any]) -> None:
    """The fields that every attestation has."""
    assert (parsed.magic, parsed.firmware_version) == (fields["magic"], fields["firmware"])
    assert (parsed.qualified_signer, parsed.extra_data) == (fields["signer"], fields["extra_data"])
    assert parsed.clock_info == ClockInfo(
        clock=fields["clock"],
        reset_count=fields["resets"],
        restart_count=fields["restarts"],
        safe=fields["safe"],
    )


@given(ATTESTS, st.lists(st.tuples(HASHES, PCRS), max_size=4), st.binary(max_size=64))
def test_quotes_of_the_tss_are_read(fields: dict[str, Any], banks: list[tuple[HashAlg, set[int]]], pcrs: bytes) -> None:
    """Whatever the TSS marshals comes out field by field, with selections in their order."""
    from tpm2_pytss import TPM2_ALG, TPM2_ST, TPML_PCR_SELECTION, TPMS_PCR_SELECTION

    attest = attest_of(fields)
    attest.type = TPM2_ST.ATTEST_QUOTE
    entries = [TPMS_PCR_SELECTION(hash=TPM2_ALG(bank.value), pcrs=sorted(chosen)) for bank, chosen in banks]
    attest.attested.quote.pcrSelect = TPML_PCR_SELECTION(entries)
    attest.attested.quote.pcrDigest.buffer = pcrs
    parsed = parse_attest(attest.marshal())
    same(parsed, fields)
    selection = tuple(
        SelectionEntry(hash_alg=bank.value, size_of_select=3 if chosen else 0, mask=mask_of(chosen))
        for bank, chosen in banks
    )
    assert parsed.attested == QuoteInfo(selection=selection, pcr_digest=pcrs)


@given(ATTESTS, NAMES, NAMES)
def test_certifications_of_the_tss_are_read(fields: dict[str, Any], name: bytes, qualified: bytes) -> None:
    """Name and qualified name of the certified object."""
    from tpm2_pytss import TPM2_ST

    attest = attest_of(fields)
    attest.type = TPM2_ST.ATTEST_CERTIFY
    attest.attested.certify.name.name = name
    attest.attested.certify.qualifiedName.name = qualified
    parsed = parse_attest(attest.marshal())
    same(parsed, fields)
    assert parsed.attested == CertifyInfo(name=name, qualified_name=qualified)


@given(HASHES, st.binary(max_size=512), st.integers(0, (1 << 256) - 1), st.integers(0, (1 << 256) - 1))
def test_signatures_of_the_tss_are_read(hash_alg: HashAlg, rsa_bytes: bytes, r: int, s: int) -> None:
    """Both schemes, with every hash."""
    from tpm2_pytss import TPM2_ALG, TPMT_SIGNATURE

    signature = TPMT_SIGNATURE(sigAlg=TPM2_ALG.RSASSA)
    signature.signature.rsassa.hash = TPM2_ALG(hash_alg.value)
    signature.signature.rsassa.sig.buffer = rsa_bytes
    assert parse_signature(signature.marshal()) == RsassaSignature(hash_alg=hash_alg, signature=rsa_bytes)
    signature = TPMT_SIGNATURE(sigAlg=TPM2_ALG.ECDSA)
    signature.signature.ecdsa.hash = TPM2_ALG(hash_alg.value)
    signature.signature.ecdsa.signatureR.buffer = r.to_bytes(32, "big")
    signature.signature.ecdsa.signatureS.buffer = s.to_bytes(32, "big")
    assert parse_signature(signature.marshal()) == EcdsaSignature(hash_alg=hash_alg, r=r, s=s)


@given(HASHES, st.dictionaries(HASHES, PCRS.filter(bool), max_size=3))
def test_selections_are_marshalled_as_the_tss_does(bank: HashAlg, lists: dict[HashAlg, set[int]]) -> None:
    """In ascending order of banks, three bytes each; one bank and several."""
    from tpm2_pytss import TPM2_ALG, TPML_PCR_SELECTION, TPMS_PCR_SELECTION

    for chosen in (lists, {bank: {0, 23}}):
        ordered = sorted(chosen.items(), key=lambda entry: entry[0].value)
        entries = [TPMS_PCR_SELECTION(hash=TPM2_ALG(alg.value), pcrs=sorted(pcrs)) for alg, pcrs in ordered]
        assert PcrSelection.from_lists(chosen).marshal() == TPML_PCR_SELECTION(entries).marshal()


@given(HASHES, HASHES, WORDS, st.binary(max_size=64), st.binary(max_size=512), WORDS, SHORT_WORDS)
@settings(max_examples=50)
def test_rsa_keys_of_the_tss_are_read(
    name_alg: HashAlg, scheme_hash: HashAlg, attributes: int, policy: bytes, modulus: bytes, exponent: int, bits: int
) -> None:
    """Every field of an RSA key's public area; the Name is the TSS's."""
    from tpm2_pytss import TPM2_ALG, TPM2B_PUBLIC, TPMA_OBJECT

    public = TPM2B_PUBLIC()
    area = public.publicArea
    area.type, area.nameAlg = TPM2_ALG.RSA, TPM2_ALG(name_alg.value)
    area.objectAttributes = TPMA_OBJECT(attributes)
    area.authPolicy.buffer, area.unique.rsa.buffer = policy, modulus
    area.parameters.rsaDetail.symmetric.algorithm = TPM2_ALG.NULL
    area.parameters.rsaDetail.scheme.scheme = TPM2_ALG.RSASSA
    area.parameters.rsaDetail.scheme.details.rsassa.hashAlg = TPM2_ALG(scheme_hash.value)
    area.parameters.rsaDetail.keyBits, area.parameters.rsaDetail.exponent = bits, exponent
    parsed = parse_public(public.marshal())
    assert (parsed.name_alg, parsed.scheme_hash, int(parsed.attributes)) == (name_alg.value, scheme_hash, attributes)
    assert (parsed.auth_policy, parsed.unique, parsed.size_bits) == (policy, (modulus,), bits)
    assert parsed.exponent == (exponent or 65537)
    assert parsed.name == bytes(public.get_name().name)


# --- keys in a TPM ----------------------------------------------------------------------------------------------------


@pytest.fixture
async def esapi() -> AsyncIterator[Any]:
    """A client of a started swtpm, at the TSS's own level."""
    from tpm2_pytss import ESAPI

    with short_folder() as folder:
        async with blank_swtpm(folder) as process:
            with ESAPI(process.tcti) as client:
                yield client


def create(esapi: Any, template: bytes, hierarchy: str = "OWNER") -> tuple[Any, Any]:
    """A primary from a template, as the TSS's object, and its public area as the TPM gives it."""
    from tpm2_pytss import ESYS_TR, TPM2B_PUBLIC, TPM2B_SENSITIVE_CREATE

    public, _ = TPM2B_PUBLIC.unmarshal(template)
    handle = esapi.create_primary(TPM2B_SENSITIVE_CREATE(), public, getattr(ESYS_TR, hierarchy))[0]
    return handle, esapi.read_public(handle)


def template_of(area: bytes, unique_size: int) -> bytes:
    """Template from a public area: its last bytes are the unique field."""
    empty = {258: sized(b""), 386: sized(b""), 68: sized(b"") * 2, 100: sized(b"") * 2}[unique_size]
    return sized(area[:-unique_size] + empty)


AKS = {
    "rsa-2048-sha256": template_of(rsa_key().area, 258),
    "rsa-2048-sha512": template_of(rsa_key(hash_alg=SHA512).area, 258),
    "rsa-3072-sha384": template_of(rsa_key(bits=3072, hash_alg=SHA384).area, 386),
    "p256-sha256": template_of(ecc_key().area, 68),
    "p384-sha384": template_of(ecc_key(curve=P384, hash_alg=SHA384, name_alg=SHA384).area, 100),
}


@pytest.mark.parametrize("name", AKS)
async def test_every_acceptable_ak_quotes_and_certifies(esapi: Any, name: str) -> None:
    """Name and qualified name are the TPM's; quote and certification parse and verify, and not over other bytes."""
    from tpm2_pytss import TPM2_ALG, TPM2B_DATA, TPML_PCR_SELECTION, TPMT_SIG_SCHEME

    handle, (raw_public, own_name, qualified) = create(esapi, AKS[name])
    public = parse_public(raw_public.marshal())
    check_ak(public)
    assert (public.name, owner_qualified_name(public)) == (bytes(own_name.name), bytes(qualified.name))
    none, data = TPMT_SIG_SCHEME(scheme=TPM2_ALG.NULL), TPM2B_DATA(b"d" * 34)
    quoted, quote_signature = esapi.quote(handle, TPML_PCR_SELECTION.parse("sha256:0,7+sha384:23"), data, none)
    certified, certify_signature = esapi.certify(handle, handle, data, none)
    raw = bytes(quoted.attestationData)
    quote, certification = parse_attest(raw), parse_attest(bytes(certified.attestationData))
    assert isinstance(quote.attested, QuoteInfo)
    assert [entry.mask for entry in quote.attested.selection] == [0x81, 0x800000]
    assert certification.attested == CertifyInfo(name=public.name, qualified_name=owner_qualified_name(public))
    for attest, signature in ((quote, quote_signature), (certification, certify_signature)):
        assert (attest.extra_data, attest.qualified_signer) == (b"d" * 34, owner_qualified_name(public))
        verify_signature(public, parse_signature(signature.marshal()), attest.raw)
    with pytest.raises(QuoteSignatureInvalid):
        verify_signature(public, parse_signature(certify_signature.marshal()), raw)


async def test_the_hierarchy_is_in_the_qualified_name(esapi: Any) -> None:
    """A primary of the endorsement hierarchy has another one than an owner's primary of the same Name would have."""
    _, (raw, name, qualified) = create(esapi, AKS["p256-sha256"], "ENDORSEMENT")
    public = parse_public(raw.marshal())
    assert public.name == bytes(name.name)
    assert owner_qualified_name(public) != bytes(qualified.name)


async def test_an_unrestricted_key_signs_a_forged_quote_and_is_refused(esapi: Any) -> None:
    """Its signature over an attest that no TPM made is good: only the attributes tell it from an AK."""
    from tpm2_pytss import TPM2_ALG, TPM2B_DIGEST, TPMT_SIG_SCHEME, TPMT_TK_HASHCHECK

    template = template_of(ecc_key(attributes=AK_ATTRIBUTES ^ 1 << 16).area, 68)
    handle, (raw, _, _) = create(esapi, template)
    public = parse_public(raw.marshal())
    forged = bytes.fromhex("ff5443478018") + b"whatever the host likes"
    none, ticket = TPMT_SIG_SCHEME(scheme=TPM2_ALG.NULL), TPMT_TK_HASHCHECK(tag=0x8024, hierarchy=0x40000007)
    signature = esapi.sign(handle, TPM2B_DIGEST(HashAlg.SHA256.digest(forged)), none, ticket)
    verify_signature(public, parse_signature(signature.marshal()), forged)
    with pytest.raises(UnacceptableKey, match="RESTRICTED"):
        check_ak(public)


EK_ATTRIBUTES = 0x000300F2  # as template L, and userWithAuth
POLICY_B = {
    SHA256: "ca3d0a99a2b93906f7a3342414efcfb3a385d44cd1fd459089d19b5071c0b7a0",
    SHA384: "b26e7d28d11a50bc53d882bcf5fd3a1a074148bb35d3b4e4cb1c0ad9bde419cacb47ba09699646150f9fc000f3f80e12",
}


@pytest.mark.parametrize(("bits", "name_alg", "aes"), [(2048, SHA256, 128), (3072, SHA384, 256)], ids=["H-1", "H-6"])
async def test_credentials_for_eks_of_template_h_open_in_a_tpm(esapi: Any, bits: int, name_alg: int, aes: int) -> None:
    """A credential for another hash and cipher than L-1's is activated too; one for another Name is not."""
    from tpm2_pytss import TPM2B_ENCRYPTED_SECRET, TPM2B_ID_OBJECT, TSS2_Exception

    area = (
        u16(1) + u16(name_alg) + EK_ATTRIBUTES.to_bytes(4, "big") + sized(bytes.fromhex(POLICY_B[name_alg]))
        + u16(6) + u16(aes) + u16(0x43) + u16(NULL) + u16(bits) + bytes(4) + sized(b"")
    )  # fmt: skip
    ek_handle, (raw_ek, _, _) = create(esapi, sized(area), "ENDORSEMENT")
    ek = parse_public(raw_ek.marshal())
    check_ek(ek)
    ak_template = ecc_key(attributes=AK_ATTRIBUTES | 1 << 10).area
    ak_handle, (_, ak_name, _) = create(esapi, template_of(ak_template, 68))
    secret = secrets.token_bytes(32)

    def activate(name: bytes) -> bytes:
        credential = make_credential(ek, name, secret)
        id_object, _ = TPM2B_ID_OBJECT.unmarshal(credential.id_object)
        encrypted, _ = TPM2B_ENCRYPTED_SECRET.unmarshal(credential.encrypted_secret)
        return bytes(esapi.activate_credential(ak_handle, ek_handle, id_object, encrypted))

    assert activate(bytes(ak_name.name)) == secret
    with pytest.raises(TSS2_Exception):
        activate(ek.name)
