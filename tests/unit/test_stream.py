"""Frames between provider verifier and host agent: fields only, and nothing to sign."""

from __future__ import annotations

import base64
import itertools
import json
import random
import string
from dataclasses import replace

import pytest

from harness.credential import Credential
from harness.errors import MalformedMessage, MessageTooLarge
from harness.provider.stream import (
    ORDER_LIMIT,
    ActivateOrder,
    CancelOrder,
    CertifyOrder,
    IdentityOrder,
    Order,
    QuoteOrder,
    encode_order,
    frames_of,
    lines_of,
    open_order,
    parse_allowlist,
    parse_order,
)
from harness.values import HashAlg, Nonce, PcrSelection
from tests.support.pendings import a_request, agent

CREDENTIAL = Credential(id_object=b"\x00\x02ab", encrypted_secret=b"\x00\x03cde")
QUOTE = json.loads(encode_order(7, QuoteOrder(pending=a_request(pcrs=[0, 7]))))
GUEST_QUOTE = json.loads(encode_order(7, QuoteOrder(pending=a_request(pcrs=[0, 7], agent_id=agent(1)))))
ACTIVATE = json.loads(encode_order(9, ActivateOrder(credential=CREDENTIAL, requester=b"r" * 32)))
CERTIFY = json.loads(encode_order(10, CertifyOrder(nonce=Nonce(b"n" * 32))))


def read(frame: object) -> tuple[int, Order]:
    number, members = open_order(json.dumps(frame))
    return number, parse_order(members)


@pytest.mark.parametrize(
    "order",
    [
        QuoteOrder(pending=a_request(pcrs=[0, 7])),
        QuoteOrder(pending=a_request(pcrs=[3], agent_id=agent(5), bank=HashAlg.SHA384)),
        QuoteOrder(pending=replace(a_request(), wait_s=2.5)),
        ActivateOrder(credential=CREDENTIAL, requester=b"r" * 32),
        CertifyOrder(nonce=Nonce(b"n" * 32)),
        IdentityOrder(),
        CancelOrder(),
    ],
    ids=lambda order: type(order).__name__,
)
def test_an_order_arrives_as_it_was_given(order: Order) -> None:
    """Every kind of order, with its id."""
    number, members = open_order(encode_order(42, order))
    assert (number, parse_order(members)) == (42, order)


@pytest.mark.parametrize("member", ["root", "leaf", "leaf_hash", "extra_data", "qualifying", "tree_size", "vtpm_ek"])
@pytest.mark.parametrize(
    "frame", [QUOTE, GUEST_QUOTE, ACTIVATE, CERTIFY], ids=["quote", "guest", "activate", "certify"]
)
def test_nothing_to_sign_can_be_handed_over(frame: dict[str, object], member: str) -> None:
    """A frame with one member more is refused; without it, it passes."""
    read(frame)
    with pytest.raises(MalformedMessage, match=f"'{member}' is unknown"):
        read({**frame, member: "00" * 32})


@pytest.mark.parametrize(
    ("frame", "member"),
    [(frame, member) for frame in (QUOTE, GUEST_QUOTE, ACTIVATE, CERTIFY) for member in frame if member != "id"],
)
def test_nothing_may_be_missing(frame: dict[str, object], member: str) -> None:
    """Also not one of agent_id and binding."""
    with pytest.raises(MalformedMessage):
        read({name: value for name, value in frame.items() if name != member})


BAD_MEMBERS: list[tuple[str, list[object]]] = [
    ("tenant", ["", 7, None]),
    ("nonce", ["", "00" * 15, "00" * 65, "AB" * 16, "0x" + "00" * 16, 5]),
    ("mask", ["0x0", "0x1000000", "0x10000", "0x800000", "1", "0X1", 1, "0xG"]),
    ("hash_alg", ["sha1", "SHA256", "", 11]),
    ("requester", ["00" * 31, "00" * 33, "zz" * 32, None]),
    ("agent_id", ["", "A0000000-0000-0000-0000-000000000001", "{}", 1]),
    ("binding", ["00" * 31, "00" * 33, ""]),
    ("wait_s", [0, -1, 30.5, 1e300, True, "3", None]),
    (
        "allowlist",
        [
            [],
            "sha256",
            {"sha1": "0x1"},
            {"sha256": "0x0"},
            {"sha256": "0x1000000"},
            {"sha256": "1"},
            {"sha256": [0]},
            {"sha256": 1},
            {"sha256": "0xF"},
        ],
    ),
    ("op", ["sign", "", None, 1]),
]


