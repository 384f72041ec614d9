"""Messages on the wire: strict JSON, the request and the answer of a host quote, Keylime's envelope.

Invariants:
    1. Input becomes a typed value once, here; bytes are hex or base64 only outside of this module.
    2. Repeated members are refused everywhere: two parsers must not read two messages in one.
    3. `ProviderEvidence` is received, not believed; `tenant.appraisal` makes of it what is believed.

Spec: DESIGN 3.1 (request), 3.3 (answer), 3.5 check 1 (types and bounds); RFC 8259, RFC 4648.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from harness.errors import MalformedEvidence, MalformedMessage, MessageTooLarge
from harness.merkle import HASH_SIZE, InclusionProof
from harness.protocol import QuoteRequest
from harness.values import (
    PCR_COUNT,
    HashAlg,
    HostId,
    Nonce,
    PcrValues,
    parse_agent_id,
    parse_hex,
    parse_host_id,
    parse_mask,
)
from harness.wire_errors import error_from_response, failure, retry_after_s, status_of

__all__ = [
    "ProviderEvidence",
    "ResultsText",
    "VerifierQuery",
    "compact",
    "encode_proof",
    "encode_shared",
    "error_from_response",
    "failure",
    "parse_json",
    "parse_provider_evidence",
    "parse_verifier_query",
    "proof_text",
    "retry_after_s",
    "status_of",
    "success",
    "verifier_query",
]

_MAX_INTEGER = 1 << 63
_LONGEST_INTEGER = 20
"""Digits of 2^64 - 1, the largest integer of any message."""
_MAX_DEPTH = 100
_MAX_STRUCTURE = 4096
_MAX_HASHES = 64
_MAX_VALUE = 64
_PCR_INDICES = {str(pcr): pcr for pcr in range(PCR_COUNT)}
_PARAMETERS = frozenset({"nonce", "mask", "hash_alg", "agent_id", "binding", "host_id"})


def parse_json(data: bytes, *, limit: int) -> object:
    """JSON value from bytes of somebody else.

    Args:
        data: UTF-8.
        limit: largest length, in bytes.

    Raises:
        MessageTooLarge: more than ``limit`` bytes.
        MalformedMessage: not UTF-8, not JSON, nested too deeply, a member repeated, NaN or infinity.
    """
    if len(data) > limit:
        raise MessageTooLarge(f"message of {len(data)} bytes, at most {limit} are allowed")
    try:
        value: object = _DECODER.decode(data.decode("utf-8"))
    except UnicodeDecodeError:
        raise MalformedMessage("message is not UTF-8") from None
    except RecursionError:
        raise MalformedMessage("message is nested too deeply") from None
    except ValueError as error:
        raise MalformedMessage(f"message is not JSON: {error}") from None
    if data.count(b"{") + data.count(b"[") > _MAX_DEPTH:
        _check_depth(value)
    return value


def _check_depth(value: object) -> None:
    # Python's own limit depends on the stack of the moment: the same message must not be JSON here and not there.
    level = [value]
    for _ in range(_MAX_DEPTH):
        inner = (item.values() if isinstance(item, dict) else item for item in level if isinstance(item, dict | list))
        level = [value for values in inner for value in values]
        if not level:
            return
    raise MalformedMessage("message is nested too deeply")


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise MalformedMessage("message repeats a member")
    return members


def _whole(text: str) -> int | float:
    # A longer one is out of every range here. As a float it is never taken for an integer, and no work goes into it.
    return int(text) if len(text) <= _LONGEST_INTEGER else float(text)


def _no_constant(name: str) -> object:
    raise MalformedMessage(f"message holds {name}, which is not JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_int=_whole, parse_constant=_no_constant)


_ENCODER = json.JSONEncoder(separators=(",", ":"))


def compact(value: object) -> str:
    """JSON text without spaces, ASCII."""
    return _ENCODER.encode(value)


def success(results: object) -> dict[str, object]:
    """Envelope of an answer (DESIGN 3.3)."""
    return {"code": 200, "status": "Success", "results": results}


@dataclass(frozen=True, slots=True)
class ResultsText:
    """Results as JSON text, which goes into the envelope as it is: nobody on the way has to write it anew."""

    text: bytes = field(repr=False)

    def envelope(self) -> bytes:
        """What `success` is as text."""
        return b'{"code":200,"status":"Success","results":%b}' % self.text


# --- request ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifierQuery:
    """`GET /v1/verifier`: the request, and for a host-only one the host it goes to."""

    request: QuoteRequest
    host_id: HostId | None


def parse_verifier_query(pairs: Sequence[tuple[str, str]]) -> VerifierQuery:
    """Query from the URL's parameters in their order.

    Raises:
        MalformedMessage: an unknown, repeated or missing parameter, or one in another form than DESIGN 3.1 asks.
    """
    given = dict(pairs)
    if len(given) != len(pairs):
        raise MalformedMessage("a parameter is repeated")
    if unknown := given.keys() - _PARAMETERS:
        raise MalformedMessage(f"unknown parameter {ascii(min(unknown))[:40]}")
    if missing := {"nonce", "mask", "hash_alg"} - given.keys():
        raise MalformedMessage(f"parameter {min(missing)} is missing")
    agent_id, binding, host_id = given.get("agent_id"), given.get("binding"), given.get("host_id")
    request = QuoteRequest(
        nonce=Nonce.parse(given["nonce"]),
        mask=parse_mask(given["mask"]),
        bank=HashAlg.parse(given["hash_alg"]),
        agent_id=None if agent_id is None else parse_agent_id(agent_id),
        binding=None if binding is None else parse_hex(binding, "binding", size=32),
    )
    if (agent_id is None) != (host_id is not None):
        raise MalformedMessage("host_id is given exactly when agent_id is not")
    return VerifierQuery(request=request, host_id=None if host_id is None else parse_host_id(host_id))


def verifier_query(query: VerifierQuery) -> list[tuple[str, str]]:
    """The URL's parameters of a query; `parse_verifier_query` reads them back."""
    request = query.request
    pairs = [("nonce", request.nonce.value.hex()), ("mask", f"{request.mask:#x}"), ("hash_alg", request.bank.text)]
    if request.agent_id is not None and request.binding is not None:
        pairs += [("agent_id", str(request.agent_id)), ("binding", request.binding.hex())]
    if query.host_id is not None:
        pairs.append(("host_id", str(query.host_id)))
    return pairs


