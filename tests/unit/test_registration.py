"""Keylime's registration protocol as both registrars speak it: bodies, key checks, challenges.

Size: one table of bodies and its builders.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding

from harness.attest import ObjectAttributes
from harness.credential import keylime_auth_tag, parse_keylime_blob
from harness.errors import ChallengeFailed, CloneSuspected, HarnessError, MalformedMessage, PoolFull, UnacceptableKey
from harness.registration import CHALLENGE_S, OpenChallenges, parse_auth_tag, parse_registration
from harness.tpm_templates import KeyTemplate
from harness.values import AgentId
from tests.support.enrolment_parties import SoftVtpm, changed_attributes, ek_public, open_credential
from tests.support.pendings import agent
from tests.support.soft_tpm import public_of, sized

GUEST, OTHER = agent(1), agent(2)
VTPM = SoftVtpm()
CA_KEY = ec.generate_private_key(ec.SECP256R1())
CERTIFICATE = VTPM.certified(GUEST, CA_KEY)
PEM = x509.load_der_x509_certificate(CERTIFICATE).public_bytes(Encoding.PEM).decode()
EK, AK = VTPM.ek.marshal(), VTPM.ak.marshal()
A = ObjectAttributes


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def body(**changes: Any) -> dict[str, Any]:
    """An honest body with members changed; None takes a member away."""
    honest = {
        "ek_tpm": b64(EK),
        "aik_tpm": b64(AK),
        "ekcert": b64(CERTIFICATE),
        "mtls_cert": PEM,
        "ip": "127.0.0.1",
        "port": 9002,
    }
    return {name: value for name, value in (honest | changes).items() if value is not None}


# --- the body -----------------------------------------------------------------------------------------------


def test_an_honest_body_is_taken_as_it_is() -> None:
    """Keys, certificate and contact."""
    parsed = parse_registration(body())
    assert (parsed.ek.marshal(), parsed.ak.marshal(), parsed.ek_certificate) == (EK, AK, CERTIFICATE)
    assert (parsed.mtls_cert, parsed.ip, parsed.port) == (PEM, "127.0.0.1", 9002)


def test_contact_may_be_left_out() -> None:
    """A guest that nobody calls has none."""
    parsed = parse_registration(body(mtls_cert=None, ip=None, port=None))
    assert (parsed.mtls_cert, parsed.ip, parsed.port) == (None, None, None)


def test_the_certificate_may_be_pem() -> None:
    """Older agents send it so; both forms give the same DER."""
    assert parse_registration(body(ekcert=PEM)).ek_certificate == CERTIFICATE


def test_members_of_stock_agents_that_we_do_not_use_are_ignored() -> None:
    """iak_tpm and others of newer Keylime versions."""
    assert parse_registration(body(iak_tpm="AAAA", idevid_cert="", active=True)).ek.marshal() == EK


@pytest.mark.parametrize("value", [None, [], "text", 5, True])
def test_a_body_that_is_no_object_is_malformed(value: object) -> None:
    """JSON of another type."""
    with pytest.raises(MalformedMessage, match="object"):
        parse_registration(value)


@pytest.mark.parametrize("name", ["ek_tpm", "aik_tpm", "ekcert"])
@pytest.mark.parametrize(
    "value", [None, 5, True, [], {}, "no base64!", "AAA", "Zg==\n", "Zg\xfc=", "\ud800", "A" * 20_000]
)
def test_keys_and_certificate_must_be_there_in_base64(name: str, value: object) -> None:
    """Missing, of another type, in another encoding, or too long; the member is named."""
    with pytest.raises(MalformedMessage, match=name):
        parse_registration(body(**{name: value}))


BAD_MEMBERS: dict[str, list[object]] = {
    "port": [0, -1, 65536, True, "9002", 9002.0, []],
    "ip": [5, [], {}, "x" * 20_000],
    "mtls_cert": [5, [], "", "no PEM", "\ud800", PEM[:-40], b64(CERTIFICATE)],
    "ekcert": ["-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", "-----BEGIN"],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name in BAD_MEMBERS for value in BAD_MEMBERS[name]])
def test_other_members_must_have_their_type(name: str, value: object) -> None:
    """A contact that is not understood is not kept."""
    with pytest.raises(MalformedMessage, match=name):
        parse_registration(body(**{name: value}))


# --- malformed structures: each length field, one too large and one too small ---------------------------------


@dataclass(frozen=True, slots=True)
class LengthField:
    """A two-byte length in a TPM2B_PUBLIC, by its offset."""

    name: str
    offset: int


# TPM2B size, then type 2, nameAlg 2, attributes 4, policy size; EK: policy 32 bytes, symmetric 6, scheme 2, keyBits 2,
# exponent 4, modulus size. AK: no policy, symmetric 2, scheme 4, curve 2, kdf 2, x size, 32 bytes of x, y size.
EK_LENGTHS = [LengthField("size", 0), LengthField("authPolicy", 10), LengthField("modulus", 58)]
AK_LENGTHS = [LengthField("size", 0), LengthField("authPolicy", 10), LengthField("x", 22), LengthField("y", 56)]
LENGTHS = [("ek_tpm", EK, field) for field in EK_LENGTHS] + [("aik_tpm", AK, field) for field in AK_LENGTHS]
LENGTH_NAMES = [f"{member} {field.name}" for member, _, field in LENGTHS]  # the keys are others in each run


@pytest.mark.parametrize(("member", "data", "field"), LENGTHS, ids=LENGTH_NAMES)
def test_the_table_of_length_fields_is_right(member: str, data: bytes, field: LengthField) -> None:
    """Each offset holds the length that the structure says it does."""
    expected = {"size": len(data) - 2, "authPolicy": 32 if member == "ek_tpm" else 0, "modulus": 256, "x": 32, "y": 32}
    assert int.from_bytes(data[field.offset : field.offset + 2], "big") == expected[field.name]


@pytest.mark.parametrize("difference", [-1, 1, 256, 0xFFFF])
@pytest.mark.parametrize(("member", "data", "field"), LENGTHS, ids=LENGTH_NAMES)
def test_a_wrong_length_field_is_malformed(member: str, data: bytes, field: LengthField, difference: int) -> None:
    """Never an exception of the parser's inside, and never another key."""
    wrong = bytearray(data)
    length = (int.from_bytes(data[field.offset : field.offset + 2], "big") + difference) % 0x10000
    wrong[field.offset : field.offset + 2] = length.to_bytes(2, "big")
    with pytest.raises(MalformedMessage):
        parse_registration(body(**{member: b64(bytes(wrong))}))


