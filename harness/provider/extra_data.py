"""What a quote's extraData may be: its length tells what was signed.

| length | meaning | who chose it |
|---|---|---|
| 1 to 31 | raw nonce (Keylime pass-through) | the caller |
| 32 | native batch: `protocol.qualifying_data` | this process |
| 34 | batch in Keylime's text form: `protocol.qualifying_text` | this process |
| 0, 33, more than 34 | refused | |

Invariants:
    1. A value that a caller chose never has the length of one that was computed here.

Spec: DESIGN 3.2.
"""

from __future__ import annotations

import enum
import re

from harness.errors import MalformedMessage

_TEXT_FORM = re.compile(rb"b1[A-Z2-7]{32}")


class ExtraData(enum.Enum):
    """What a quote is made over."""

    RAW_NONCE = "a raw nonce"
    NATIVE_BATCH = "a batch"
    TEXT_BATCH = "a batch in text form"


def check_extra_data(kind: ExtraData, data: bytes) -> None:
    """Refuses extraData whose length does not say what it is.

    Raises:
        MalformedMessage: the table above has no such row.
    """
    allowed = {
        ExtraData.RAW_NONCE: 1 <= len(data) <= 31,
        ExtraData.NATIVE_BATCH: len(data) == 32,
        ExtraData.TEXT_BATCH: _TEXT_FORM.fullmatch(data) is not None,
    }[kind]
    if not allowed:
        raise MalformedMessage(f"extraData of {len(data)} bytes is not {kind.value}")
