"""Appraisal of saved evidence: what is a verdict, and what cannot be used (DESIGN 3.9)."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.errors import ConfigError
from harness.protocol import guest_binding
from harness.tenant.offline import FILE_LIMIT, appraise_files
from tests.support import vectors
from tests.support.forge import AK_ATTRIBUTES, ecc_key, rsa_key
from tests.support.rounds import drop, put

Files = dict[str, Any]
Edit = Callable[[Files], object]


def case(name: str = "accept-with-guest") -> Files:
    """Request, response and trust of one case."""
    whole = vectors.appraisal_case(name)
    return {part: whole[part] for part in ("request", "response", "trust")}


def appraised(folder: Path, files: Files) -> tuple[dict[str, object], int]:
    """The verdict on these contents."""
    return appraise_files(**vectors.save(folder, **files))


def text_of(change: Callable[[str], str], name: str) -> Edit:
    """Edit that changes the JSON text of one file."""

    def edit(files: Files) -> None:
        files[name] = change(json.dumps(files[name])).encode()

    return edit


def hashed_again(files: Files) -> None:
    """Makes the stated guest evidence the one that the request is bound to."""
    guest = files["request"]["guest"]
    binding = guest_binding(bytes.fromhex(guest["ak_name"]), base64.b64decode(guest["attest"]))
    assert files["request"]["binding"] == binding.hex()


def area(change: Callable[[bytearray], object]) -> str:
    """Base64 of an ECC AK's TPM2B_PUBLIC with other bytes."""
    data = bytearray(ecc_key().marshalled)
    change(data)
    return base64.b64encode(data).decode()


def set_bytes(offset: int, value: str) -> Callable[[bytearray], object]:
    """Change that writes bytes at a place."""

    def change(data: bytearray) -> None:
        new = bytes.fromhex(value)
        data[offset : offset + len(new)] = new

    return change


def key(**changes: Any) -> str:
    """Base64 of an ECC AK with other properties."""
    return base64.b64encode(ecc_key(**changes).marshalled).decode()


def test_the_stated_guest_evidence_is_hashed_as_it_is() -> None:
    """The honest case is bound to the guest evidence that stands beside it."""
    hashed_again(case())


# --- verdicts ---------------------------------------------------------------------------------------------------------

