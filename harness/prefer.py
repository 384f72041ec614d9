"""The header field Prefer: how long a client's answer is of use to it.

Invariants:
    1. Preferences that are not known here are ignored, as the RFC asks; a ``wait`` that is malformed is refused:
       whoever states a deadline must be able to rely on it.

Spec: RFC 7240, 2 and 4.3; DESIGN 3.5 (check 1: a tenant gives up after 30 s).
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from harness.errors import MalformedMessage

HEADER = "Prefer"
LONGEST_WAIT_S = 30
"""Seconds in which any answer is of use: a nonce is good for as long."""
_PREFERENCE = re.compile(r'(?:"(?:[^"\\]|\\.)*+(?:"|\\?\Z)|[^,"])+', re.DOTALL)
"""Whatever stands in the field is read once: text in quotes that nobody closed goes to the end, and never back."""
_SECONDS = re.compile(r'"?([0-9]{1,9})"?')


def parse_wait(values: Sequence[str]) -> float:
    """Seconds in which an answer is of use, from all fields of a request.

    Args:
        values: of the field lines, in their order.

    Returns:
        What ``wait`` says, at most `LONGEST_WAIT_S`, which is also the default. The first of several counts.

    Raises:
        MalformedMessage: ``wait`` is not a whole number of seconds, or is 0.
    """
    for preference in _PREFERENCE.findall(",".join(values)):
        name, _, value = preference.partition(";")[0].partition("=")
        if name.strip().lower() == "wait":
            seconds = _SECONDS.fullmatch(value.strip())
            if seconds is None or int(seconds[1]) == 0:
                raise MalformedMessage("Prefer: wait must be a whole number of seconds, at least 1")
            return float(min(int(seconds[1]), LONGEST_WAIT_S))
    return float(LONGEST_WAIT_S)


def prefer_wait(seconds: float) -> str:
    """Value of the field for a client that gives up after so many seconds."""
    return f"wait={min(max(1, math.floor(seconds)), LONGEST_WAIT_S)}"
