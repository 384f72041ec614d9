"""Which guests run here: the cache of domains from reports, and the residency that a batch is sealed with.

Size: one cache and every report about it.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from harness.errors import CloneSuspected, GuestNotHere, MalformedMessage, NotReady, PeerUnreachable
from harness.provider.guests import Domain, GuestCache
from harness.provider.journal import RSA_EK, Journal
from harness.provider.residency import GuestResidency
from harness.provider.tables import HOST_SCHEMA, HostBase
from harness.store import open_store
from tests.support.batching import WAIT_S
from tests.support.pendings import agent
from tests.support.vtpm_host import ScriptedGuests, domain, until

GUEST, OTHER = agent(1), agent(2)
KEY, FOREIGN = b"\x01" * 32, b"\x02" * 32
FILE = os.stat_result((0o600, 7, 8, 1, 0, 0, 0, 0, 0, 0))


class Followed:
    """A cache that follows a script."""

    def __init__(self, guests: ScriptedGuests, settle_s: float) -> None:
        self.guests = guests
        self.cache = GuestCache(guests, rng=random.Random(1), settle_s=settle_s)

    async def say(self, *domains: Domain) -> None:
        await self._took(lambda: self.guests.say({entry.agent_id: entry for entry in domains}))

    async def change(self, changed: Domain, *, gone: bool = False) -> None:
        await self._took(lambda: self.guests.say((changed.agent_id, None if gone else changed)))

    async def _took(self, speak: object) -> None:
        assert callable(speak)
        async with asyncio.timeout(WAIT_S):
            speak()
            await self.cache.changed()


@asynccontextmanager
async def followed(settle_s: float = 0.0) -> AsyncIterator[Followed]:
    made = Followed(ScriptedGuests(), settle_s)
    task = asyncio.create_task(made.cache.follow())
    try:
        yield made
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


# --- the cache ------------------------------------------------------------------------------------------------


async def test_before_the_first_report_nothing_is_known() -> None:
    """NotReady for every guest, not GuestNotHere."""
    async with followed() as host:
        for ask in (host.cache.domain, host.cache.check_manufacturing):
            with pytest.raises(NotReady):
                ask(GUEST)
        with pytest.raises(NotReady):
            host.cache.domains()


async def test_the_first_report_is_all_there_is() -> None:
    """A guest that is not in it is not defined here."""
    async with followed() as host:
        await host.say(domain(GUEST, "running"))
        assert host.cache.domain(GUEST) == domain(GUEST, "running")
        assert host.cache.domain(OTHER) is None


async def test_changes_are_followed_one_by_one() -> None:
    """Defined, started, stopped, undefined."""
    async with followed() as host:
        await host.say()
        for state in ("shutoff", "starting", "running", "paused", "running", "shutoff"):
            await host.change(domain(GUEST, state))
            assert host.cache.domain(GUEST) == domain(GUEST, state)
        await host.change(domain(GUEST), gone=True)
        assert host.cache.domains() == {}
        await host.change(domain(GUEST), gone=True)  # once more is no error


async def test_a_lost_connection_makes_everything_unknown_until_the_next_list() -> None:
    """What ran before is not believed any more: events may have been missed."""
    async with followed() as host:
        await host.say(domain(GUEST, "running"))
        host.guests.break_off()
        await until(lambda: _unknown(host.cache))
        await host.say(domain(OTHER, "running"))
        assert host.cache.domain(GUEST) is None
        assert host.cache.domain(OTHER) == domain(OTHER, "running")
        assert host.guests.connections == 2


async def test_a_change_before_the_list_is_not_believed() -> None:
    """The guest manager does not speak the protocol: connected anew, still unknown."""
    async with followed() as host:
        host.guests.say((GUEST, domain(GUEST, "running")))
        await until(lambda: host.guests.connections == 2)
        assert _unknown(host.cache)


async def test_a_second_list_replaces_the_first() -> None:
    """Guests that are not in it are gone."""
    async with followed() as host:
        await host.say(domain(GUEST))
        await host.say(domain(OTHER))
        assert list(host.cache.domains()) == [OTHER]


async def test_a_cancelled_cache_says_not_ready() -> None:
    """Nobody follows any more, so nothing is known."""
    async with followed() as host:
        await host.say(domain(GUEST, "running"))
    assert _unknown(host.cache)


def _unknown(cache: GuestCache) -> bool:
    try:
        cache.domains()
    except NotReady:
        return True
    return False


@pytest.mark.parametrize("state", ["shutoff", "starting"])
async def test_a_vtpm_may_be_made_for_a_domain_that_is_off(state: str) -> None:
    """Or about to start: that is when swtpm_setup runs."""
    async with followed() as host:
        await host.say(domain(GUEST, state))
        host.cache.check_manufacturing(GUEST)


@pytest.mark.parametrize("state", ["running", "paused", "migrating", "crashed", ""])
async def test_no_vtpm_is_made_for_a_domain_that_runs(state: str) -> None:
    """In any state but off; unknown states count as running."""
    async with followed() as host:
        await host.say(domain(GUEST, state))
        with pytest.raises(GuestNotHere):
            host.cache.check_manufacturing(GUEST)


async def test_no_vtpm_is_made_for_a_transient_or_unknown_domain() -> None:
    """It would be gone with its vTPM at the next stop, or is not this host's."""
    async with followed() as host:
        await host.say(domain(GUEST, persistent=False))
        for agent_id in (GUEST, OTHER):
            with pytest.raises(GuestNotHere):
                host.cache.check_manufacturing(agent_id)