DEEP = "[" * 50000 + "]" * 50000
VERDICTS: list[tuple[str, Edit, int | None]] = [
    ("as-it-is", lambda files: None, None),
    ("unknown-members", put("request", "note", value={"a": [1]}), None),
    ("unknown-members-of-trust", put("trust", "note", value=None), None),
    ("unknown-members-of-guest", put("request", "guest", "note", value=1), None),
    ("unknown-members-of-response", put("response", "proof", "root", value="00"), None),
    ("unknown-huge-integer", text_of(lambda text: '{"x": ' + "9" * 9000 + ", " + text[1:], "response"), None),
    ("no-qualified-name", drop("trust", "ak_qualified_name"), None),
    ("mask-with-leading-zeros", put("request", "mask", value="0x004091"), None),
    ("no-guest-evidence", drop("request", "guest"), None),
    ("not-json", put("response", value=b"{"), 1),
    ("empty-file", put("response", value=b""), 1),
    ("not-utf-8", put("response", value=b'{"a": "\xff"}'), 1),
    ("byte-order-mark", text_of(lambda text: "\N{ZERO WIDTH NO-BREAK SPACE}" + text, "response"), 1),
    ("two-values", text_of(lambda text: text + text, "response"), 1),
    ("list", put("response", value=[case()["response"]]), 1),
    ("null", put("response", value=None), 1),
    ("envelope-around", put("response", value={"code": 200, "results": case()["response"]}), 1),
    ("nan-in-an-unknown-member", text_of(lambda text: '{"x": NaN, ' + text[1:], "response"), 1),
    ("repeated-member", text_of(lambda text: '{"host_id": "x", ' + text[1:], "response"), 1),
    ("repeated-unknown-member", text_of(lambda text: '{"x": 1, "x": 1, ' + text[1:], "response"), 1),
    ("repeated-deep-inside", text_of(lambda text: '{"x": [{"a": 1, "a": 1}], ' + text[1:], "response"), 1),
    ("repeated-pcr", text_of(lambda text: text.replace('{"0":', '{"0": "", "0":'), "response"), 1),
    ("deep", text_of(lambda text: '{"x": ' + DEEP + ", " + text[1:], "response"), 1),
    ("too-large", put("response", value=b" " * (FILE_LIMIT + 1)), 1),
    ("index-is-a-float", put("response", "proof", "leaf_index", value=1.0), 1),
    ("lone-surrogate", put("response", "attest", value="\ud800"), 1),
    ("host-id-of-another-form", put("response", "host_id", value="\ud800"), 2),
    ("other-guest-attest", put("request", "guest", "attest", value=""), 11),
    ("other-guest-name", put("request", "guest", "ak_name", value=""), 11),
    ("large-guest-attest", put("request", "guest", "attest", value="A" * 80000), 11),
    ("policy-missing", drop("trust", "policy"), 9),
    ("policy-null", put("trust", "policy", value=None), 9),
    ("policy-empty", put("trust", "policy", value={}), 9),
    ("policy-of-an-empty-bank", put("trust", "policy", value={"sha256": {}}), 9),
    ("policy-empty-list", put("trust", "policy", value={"sha256": {"0": []}}), 9),
    ("policy-of-another-bank", put("trust", "policy", value={"sha384": {"0": ["00" * 48]}}), 9),
    ("policy-short-value", put("trust", "policy", value={"sha256": {"0": ["00"]}}), 9),
    ("policy-pcr-16", put("trust", "policy", value={"sha256": {"16": ["00" * 32]}}), 9),
    ("other-counters", put("trust", "last_clock", value={"clock": 0, "resetCount": 1 << 40, "restartCount": 0}), 10),
    ("requester-missing", drop("request", "requester"), 5),
    ("other-host-trusted", put("trust", "host_id", value="00000000-0000-0000-0000-000000000000"), 2),
    ("other-ak", put("trust", "ak", value=key()), 6),
    ("other-qualified-name", put("trust", "ak_qualified_name", value="00"), 6),
    ("empty-qualified-name", put("trust", "ak_qualified_name", value=""), 6),
    ("ak-unrestricted", put("trust", "ak", value=key(attributes=AK_ATTRIBUTES ^ 1 << 16)), 6),
    ("ak-reserved-bit", put("trust", "ak", value=area(set_bytes(6, "80050072"))), 6),
    ("ak-sha1-name", put("trust", "ak", value=area(set_bytes(4, "0004"))), 6),
    ("ak-sha1-scheme", put("trust", "ak", value=area(set_bytes(16, "0004"))), 6),
    ("ak-on-another-curve", put("trust", "ak", value=area(set_bytes(18, "0010"))), 6),
    ("ak-off-its-curve", put("trust", "ak", value=area(lambda data: set_bytes(len(data) - 1, "00")(data))), 6),
    ("ak-rsa-1024", put("trust", "ak", value=base64.b64encode(rsa_key(bits=1024).marshalled).decode()), 6),
]  # fmt: skip


@pytest.mark.parametrize(("edit", "check"), [pytest.param(edit, check, id=name) for name, edit, check in VERDICTS])
def test_evidence_gets_a_verdict(edit: Edit, check: int | None, tmp_path: Path) -> None:
    """Whatever stands in the response, and whatever usable request and trust say, the answer is a verdict."""
    files = case()
    edit(files)
    verdict, code = appraised(tmp_path, files)
    if check is None:
        assert (verdict, code) == ({"accepted": True}, 0)
        return
    assert code == 1
    assert verdict.keys() == {"accepted", "failed_check", "error", "detail"}
    assert (verdict["accepted"], verdict["failed_check"]) == (False, check)


def test_a_missing_response_is_no_evidence(tmp_path: Path) -> None:
    """Nothing received is malformed evidence, never acceptance."""
    paths = vectors.save(tmp_path, **case())
    paths["response"].unlink()
    verdict, code = appraise_files(**paths)
    assert (verdict["failed_check"], verdict["error"], code) == (1, "MalformedEvidence", 1)


def test_an_unusable_request_comes_before_the_response(tmp_path: Path) -> None:
    """Evidence is not looked at before request and trust can be used."""
    files = case() | {"response": b"{"}
    del files["trust"]["ak"]
    with pytest.raises(ConfigError):
        appraised(tmp_path, files)


