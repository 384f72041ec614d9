"""Errors on the wire: the status of each, and what a peer can make us raise."""

from __future__ import annotations

import inspect

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness import errors
from harness.errors import HarnessError
from harness.wire_errors import error_from_response, failure, retry_after_s, status_of

STATUSES: list[tuple[HarnessError, int, float | None]] = [
    (errors.MalformedMessage("x"), 400, None),
    (errors.UnsupportedVersion("x"), 400, None),
    (errors.MessageTooLarge("x"), 413, None),
    (errors.AccessDenied("x"), 403, None),
    (errors.NotYourGuest("x"), 403, None),
    (errors.SelectionNotAllowed("x"), 403, None),
    (errors.GuestNotHere("x"), 404, None),
    (errors.NotFound("x"), 404, None),
    (errors.Conflict("x"), 409, None),
    (errors.PoolFull("x", retry_after_s=2.5), 503, 2.5),
    (errors.ShareExhausted("x"), 503, 1.0),
    (errors.WouldBeLate("x", retry_after_s=4.0), 503, 4.0),
    (errors.TooManyConnections("x"), 503, 1.0),
    (errors.ShuttingDown("x"), 503, 1.0),
    (errors.NotReady("x"), 503, 1.0),
    (errors.BatchFailed("x", batch_id="b"), 503, 1.0),
    (errors.DeviceUnavailable("x"), 503, 1.0),
    (errors.DeviceFault("x", response_code=0x101), 503, 1.0),
    (errors.StoreError("x"), 503, 1.0),
    (errors.PeerUnreachable("x"), 502, None),
    (errors.PeerRefusedUs("x", status=403), 502, None),
    (errors.DeadlineExceeded("x"), 504, None),
    (errors.CertificateExpired("x"), 401, None),
    (errors.ChallengeFailed(), 400, None),
    (errors.UnacceptableKey("x"), 403, None),
    (errors.CertificateRefused("x"), 403, None),
    (errors.KeyChanged("x"), 403, None),
    (errors.CloneSuspected("x"), 403, None),
    (errors.ConfigError("x"), 500, None),
    (errors.SimulatorCrashed("x"), 500, None),
    (errors.UntrustedKey("x"), 500, None),
]


@pytest.mark.parametrize(("error", "status", "wait_s"), STATUSES, ids=lambda value: type(value).__name__)
def test_every_error_has_its_status(error: HarnessError, status: int, wait_s: float | None) -> None:
    """One table; 503 alone suggests when to come again."""
    assert (status_of(error), retry_after_s(error)) == (status, wait_s)
    assert failure(error) == {"code": status, "status": error.detail, "results": {"error": type(error).__name__}}


TRAVELS = {
    "PoolFull", "ShareExhausted", "WouldBeLate", "TooManyConnections", "ShuttingDown", "NotReady",
    "BatchFailed", "NotYourGuest", "GuestNotHere", "NotFound", "SelectionNotAllowed", "AccessDenied",
    "Conflict", "UnacceptableKey",
    "CertificateRefused", "ChallengeFailed", "KeyChanged", "CloneSuspected", "CertificateExpired",
}  # fmt: skip


@pytest.mark.parametrize("error", [error for error, _, _ in STATUSES if type(error).__name__ in TRAVELS], ids=repr)
def test_a_named_refusal_is_the_same_on_the_other_side(error: HarnessError) -> None:
    """Class, sentence and waiting time survive the wire."""
    wait_s = retry_after_s(error)
    back = error_from_response(status_of(error), failure(error), None if wait_s is None else str(wait_s))
    assert type(back) is type(error)
    assert back.detail == error.detail
    assert retry_after_s(back) == wait_s


@pytest.mark.parametrize("error", [error for error, _, _ in STATUSES if type(error).__name__ not in TRAVELS], ids=repr)
def test_any_other_error_is_told_by_its_status_only(error: HarnessError) -> None:
    """What is wrong inside of a peer is no error of ours by that name; when to come again is kept."""
    status, wait_s = status_of(error), retry_after_s(error)
    back = error_from_response(status, failure(error), None if wait_s is None else str(wait_s))
    later = errors.PeerUnreachable if wait_s is None else errors.NotReady
    assert type(back) is (later if status >= 500 else errors.PeerRefusedUs)
    assert retry_after_s(back) == wait_s


