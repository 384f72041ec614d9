"""The services that need a TPM before they serve, when somebody else has their port: one sentence and code 2."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest

from harness.config import GuestAgentSettings, Settings, dump
from harness.pki import Role
from tests.support.provider_site import new_site
from tests.support.stop_lab import started
from tests.support.tenant_site import TENANT, new_tenant_site
from tests.support.tenant_wire import AGENT

pytestmark = [pytest.mark.needs_swtpm, pytest.mark.timeout(900)]


async def ends_with(folder: Path, service: str, settings: Settings, port: int) -> None:
    """The service is started and must say which key of which file is wrong."""
    config, log = folder / "service.yml", folder / "service.log"
    dump(settings, config)
    with started(service, service, config, log) as running:
        assert await running.ended(within_s=60) == 2
    said = log.read_text().splitlines()[-1]
    assert said == f"harness: {config}: listen.port: 127.0.0.1 port {port}: Address already in use"


async def test_a_host_agent_names_the_port_that_is_taken(tmp_path: Path) -> None:
    """The host agent has provisioned its keys by then; it ends all the same."""
    async with new_site() as site:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port: int = taken.getsockname()[1]
            listen: Any = {"port": port}
            database = f"sqlite+aiosqlite:///{tmp_path / 'host.db'}"
            await ends_with(tmp_path, "host-agent", site.agent_settings(listen=listen, database=database), port)


async def test_a_guest_agent_names_the_port_that_is_taken(tmp_path: Path) -> None:
    """The guest agent has its vTPM's keys by then; it ends before it registers anywhere."""
    async with new_tenant_site() as site:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port: int = taken.getsockname()[1]
            settings = GuestAgentSettings.model_validate(
                {
                    "listen": {"port": port},
                    "tls": site.tls(Role.GUEST_AGENT, str(AGENT)),
                    "tenant": TENANT,
                    "agent_id": AGENT,
                    "tcti": site.tcti,
                    "state_dir": site.folder / "agent",
                    "registrars": ["https://127.0.0.1:1"],
                    "payload_dir": site.folder / "payload",
                }
            )
            await ends_with(tmp_path, "guest-agent", settings, port)