def test_a_firmware_version_is_judged_where_it_is_given(tmp_path: Path) -> None:
    """It is part of a baseline though the form of DESIGN 3.9 has no member for it."""
    files = case("clock-back")
    seen = files["trust"]["last_clock"] | {"clock": 1}
    files["trust"]["last_clock"] = seen
    assert appraised(tmp_path, files)[1] == 0
    files["trust"]["last_clock"] = seen | {"firmwareVersion": (1 << 64) - 1}
    assert appraised(tmp_path, files)[0]["error"] == "HostRebooted"


# --- unusable ---------------------------------------------------------------------------------------------------------

BAD: dict[str, list[Any]] = {
    "request nonce": [None, 7, "", "01" * 15, "01" * 65, "AB" * 32, "0" * 33, "\ud800"],
    "request mask": [None, 0x4091, "4091", "0X4091", "0x", "0x0", "0x1000000", "0x10000", "0x800000", "0x409A", "0x٣"],
    "request hash_alg": [None, 11, "sha1", "SHA256", "", "md5"],
    "request requester": [None, 7, "", "01" * 31, "01" * 33, "AB" * 32],
    "request vtpm_ek": [None, 7, "", "01" * 31, "AB" * 32],
    "request binding": [None, 7, "", "01" * 31, "AB" * 32],
    "request agent_id": [None, 7, "", "A0BB03B7-39BB-4D7B-88E6-14A7E2004C8E", "a0bb03b739bb4d7b88e614a7e2004c8e"],
    "request guest": [None, 7, [], "x", {}],
    "request guest ak_name": [None, 7, "AB", "a", "zz"],
    "request guest attest": [None, 7, "QQ", "QQ==\n", "-_-_", "QR==", "ab cd"],
    "trust host_id": [None, 7, "", "D3AD2578-0A39-4182-9A17-B89661470AFD", "host-1"],
    "trust ak": [
        None, 7, "", "QQ", "QQ==", "!", area(lambda data: data.pop()), area(lambda data: data.append(0)),
        area(lambda data: data.clear()), area(set_bytes(0, "0000")), area(set_bytes(2, "0008")),
        area(set_bytes(4, "9999")), key()[:-1], key() + "\n", base64.b64encode(ecc_key().area).decode(),
    ],
    "trust ak_qualified_name": [7, "AB" * 34, "a", "zz", []],
    "trust policy": [
        7, [], "x", {"sha1": {}}, {"sha256": []}, {"sha256": {"24": []}}, {"sha256": {"07": []}},
        {"sha256": {"0": "00"}}, {"sha256": {"0": ["AB" * 32]}}, {"sha256": {"0": [7]}},
    ],
    "trust last_clock": [
        7, [], "x", {}, {"clock": 1, "resetCount": 1}, {"clock": 1, "restartCount": 1},
        {"resetCount": 1, "restartCount": 1},
    ],
}  # fmt: skip
CLOCK = {"clock": 1, "resetCount": 1, "restartCount": 1}
BAD["trust last_clock"] += [
    CLOCK | {name: value} for name in CLOCK for value in (None, True, -1, 1.0, "1", 1 << 63, float("inf"))
]
REQUIRED = [
    ("request", "nonce"), ("request", "mask"), ("request", "hash_alg"), ("request", "agent_id"), ("request", "vtpm_ek"),
    ("request", "binding"), ("request", "guest", "ak_name"), ("request", "guest", "attest"), ("trust", "host_id"),
    ("trust", "ak"), ("trust", "last_clock"),
]  # fmt: skip


def without_a_guest(files: Files) -> None:
    """Leaves the guest's evidence without agent and binding."""
    for name in ("agent_id", "vtpm_ek", "binding"):
        del files["request"][name]


def keep_one(kept: str) -> Edit:
    """Leaves one of the three members that go together, and no guest."""

    def edit(files: Files) -> None:
        for name in {"agent_id", "vtpm_ek", "binding", "guest"} - {kept}:
            del files["request"][name]

    return edit


