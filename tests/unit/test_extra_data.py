"""The length of extraData tells what was signed."""

from __future__ import annotations

import pytest

from harness.errors import MalformedMessage
from harness.protocol import qualifying_data, qualifying_text
from harness.provider.extra_data import ExtraData, check_extra_data

BATCH = qualifying_data(16, b"\x01" * 32)
TEXT = qualifying_text(BATCH)


@pytest.mark.parametrize("size", range(1, 32))
def test_a_raw_nonce_has_1_to_31_bytes(size: int) -> None:
    """Every length below that of a batch passes, and only as a raw nonce."""
    check_extra_data(ExtraData.RAW_NONCE, bytes(size))
    for kind in (ExtraData.NATIVE_BATCH, ExtraData.TEXT_BATCH):
        with pytest.raises(MalformedMessage):
            check_extra_data(kind, bytes(size))


@pytest.mark.parametrize("size", [0, 32, 33, 34, 35, 64])
def test_a_caller_cannot_choose_a_value_that_could_be_a_batch(size: int) -> None:
    """A raw nonce of 32 bytes or more is refused, and so is none."""
    with pytest.raises(MalformedMessage, match=f"{size} bytes"):
        check_extra_data(ExtraData.RAW_NONCE, bytes(size))


def test_a_text_batch_is_refused_as_a_raw_nonce() -> None:
    """34 bytes in the right form are still not the caller's to choose."""
    with pytest.raises(MalformedMessage):
        check_extra_data(ExtraData.RAW_NONCE, TEXT)


def test_batches_pass_as_what_they_are() -> None:
    """Both forms, as `protocol` computes them."""
    check_extra_data(ExtraData.NATIVE_BATCH, BATCH)
    check_extra_data(ExtraData.TEXT_BATCH, TEXT)


@pytest.mark.parametrize("size", [0, 1, 31, 33, 34, 64])
def test_a_native_batch_has_exactly_32_bytes(size: int) -> None:
    """No other length is signed as one."""
    with pytest.raises(MalformedMessage):
        check_extra_data(ExtraData.NATIVE_BATCH, bytes(size))


@pytest.mark.parametrize(
    "data",
    [b"", TEXT[:-1], TEXT + b"A", TEXT + b"\n", b"b2" + TEXT[2:], TEXT.lower(), TEXT[:-1] + b"0", BATCH, bytes(34)],
)
def test_a_text_batch_has_exactly_its_form(data: bytes) -> None:
    """b1 and 32 base32 characters; nothing before, after or between."""
    with pytest.raises(MalformedMessage):
        check_extra_data(ExtraData.TEXT_BATCH, data)