@pytest.mark.parametrize(("member", "data"), [("ek_tpm", EK), ("aik_tpm", AK)], ids=["ek_tpm", "aik_tpm"])
def test_a_structure_that_is_cut_anywhere_is_malformed(member: str, data: bytes) -> None:
    """At every byte, with the outer length as it was and with one that fits."""
    for end in range(len(data)):
        with pytest.raises(MalformedMessage):
            parse_registration(body(**{member: b64(data[:end])}))
        if end > 2:
            with pytest.raises(MalformedMessage):
                parse_registration(body(**{member: b64(sized(data[2:end]))}))


@pytest.mark.parametrize(("member", "data"), [("ek_tpm", EK), ("aik_tpm", AK)], ids=["ek_tpm", "aik_tpm"])
def test_trailing_bytes_are_malformed(member: str, data: bytes) -> None:
    """Behind the structure, and inside its size."""
    for wrong in (data + b"\x00", sized(data[2:] + b"\x00")):
        with pytest.raises(MalformedMessage):
            parse_registration(body(**{member: b64(wrong)}))


# --- acceptable keys ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flip",
    [
        A.FIXED_TPM,
        A.FIXED_PARENT,
        A.SENSITIVE_DATA_ORIGIN,
        A.RESTRICTED,
        A.SIGN,
        A.DECRYPT,
        A.X509_SIGN,
        A.ENCRYPTED_DUPLICATION,
        A.ST_CLEAR,
        1 << 31,
    ],
)
def test_an_ak_with_another_attribute_is_refused(flip: int) -> None:
    """One bit is enough: not restricted, it would sign anything; not fixedTPM, it might be anywhere."""
    with pytest.raises(UnacceptableKey, match="AK"):
        parse_registration(body(aik_tpm=b64(changed_attributes(VTPM.ak, flip=flip))))


@pytest.mark.parametrize("flip", [A.USER_WITH_AUTH, A.ADMIN_WITH_POLICY, A.NO_DA])
def test_attributes_that_are_free_for_an_ak(flip: int) -> None:
    """Stock agents choose them differently."""
    assert parse_registration(body(aik_tpm=b64(changed_attributes(VTPM.ak, flip=flip))))


@pytest.mark.parametrize(
    "flip", [A.FIXED_TPM, A.FIXED_PARENT, A.SENSITIVE_DATA_ORIGIN, A.RESTRICTED, A.DECRYPT, A.SIGN, 1 << 31]
)
def test_an_ek_with_another_attribute_is_refused(flip: int) -> None:
    """It was not made by the template of the TCG."""
    with pytest.raises(UnacceptableKey, match="EK"):
        parse_registration(body(ek_tpm=b64(changed_attributes(VTPM.ek, flip=flip))))


