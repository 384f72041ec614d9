"""Nothing secret is in the logs of an honest demo: no nonce, share, payload, authValue, key or quote."""

from __future__ import annotations

import base64
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from harness.events import read_events
from harness.lab_plan import DEMO_PAYLOAD

pytestmark = [pytest.mark.needs_swtpm, pytest.mark.timeout(900)]
RUN = re.compile(r"[A-Za-z0-9+/=]{20,}")
"""What a nonce, a digest, a key, a share or a quote looks like as hex, base64 or letters and digits: Keylime's nonces
are 20 characters, ours 64. UUIDs, times and names have dashes, points or colons earlier than that."""
SHORT_WORDS = {"nonce", "u", "v", "payload", "auth", "quote", "attest", "secret", "password", "key"}


def runs_in(text: str, folder: Path) -> list[str]:
    """Runs that may be secret; paths of files below the folder are none."""
    return RUN.findall(re.sub(rf'{re.escape(str(folder))}[^"\s]*', _unless_there(folder), text))


def _unless_there(folder: Path) -> Callable[[re.Match[str]], str]:
    """What is only written like a path, and leads nowhere, is searched."""
    return lambda found: "" if Path(found[0]).exists() else found[0].removeprefix(str(folder))


@pytest.fixture(scope="module")
def demo() -> Iterator[Path]:
    """The folder of a demo that ended well."""
    with tempfile.TemporaryDirectory(prefix="h") as name:
        folder = Path(name) / "l"
        command = [sys.executable, "-m", "harness", "demo", "--tenants", "2", "--guests", "1", "--json"]
        done = subprocess.run(
            [*command, "--lab", str(folder)], stdin=subprocess.DEVNULL, capture_output=True, timeout=200, check=False
        )
        assert done.returncode == 0, done.stderr
        yield folder


def logs_of(folder: Path) -> dict[str, str]:
    """The log of every process."""
    return {path.name: path.read_text(encoding="utf-8") for path in sorted(folder.glob("log/*"))}


def secrets_of(folder: Path) -> dict[str, bytes]:
    """What the lab's files hold that nobody may read in a log."""
    found = {"payload": DEMO_PAYLOAD.strip()}
    for path in folder.rglob("*.key"):
        found[path.name] = b"".join(path.read_bytes().splitlines()[1:2])
    for path in folder.rglob("auth*"):
        for number, text in enumerate(re.findall(r"[A-Za-z0-9+/=]{16,}", path.read_text(errors="replace"))):
            found[f"{path.name} {number}"] = text.encode()
    return found


def test_the_search_finds_what_it_is_for(tmp_path: Path) -> None:
    """A nonce of Keylime's, one of ours, a key and a share are found in a line; ids, times and paths are not."""
    for secret in ("k3Yl1m3n0nc3k3Yl1m30", bytes(32).hex(), base64.b64encode(bytes(range(32))).decode()):
        assert runs_in(json.dumps({"event": "x", "detail": f"GET /v2.1/quotes?nonce={secret}&mask=0x1"}), tmp_path)
    image = tmp_path / "h" / "host1" / "guests" / "image" / "agent.pem"
    line = f'{{"agent_id": "44aeffdb-5f0d-4097-8410-7130361c801f", "file": "{image}", "t": "2026-11-24T12"}}'
    assert runs_in(line, tmp_path)
    image.parent.mkdir(parents=True)
    image.touch()
    assert runs_in(line, tmp_path) == []


def test_every_process_wrote_events_and_nothing_else(demo: Path) -> None:
    """Eleven processes and the lab: every line of every log is an event."""
    logs = logs_of(demo)
    assert {"host1-agent.log", "provider-verifier.log", "alice-verifier.log", "agent-alice-vm1.log"} <= logs.keys()
    for name, text in logs.items():
        assert text.count("\n") == len(list(read_events(demo / "log" / name))), name


def test_no_log_has_anything_that_looks_secret(demo: Path) -> None:
    """No run of 20 or more letters and digits in any line, and no field of a secret's name with a value."""
    for name, text in logs_of(demo).items():
        assert runs_in(text, demo) == [], name
        for event in read_events(demo / "log" / name):
            assert {event[field] for field in event.keys() & SHORT_WORDS} <= {"(not logged)"}, name


def test_no_log_has_a_secret_of_the_labs_files(demo: Path) -> None:
    """Private keys, authValues and the payload, as they are and as base64 and hex."""
    secrets = secrets_of(demo)
    assert len(secrets) > 10
    for name, text in logs_of(demo).items():
        for what, secret in secrets.items():
            forms = {secret.decode("latin-1"), secret.hex(), base64.b64encode(secret).decode()}
            assert not any(form in text for form in forms), f"{what} in {name}"
