"""What a replacement of a host's TPM must remember to be completed when it is interrupted.

The note is made before anything is changed, and removed when everything is done; it lies in the host's folder.

Invariants:
    1. Nothing that is destroyed on the way, such as a guest's definition or the order by which it was attested, is in
       the note only after that.

Owner: `lab_replace`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from harness.errors import ConfigError
from harness.private_file import write_private

FILE = "replacing.json"


@dataclass(slots=True, kw_only=True)
class GuestNote:
    """A guest on the host, as it was before.

    Args:
        name: for people.
        tenant: whose it is.
        running: whether it was on.
        definition: its guest manager's; None: it was defined nowhere.
        stated: whether its tenant knew it.
        attested: what its verifier said of it and of its reference values; None: it was not under attestation.
        done: whether it has come back, and its tenant has judged it.
    """

    name: str
    tenant: str
    running: bool
    definition: Mapping[str, Any] | None
    stated: bool
    attested: Mapping[str, Any] | None
    done: bool = False


@dataclass(slots=True, kw_only=True)
class ReplacementNote:
    """A replacement that has begun.

    Args:
        old: id of the host with its former TPM.
        chips: how many TPMs of this host had been replaced before.
        guests: by id.
    """

    old: str
    chips: int
    guests: dict[str, GuestNote]

    @property
    def missing(self) -> dict[str, GuestNote]:
        """Guests that have not come back yet."""
        return {agent_id: guest for agent_id, guest in self.guests.items() if not guest.done}

    def save(self, folder: Path) -> None:
        """Keeps the note in the host's folder. Raises ConfigError when it cannot be written."""
        try:
            write_private(folder / FILE, json.dumps(asdict(self), indent=1).encode())
        except OSError as error:
            raise ConfigError(f"{folder / FILE}: cannot be written: {error.strerror}") from error


def unfinished(folder: Path) -> ReplacementNote | None:
    """The replacement that has begun on a host and was not completed.

    Args:
        folder: of the host.

    Raises:
        ConfigError: the note cannot be read.
    """
    path = folder / FILE
    try:
        kept = json.loads(path.read_bytes())
        guests = {agent_id: GuestNote(**members) for agent_id, members in kept.pop("guests").items()}
        return ReplacementNote(guests=guests, **kept)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(
            f"{path}: is not the note of a replacement; remove it, and begin the replacement anew"
        ) from error
