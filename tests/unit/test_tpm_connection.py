"""The thread's side of the TPM client, against an ESAPI that fails on command."""

from __future__ import annotations

import pytest

from harness.errors import DeviceFault, DeviceUnavailable, HarnessError
from harness.tpm_connection import Connection

RETRY, YIELDED, TESTING = 0x922, 0x908, 0x90A
RESOURCE_MANAGER_LAYER, TCTI_LAYER, ESYS_LAYER = 11 << 16, 10 << 16, 7 << 16


class EsapiError(Exception):
    def __init__(self, rc: int) -> None:
        super().__init__(f"rc {rc:#x}")
        self.rc = rc


class FakeEsapi:
    """Raises the given response codes one after the other, then answers. Checks that nobody uses it when closed."""

    def __init__(self, codes: list[int]) -> None:
        self._codes = codes
        self.closed = False
        self.calls = 0

    def get_random(self, size: int) -> bytes:
        assert not self.closed
        self.calls += 1
        if self._codes:
            raise EsapiError(self._codes.pop(0))
        return bytes(size)

    def tr_from_tpmpublic(self, handle: int) -> str:
        return f"object {handle:#x}"

    def close(self) -> None:
        self.closed = True


class Bench:
    """A connection whose ESAPI contexts and waits are recorded."""

    def __init__(self, *codes: int) -> None:
        self._codes = list(codes)
        self.opened: list[FakeEsapi] = []
        self.waits: list[float] = []
        self.connection = Connection(self._connect, EsapiError, wait=self.waits.append)

    def _connect(self) -> FakeEsapi:
        self.opened.append(FakeEsapi(self._codes))
        return self.opened[-1]

    def ask(self) -> bytes:
        answer: bytes = self.connection.do("get_random", 8)
        return answer


@pytest.mark.parametrize("code", [RETRY, YIELDED, TESTING, RESOURCE_MANAGER_LAYER | RETRY])
def test_busy_tpm_is_asked_again(code: int) -> None:
    """RETRY, YIELDED and TESTING, also from the kernel's resource manager, are waited for and tried again."""
    bench = Bench(code, code)
    assert bench.ask() == bytes(8)
    assert len(bench.waits) == 2
    assert len(bench.opened) == 1


def test_busy_tpm_is_not_asked_for_ever() -> None:
    """After 20 tries the client gets the TPM's own response code."""
    bench = Bench(*[RETRY] * 100)
    with pytest.raises(DeviceFault) as caught:
        bench.ask()
    assert caught.value.response_code == RETRY
    assert bench.opened[0].calls == 20
    assert len(bench.waits) == 19


@pytest.mark.parametrize(
    ("code", "kind", "connections"),
    [
        (0x9A2, DeviceFault, 1),
        (0x101, DeviceFault, 1),
        (RESOURCE_MANAGER_LAYER | 0x101, DeviceFault, 1),
        (TCTI_LAYER | 0x0A, DeviceUnavailable, 2),
        (ESYS_LAYER | 0x07, DeviceUnavailable, 2),
    ],
)
def test_layer_of_an_error_decides_its_kind(code: int, kind: type[HarnessError], connections: int) -> None:
    """An answer of the TPM is a fault and keeps the connection; anything below it drops the connection. No retry."""
    bench = Bench(code)
    with pytest.raises(kind) as caught:
        bench.ask()
    assert bench.ask() == bytes(8)
    assert len(bench.opened) == connections
    assert not bench.waits
    if isinstance(caught.value, DeviceFault):
        assert caught.value.response_code == code & 0xFFFF
    else:
        assert bench.opened[0].closed


def test_objects_are_not_carried_over_to_a_new_connection() -> None:
    """An ESYS object belongs to the context it was made in: after a lost connection it is made anew."""
    bench = Bench(TCTI_LAYER | 0x0A)
    first = bench.connection.object(0x81010001)
    assert first == bench.connection.object(0x81010001)
    with pytest.raises(DeviceUnavailable):
        bench.ask()
    bench.connection.open()
    assert bench.connection._objects == {}
