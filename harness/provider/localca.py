#!/usr/bin/python3 -IS
"""The create_certs_tool that swtpm_setup calls: asks the host agent for a certificate and writes it to a file.

Standard library only, and nothing of this project: it runs up to three times for each vTPM (RSA EK, platform, ECC EK),
under libvirt's account for swtpm, with the system's Python (``-I``: modules beside this file are not found, whatever
their names). It never opens the hardware TPM.

Invariants:
    1. Exit code 0 means that the certificate is there; anything else keeps the guest from starting (swtpm_setup).
    2. It ends within `DEADLINE_S`, however slowly the answer comes.
    3. A failure is one sentence on standard error, and in the log that swtpm_setup names.

Spec: swtpm_setup(8), create_certs_tool; DESIGN 3.6.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import json
import os
import socket
import sys
import time

DEADLINE_S = 40.0
_ANSWER_LIMIT = 65536


class _Failed(Exception):
    """No certificate; the text says why."""


def main(argv: list[str], *, deadline_s: float = DEADLINE_S) -> int:
    """Runs the tool; returns its exit code."""
    arguments, _ = _parser().parse_known_args(argv)
    try:
        certificate = _ask(_configured_socket(arguments.configfile), _order(arguments), deadline_s)
        name = "ek.cert" if arguments.type == "ek" else "platform.cert"
        _write(os.path.join(arguments.dir, name), certificate)
    except (OSError, ValueError, _Failed) as error:
        _complain(arguments.logfile, f"localca: {arguments.type} certificate: {error}")
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Certifies a vTPM through the host agent.", allow_abbrev=False)
    parser.add_argument("--type", required=True, choices=("ek", "platform"))
    for name in ("ek", "dir", "vmid", "configfile"):
        parser.add_argument("--" + name, required=True)
    for name in ("logfile", "tpm-manufacturer", "tpm-model", "tpm-version"):
        parser.add_argument("--" + name, default="")
    return parser


def _order(arguments: argparse.Namespace) -> dict[str, object]:
    tpm = {
        "manufacturer": arguments.tpm_manufacturer,
        "model": arguments.tpm_model,
        "version": arguments.tpm_version,
    }
    return {"op": "issue", "type": arguments.type, "ek": arguments.ek, "vmid": arguments.vmid, "tpm": tpm}


def _configured_socket(path: str) -> str:
    with open(path, encoding="utf-8") as lines:
        for line in lines:
            key, separator, value = line.partition("=")
            if separator and key.strip() == "socket":
                return value.strip()
    raise ValueError(f"{path} does not name the host agent's socket (socket = PATH)")


def _ask(path: str, order: dict[str, object], deadline_s: float) -> bytes:
    until = time.monotonic() + deadline_s
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(deadline_s)
        try:
            connection.connect(path)
            connection.sendall(json.dumps(order).encode() + b"\n")
            return _certificate(_line(connection, until))
        except TimeoutError:
            raise _Failed(f"the host agent at {path} gave no answer within {deadline_s:g} s") from None
        except OSError as error:
            raise _Failed(f"the host agent at {path} cannot be asked: {error.strerror or error}") from None


def _line(connection: socket.socket, until: float) -> bytes:
    answer = b""
    while not answer.endswith(b"\n"):
        left_s = until - time.monotonic()
        if left_s <= 0:
            raise TimeoutError
        connection.settimeout(left_s)
        part = connection.recv(_ANSWER_LIMIT)
        answer += part
        if not part or len(answer) > _ANSWER_LIMIT:
            raise _Failed("the host agent gave no whole answer")
    return answer


def _certificate(answer: bytes) -> bytes:
    try:
        members = json.loads(answer)
    except (ValueError, RecursionError):
        members = None
    if not isinstance(members, dict):
        raise _Failed("the host agent's answer is not a JSON object")
    certificate = members.get("certificate")
    if certificate is None:
        raise _Failed(f"the host agent refuses: {members.get('detail', 'no reason given')}")
    if not isinstance(certificate, str):
        raise _Failed("the host agent's certificate is not base64")
    try:
        return base64.b64decode(certificate, validate=True)
    except ValueError:
        raise _Failed("the host agent's certificate is not base64") from None


def _write(path: str, data: bytes) -> None:
    half = path + ".new"
    with open(half, "wb") as file:
        file.write(data)
    os.replace(half, path)


def _complain(logfile: str, sentence: str) -> None:
    print(sentence, file=sys.stderr)
    if logfile:
        # standard error has the sentence when the log cannot be written
        with contextlib.suppress(OSError), open(logfile, "a", encoding="utf-8") as file:
            print(sentence, file=file)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
