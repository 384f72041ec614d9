"""The file with the authValues of the host's keys."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from harness.errors import ConfigError
from harness.provider import auths


def test_no_file_is_none_and_makes_nothing(tmp_path: Path) -> None:
    """Looking does not create: whether keys exist already is for the caller to find out first."""
    assert auths.load(tmp_path) is None
    assert list(tmp_path.iterdir()) == []


def test_made_once_and_read_again(tmp_path: Path) -> None:
    """What was made is what is loaded: two different random values of 32 bytes."""
    made = auths.make(tmp_path / "new")
    assert auths.load(tmp_path / "new") == made
    assert len(made.ak) == len(made.ca) == 32
    assert made.ak != made.ca
    assert made != auths.make(tmp_path / "other")


def test_nobody_else_can_read_it(tmp_path: Path) -> None:
    """Mode 0600, and nothing else is left in the directory."""
    auths.make(tmp_path)
    (file,) = tmp_path.iterdir()
    assert file.stat().st_mode & 0o777 == 0o600


def test_the_first_of_two_makers_wins(tmp_path: Path) -> None:
    """Two agents that start together end up with the same values."""
    assert auths.make(tmp_path) == auths.make(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == [auths.FILE_NAME]


def test_the_values_are_in_no_text(tmp_path: Path) -> None:
    """Neither in the repr nor in the error about a damaged file."""
    made = auths.make(tmp_path)
    assert made.ak.hex() not in repr(made)
    file = tmp_path / auths.FILE_NAME
    file.write_text(json.dumps({"ak": made.ak.hex(), "ca": made.ak.hex()}))
    with pytest.raises(ConfigError) as caught:
        auths.load(tmp_path)
    assert made.ak.hex() not in str(caught.value)
    assert caught.value.__cause__ is None


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o644])
def test_a_file_that_others_may_read_is_refused(tmp_path: Path, mode: int) -> None:
    """It may have been read: it is not used, and the error names it."""
    auths.make(tmp_path)
    (tmp_path / auths.FILE_NAME).chmod(mode)
    with pytest.raises(ConfigError, match=r"auth\.json: .*0600"):
        auths.load(tmp_path)


@pytest.mark.needs_root
def test_a_file_of_another_user_is_refused(tmp_path: Path) -> None:
    """Whoever owns it knows the values."""
    auths.make(tmp_path)
    os.chown(tmp_path / auths.FILE_NAME, 12345, -1)
    with pytest.raises(ConfigError):
        auths.load(tmp_path)


def test_a_link_is_refused(tmp_path: Path) -> None:
    """A file that somebody points us to is not ours."""
    auths.make(tmp_path / "real")
    (tmp_path / auths.FILE_NAME).symlink_to(tmp_path / "real" / auths.FILE_NAME)
    with pytest.raises(ConfigError, match="cannot be read"):
        auths.load(tmp_path)


@pytest.mark.parametrize(
    "content",
    ["", "not json", "[]", "{}", '{"ak": 1, "ca": 2}', json.dumps({"ak": "00" * 16, "ca": "11" * 16})],
)
def test_a_damaged_file_is_refused(tmp_path: Path, content: str) -> None:
    """It is never made anew by itself: the keys in the TPM belong to the old values."""
    file = tmp_path / auths.FILE_NAME
    file.write_text(content)
    file.chmod(0o600)
    with pytest.raises(ConfigError, match="restore"):
        auths.load(tmp_path)
    assert file.read_text() == content


def test_a_directory_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    """The error names the file."""
    (tmp_path / "blocked").write_text("a file, not a directory")
    with pytest.raises(ConfigError, match=r"auth\.json"):
        auths.make(tmp_path / "blocked")