KINDS = [kind for kind in vars(errors).values() if inspect.isclass(kind) and issubclass(kind, HarnessError)]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: str(kind.__name__))
def test_every_class_of_error_has_a_status(kind: type[HarnessError]) -> None:
    """One of the table's, or 500 for what has no place on the wire; no new class falls out of it."""
    error = kind.__new__(kind)
    error.detail = "x"
    family = (errors.AppraisalError, errors.ConfigError, errors.SimulationError)
    if kind is HarnessError or issubclass(kind, family):
        assert status_of(error) == 500
    else:
        assert status_of(error) in {400, 401, 403, 404, 409, 413, 502, 503, 504}


def test_a_failed_challenge_stays_without_detail() -> None:
    """The peer's text is not repeated: there is one sentence for every failure."""
    back = error_from_response(400, {"status": "wrong by one bit", "results": {"error": "ChallengeFailed"}}, None)
    assert (type(back), back.detail) == (errors.ChallengeFailed, errors.ChallengeFailed().detail)


@pytest.mark.parametrize(
    ("status", "body", "retry_after", "expected"),
    [
        pytest.param(500, None, None, errors.PeerUnreachable, id="fault"),
        pytest.param(408, None, None, errors.PeerUnreachable, id="keylimes-later"),
        pytest.param(599, None, None, errors.PeerUnreachable, id="any-5xx"),
        pytest.param(503, None, "3", errors.NotReady, id="later-by-seconds"),
        pytest.param(503, None, "Wed, 21 Oct 2026 07:28:00 GMT", errors.PeerUnreachable, id="later-by-date"),
        pytest.param(503, None, "-1", errors.PeerUnreachable, id="later-by-less-than-nothing"),
        pytest.param(503, None, "nan", errors.PeerUnreachable, id="later-by-nan"),
        pytest.param(403, None, None, errors.PeerRefusedUs, id="refused"),
        pytest.param(404, {"results": None}, None, errors.PeerRefusedUs, id="not-an-envelope"),
        pytest.param(400, {"results": {"error": 7}}, None, errors.PeerRefusedUs, id="name-is-no-text"),
        pytest.param(429, [], "5", errors.PeerRefusedUs, id="our-bug"),
    ],
)
def test_an_answer_without_a_name_goes_by_its_status(
    status: int, body: object, retry_after: str | None, expected: type[HarnessError]
) -> None:
    """408 and 5xx mean later, any other status means that our request is wrong."""
    assert type(error_from_response(status, body, retry_after)) is expected


FINDINGS = [
    name
    for name, kind in vars(errors).items()
    if inspect.isclass(kind) and issubclass(kind, errors.AppraisalError | errors.ConfigError | errors.SimulationError)
]


@pytest.mark.parametrize(
    "name", [*FINDINGS, "DeviceFault", "StoreError", "IllegalTransition", "HarnessError", "Nonsense"]
)
@pytest.mark.parametrize("status", [400, 403, 500, 503])
def test_a_peer_cannot_make_a_finding_or_a_fault_of_ours(name: str, status: int) -> None:
    """A verdict is made by our own appraisal only."""
    back = error_from_response(status, {"status": "x", "results": {"error": name}}, None)
    assert type(back) in {errors.PeerRefusedUs, errors.PeerUnreachable}


def test_name_and_status_must_belong_together() -> None:
    """A 403 that calls itself overload is a refusal, not a reason to try again."""
    back = error_from_response(403, {"status": "x", "results": {"error": "PoolFull"}}, "1")
    assert isinstance(back, errors.PeerRefusedUs)
    assert (back.status, back.error) == (403, "PoolFull")


def test_waiting_times_and_sentences_of_a_peer_are_bounded() -> None:
    """A peer cannot put us to sleep for a day or fill the log."""
    back = error_from_response(503, {"status": "x" * 9999, "results": {"error": "PoolFull"}}, "1e9")
    assert retry_after_s(back) == 3600
    assert len(back.detail) <= 500


@given(
    st.integers(300, 599),
    st.none() | st.text() | st.dictionaries(st.sampled_from(["status", "results", "code"]), st.text() | st.none()),
    st.none() | st.text(max_size=20),
)
def test_every_answer_is_some_error(status: int, body: object, retry_after: str | None) -> None:
    """There is no answer that cannot be told."""
    assert isinstance(error_from_response(status, body, retry_after), HarnessError)
