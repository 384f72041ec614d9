"""A lab's site file, and operators that write down what the command line asks of them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from harness import cli, cli_exit, cli_site, config, lab_names
from harness.errors import HarnessError
from harness.tenant.order import order_in_force

HOST_ID = "3c5d7a0e-1f0b-8a4c-9d2e-5b6f7a8c9d0e"
OTHER_HOST_ID = "9b1f0c2d-1f0b-8a4c-9d2e-5b6f7a8c9d0e"
AGENT_ID = "6f1d2c3b-4a59-4e6f-8a7b-0c1d2e3f4a5b"
OTHER_AGENT_ID = "6f1d2c3b-0000-4e6f-8a7b-0c1d2e3f4a5b"
POLICY = {"sha256": {"0": ["00" * 32], "4": ["44" * 32]}}
SEEN = {"at": 100.0, "pcrs": {"sha256": {"0": "00" * 32, "4": "55" * 32, "9": "99" * 32}}}
POLICIES = {"guest_policy": POLICY, "host_policy": POLICY, "seen": {"guest": None, "host": SEEN}}
HOST = {"host_id": HOST_ID, "url": "https://provider", "enrolled_at": 0, "baseline": {"reset_count": 3}}
FAILED = {
    "state": "FAILED",
    "attested": False,
    "payload_released": False,
    "layer": "host",
    "failed_check": None,
    "error": "GuestNotHere",
    "detail": "it does not run here",
    "attestation_count": 3,
    "last_successful_attestation": 50.0,
}
ATTESTED = {**FAILED, "state": "GET_QUOTE", "attested": True, "error": None, "detail": None, "layer": None}
GUEST: dict[str, Any] = {
    "agent_id": AGENT_ID,
    "host_id": HOST_ID,
    "state": "active",
    "refused": None,
    "chain": [],
    "attestation": FAILED,
}
TERMS = {
    "need_provider_quote": True,
    "provider_verifier": "https://provider:9",
    "provider_quote_interval": 4,
    "guest_mask": "0x31",
    "host_mask": "0x11",
    "hash_alg": "sha256",
    "allow_reboots": True,
    "quote_interval_s": 5.0,
    "round_deadline_s": 60.0,
    "clock_unsafe_limit_s": 120.0,
}
BEFORE = order_in_force(TERMS, POLICIES, None)
"""How the guest was attested before its re-enrolment."""
ALARM = {"id": "r12", "at": 0.0, "kind": "KeyChanged", "agent_id": None, "host_id": HOST_ID, "detail": "another EK"}
ENTRY = {"at": 0.0, "service": "verifier", "who": "alice/tenant-operator/operator", "action": "resume"}


class Operator:
    """An operator of either side that writes down what it was asked.

    ``refusals`` are errors by the name of the call; ``refusal`` is one for all.
    """

    def __init__(self) -> None:
        self.asked: list[tuple[Any, ...]] = []
        self.refusal: Exception | None = None
        self.refusals: dict[str, BaseException] = {}
        self.guest_now: dict[str, Any] = GUEST
        self.allowlist = [0, 7]
        self.answers: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Callable[..., Awaitable[Any]]:
        answers: dict[str, Any] = {
            "hosts": [{**HOST, "name": "host1", "replacement": None}],
            "host": HOST,
            "re_enrol_host": HOST,
            "add_host": [HOST],
            "guests": [{**self.guest_now, "name": "web1", "tenant": "alice", "registered": True}],
            "stated": [self.guest_now],
            "guest": self.guest_now,
            "policy": POLICIES,
            "former_order": BEFORE,
            "registered": "contact",
            "alarms": [],
            "audit": [],
            "tenants": [{"name": "alice", "allowlists": {HOST_ID: {"sha256": self.allowlist}}}],
            "attestation": self.guest_now.get("attestation"),
            **self.answers,
        }

        async def call(*arguments: Any, **named: Any) -> Any:
            self.asked.append((name, *arguments, *named.values()))
            refusal: BaseException | None = self.refusals.get(name, self.refusal)
            if refusal is not None:
                raise refusal
            return answers.get(name)

        return call

    def acts(self, *names: str) -> list[tuple[Any, ...]]:
        """Calls of these names, with ids as text."""
        return [(name, *map(plain, rest)) for name, *rest in self.asked if name in names]


def plain(value: object) -> object:
    """A value as a test writes it."""
    return str(value) if type(value).__name__ == "UUID" else value


def make_lab(folder: Path) -> Path:
    """A folder that describes a lab with one host, a guest web1 on it, and two tenants."""
    policy = folder / "policy.json"
    policy.write_text(json.dumps(POLICY))
    tls = config.TlsSettings(certificate=folder / "c.pem", key=folder / "k.pem", authorities={})
    tenant = config.TenantSite(
        registrar="https://tenant:1",
        verifier="https://tenant:2",
        provider_verifier="https://provider:2",
        operator=tls,
        guest_policy=policy,
        host_policy=policy,
    )
    host = config.HostSite(
        agent="https://host:1",
        guest_manager=folder / "g",
        guests=folder / "guests",
        hardware_control=folder / "c",
        tpm_socket=folder / "t",
        local_socket=folder / "l",
    )
    provider = config.ProviderSite(registrar="https://provider:1", verifier="https://provider:2", operator=tls)
    site = config.SiteSettings(
        pki=folder, provider=provider, hosts={"host1": host}, tenants={"alice": tenant, "bob": tenant}
    )
    config.dump(site, folder / lab_names.SITE_FILE)
    definition = folder / "guests" / AGENT_ID / "domain.json"
    definition.parent.mkdir(parents=True)
    definition.write_text(json.dumps({"uuid": AGENT_ID, "name": "web1", "scenario": "guest-good"}))
    return folder


def in_place_of_operators(monkeypatch: pytest.MonkeyPatch, fake: Any) -> None:
    """Let every command get this operator instead of connections, in an environment that names nothing."""

    def act(_whose: object, act: Callable[[Any], Awaitable[Any]]) -> Any:
        async def run() -> Any:
            return await act(fake)

        return asyncio.run(run())

    def each(tenants: Mapping[str, object], act: Callable[[str, Any], Awaitable[Any]]) -> dict[str, Any]:
        async def one(name: str) -> Any:
            try:
                return await act(name, fake)
            except HarnessError as error:
                return error

        async def run() -> dict[str, Any]:
            return {name: await one(name) for name in tenants}

        return asyncio.run(run())

    monkeypatch.setattr(cli_site, "as_tenant", act)
    monkeypatch.setattr(cli_site, "as_provider", act)
    monkeypatch.setattr(cli_site, "as_tenants", each)
    monkeypatch.delenv("HARNESS_TENANT", raising=False)
    monkeypatch.delenv("HARNESS_LAB", raising=False)


def run(*words: str) -> int:
    """Exit code of a command line."""
    return cli_exit.guarded(lambda: cli.app(list(words), prog_name="harness"))


def alice(lab: Path, *words: str) -> int:
    """Exit code of a command of alice's operator."""
    return run("tenant", *words, "--lab", str(lab), "--tenant", "alice")
