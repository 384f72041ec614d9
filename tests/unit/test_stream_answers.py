"""Answers of the stream: written once by the host agent, and handed to the tenant as those bytes."""

from __future__ import annotations

import json
import random
import string
from datetime import UTC, datetime

import pytest

from harness.errors import (
    AccessDenied,
    BatchFailed,
    GuestNotHere,
    HarnessError,
    MalformedMessage,
    MessageTooLarge,
    PeerUnreachable,
    PoolFull,
)
from harness.merkle import InclusionProof
from harness.messages import compact, encode_proof, parse_json, proof_text, success
from harness.provider.batch import Quote
from harness.provider.batcher import Answer, SharedAnswer
from harness.provider.stream_answers import (
    ANSWER_LIMIT,
    SHARED_LIMIT,
    BatchLine,
    ErrorLine,
    ResultLine,
    encode_batch,
    encode_error,
    encode_result,
    parse_answer,
)
from harness.provider.stream_host import answer_lines, encode_shared_answer
from harness.values import HashAlg, HostId
from tests.support.pendings import agent

QUOTE = Quote(
    host_id=HostId(agent(1)),
    attest=bytes(range(120)),
    signature=bytes(range(72)),
    pcrs={HashAlg.SHA256: {0: bytes(32), 7: b"7" * 32}, HashAlg.SHA384: {3: b"3" * 48}},
)
SHARED = SharedAnswer(batch_id="0011223344556677", sealed_at=datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC), quote=QUOTE)
PROOFS = [
    InclusionProof(leaf_index=5, tree_size=16, hashes=tuple(bytes([n]) * 32 for n in range(4))),
    InclusionProof(leaf_index=0, tree_size=1, hashes=()),
    InclusionProof(leaf_index=(1 << 20) - 1, tree_size=1 << 20, hashes=tuple(bytes([n]) * 32 for n in range(20))),
]


def line_of(*proofs: InclusionProof) -> str:
    """The line of a batch whose members have the ids 1, 2, ..."""
    answers = [(number, Answer(shared=SHARED, proof=proof)) for number, proof in enumerate(proofs, 1)]
    (line,) = answer_lines(answers, lambda shared: compact(encode_shared_answer(shared)))
    return line


HONEST = line_of(*PROOFS)


@pytest.mark.parametrize("proof", PROOFS, ids=["four", "none", "twenty"])
def test_a_proof_is_written_as_its_members_would_be(proof: InclusionProof) -> None:
    """The shortcut for each waiter gives the same text."""
    assert proof_text(proof) == compact(encode_proof(proof))


def test_each_id_is_answered_the_bytes_of_the_envelope_that_its_members_make() -> None:
    """The shared part with its own proof (DESIGN 3.3), byte for byte what would be written for it alone."""
    batch = parse_answer(HONEST)
    assert isinstance(batch, BatchLine)
    answers = dict(batch.results())
    assert answers.keys() == {1, 2, 3}
    for number, proof in enumerate(PROOFS, 1):
        alone = success({**encode_shared_answer(SHARED), "proof": encode_proof(proof)})
        assert answers[number].envelope() == json.dumps(alone, separators=(",", ":")).encode()
        assert parse_json(answers[number].envelope(), limit=1 << 20) == alone


def test_the_line_of_a_batch_is_one_object_of_json() -> None:
    """Whoever reads it with a parser finds the same."""
    frame = json.loads(HONEST)
    assert frame["batch"] == encode_shared_answer(SHARED)
    assert frame["proofs"] == [{"id": n, "proof": encode_proof(proof)} for n, proof in enumerate(PROOFS, 1)]


def test_a_shared_part_with_every_character_is_handed_on_unchanged() -> None:
    """Also with what stands between the parts of a line, inside of a text."""
    shared = {"host_id": '],"proofs":[{"id":1', "batch": 'ü\n\u2028 \\ "}'}
    (line,) = encode_batch(compact(shared), [(7, proof_text(PROOFS[0]))])
    batch = parse_answer(line)
    assert isinstance(batch, BatchLine)
    assert json.loads(dict(batch.results())[7].text) == {**shared, "proof": encode_proof(PROOFS[0])}


def test_a_large_batch_is_split_into_lines_that_fit_into_a_frame() -> None:
    """With the longest proofs that there are; all ids arrive, each once."""
    lines = list(encode_batch("{}", [(number, proof_text(PROOFS[2])) for number in range(2500)]))
    assert [len(json.loads(line)["proofs"]) for line in lines] == [1000, 1000, 500]
    assert max(map(len, lines)) < ANSWER_LIMIT // 2
    assert [entry["id"] for line in lines for entry in json.loads(line)["proofs"]] == list(range(2500))


def replaced(old: str, new: str) -> str:
    """The honest line with one change."""
    assert old in HONEST
    return HONEST.replace(old, new, 1)