# --- runs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("states", "runs"),
    [
        (["running"], 0),  # it ran before we looked
        (["running", "paused", "migrating", "running"], 0),
        (["starting", "running"], 0),
        (["shutoff"], 1),
        (["shutoff", "starting", "running"], 1),
        (["shutoff", "running"], 1),  # libvirt knows no state "starting"
        (["shutoff", "shutoff"], 1),
        (["running", "shutoff", "running"], 1),
        (["running", "shutoff", "starting", "running"], 1),
        (["running", "starting", "running"], 1),
        (["running", "crashed", "running"], 1),
        (["starting", "shutoff", "running"], 1),  # a start that failed
        (["running", "gone", "running"], 2),
        (["running", "gone", "shutoff", "starting", "running"], 2),
        (["shutoff", "gone", "gone", "shutoff"], 4),
    ],
)
@pytest.mark.parametrize("as_lists", [False, True])
async def test_a_domain_that_was_off_is_in_another_run(states: list[str], runs: int, as_lists: bool) -> None:
    """Whether it is reported as a change or with a whole list: what was read before an earlier start is out of date."""
    async with followed() as host:
        await host.say(domain(GUEST, states[0]))
        for state in states[1:]:
            if as_lists:
                await host.say(*[] if state == "gone" else [domain(GUEST, state)])
            else:
                await host.change(domain(GUEST, state), gone=state == "gone")
        if not (as_lists and states.count("gone") > 1):  # absent from two lists is no second disappearance
            assert host.cache.run_of(GUEST) == runs
        assert host.cache.run_of(OTHER) == 0


async def test_a_run_goes_on_over_a_lost_connection() -> None:
    """A guest that runs before and after is taken for the same; one that is off afterwards is not."""
    async with followed() as host:
        await host.say(domain(GUEST, "running"), domain(OTHER, "running"))
        host.guests.break_off()
        await host.say(domain(GUEST, "running"), domain(OTHER))
        assert (host.cache.run_of(GUEST), host.cache.run_of(OTHER)) == (0, 1)


async def test_who_asks_for_a_domain_that_is_off_waits_for_the_report() -> None:
    """The question can overtake it: it comes on another connection."""
    async with followed(settle_s=WAIT_S) as host:
        asked = asyncio.create_task(host.cache.off(GUEST))
        await host.say()
        await host.change(domain(GUEST, "running"))
        assert not asked.done()
        await host.change(domain(GUEST))
        async with asyncio.timeout(WAIT_S):
            assert await asked == host.cache.run_of(GUEST)


@pytest.mark.parametrize("state", ["running", "paused", "migrating", None])
async def test_a_domain_that_runs_or_is_not_defined_is_not_off(state: str | None) -> None:
    """The wait has an end."""
    async with followed() as host:
        await host.say(*[] if state is None else [domain(GUEST, state)])
        with pytest.raises(GuestNotHere):
            await host.cache.off(GUEST)


