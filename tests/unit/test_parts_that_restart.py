"""What parts of the provider answer right after a restart is tried again by a session, and never the end of one."""

from __future__ import annotations

import uuid

import pytest

from harness.errors import (
    CertificateExpired,
    DeadlineExceeded,
    GuestNotHere,
    HarnessError,
    NotReady,
    PeerRefusedUs,
    PeerUnreachable,
    ShuttingDown,
    StoreError,
)
from harness.messages import error_from_response, failure, status_of
from harness.provider.admission import Admission, Snapshot
from harness.provider.host_links import HostLinks
from harness.tenant.plan import Timing
from harness.tenant.retries import GUEST, HOST, Retries, classify
from harness.tenant.states import Event
from harness.values import HostId
from tests.support.pendings import agent, allow


def over_the_wire(error: HarnessError) -> HarnessError:
    """What the tenant's verifier makes of the provider's answer."""
    return error_from_response(status_of(error), failure(error), None)


async def unread() -> Snapshot:
    raise StoreError("the database is not up yet")


async def test_a_provider_that_has_not_read_its_records_refuses_nobody() -> None:
    """Neither 404 nor 403 for a guest that it has not loaded yet: "later"."""
    with pytest.raises(StoreError) as answer:
        await Admission(unread).admit_guest("alice", agent(1), allow([0]))
    assert status_of(answer.value) == 503
    assert classify(over_the_wire(answer.value)) is Event.TRANSPORT_FAILED


async def test_a_host_whose_link_is_not_there_yet_is_tried_again() -> None:
    """The provider verifier restarted, the host agent has not been reached: 503."""

    def never(_: str) -> object:
        raise AssertionError("no link is opened")

    async with HostLinks(never) as links:  # type: ignore[arg-type]
        with pytest.raises(NotReady) as answer:
            links.link(HostId(uuid.UUID(int=1)))
    assert classify(over_the_wire(answer.value)) is Event.TRANSPORT_FAILED


@pytest.mark.parametrize(
    "error",
    [
        PeerUnreachable("no connection"),
        DeadlineExceeded("no answer"),
        NotReady("the cache is not complete"),
        ShuttingDown("bye"),
        StoreError("disk full"),
        PeerRefusedUs("a peer without our errors", status=408),
        CertificateExpired("our certificate expired"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_is_away_for_a_minute_ends_no_session(error: HarnessError) -> None:
    """Tried again for the whole minute, with waits of ten seconds at most, whichever layer it is."""
    for layer in (GUEST, HOST):
        retries, now = Retries(Timing()), 0.0
        while now < 60.0:
            assert retries.after(layer, error, now) is Event.TRANSPORT_FAILED
            wait_s = retries.wait_s(0.99)
            assert 0 < wait_s <= 10.0 + 1.0  # and the second that 503 asks for
            now += wait_s


def test_patience_is_measured_and_not_counted() -> None:
    """Ten minutes by default, however many attempts fit in; then FAILED."""
    retries, now, tries = Retries(Timing()), 0.0, 0
    while retries.after(HOST, PeerUnreachable("away"), now) is Event.TRANSPORT_FAILED:
        now += retries.wait_s(0.0)
        tries += 1
    assert 600.0 <= now <= 620.0
    assert tries > 100


def test_an_absent_guest_has_time_to_start() -> None:
    """Three retries after 404, as the design says, that are spread over more than twenty seconds."""
    retries, now = Retries(Timing()), 0.0
    absent = over_the_wire(GuestNotHere("not here"))
    for _ in range(3):
        assert retries.after(HOST, absent, now) is Event.ABSENT
        now += retries.wait_s(0.0)
    assert now > 20.0
    assert retries.after(HOST, absent, now) is Event.RETRIES_EXHAUSTED