DAMAGED = {
    "empty": '{"batch":',
    "no proofs": '{"batch":{"host_id":"h"}}',
    "no entry": '{"batch":{"host_id":"h"},"proofs":[]}',
    "shared part is empty": replaced(HONEST[9 : HONEST.index(',"proofs"')], "{}"),
    "shared part is no object": replaced(HONEST[9 : HONEST.index(',"proofs"')], '["host_id"]'),
    "shared part is no json": replaced('"attest":', '"attest";'),
    "shared part has a proof": replaced('"attest":', '"proof":{},"attest":'),
    "shared part repeats a member": replaced('"attest":', '"attest":"","attest":'),
    "shared part has an end of its own": replaced('"host_id"', '"x":1}},"proofs":[],"y":{"host_id"'),
    "space before the shared part": replaced('{"batch":', '{"batch": '),
    "space after the shared part": replaced(',"proofs"', ' ,"proofs"'),
    "id is negative": replaced('"id":1', '"id":-1'),
    "id is text": replaced('"id":1', '"id":"1"'),
    "id is too long": replaced('"id":1', '"id":10000000000000000'),
    "id has a zero before it": replaced('"id":1', '"id":01'),
    "a member more": replaced('"leaf_index":5', '"leaf_index":5,"host_id":"x"'),
    "a member less": replaced('"leaf_index":5,', ""),
    "another order": replaced('"leaf_index":5,"tree_size":16', '"tree_size":16,"leaf_index":5'),
    "hash is short": replaced("01" * 32, "01" * 31),
    "hash in upper case": replaced("03" * 32, "0A" * 32),
    "hash has an end": replaced("01" * 32, "01" * 31 + '"}'),
    "21 hashes": replaced("13" * 32 + '"]', "13" * 32 + '","' + "14" * 32 + '"]'),
    "comma at the end": replaced("]}}]}", "]}},]}"),
    "no comma between": replaced('},{"id"', '}{"id"'),
    "cut": HONEST[:-1],
    "cut in an entry": HONEST[:-9],
    "more behind it": HONEST + " ",
    "a line behind it": HONEST + "\n",
}  # fmt: skip


@pytest.mark.parametrize("line", DAMAGED.values(), ids=DAMAGED.keys())
def test_a_batch_in_any_other_form_is_refused(line: str) -> None:
    """Nothing is handed to a tenant of which the provider verifier does not know that it is one answer."""
    parse_answer(HONEST)
    with pytest.raises(MalformedMessage):
        parse_answer(line)


def test_a_shared_part_is_bounded_because_every_member_is_handed_a_copy() -> None:
    """All PCRs of all banks fit, with structures longer than any TPM's; what is far longer ends the connection."""
    pcrs = {bank: {pcr: bytes(bank.digest_size) for pcr in range(24)} for bank in HashAlg}
    quote = Quote(host_id=QUOTE.host_id, attest=bytes(1024), signature=bytes(1024), pcrs=pcrs)
    shared = SharedAnswer(batch_id=SHARED.batch_id, sealed_at=SHARED.sealed_at, quote=quote)
    (line,) = answer_lines(
        [(1, Answer(shared=shared, proof=PROOFS[0]))], lambda each: compact(encode_shared_answer(each))
    )
    assert isinstance(parse_answer(line), BatchLine)
    with pytest.raises(MessageTooLarge):
        parse_answer(replaced('"attest":"', '"attest":"' + "A" * SHARED_LIMIT))


def test_a_refusal_is_no_longer_than_a_sentence() -> None:
    """Whatever its kind: it goes to the tenant, and into the log."""
    for error in (MalformedMessage("x" * 10_000), GuestNotHere("x" * 10_000)):
        line = parse_answer(encode_error(3, error))
        assert isinstance(line, ErrorLine)
        assert type(line.error) is type(error)
        assert len(line.error.detail) <= 500


def test_a_result_survives_the_wire() -> None:
    """Id and members."""
    assert parse_answer(encode_result(8, {"answer": "00"})) == ResultLine(number=8, result={"answer": "00"})


@pytest.mark.parametrize(
    ("error", "arrives"),
    [
        (GuestNotHere("gone"), GuestNotHere),
        (AccessDenied("no"), AccessDenied),
        (BatchFailed("TPM", batch_id="b"), BatchFailed),
        (MalformedMessage("bank is not allocated"), MalformedMessage),
        (PeerUnreachable("x"), PeerUnreachable),
        (PoolFull("full", retry_after_s=3.0), PoolFull),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, HarnessError) else "",
)
def test_an_error_arrives_as_what_it_is(error: HarnessError, arrives: type[HarnessError]) -> None:
    """The tenant is answered with the host agent's own refusal."""
    line = parse_answer(encode_error(3, error))
    assert isinstance(line, ErrorLine)
    assert line.number == 3
    assert type(line.error) is arrives
    if isinstance(error, PoolFull):
        assert isinstance(line.error, PoolFull)
        assert line.error.retry_after_s == 3.0


@pytest.mark.parametrize(
    "line",
    [
        [],
        {},
        {"id": 1},
        {"id": 1, "result": []},
        {"id": "1", "result": {}},
        {"id": 1, "error": {"status": 404}},
        {"proofs": [], "batch": {"host_id": "h"}},
    ],
)
def test_an_answer_of_another_outline_is_refused(line: object) -> None:
    """The link then breaks, and everybody is released."""
    with pytest.raises(MalformedMessage):
        parse_answer(json.dumps(line))


def test_random_text_raises_nothing_else_and_what_is_taken_is_json(rng: random.Random) -> None:
    """Whatever arrives, the two errors of the border are all that comes out; each answer is one object."""
    for _ in range(2000):
        text = list(HONEST)
        for _ in range(rng.randint(1, 3)):
            text[rng.randrange(len(text))] = rng.choice(string.printable)
        try:
            line = parse_answer("".join(text))
        except (MalformedMessage, MessageTooLarge):
            continue
        assert isinstance(line, BatchLine)
        for _, results in line.results():
            envelope = parse_json(results.envelope(), limit=1 << 20)
            assert isinstance(envelope, dict)
            assert envelope.keys() == {"code", "status", "results"}
            assert "proof" in envelope["results"]