# --- answer -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class ProviderEvidence:
    """Answer to a host quote: received, not believed.

    ``host_id`` is the provider's claim, kept as text. ``pcrs`` are values by bank and index, of any length up to 64.
    """

    host_id: str
    attest: bytes
    signature: bytes
    pcrs: Mapping[HashAlg, Mapping[int, bytes]]
    proof: InclusionProof


def parse_provider_evidence(results: object) -> ProviderEvidence:
    """Typed evidence from ``results``; unknown members are ignored, ``batch`` is informative and not read.

    Raises:
        MalformedEvidence: check 1 of DESIGN 3.5 fails.
    """
    members = _object(results, "results")
    proof = _object(_member(members, "proof"), "proof")
    hashes = _member(proof, "hashes")
    if not isinstance(hashes, list) or len(hashes) > _MAX_HASHES:
        raise MalformedEvidence(f"proof.hashes is not a list of at most {_MAX_HASHES}")
    return ProviderEvidence(
        host_id=_text(_member(members, "host_id"), "host_id"),
        attest=_base64(_member(members, "attest"), "attest"),
        signature=_base64(_member(members, "signature"), "signature"),
        pcrs=_pcrs(_member(members, "pcrs")),
        proof=InclusionProof(
            leaf_index=_integer(_member(proof, "leaf_index"), "proof.leaf_index"),
            tree_size=_integer(_member(proof, "tree_size"), "proof.tree_size"),
            hashes=tuple(_hex(value, "proof.hashes", size=HASH_SIZE) for value in hashes),
        ),
    )