UNUSABLE: list[tuple[str, Edit]] = [
    *(
        (f"{path} {value!r:.40}", put(*path.split(), value=value))
        for path, values in BAD.items()
        for value in values
    ),
    *((f"no {' '.join(path)}", drop(*path)) for path in REQUIRED),
    *((f"{name} alone", keep_one(name)) for name in ("agent_id", "vtpm_ek", "binding")),
    ("guest without binding", without_a_guest),
    *(
        (f"{name} {what}", edit)
        for name in ("request", "trust")
        for what, edit in {
            "is not json": put(name, value=b"{"),
            "is empty": put(name, value=b""),
            "is not utf-8": put(name, value=b'{"a": "\xff"}'),
            "is a list": put(name, value=[case()[name]]),
            "is null": put(name, value=None),
            "is too large": put(name, value=b" " * (FILE_LIMIT + 1)),
            "repeats a member": text_of(lambda text: '{"x": 1, "x": 1, ' + text[1:], name),
            "holds nan": text_of(lambda text: '{"x": NaN, ' + text[1:], name),
            "is too deep": text_of(lambda text: '{"x": ' + DEEP + ", " + text[1:], name),
            "has a byte order mark": text_of(lambda text: "\N{ZERO WIDTH NO-BREAK SPACE}" + text, name),
        }.items()
    ),
]  # fmt: skip


@pytest.mark.parametrize("edit", [edit for _, edit in UNUSABLE], ids=range(len(UNUSABLE)))
def test_an_unusable_request_or_trust_is_no_verdict(edit: Edit, tmp_path: Path) -> None:
    """Exit code 2, whatever the response would be worth."""
    files = case()
    edit(files)
    with pytest.raises(ConfigError):
        appraised(tmp_path, files)


@pytest.mark.parametrize("name", ["request", "trust"])
def test_a_missing_file_is_named(name: str, tmp_path: Path) -> None:
    """The sentence says which file; a folder is no file either."""
    paths = vectors.save(tmp_path, **case())
    paths[name].unlink()
    with pytest.raises(ConfigError, match=name):
        appraise_files(**paths)
    paths[name].mkdir()
    with pytest.raises(ConfigError, match=name):
        appraise_files(**paths)


# --- any bytes --------------------------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.binary(max_size=8).map(bytes.hex),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
MEMBERS = [(part, name) for part, members in case().items() for name in members]


def ends(files: Files) -> None:
    """A verdict or one named error, and never acceptance of something else than the honest case."""
    with TemporaryDirectory(prefix="h") as folder:
        try:
            verdict, code = appraised(Path(folder), files)
        except ConfigError:
            return
        json.dumps(verdict).encode()
        assert code == (0 if verdict["accepted"] else 1)


@given(st.sampled_from(MEMBERS), JSON)
def test_any_json_in_any_member_ends_well(member: tuple[str, str], value: Any) -> None:
    """No value of any type in any member is more than a verdict or an unusable file."""
    files = case()
    files[member[0]][member[1]] = value
    ends(files)


@given(st.sampled_from(["request", "response", "trust"]), st.binary(max_size=100))
def test_any_bytes_in_any_file_end_well(name: str, data: bytes) -> None:
    """No bytes are more than a verdict or an unusable file."""
    ends(case() | {name: data})


@given(st.sampled_from(["request", "response", "trust"]), st.data())
def test_any_flipped_byte_ends_well(name: str, data: st.DataObject) -> None:
    """The honest files with one byte changed."""
    whole = bytearray(json.dumps(case()[name]).encode())
    whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    ends(case() | {name: bytes(whole)})


@given(st.sampled_from([("response", "attest"), ("response", "signature"), ("trust", "ak")]), st.data())
def test_any_flipped_bit_of_a_structure_is_refused(member: tuple[str, str], data: st.DataObject) -> None:
    """There is no bit of attest, signature or pinned key that does not matter."""
    files = case()
    structure = bytearray(base64.b64decode(files[member[0]][member[1]]))
    bit = data.draw(st.integers(0, 8 * len(structure) - 1))
    structure[bit // 8] ^= 1 << bit % 8
    files[member[0]][member[1]] = base64.b64encode(structure).decode()
    with TemporaryDirectory(prefix="h") as folder:
        try:
            verdict, code = appraised(Path(folder), files)
        except ConfigError:
            assert member[0] == "trust"
            return
    assert (verdict["accepted"], code) == (False, 1)
