"""`harness lab renew`: the certificates of a lab's services and operators, while they run and when they are down."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.config import SiteSettings
from harness.errors import ConfigError, HarnessError
from harness.lab_plan import plan
from harness.lab_renewal import Renewed, days_left, names, renew
from harness.lab_site import LabSite, write_image
from harness.own_certificate import FROM_FILE
from harness.peer import PeerClient
from harness.pki import Role, load_certificate
from harness.tls import certificate_requester
from tests.support.certificates import put_in_place, reissue, until_expired
from tests.support.stop_lab import started, until
from tests.support.web_lab import Pki

REASON = "the old one ends this week"
SHORT_S = 10.0
"""Between the making of a certificate and the end of the call that hands it over."""


class Folder:
    """A lab's folder, whose services the test starts."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.plan = plan(tenants=1, guests=1)
        self.files = LabSite.open(path, self.plan)
        self.services = {file.name: file for file in self.files.services()}
        self.site: SiteSettings = self.files.site()
        [self.guest] = self.plan.guests
        write_image(self.site, self.guest, "host1")

    def certificate(self, name: str) -> Path:
        return next(iter(self.path.glob(f"pki/*/{name}.pem")))


@pytest.fixture
def folder() -> Iterator[Folder]:
    with tempfile.TemporaryDirectory(prefix="h") as name:
        yield Folder(Path(name))


def test_everybody_with_a_certificate_can_be_named(folder: Folder) -> None:
    """Operators first, then the services as `lab status` names them, then guest agents."""
    assert names(folder.path) == [
        "provider-operator",
        "alice-operator",
        "alice-client",
        "provider-registrar",
        "provider-verifier",
        "host1-agent",
        "alice-registrar",
        "alice-verifier",
        f"agent-{folder.guest.agent_id}",
    ]


async def test_services_that_are_down_get_theirs_through_the_file(folder: Folder) -> None:
    """All certificates are new, on the same keys; who is not there takes it into use at its start."""
    certificates = {path: load_certificate(path) for path in folder.path.glob("pki/*/*-*.pem")}
    assert min(days_left(folder.path).values()) > 300
    done = await renew(folder.path, [], 30, REASON)
    assert [each.name for each in done] == names(folder.path)
    left = days_left(folder.path)
    assert list(left) == names(folder.path)
    assert all(29 < days <= 30 for days in left.values())
    assert {each.by for each in done} == {"file"}
    assert len(certificates) == len(done) - 1  # the guest agent's is in its image
    for path, old in certificates.items():
        new = load_certificate(path)
        assert new.serial_number != old.serial_number
        assert certificate_requester(new) == certificate_requester(old)
        assert path.stat().st_mode & 0o777 == 0o600


async def test_unknown_names_and_no_time_at_all_are_refused(folder: Folder) -> None:
    """One sentence that says what there is; nothing is renewed."""
    before = {path: path.read_bytes() for path in folder.path.glob("pki/*/*.pem")}
    with pytest.raises(ConfigError, match="this lab has provider-operator, alice-operator"):
        await renew(folder.path, ["alice-operator", "nobody"], 30, REASON)
    with pytest.raises(ConfigError, match="must be more than 0"):
        await renew(folder.path, [], 0, REASON)
    with pytest.raises(ConfigError):
        await renew(folder.path / "elsewhere", [], 30, REASON)
    assert {path: path.read_bytes() for path in folder.path.glob("pki/*/*.pem")} == before


async def test_a_running_service_takes_it_at_once_and_an_expired_one_soon(folder: Folder) -> None:
    """A call while it can be reached; through its file after its certificate has expired; never a restart."""
    file = folder.services["provider-registrar"]
    tls = folder.files.tls("provider", Role.PROVIDER_REGISTRAR, "registrar", trusts=("provider",))
    pki = Pki(folder.path / "pki", dict(folder.files.authorities))
    operator = folder.site.provider.operator

    def client() -> PeerClient:
        return PeerClient(operator, folder.site.provider.registrar)

    with started(file.name, file.service, file.config, folder.path / "registrar.log") as running:
        async with client() as asking:
            await until(lambda: asking.get("/version"), running)
            [done] = await renew(folder.path, ["provider-registrar"], 30, REASON)
            assert done.by == "call"
            trail = await asking.get("/v1/audit")
            assert isinstance(trail, dict)
            entry = trail["entries"][-1]
            assert (entry["action"], entry["subject"]) == ("certificate-renew", "provider-registrar/registrar")
            assert (entry["who"], entry["reason"]) == ("provider/provider-operator/operator", REASON)
            [done] = await renew(folder.path, ["provider-registrar"], SHORT_S / 86400, REASON)
            assert done.by == "call"
        await until_expired(tls)
        async with client() as asking:
            with pytest.raises(HarnessError, match="certificate has expired"):
                await asking.get("/version")
            [again] = await renew(folder.path, ["provider-registrar"], 30, REASON)
            assert again == Renewed(name=done.name, expires=again.expires, by="file")
            await until(lambda: asking.get("/version"), running)
            trail = await asking.get("/v1/audit")
            assert isinstance(trail, dict)
            entry = trail["entries"][-1]
            assert (entry["action"], entry["subject"]) == ("certificate-renew", "provider-registrar/registrar")
            assert (entry["who"], entry["reason"]) == ("file", FROM_FILE)
        put_in_place(reissue(pki, operator, seconds=-1, authority="provider"), operator)
        async with client() as asking:
            with pytest.raises(HarnessError, match=r"our own certificate .* expired at"):
                await asking.get("/version")
            ways = {each.name: each.by for each in await renew(folder.path, [], 30, REASON)}
            assert (ways["provider-operator"], ways["provider-registrar"]) == ("file", "call")
            await asking.get("/version")
