"""How long a lab's operators wait for services that are just starting, and what they do not wait for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from harness.errors import AccessDenied, HarnessError, NotFound, PeerUnreachable
from harness.lab_onboarding import Onboarding
from harness.lab_plan import plan


class Service:
    """Refuses some calls, then answers."""

    def __init__(self, error: HarnessError, refusals: int) -> None:
        self._error = error
        self._refusals = refusals
        self.calls = 0

    async def call(self) -> str:
        self.calls += 1
        if self.calls <= self._refusals:
            raise self._error
        return "done"


def onboarding() -> Onboarding:
    return Onboarding(cast(Any, SimpleNamespace(plan=plan(tenants=1, guests=1))), cast(Any, None))


@pytest.mark.parametrize(
    "error", [PeerUnreachable("starting"), NotFound("not yet")], ids=lambda error: type(error).__name__
)
async def test_a_service_that_is_just_starting_is_asked_again(error: HarnessError) -> None:
    """Until it answers."""
    service = Service(error, refusals=2)
    assert await onboarding().patiently(service.call) == "done"
    assert service.calls == 3


async def test_what_was_just_allowed_is_asked_again_for_a_moment() -> None:
    """Another service learns of it a moment later; whoever allowed nothing is refused at once."""
    service = Service(AccessDenied("this tenant may not ask it"), refusals=2)
    assert await onboarding().patiently(service.call, refused_s=60.0) == "done"
    service = Service(AccessDenied("this tenant may not ask it"), refusals=2)
    with pytest.raises(AccessDenied):
        await onboarding().patiently(service.call)
    assert service.calls == 1
