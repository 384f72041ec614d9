"""`harness lab renew`, and what `lab status` says of certificates that end soon."""

from __future__ import annotations

import datetime
import json
from pathlib import Path

import pytest

from harness import cli_lab_acts, lab_renewal
from harness.errors import ConfigError
from harness.lab_renewal import Renewed
from tests.support.cli_operators import run

EXPIRES = datetime.datetime(2030, 1, 2, 3, 4, 5, tzinfo=datetime.UTC)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[object, ...]]:
    """What the command asks for; one certificate was renewed by a call, one in its file."""
    asked: list[tuple[object, ...]] = []

    async def renew(folder: Path, services: list[str], days: float, reason: str) -> list[Renewed]:
        asked.append((folder.name, services, days, reason))
        return [
            Renewed(name="alice-verifier", expires=EXPIRES, by="call"),
            Renewed(name="alice-operator", expires=EXPIRES, by="file"),
        ]

    monkeypatch.setattr(lab_renewal, "renew", renew)
    return asked


def renew(lab: Path, *words: str) -> int:
    """Exit code of `harness lab renew`."""
    return run("lab", "renew", "--lab", str(lab), *words)


def test_everything_is_renewed_for_a_year_unless_it_is_said_otherwise(
    lab: Path, asked: list[tuple[object, ...]]
) -> None:
    """Without names: all; names and days are passed on as typed, the reason always."""
    assert renew(lab, "--reason", "yearly") == 0
    assert renew(lab, "alice-verifier", "host1-agent", "--days", "0.5", "--reason", "soon") == 0
    assert asked == [
        (lab.name, [], 365.0, "yearly"),
        (lab.name, ["alice-verifier", "host1-agent"], 0.5, "soon"),
    ]


def test_people_see_until_when_and_programs_get_the_same(
    lab: Path, asked: list[tuple[object, ...]], capsys: pytest.CaptureFixture[str]
) -> None:
    """A row for each certificate: whose, until when, and whether its service has it already."""
    assert renew(lab, "--reason", "yearly") == 0
    first, second = capsys.readouterr().out.splitlines()[1:]
    assert first.split()[:2] == ["alice-verifier", "2030-01-02T03:04:05Z"]
    assert "the service has it" in first
    assert "in its file" in second
    assert renew(lab, "--reason", "yearly", "--json") == 0
    assert json.loads(capsys.readouterr().out) == [
        {"name": "alice-verifier", "expires": "2030-01-02T03:04:05+00:00", "by": "call"},
        {"name": "alice-operator", "expires": "2030-01-02T03:04:05+00:00", "by": "file"},
    ]


@pytest.mark.parametrize(
    "words",
    [(), ("--reason", ""), *(("--reason", "x", "--days", days) for days in ("0", "-1", "nan", "inf", "36501", "soon"))],
    ids=" ".join,
)
def test_no_reason_and_no_time_at_all_are_usage_errors(
    lab: Path, asked: list[tuple[object, ...]], words: tuple[str, ...]
) -> None:
    """Exit code 2, and nothing is renewed."""
    assert renew(lab, *words) == 2
    assert asked == []


def test_only_what_ends_soon_is_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whole days that are left below thirty; what has expired is called so."""
    left = {"a": 30.0, "b": 29.9, "c": 0.5, "d": -0.1, "e": 400.0}
    monkeypatch.setattr(lab_renewal, "days_left", lambda folder: left)
    assert cli_lab_acts.ending(tmp_path) == {"b": "29 days", "c": "0 days", "d": "expired"}


def test_a_certificate_that_cannot_be_read_does_not_end_the_status(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What is wrong with it is said by its service."""

    def refuse(folder: Path) -> dict[str, float]:
        raise ConfigError("it is no certificate")

    monkeypatch.setattr(lab_renewal, "days_left", refuse)
    assert cli_lab_acts.ending(tmp_path) == {}