async def test_without_a_report_it_is_not_known_what_is_off() -> None:
    """NotReady: the caller may try again."""
    async with followed() as host:
        with pytest.raises(NotReady):
            await host.cache.off(GUEST)


# --- residency ------------------------------------------------------------------------------------------------


class Resident:
    """A host whose guest GUEST runs with its certified vTPM; a test changes one thing."""

    def __init__(self, host: Followed, journal: Journal) -> None:
        self.host = host
        self.journal = journal
        self.ek = KEY
        self.residency = GuestResidency(host.cache, journal, self._read)
        self.read: list[Path] = []
        self.meanwhile: Callable[[], Awaitable[None]] | None = None

    async def _read(self, state_dir: Path) -> bytes:
        self.read.append(state_dir)
        if self.meanwhile is not None:
            await self.meanwhile()
        return self.ek

    async def starts(self, state_dir: Path) -> bool:
        """The guest is stopped and started in order."""
        (state_dir / "tpm2-00.permall").write_bytes(b"state")
        await self.host.change(domain(GUEST))
        genuine = await self.residency.starting(GUEST, state_dir)
        await self.host.change(domain(GUEST, "running"))
        return genuine

    async def found(self) -> object:
        return (await self.residency.check({GUEST}))[GUEST]


@pytest.fixture
async def resident(tmp_path: Path) -> AsyncIterator[Resident]:
    url = f"sqlite+aiosqlite:///{tmp_path / 'agent.db'}"
    store = await open_store(url, HostBase.metadata, component="host-agent", version=HOST_SCHEMA)
    async with followed() as host:
        journal = Journal(store)
        await journal.record(GUEST, RSA_EK, KEY, 1)
        await journal.saw(GUEST, tmp_path / "tpm2-00.permall", FILE, KEY)
        await host.say(domain(GUEST, "running"))
        yield Resident(host, journal)
    await store.close()


async def test_a_running_guest_with_its_certified_vtpm_is_here(resident: Resident) -> None:
    """The digest is what goes into the leaf."""
    assert await resident.found() == KEY


@pytest.mark.parametrize("state", ["paused", "migrating"])
async def test_a_guest_that_is_held_is_not_here_until_it_goes_on(resident: Resident, state: str) -> None:
    """Who runs it next is open; it is the same run afterwards."""
    await resident.host.change(domain(GUEST, state))
    assert isinstance(await resident.found(), GuestNotHere)
    await resident.host.change(domain(GUEST, "running"))
    assert await resident.found() == KEY


@pytest.mark.parametrize("state", ["shutoff", "starting", "crashed", "RUNNING", ""])
async def test_a_guest_that_was_off_is_not_here_until_its_vtpm_was_read_again(
    resident: Resident, tmp_path: Path, state: str
) -> None:
    """A start that nobody told the host agent of: the EK of the last start says nothing about this one."""
    await resident.host.change(domain(GUEST, state))
    assert isinstance(await resident.found(), GuestNotHere)
    await resident.host.change(domain(GUEST, "running"))
    found = await resident.found()
    assert isinstance(found, GuestNotHere)
    assert "nobody has looked" in found.detail
    await resident.starts(tmp_path)
    assert await resident.found() == KEY


async def test_the_vtpm_of_a_guest_that_runs_is_not_read_again(resident: Resident, tmp_path: Path) -> None:
    """With a decoy running under its UUID, showing the genuine state does not help."""
    resident.ek = FOREIGN
    await resident.starts(tmp_path)
    resident.ek, resident.read = KEY, []
    with pytest.raises(GuestNotHere):
        await resident.residency.starting(GUEST, tmp_path)
    assert resident.read == []
    assert isinstance(await resident.found(), GuestNotHere)


async def test_a_guest_that_was_started_while_its_vtpm_was_read_is_not_here(resident: Resident, tmp_path: Path) -> None:
    """What was read is not what runs, perhaps."""
    await resident.host.change(domain(GUEST))
    (tmp_path / "tpm2-00.permall").write_bytes(b"state")
    resident.meanwhile = lambda: resident.host.change(domain(GUEST, "running"))
    with pytest.raises(GuestNotHere):
        await resident.residency.starting(GUEST, tmp_path)
    assert isinstance(await resident.found(), GuestNotHere)