def test_an_ek_with_another_policy_is_refused() -> None:
    """Somebody else could use it."""
    wrong = bytearray(EK)
    wrong[12] ^= 1
    with pytest.raises(UnacceptableKey, match="template"):
        parse_registration(body(ek_tpm=b64(bytes(wrong))))


def test_an_ek_of_1024_bits_is_refused() -> None:
    """Even when its public area says 2048."""
    small = rsa.generate_private_key(public_exponent=65537, key_size=1024)  # noqa: S505 - the bad input
    with pytest.raises(UnacceptableKey, match="EK"):
        parse_registration(body(ek_tpm=b64(ek_public(small).marshal())))


@pytest.mark.parametrize("template", [KeyTemplate.CA_P256])
def test_a_key_that_signs_anything_is_no_ak(template: KeyTemplate) -> None:
    """The vTPM CA's key, for one."""
    with pytest.raises(UnacceptableKey, match="RESTRICTED"):
        parse_registration(body(aik_tpm=b64(public_of(VTPM.ak_key, template).marshal())))


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"aik_tpm": b64(EK)}, (UnacceptableKey, CloneSuspected)),
        ({"ek_tpm": b64(AK)}, (UnacceptableKey, CloneSuspected)),
        ({"ek_tpm": b64(AK), "aik_tpm": b64(EK)}, (UnacceptableKey, CloneSuspected)),
    ],
)
def test_one_key_does_not_serve_in_two_roles(changes: dict[str, str], error: tuple[type[HarnessError], ...]) -> None:
    """No key is acceptable as EK and as AK; swapped ones are not either."""
    with pytest.raises(error):
        parse_registration(body(**changes))


def test_an_ak_whose_point_is_off_the_curve_is_refused() -> None:
    """Its signatures would mean nothing."""
    wrong = bytearray(AK)
    wrong[-1] ^= 1
    with pytest.raises(UnacceptableKey, match="usable"):
        parse_registration(body(aik_tpm=b64(bytes(wrong))))


# --- the answer -----------------------------------------------------------------------------------------------


def test_an_auth_tag_is_text() -> None:
    """Which text is right, the challenge says."""
    assert parse_auth_tag({"auth_tag": "abc", "more": 1}) == "abc"


@pytest.mark.parametrize("value", [None, [], "abc", {}, {"auth_tag": 5}, {"auth_tag": "ä"}, {"auth_tag": "a" * 257}])
def test_a_body_without_a_tag_is_malformed(value: object) -> None:
    """Missing, of another type, not ASCII, or too long."""
    with pytest.raises(MalformedMessage, match="auth_tag"):
        parse_auth_tag(value)


class Desk:
    """Challenges with a clock and secrets that the test knows."""

    def __init__(self, limit: int = 8) -> None:
        self.time = 1000.0
        self.secrets: list[bytes] = []
        self.challenges: OpenChallenges[str] = OpenChallenges(
            random=self._secret, monotonic=lambda: self.time, limit=limit
        )

    def _secret(self, size: int) -> bytes:
        self.secrets.append(bytes([len(self.secrets) + 1]) * size)
        return self.secrets[-1]

    def open(self, agent_id: AgentId = GUEST, value: str = "kept") -> str:
        """Opens a challenge; the right answer to it."""
        self.challenges.open(agent_id, value, VTPM.ek, VTPM.ak)
        return keylime_auth_tag(self.secrets[-1], str(agent_id))


@pytest.fixture
def desk() -> Desk:
    return Desk()


def test_the_tpm_that_has_both_keys_can_answer(desk: Desk) -> None:
    """The blob opens with this EK for this AK's Name, and what was kept comes back."""
    blob = desk.challenges.open(GUEST, "kept", VTPM.ek, VTPM.ak)
    secret = open_credential(VTPM.ek_key, VTPM.ak.name, parse_keylime_blob(blob))
    assert secret == desk.secrets[0]
    assert desk.challenges.answered(GUEST, keylime_auth_tag(secret, str(GUEST))) == "kept"


def test_a_tpm_without_one_of_the_keys_cannot(desk: Desk) -> None:
    """Another AK beside this EK, or another EK."""
    credential = parse_keylime_blob(desk.challenges.open(GUEST, "kept", VTPM.ek, VTPM.ak))
    stranger = SoftVtpm()
    with pytest.raises(ValueError, match="integrity"):
        open_credential(VTPM.ek_key, stranger.ak.name, credential)
    with pytest.raises(ValueError):
        open_credential(stranger.ek_key, VTPM.ak.name, credential)


def test_secrets_are_random_and_of_32_bytes() -> None:
    """By default they come from the system."""
    challenges: OpenChallenges[None] = OpenChallenges()
    blobs = (challenges.open(GUEST, None, VTPM.ek, VTPM.ak) for _ in range(2))
    secrets = [open_credential(VTPM.ek_key, VTPM.ak.name, parse_keylime_blob(blob)) for blob in blobs]
    assert [len(secret) for secret in secrets] == [32, 32]
    assert secrets[0] != secrets[1]


