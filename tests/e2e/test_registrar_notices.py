"""Alarms of the tenant registrar are told to its receivers: changed keys, also after a kill."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import multiprocessing
import socket
import sqlite3
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa

from harness.config import NotifySettings
from harness.tenant.notices import load_or_make
from tests.support.registrar_process import RegistrarSite, SoftGuest, registrar_site
from tests.support.service_process import serving
from tests.support.tenant_wire import AGENT
from tests.support.tpms import short_folder
from tests.support.webhook_receiver import ReceiverLog, receiving

WAIT_S = 120.0


async def changed_key(site: RegistrarSite) -> None:
    """A guest that has registered shows up with other keys."""
    await site.add_host()
    await site.state_guest()
    async with asyncio.timeout(WAIT_S):
        await site.registration()
    site.guest = SoftGuest(site.provider)
    site.registration()


async def alarms(site: RegistrarSite) -> list[Any]:
    """Alarms that nobody has acknowledged, as soon as there are any."""
    async with asyncio.timeout(WAIT_S):
        while True:
            if found := (await site.get("/v1/alarms"))["alarms"]:
                return list(found)
            await asyncio.sleep(0.05)


async def marked(site: RegistrarSite) -> None:
    """Waits until every alarm is marked as told."""
    query = "select count(*) from alarms where notified_at is null"
    async with asyncio.timeout(WAIT_S):
        while True:
            with contextlib.closing(sqlite3.connect(site.database, timeout=10)) as connection:
                if connection.execute(query).fetchone() == (0,):
                    return
            await asyncio.sleep(0.05)


async def test_a_changed_key_is_told_to_every_receiver_at_once() -> None:
    """Our own form names the service; Keylime's is signed with the key beside the database."""
    native, keylime = ReceiverLog(), ReceiverLog()
    async with receiving(native) as one, receiving(keylime) as two:
        notify = [
            NotifySettings(url=f"http://127.0.0.1:{one}/hook"),
            NotifySettings(url=f"http://127.0.0.1:{two}/revoke", format="keylime"),
        ]
        with short_folder() as folder:
            async with registrar_site(folder, notify=notify) as site, serving(site.process):
                await changed_key(site)
                [ours, *_] = await native.wait_for(1, deadline_s=15.0)  # less than the notifier's own look-out
                assert ours["service"] == "tenant-registrar"
                assert (ours["kind"], ours["agent_id"], ours["layer"]) == ("KeyChanged", str(AGENT), None)
                assert ours["id"] == (await alarms(site))[0]["id"]
                [theirs, *_] = await keylime.wait_for(1)
                message = verified(folder, theirs)
                assert (message["type"], message["agent_id"]) == ("revocation", str(AGENT))
                assert message["event_id"] == "registrar.KeyChanged"


async def test_an_alarm_outlives_a_kill_and_a_receiver_that_is_away() -> None:
    """Nobody listens, the registrar is killed: after its restart the alarm is told, and not again after the next."""
    with socket.create_server(("127.0.0.1", 0)) as reserved:
        port = reserved.getsockname()[1]
    log = ReceiverLog()
    with short_folder() as folder:
        notify = [NotifySettings(url=f"http://127.0.0.1:{port}/hook")]
        async with registrar_site(folder, notify=notify) as site, serving(site.process):
            await changed_key(site)
            await alarms(site)
            for task in site.tasks:
                task.cancel()
            await site.process.kill()
            await site.process.start()
            count = len(await alarms(site))
            async with receiving(log, port=port):
                told = await log.wait_for(count)
                assert {body["kind"] for body in told} == {"KeyChanged"}
                await marked(site)
                await site.process.stop()
                await site.process.start()
                assert len(await alarms(site)) == count
                assert len(log.bodies) == count


def test_services_that_start_at_once_sign_with_one_key() -> None:
    """Of several processes that make the revocation key one does; all have the certificate that belongs to it."""
    context = multiprocessing.get_context("spawn")
    with short_folder() as folder, context.Pool(4) as pool:
        certificates = pool.map(_certificate, [folder / "revocation.key"] * 4, chunksize=1)
    assert len(set(certificates)) == 1


def _certificate(path: Path) -> bytes:
    return load_or_make(path).certificate


def verified(folder: Path, body: dict[str, str]) -> dict[str, Any]:
    """The message, if it is signed as Keylime's clients expect."""
    public = x509.load_pem_x509_certificate((folder / "revocation.crt").read_bytes()).public_key()
    assert isinstance(public, rsa.RSAPublicKey)
    pss = padding.PSS(mgf=padding.MGF1(hashes.SHA256()), salt_length=padding.PSS.MAX_LENGTH)
    public.verify(base64.b64decode(body["signature"]), body["msg"].encode(), pss, hashes.SHA256())
    return dict(json.loads(body["msg"]))