async def test_a_transient_domain_is_not_here(resident: Resident) -> None:
    """Anybody who may use the guest manager could start one under this UUID."""
    await resident.host.change(domain(GUEST, "running", persistent=False))
    assert isinstance(await resident.found(), GuestNotHere)


async def test_an_undefined_domain_is_not_here(resident: Resident) -> None:
    """Whatever the journal knows."""
    await resident.host.change(domain(GUEST), gone=True)
    assert isinstance(await resident.found(), GuestNotHere)


async def test_a_lost_guest_manager_is_not_ready(resident: Resident) -> None:
    """503, and the tenant tries again: not an answer about this guest."""
    resident.host.guests.break_off()
    await until(lambda: _unknown(resident.host.cache))
    assert isinstance(await resident.found(), NotReady)
    with pytest.raises(NotReady):
        await resident.residency.report()


async def test_another_vtpm_at_the_last_start_is_not_here(resident: Resident, tmp_path: Path) -> None:
    """A decoy under this UUID."""
    await resident.journal.saw(GUEST, tmp_path / "tpm2-00.permall", FILE, FOREIGN)
    assert isinstance(await resident.found(), GuestNotHere)


async def test_a_guest_that_was_never_seen_starting_is_not_here(resident: Resident) -> None:
    """It runs, and its key is certified; which vTPM it runs with nobody has looked at."""
    await resident.journal.record(OTHER, RSA_EK, FOREIGN, 2)
    await resident.host.change(domain(OTHER, "running"))
    assert isinstance((await resident.residency.check({OTHER}))[OTHER], GuestNotHere)


async def test_a_guest_whose_vtpm_was_never_certified_is_not_here(resident: Resident, tmp_path: Path) -> None:
    """It was seen; nobody certified it."""
    await resident.journal.saw(OTHER, tmp_path / "tpm2-00.permall", FILE, FOREIGN)
    await resident.host.change(domain(OTHER, "running"))
    assert isinstance((await resident.residency.check({OTHER}))[OTHER], GuestNotHere)


async def test_a_released_vtpm_is_not_here(resident: Resident) -> None:
    """The operator's release takes effect at the next batch."""
    await resident.journal.release(GUEST, "stolen", who="uid 0")
    assert isinstance(await resident.found(), GuestNotHere)


async def test_every_guest_of_a_batch_gets_its_own_answer(resident: Resident) -> None:
    """One that is not here does not harm the others."""
    found = await resident.residency.check({GUEST, OTHER})
    assert found[GUEST] == KEY
    assert isinstance(found[OTHER], GuestNotHere)
    assert await resident.residency.check(frozenset()) == {}


async def test_a_start_is_recorded_whatever_vtpm_it_is(resident: Resident, tmp_path: Path) -> None:
    """The answer says whether it is the certified one; the record decides who is here."""
    resident.ek = FOREIGN
    assert not await resident.starts(tmp_path)
    assert isinstance(await resident.found(), GuestNotHere)
    resident.ek = KEY
    assert await resident.starts(tmp_path)
    assert await resident.found() == KEY
    assert resident.read == [tmp_path, tmp_path]


async def test_a_start_without_a_state_leaves_no_record(resident: Resident, tmp_path: Path) -> None:
    """Nothing was read, so nothing is known; the last start is over."""
    await resident.host.change(domain(GUEST))
    for folder in (tmp_path / "nothing", Path("/\x00")):
        with pytest.raises(MalformedMessage, match="no vTPM state"):
            await resident.residency.starting(GUEST, folder)
    assert resident.read == []
    await resident.host.change(domain(GUEST, "running"))
    assert isinstance(await resident.found(), GuestNotHere)
    assert await resident.journal.seen() == {}


async def test_a_start_whose_state_cannot_be_read_leaves_no_record(resident: Resident, tmp_path: Path) -> None:
    """The error is the reader's; other guests keep their records."""
    await resident.journal.saw(OTHER, tmp_path / "tpm2-00.permall", FILE, FOREIGN)

    async def fails() -> None:
        raise PeerUnreachable("no swtpm")

    resident.meanwhile = fails
    with pytest.raises(PeerUnreachable):
        await resident.starts(tmp_path)
    await resident.host.change(domain(GUEST, "running"))
    assert isinstance(await resident.found(), GuestNotHere)
    assert await resident.journal.seen() == {OTHER: FOREIGN}


