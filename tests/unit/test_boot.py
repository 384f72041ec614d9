"""Boot scenarios: what differs between them, and reference values against the definition of extend."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import pytest

from harness.errors import ConfigError
from harness.sim.boot import Scenario, reference_values, replay, scenario_names
from harness.values import HashAlg


class SoftTpm:
    """PCRs in memory; refuses an extend that leaves out an allocated bank."""

    def __init__(self, *banks: HashAlg) -> None:
        self.values = {bank: {pcr: bytes(bank.digest_size) for pcr in range(24)} for bank in banks}

    async def banks(self) -> frozenset[HashAlg]:
        return frozenset(self.values)

    async def pcr_extend(self, pcr: int, digests: Mapping[HashAlg, bytes]) -> None:
        assert digests.keys() == self.values.keys()
        for bank, digest in digests.items():
            self.values[bank][pcr] = hashlib.new(bank.text, self.values[bank][pcr] + digest).digest()


@pytest.mark.parametrize("name", scenario_names())
def test_every_scenario_loads(name: str) -> None:
    """Each scenario of the package is valid and measures something into every PCR from 0 to 7."""
    scenario = Scenario.load(name)
    assert scenario.name == name
    assert scenario.description
    assert {event.pcr for event in scenario.events} >= set(range(8))


@pytest.mark.parametrize("bank", list(HashAlg))
@pytest.mark.parametrize("name", scenario_names())
async def test_reference_values_are_what_a_replay_leaves(name: str, bank: HashAlg) -> None:
    """Reference values equal the PCRs after a replay, in every bank; PCRs without an event stay at zero."""
    scenario, tpm = Scenario.load(name), SoftTpm(bank, HashAlg.SHA256)
    await replay(scenario, tpm)
    expected = {pcr: bytes(bank.digest_size) for pcr in range(24)} | reference_values(scenario, bank)
    assert tpm.values[bank] == expected


def test_reference_value_of_one_event() -> None:
    """PCR 14 of a host is H(0 || H(event data)): one event, computed by hand."""
    value = hashlib.sha256(bytes(32) + hashlib.sha256(b"host agent and its configuration 1").digest()).digest()
    assert reference_values(Scenario.load("good"), HashAlg.SHA256)[14] == value


@pytest.mark.parametrize(
    ("base", "changed", "label", "pcr"),
    [
        ("good", "tampered-kernel", "kernel", 4),
        ("good", "updated-kernel", "kernel", 4),
        ("good", "tampered-firmware", "firmware", 0),
        ("good", "tampered-agent", "host-agent", 14),
        ("guest-good", "guest-tampered-kernel", "kernel", 4),
    ],
)
def test_derived_scenario_differs_in_one_event_and_one_pcr(base: str, changed: str, label: str, pcr: int) -> None:
    """A tampered scenario differs from the good one in the named event only, and so in one PCR only."""
    one, two = Scenario.load(base), Scenario.load(changed)
    pairs = zip(one.events, two.events, strict=True)
    assert [left.label for left, right in pairs if left != right] == [label]
    before, after = reference_values(one, HashAlg.SHA384), reference_values(two, HashAlg.SHA384)
    assert [index for index in before if before[index] != after[index]] == [pcr]


EVENT = "{pcr: 4, type: EV_IPL, label: one, text: first}"


def test_own_scenario_may_build_on_a_file_beside_it(tmp_path: Path) -> None:
    """An own file names its base as a file in the same folder or as a scenario of the package."""
    (tmp_path / "base.yml").write_text(f"description: base\nevents: [{EVENT}]\n")
    (tmp_path / "own.yml").write_text("description: own\nbased_on: base.yml\nreplace: [{label: one, text: second}]\n")
    (tmp_path / "kernel.yml").write_text("description: own\nbased_on: good\nreplace: [{label: kernel, text: second}]\n")
    assert [event.data for event in Scenario.load(tmp_path / "own.yml").events] == [b"second"]
    assert Scenario.load(tmp_path / "kernel.yml").events[:3] == Scenario.load("good").events[:3]


@pytest.mark.parametrize(
    "content",
    [
        "description: nothing\n",
        f"description: both\nbased_on: good\nevents: [{EVENT}]\n",
        f"description: replace without base\nreplace: [{{label: one, text: x}}]\nevents: [{EVENT}]\n",
        f"description: twice\nevents: [{EVENT}, {EVENT}]\n",
        "description: unknown event\nbased_on: good\nreplace: [{label: kernal, text: x}]\n",
        "description: unknown base\nbased_on: better\nreplace: [{label: kernel, text: x}]\n",
        "description: no data\nevents: [{pcr: 4, type: EV_IPL, label: one}]\n",
        "description: two data\nevents: [{pcr: 4, type: EV_IPL, label: one, text: a, hex: '00'}]\n",
        "description: odd hex\nevents: [{pcr: 4, type: EV_IPL, label: one, hex: '0'}]\n",
        "description: no such PCR\nevents: [{pcr: 24, type: EV_IPL, label: one, text: a}]\n",
        "description: resettable\nevents: [{pcr: 16, type: EV_IPL, label: one, text: a}]\n",
        "description: dynamic\nevents: [{pcr: 17, type: EV_IPL, label: one, text: a}]\n",
        "description: key\nevents: [{pcr: 4, type: EV_IPL, label: one, text: a, colour: red}]\n",
        "- a list\n",
    ],
)
def test_broken_scenario_is_refused(tmp_path: Path, content: str) -> None:
    """Each kind of mistake in a scenario file is a ConfigError that names the file."""
    path = tmp_path / "own.yml"
    path.write_text(content)
    with pytest.raises(ConfigError):
        Scenario.load(path)