@pytest.mark.parametrize(("member", "value"), [(name, value) for name, values in BAD_MEMBERS for value in values])
def test_a_malformed_member_is_refused(member: str, value: object) -> None:
    """One member of an honest frame changed, one named error."""
    read(GUEST_QUOTE)
    with pytest.raises(MalformedMessage):
        read({**GUEST_QUOTE, member: value})


@pytest.mark.parametrize(
    "text", ["", "[]", "7", "{}", '{"id": 1', '{"id": 1, "id": 2, "op": "identity"}', "[" * 100_000]
)
def test_a_frame_without_a_usable_form_is_refused(text: str) -> None:
    """It cannot be answered under an id."""
    with pytest.raises((MalformedMessage, MessageTooLarge)):
        open_order(text)


@pytest.mark.parametrize("number", [-1, 1 << 53, True, "1", 1.0, None])
def test_an_id_is_a_small_integer(number: object) -> None:
    """JSON carries it exactly, and nobody confuses it with another."""
    with pytest.raises(MalformedMessage, match="id"):
        open_order(json.dumps({"id": number, "op": "identity"}))


def test_a_frame_above_the_limit_is_refused_unparsed() -> None:
    """Size comes before content."""
    with pytest.raises(MessageTooLarge):
        open_order(json.dumps({"id": 1, "op": "x" * ORDER_LIMIT}))


@pytest.mark.parametrize("credential", ["", "!!", "AAAA", base64.b64encode(b"\x00" * 40).decode(), 5])
def test_a_damaged_credential_is_refused(credential: object) -> None:
    """Before it reaches the TPM."""
    with pytest.raises(MalformedMessage):
        read({**ACTIVATE, "credential": credential})


def test_allowlists_survive_the_wire() -> None:
    """Several banks, and none at all."""
    for allowlist in (PcrSelection(), PcrSelection.from_lists({HashAlg.SHA384: [1], HashAlg.SHA256: [0, 23]})):
        order = QuoteOrder(pending=replace(a_request(), allowlist=allowlist))
        assert read(json.loads(encode_order(1, order))) == (1, order)


@pytest.mark.parametrize("value", [[], "sha256", {"sha1": [0]}, {"sha256": [24]}, {"sha256": [True]}, {"sha256": 1}])
def test_an_operators_allowlist_lists_pcrs_of_known_banks(value: object) -> None:
    """The form in which an operator states it, and in which it is stored."""
    assert parse_allowlist({"sha256": [0, 23]}) == PcrSelection.from_lists({HashAlg.SHA256: [0, 23]})
    with pytest.raises(MalformedMessage):
        parse_allowlist(value)


# --- frames -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [1, 3, 4, 7, 100])
def test_lines_travel_in_as_few_frames_as_their_limit_allows(limit: int) -> None:
    """In their order, none is lost or cut; only a line that is longer than the limit makes a longer frame."""
    lines = ["abc", "d", "ef", "ghijk", "l", "m"]
    made = list(frames_of(lines, limit))
    assert [line for frame in made for line in frame.split("\n")] == lines
    assert all(len(frame) <= limit or "\n" not in frame for frame in made)
    assert all(len(one) + 1 + len(other.split("\n")[0]) > limit for one, other in itertools.pairwise(made))
    assert list(frames_of([], limit)) == []


def test_a_frame_above_its_limit_is_not_taken_apart() -> None:
    """Size comes before content, also where each line is short enough."""
    assert lines_of("a\nb", 3) == ["a", "b"]
    with pytest.raises(MessageTooLarge):
        lines_of("a\nb", 2)


def test_random_text_raises_nothing_else(rng: random.Random) -> None:
    """Whatever arrives, the two errors of the border are all that comes out."""
    honest = json.dumps(GUEST_QUOTE)
    for _ in range(500):
        text = list(honest)
        for _ in range(rng.randint(1, 4)):
            text[rng.randrange(len(text))] = rng.choice(string.printable)
        try:
            parse_order(open_order("".join(text))[1])
        except (MalformedMessage, MessageTooLarge):
            continue
