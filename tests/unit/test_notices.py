"""What receivers of alarms are told: both forms, the signature, and where its key is."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from harness.errors import ConfigError
from harness.tenant.notices import Notice, RevocationKey, load_or_make

REQUEST = json.dumps(
    {
        "cloudagent_ip": "10.0.0.7",
        "cloudagent_port": 9002,
        "need_provider_quote": False,
        "guest_mask": "0x1",
        "guest_policy": {"sha256": {"0": ["00" * 32]}},
    }
)


def notice(**changes: Any) -> Notice:
    members: dict[str, Any] = {
        "id": 7,
        "at": 1_800_000_000.0,
        "kind": "ReferenceValueMismatch",
        "agent_id": "d432fbb3-d2f1-4a97-9ef7-75bd81c00000",
        "host_id": None,
        "detail": "guest: PCR 4 of sha256 does not have an allowed value",
        "request": REQUEST,
    }
    return Notice(**(members | changes))


def test_the_native_form() -> None:
    """The alarm's members, with layer and check."""
    assert notice().native() == {
        "id": 7,
        "at": 1_800_000_000.0,
        "kind": "ReferenceValueMismatch",
        "agent_id": "d432fbb3-d2f1-4a97-9ef7-75bd81c00000",
        "host_id": None,
        "layer": "guest",
        "failed_check": 9,
        "detail": "guest: PCR 4 of sha256 does not have an allowed value",
    }


@pytest.mark.parametrize(
    ("kind", "detail", "layer", "check"),
    [
        ("HostRebooted", "host: reset", "host", 10),
        ("PeerUnreachable", "payload: no connection", "payload", None),
        ("RuntimeError", "verifier: bug", "verifier", None),
        ("KeyChanged", "another EK: than the pinned one", None, None),
        ("AppraisalError", "no colon", None, None),
        ("annotations", "no error", None, None),
    ],
)
def test_layer_and_check_are_those_of_the_finding(kind: str, detail: str, layer: str | None, check: int | None) -> None:
    """None where the alarm is no session's, or no rejection."""
    told = notice(kind=kind, detail=detail)
    assert (told.layer, told.failed_check) == (layer, check)


def test_keylimes_form_has_keylimes_members() -> None:
    """Those of its revocation messages; policy, metadata and context are JSON text, as Keylime has them."""
    message = notice().revocation()
    assert (message["type"], message["ip"], message["port"]) == ("revocation", "10.0.0.7", 9002)
    assert message["agent_id"] == "d432fbb3-d2f1-4a97-9ef7-75bd81c00000"
    assert json.loads(str(message["tpm_policy"])) == {"sha256": {"0": ["00" * 32]}}
    assert json.loads(str(message["meta_data"])) == {"host_id": None, "layer": "guest", "failed_check": 9}
    assert message["event_time"] == "Fri Jan 15 08:00:00 2027"
    assert message["event_id"] == "guest.ReferenceValueMismatch"
    assert message["severity_label"] == "CRITICAL"
    assert json.loads(str(message["context"])) == {"message": notice().detail}


@pytest.mark.parametrize("request_text", [None, "{}", "not JSON"])
def test_an_alarm_of_an_agent_that_is_gone_is_told_all_the_same(request_text: str | None) -> None:
    """Without an address and a policy."""
    message = notice(request=request_text).revocation()
    assert (message["ip"], message["port"], message["tpm_policy"]) == (None, None, "{}")


def verify(key: RevocationKey, body: dict[str, str]) -> None:
    """As Keylime's `rsa_verify` does, with the key of the certificate."""
    public = x509.load_pem_x509_certificate(key.certificate).public_key()
    assert isinstance(public, rsa.RSAPublicKey)
    assert public.key_size == 2048
    pss = padding.PSS(mgf=padding.MGF1(hashes.SHA256()), salt_length=padding.PSS.MAX_LENGTH)
    public.verify(base64.b64decode(body["signature"]), body["msg"].encode(), pss, hashes.SHA256())


def test_keylimes_form_is_signed(tmp_path: Path) -> None:
    """The signature verifies over the very text of msg, and over no other."""
    key = load_or_make(tmp_path / "revocation.key")
    body = key.signed(notice())
    assert set(body) == {"msg", "signature"}
    assert json.loads(body["msg"]) == notice().revocation()
    verify(key, body)
    with pytest.raises(InvalidSignature):
        verify(key, body | {"msg": body["msg"].replace("10.0.0.7", "10.0.0.8")})


def test_the_key_is_made_once_and_is_private(tmp_path: Path) -> None:
    """A second start signs with the same key; nobody else may read it."""
    path = tmp_path / "state" / "revocation.key"
    first = load_or_make(path)
    assert path.stat().st_mode & 0o777 == 0o600
    body = first.signed(notice())
    again = load_or_make(path)
    assert again.certificate == first.certificate == (tmp_path / "state" / "revocation.crt").read_bytes()
    verify(again, body)
    verify(first, again.signed(notice()))


def test_a_key_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    """No PEM, or no RSA key: a sentence with the file, and the file stays."""
    path = tmp_path / "revocation.key"
    curve = ec.generate_private_key(ec.SECP256R1()).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    for content in (b"", b"no key", curve):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=r"revocation\.key"):
            load_or_make(path)
        assert path.read_bytes() == content
