"""Chip profiles: what the package brings is complete and honest about its sources; sampling repeats."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest

from harness.errors import ConfigError
from harness.sim.commands import Command, KeyType
from harness.sim.profiles import Latency, LatencySampler, load_profile, profile_names

GOOD = """
name: own
chip: a chip of ours
source: measured here
assumptions: []
tpm: {manufacturer: "id:00000000", model: own, version: "id:1"}
private_key: {rsa2048: {p50: 10, p95: 12, p99: 20}, ecc256: {p50: 5, p95: 6, p99: 7}, other: null}
commands: {PCR_Read: {p50: 1, p95: 1, p99: 1}}
"""


@pytest.mark.parametrize("name", profile_names())
def test_every_profile_loads_and_names_source_and_assumptions(name: str) -> None:
    """Each profile of the package is valid, carries its own name, and says what it rests on."""
    profile = load_profile(name)
    assert profile.name == name
    assert profile.assumptions
    if name != "swtpm":
        assert "10.46586/tches.v2024.i2.714-734" in profile.source


def test_enough_chips_of_enough_vendors() -> None:
    """At least six real chips of at least four vendors are there."""
    profiles = [load_profile(name) for name in profile_names() if name != "swtpm"]
    assert len(profiles) >= 6
    assert len({profile.tpm.manufacturer for profile in profiles}) >= 4


def test_default_chip_has_the_published_medians() -> None:
    """SLB9670 signs in 187 ms with RSA-2048 and 71 ms with P-256 (TPMScan, IFX/7.85.17.51968)."""
    profile = load_profile("ifx-slb9670")
    rsa, ecc = profile.private_key[KeyType.RSA2048], profile.private_key[KeyType.P256]
    assert rsa is not None
    assert ecc is not None
    assert (rsa.p50, rsa.p95, rsa.p99) == (187, 190, 191)
    assert (ecc.p50, ecc.p95, ecc.p99) == (71, 72, 72)


def test_samples_follow_the_quantiles() -> None:
    """A long run of draws has the quantiles of the profile, and p99 is the largest value."""
    latency = Latency(p50=100, p95=150, p99=200)
    draws = sorted(latency.quantile((i + 0.5) / 1000) for i in range(1000))
    assert draws[500] == pytest.approx(100, abs=1)
    assert draws[950] == pytest.approx(150, abs=1)
    assert draws[-1] == 200
    assert draws[0] >= 50
    assert statistics.fmean(draws) == pytest.approx(102, abs=3)


def test_quantile_never_falls_below_zero() -> None:
    """A wide distribution is cut at zero."""
    assert Latency(p50=1, p95=10, p99=10).quantile(0.0) == 0.0


def test_same_seed_same_latencies() -> None:
    """Profile and seed decide the latencies; another seed gives others."""
    profile = load_profile("ifx-slb9670")

    def draws(seed: int) -> list[float]:
        sampler = LatencySampler(profile, seed)
        return [sampler.draw_s(Command.Quote, KeyType.P256) for _ in range(20)]

    assert draws(7) == draws(7)
    assert draws(7) != draws(8)


def test_undelayed_command_does_not_shift_later_draws() -> None:
    """Every command uses one draw, delayed or not: profiles that differ in one command agree in the others."""
    profile = load_profile("ifx-slb9670")
    one, two = LatencySampler(profile, 1), LatencySampler(profile, 1)
    assert one.draw_s(Command.CreatePrimary, None) == 0.0
    two.draw_s(Command.GetRandom, None)
    assert one.draw_s(Command.Quote, KeyType.RSA2048) == two.draw_s(Command.Quote, KeyType.RSA2048)


def test_swtpm_profile_delays_nothing() -> None:
    """With the profile ``swtpm`` no command is delayed and no key needs to be looked up."""
    profile = load_profile("swtpm")
    assert not profile.needs_key_types
    assert all(profile.latency(command, None) is None for command in Command)


def test_own_profile_is_loaded_from_a_path(tmp_path: Path) -> None:
    """A path instead of a name reads the user's own file."""
    path = tmp_path / "own.yml"
    path.write_text(GOOD)
    profile = load_profile(path)
    assert profile.latency(Command.PCR_Read, None) == Latency(p50=1, p95=1, p99=1)
    assert profile.latency(Command.GetRandom, None) is None
    assert profile.latency(None, None) is None


@pytest.mark.parametrize(
    ("old", "new", "what"),
    [
        ("name: own", "name: own\ncolour: red", "colour"),
        ("p95: 12", "p95: 9", "must not fall"),
        ("p50: 10", "p50: -1", "private_key.rsa2048.p50"),
        ("p50: 10", "p50: fast", "private_key.rsa2048.p50"),
        (", other: null", "", "private_key has nothing for other"),
        ("PCR_Read", "PCR_Write", "PCR_Write is not a command"),
        ("PCR_Read", "Quote", "Quote is not a command without private key"),
        ("source: measured here", "source: ''", "source"),
        ("name: own", "name: [", "line 4"),
    ],
)
def test_broken_profile_is_refused_with_file_and_reason(tmp_path: Path, old: str, new: str, what: str) -> None:
    """Each kind of mistake in a profile is a ConfigError that names the file and the key."""
    path = tmp_path / "own.yml"
    path.write_text(GOOD.replace(old, new, 1))
    with pytest.raises(ConfigError, match=r"own\.yml") as caught:
        load_profile(path)
    assert what in caught.value.detail


@pytest.mark.parametrize("name", ["no-such-chip", "./missing.yml"])
def test_unknown_profile_is_refused(name: str) -> None:
    """A name that is not in the package and a file that is not there are ConfigErrors."""
    with pytest.raises(ConfigError):
        load_profile(name)
