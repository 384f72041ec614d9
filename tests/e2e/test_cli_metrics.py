"""`harness provider metrics` and `harness tenant metrics` against services on real sockets."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from harness import config, lab_names
from harness.config import Listen, TlsSettings
from harness.metrics import Metrics
from harness.pki import Role
from harness.tls import identities_of
from harness.web import application, serve
from tests.support.cli_operators import run
from tests.support.web_lab import Pki

NOWHERE = "https://127.0.0.1:9"
SERVICES = {
    "provider registrar": ("provider", Role.PROVIDER_REGISTRAR),
    "provider verifier": ("provider", Role.PROVIDER_VERIFIER),
    "host1": ("provider", Role.HOST_AGENT),
    "alice registrar": ("alice", Role.TENANT_REGISTRAR),
    "alice verifier": ("alice", Role.TENANT_VERIFIER),
    "bob registrar": ("bob", Role.TENANT_REGISTRAR),
    "bob verifier": ("bob", Role.TENANT_VERIFIER),
}


@dataclass(frozen=True, slots=True)
class Lab:
    """A site file whose services run, each with a refusal of its own number."""

    folder: Path

    async def harness(self, *words: str) -> int:
        """Exit code of a command line; it has a loop of its own."""
        return await asyncio.to_thread(run, *words, "--lab", str(self.folder))


def site(folder: Path, urls: Mapping[str, str], operators: Mapping[str, TlsSettings]) -> None:
    """Writes the site file."""
    made = {
        "pki": folder,
        "provider": {
            "registrar": urls["provider registrar"],
            "verifier": urls["provider verifier"],
            "operator": operators["provider"],
        },
        "hosts": {
            "host1": {
                "agent": urls["host1"],
                **{
                    name: folder / name
                    for name in ("guest_manager", "guests", "hardware_control", "tpm_socket", "local_socket")
                },
            }
        },
        "tenants": {
            name: {
                "registrar": urls[f"{name} registrar"],
                "verifier": urls[f"{name} verifier"],
                "provider_verifier": urls["provider verifier"],
                "operator": operators[name],
                "guest_policy": folder / "policy",
                "host_policy": folder / "policy",
            }
            for name in ("alice", "bob")
        },
    }
    config.dump(config.SiteSettings.model_validate(made), folder / lab_names.SITE_FILE)


@asynccontextmanager
async def lab(folder: Path, *down: str) -> AsyncIterator[Lab]:
    """All services but those that are down."""
    pki = Pki(folder / "pki")
    urls = dict.fromkeys(SERVICES, NOWHERE)
    async with AsyncExitStack() as stack:
        for number, (name, (authority, role)) in enumerate(SERVICES.items(), start=1):
            if name in down:
                continue
            tls = pki.tls(authority, role, "server", trusts=(authority,))
            metrics = Metrics(role.value)
            for _ in range(number):
                metrics.refused("PoolFull")
            app = application(role.value, [], identities_of(tls), metrics=metrics)
            urls[name] = (await stack.enter_async_context(serve(app, tls, Listen()))).url
        operators = {
            "provider": pki.tls("provider", Role.PROVIDER_OPERATOR, "op"),
            **{name: pki.tls(name, Role.TENANT_OPERATOR, "op", trusts=(name,)) for name in ("alice", "bob")},
        }
        site(folder, urls, operators)
        yield Lab(folder)


async def test_the_provider_sees_its_own_services(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Registrar, verifier and every host agent, by the names that operators know; no tenant's."""
    async with lab(tmp_path) as made:
        assert await made.harness("provider", "metrics", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    refused = {
        each["service"]: each["value"]
        for each in found
        if each["name"] == "harness_refusals_total" and each["labels"] == {"reason": "PoolFull"}
    }
    assert refused == {"registrar": 1.0, "verifier": 2.0, "host1": 3.0}


async def test_a_table_shows_what_has_happened(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Counts of 0 and figures of the process only with --all."""
    async with lab(tmp_path) as made:
        assert await made.harness("provider", "metrics", "--service", "host1") == 0
        short = capsys.readouterr().out
        assert await made.harness("provider", "metrics", "--service", "host1", "--all") == 0
        whole = capsys.readouterr().out
    lines = [line.split() for line in short.splitlines()]
    assert ["host1", "harness_refusals_total", "reason=PoolFull", "3"] in lines
    assert "ShareExhausted" not in short
    assert "process_" not in short
    assert "ShareExhausted" in whole
    assert "process_resident_memory_bytes" in whole


async def test_tenants_are_shown_all_or_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each tenant's services by its name; a stated tenant and service alone."""
    async with lab(tmp_path) as made:
        assert await made.harness("tenant", "metrics", "--json") == 0
        found = json.loads(capsys.readouterr().out)
        assert {each["service"] for each in found} == {name for name in SERVICES if name.startswith(("alice", "bob"))}
        assert await made.harness("tenant", "metrics", "--tenant", "bob", "--service", "verifier", "--json") == 0
        found = json.loads(capsys.readouterr().out)
    assert {each["service"] for each in found} == {"bob verifier"}


async def test_a_service_that_does_not_answer_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The others are shown, and the exit code says that not all were."""
    async with lab(tmp_path, "host1") as made:
        assert await made.harness("provider", "metrics") == 1
        said = capsys.readouterr()
        assert "the metrics of host1 cannot be read" in said.err
        assert "verifier" in said.out
        assert await made.harness("provider", "metrics", "--service", "host1") == 2


async def test_a_service_that_does_not_exist_is_unusable_input(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The sentence names those that there are."""
    async with lab(tmp_path) as made:
        assert await made.harness("provider", "metrics", "--service", "host2") == 2
    assert "--service host2: is not one of registrar, verifier, host1" in capsys.readouterr().err