def encode_shared(
    *,
    host_id: HostId,
    attest: bytes,
    signature: bytes,
    pcrs: PcrValues,
    batch_id: str,
    sealed_at: str,
) -> dict[str, object]:
    """What all members of a batch are answered; each gets its own ``proof`` beside it (`encode_proof`)."""
    return {
        "host_id": str(host_id),
        "attest": base64.b64encode(attest).decode(),
        "signature": base64.b64encode(signature).decode(),
        "pcrs": encode_pcrs(pcrs),
        "batch": {"id": batch_id, "sealed_at": sealed_at},
    }


def encode_pcrs(pcrs: PcrValues) -> dict[str, dict[str, str]]:
    """PCR values as ``{bank: {index: hex}}``."""
    return {bank.text: {str(pcr): value.hex() for pcr, value in values.items()} for bank, values in pcrs.items()}


def encode_proof(proof: InclusionProof) -> dict[str, object]:
    """Index, size and siblings; never sides, never the tree."""
    return {
        "leaf_index": proof.leaf_index,
        "tree_size": proof.tree_size,
        "hashes": [value.hex() for value in proof.hashes],
    }


def proof_text(proof: InclusionProof) -> str:
    """`encode_proof` as compact JSON text; there is one for each waiter, so it is written without detours."""
    hashes = '","'.join([value.hex() for value in proof.hashes])
    listed = f'["{hashes}"]' if hashes else "[]"
    return f'{{"leaf_index":{proof.leaf_index},"tree_size":{proof.tree_size},"hashes":{listed}}}'


def _object(value: object, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise MalformedEvidence(f"{what} is not an object")
    return value


def _member(members: Mapping[str, Any], name: str) -> object:
    if name not in members:
        raise MalformedEvidence(f"member {name} is missing")
    return members[name]


def _text(value: object, what: str) -> str:
    if not isinstance(value, str):
        raise MalformedEvidence(f"{what} is not a string")
    return value


def _integer(value: object, what: str) -> int:
    if type(value) is not int or not 0 <= value < _MAX_INTEGER:  # a bool is an int to isinstance
        raise MalformedEvidence(f"{what} is not an integer from 0 to 2^63 - 1")
    return value


def _base64(value: object, what: str) -> bytes:
    text = _text(value, what)
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise MalformedEvidence(f"{what} is not padded base64") from None
    if base64.b64encode(data).decode() != text:  # one encoding only: no excess padding, no stray bits
        raise MalformedEvidence(f"{what} is not canonical base64")
    if len(data) > _MAX_STRUCTURE:
        raise MalformedEvidence(f"{what} has more than {_MAX_STRUCTURE} bytes")
    return data


def _hex(value: object, what: str, *, size: int | None = None) -> bytes:
    try:
        return parse_hex(_text(value, what), what, size=size, at_most=_MAX_VALUE)
    except MalformedMessage as error:
        raise MalformedEvidence(error.detail) from None


def _pcrs(value: object) -> dict[HashAlg, dict[int, bytes]]:
    pcrs: dict[HashAlg, dict[int, bytes]] = {}
    for bank, values in _object(value, "pcrs").items():
        try:
            alg = HashAlg.parse(bank)
        except MalformedMessage:
            raise MalformedEvidence("pcrs names a bank that is not sha256, sha384 or sha512") from None
        pcrs[alg] = {}
        for index, digest in _object(values, f"pcrs.{bank}").items():
            pcr = _PCR_INDICES.get(index)
            if pcr is None:
                raise MalformedEvidence(f"pcrs.{bank} has an index that is not a decimal from 0 to 23")
            pcrs[alg][pcr] = _hex(digest, f"pcrs.{bank}.{index}")
    return pcrs