def test_an_answer_counts_once(desk: Desk) -> None:
    """The right one, repeated, is wrong."""
    right = desk.open()
    desk.challenges.answered(GUEST, right)
    with pytest.raises(ChallengeFailed):
        desk.challenges.answered(GUEST, right)


@pytest.mark.parametrize("wrong", ["", "0" * 96, "-", "x"])
def test_a_wrong_answer_burns_the_challenge(desk: Desk, wrong: str) -> None:
    """Nobody may guess on."""
    right = desk.open()
    with pytest.raises(ChallengeFailed):
        desk.challenges.answered(GUEST, wrong)
    with pytest.raises(ChallengeFailed):
        desk.challenges.answered(GUEST, right)


@pytest.mark.parametrize("answer", ["-", ""])
def test_an_answer_to_no_challenge_is_wrong(desk: Desk, answer: str) -> None:
    """Whatever stands for a missing one inside."""
    with pytest.raises(ChallengeFailed):
        desk.challenges.answered(GUEST, answer)


def test_another_guests_answer_is_wrong(desk: Desk) -> None:
    """The tag is bound to the agent's id, and a failure touches only its own challenge."""
    right = desk.open()
    desk.open(OTHER)
    with pytest.raises(ChallengeFailed):
        desk.challenges.answered(OTHER, right)
    assert desk.challenges.answered(GUEST, right) == "kept"


def test_the_tag_is_bound_to_the_id(desk: Desk) -> None:
    """The right secret with another agent's id is a wrong answer."""
    desk.open()
    with pytest.raises(ChallengeFailed):
        desk.challenges.answered(GUEST, keylime_auth_tag(desk.secrets[-1], str(OTHER)))


def test_an_answer_at_the_last_moment_counts(desk: Desk) -> None:
    """60 seconds, the last one included."""
    right = desk.open()
    desk.time += CHALLENGE_S
    assert desk.challenges.answered(GUEST, right) == "kept"


def test_a_late_answer_is_wrong(desk: Desk) -> None:
    """And burns the challenge: going back in time does not help."""
    right = desk.open()
    desk.time += CHALLENGE_S + 0.001
    with pytest.raises(ChallengeFailed):
        desk.challenges.answered(GUEST, right)
    desk.time -= CHALLENGE_S
    with pytest.raises(ChallengeFailed):
        desk.challenges.answered(GUEST, right)


def test_only_the_newest_challenge_of_an_agent_counts(desk: Desk) -> None:
    """A repeated POST replaces it, and what was kept with it."""
    desk.open(value="first")
    second = desk.open(value="second")
    assert desk.challenges.answered(GUEST, second) == "second"
    first = desk.open(value="first")
    desk.open(value="second")
    with pytest.raises(ChallengeFailed):
        desk.challenges.answered(GUEST, first)


def test_a_forgotten_challenge_has_no_answer(desk: Desk) -> None:
    """The guest was removed while it registered; forgetting twice is no error."""
    right = desk.open()
    desk.challenges.forget(GUEST)
    desk.challenges.forget(GUEST)
    with pytest.raises(ChallengeFailed):
        desk.challenges.answered(GUEST, right)


def test_open_challenges_have_a_limit(desk: Desk) -> None:
    """The one too many is asked to come back; the others can still be answered."""
    answers = {agent(number): desk.open(agent(number)) for number in range(8)}
    with pytest.raises(PoolFull) as full:
        desk.open(agent(99))
    assert 0 < full.value.retry_after_s <= CHALLENGE_S
    for agent_id, answer in answers.items():
        assert desk.challenges.answered(agent_id, answer) == "kept"


def test_a_repeated_post_needs_no_room(desk: Desk) -> None:
    """It replaces the agent's own challenge, so a full table locks nobody out who is in it."""
    for number in range(8):
        desk.open(agent(number))
    answer = desk.open(agent(3), "again")
    assert desk.challenges.answered(agent(3), answer) == "again"


def test_expired_challenges_make_room(desk: Desk) -> None:
    """At the limit the late ones go; one that is still open stays."""
    for number in range(7):
        desk.open(agent(number))
    desk.time += CHALLENGE_S
    answer = desk.open(agent(7))
    desk.time += 0.001
    desk.open(agent(99))
    assert desk.challenges.answered(agent(7), answer) == "kept"


def test_no_secret_is_in_the_text_of_a_challenge(desk: Desk) -> None:
    """A table that lands in a log gives no answer away."""
    right = desk.open()
    assert right not in repr(vars(desk.challenges))