async def test_the_report_for_the_registrar_names_every_domain(resident: Resident) -> None:
    """With the EK it was last seen with, or none."""
    await resident.host.change(domain(OTHER, "shutoff"))
    assert await resident.residency.report() == [
        {"agent_id": str(GUEST), "state": "running", "vtpm_ek": KEY.hex()},
        {"agent_id": str(OTHER), "state": "shutoff", "vtpm_ek": ""},
    ]


# --- runs with ids ----------------------------------------------------------------------------------------------


class Runs:
    """What happens to GUEST at a guest manager that gives its starts ids."""

    def __init__(self, resident: Resident, folder: Path) -> None:
        self.resident = resident
        (folder / "tpm2-00.permall").write_bytes(b"state")
        self.folder = folder

    async def start(self, run: str, *, told: str | None = None) -> None:
        """An honest start; the hook may tell another id than the reports."""
        await self.resident.host.change(domain(GUEST))
        await self.resident.residency.starting(GUEST, self.folder, run=told or run)
        await self.resident.host.change(domain(GUEST, "starting", run=run))
        await self.resident.host.change(domain(GUEST, "running", run=run))


@pytest.fixture
def runs(resident: Resident, tmp_path: Path) -> Runs:
    return Runs(resident, tmp_path)


async def test_a_reading_holds_for_the_run_that_it_was_made_for(runs: Runs) -> None:
    """Paused and resumed it is the same run."""
    await runs.start("r1")
    assert await runs.resident.found() == KEY
    for state in ("paused", "running"):
        await runs.resident.host.change(domain(GUEST, state, run="r1"))
    assert await runs.resident.found() == KEY


async def test_a_restart_during_a_lost_connection_is_noticed(runs: Runs) -> None:
    """It ran before and it runs after; only the id of the run tells that nobody looked at what runs now."""
    await runs.start("r1")
    runs.resident.host.guests.break_off()
    await runs.resident.host.say(domain(GUEST, "running", run="r2"))
    assert isinstance(await runs.resident.found(), GuestNotHere)
    await runs.start("r3")
    assert await runs.resident.found() == KEY


async def test_the_same_run_after_a_lost_connection_is_here(runs: Runs) -> None:
    """The manager's socket broke; the guest did not."""
    await runs.start("r1")
    runs.resident.host.guests.break_off()
    await runs.resident.host.say(domain(GUEST, "running", run="r1"))
    assert await runs.resident.found() == KEY


async def test_a_reading_for_another_run_does_not_hold(runs: Runs) -> None:
    """The hook told of one start, and another one runs."""
    await runs.start("r2", told="r1")
    assert isinstance(await runs.resident.found(), GuestNotHere)


@pytest.mark.parametrize(("run", "here"), [("r1", True), ("r2", False)])
async def test_the_run_of_a_reading_survives_the_host_agent(runs: Runs, run: str, here: bool) -> None:
    """A new host agent finds a guest running: the journal knows for which start its EK was read."""
    await runs.start("r1")
    async with followed() as host:
        again = Resident(host, runs.resident.journal)
        await host.say(domain(GUEST, "running", run=run))
        assert (await again.found() == KEY) is here


async def test_a_manager_without_ids_is_followed_by_what_it_reports(runs: Runs) -> None:
    """A run that it does not name is the one that was seen starting."""
    await runs.resident.host.change(domain(GUEST))
    await runs.resident.residency.starting(GUEST, runs.folder, run="r1")
    await runs.resident.host.change(domain(GUEST, "running"))
    assert await runs.resident.found() == KEY


async def test_a_clone_of_another_guests_vtpm_does_not_start(resident: Resident, tmp_path: Path) -> None:
    """The EK is certified for a guest: under any other UUID it is a copy. The genuine guest stays here."""
    (tmp_path / "tpm2-00.permall").write_bytes(b"state")
    await resident.host.change(domain(OTHER))
    with pytest.raises(CloneSuspected, match=str(GUEST)):
        await resident.residency.starting(OTHER, tmp_path)
    await resident.host.change(domain(OTHER, "running"))
    assert isinstance((await resident.residency.check({OTHER}))[OTHER], GuestNotHere)
    assert await resident.found() == KEY
