"""What people type for guests and hosts: an id, the first characters of it, or a guest's name.

Names are those of the guests' definitions in the lab's folder; nothing here asks a service.

Invariants:
    1. A text that fits several is refused; a complete id is taken as it is.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

from harness.errors import ConfigError, MalformedMessage, NotFound

if TYPE_CHECKING:
    from harness.config import SiteSettings

_DEFINITIONS = "*/domain.json"


def guest_names(site: SiteSettings) -> dict[str, str]:
    """Names of the guests that are defined on the lab's hosts, by id."""
    names: dict[str, str] = {}
    for host in site.hosts.values():
        for path in sorted(host.guests.glob(_DEFINITIONS)):
            try:
                match json.loads(path.read_bytes()):
                    case {"uuid": str(agent_id), "name": str(name)}:
                        names[agent_id] = name
            except (OSError, ValueError):  # it is being written, or removed
                continue
    return names


def is_id(text: str) -> bool:
    """Whether a text is a complete id."""
    from harness.values import parse_uuid

    try:
        parse_uuid(text, "id")
    except MalformedMessage:
        return False
    return True


def pick(text: str, known: Collection[str], names: Mapping[str, str], *, what: str, listing: str) -> str:
    """The id that a text stands for.

    Args:
        text: as typed: a complete id, the first characters of a known one, or a name.
        known: ids to choose from.
        names: names by id.
        what: ``guest`` or ``host``, for the error.
        listing: the command that lists what is known.

    Raises:
        NotFound: it fits nothing.
        ConfigError: it fits several.
    """
    if is_id(text):
        return text
    named = [each for each in known if names.get(each) == text]
    found = named or [each for each in known if text and each.startswith(text)]
    if not found:
        raise NotFound(f"no {what} {text[:80]}; `{listing}` shows them all")
    if len(found) > 1:
        raise ConfigError(f"{text} may be {', '.join(sorted(found))}: give the {what}'s id, or more of it")
    return found[0]
