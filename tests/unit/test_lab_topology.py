"""``lab.yml``: what it may say, and the one sentence for what it may not."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.errors import ConfigError
from harness.lab_topology import EXAMPLE, allowlist_of, folder_of, load_topology, payload_of, policy_of
from harness.values import HashAlg


def topology(folder: Path, text: str) -> Path:
    """A file with this text."""
    path = folder / "lab.yml"
    path.write_text(text)
    return path


def test_the_example_is_a_lab(tmp_path: Path) -> None:
    """The commented example loads, and its comments say the real defaults."""
    path = topology(tmp_path, EXAMPLE)
    found = load_topology(path)
    assert list(found.hosts) == ["host1"]
    assert {tenant: list(of.guests) for tenant, of in found.tenants.items()} == {
        "alice": ["alice-vm1", "alice-vm2"],
        "bob": ["bob-vm1"],
    }


def test_the_examples_comments_say_the_defaults(tmp_path: Path) -> None:
    """Without the comment signs the example is the same lab."""
    lines = EXAMPLE.replace("# payload:", "## payload:").replace("# host:", "## host:").split("\n")[3:]
    plain = "\n".join(line.replace("# ", "", 1) if line.lstrip().startswith("# ") else line for line in lines)
    assert "quote_interval_s: 5" in plain.replace("# ", "#")
    told = load_topology(topology(tmp_path, plain))
    assert told.folder == tmp_path / ".lab"
    assert told.model_copy(update={"folder": None}) == load_topology(topology(tmp_path, EXAMPLE))


def test_what_is_left_out_has_a_default(tmp_path: Path) -> None:
    """A host is the default chip with a good boot; a tenant sees PCRs 0 to 15 and allows reboots."""
    found = load_topology(topology(tmp_path, "hosts: {h: }\ntenants: {a: {guests: {g: }}, b: }"))
    assert (found.hosts["h"].chip, found.hosts["h"].scenario) == ("ifx-slb9670", "good")
    assert allowlist_of(found.tenants["a"]).mask(HashAlg.SHA256) == 0xFFFF
    assert found.tenants["a"].allow_reboots
    assert (payload_of(found.tenants["a"]), found.tenants["b"].guests) == (None, {})


def test_files_are_beside_the_topology(tmp_path: Path) -> None:
    """Payload, scenario and reference values of one's own are named relative to lab.yml."""
    (tmp_path / "secret").write_bytes(b"s")
    (tmp_path / "own.yml").write_text("description: mine\nbased_on: good\n")
    (tmp_path / "values.json").write_text('{"sha256": {"0": ["' + "00" * 32 + '"]}}')
    text = "hosts: {h: {scenario: own.yml}}\ntenants: {a: {payload: secret, host_policy: values.json}}"
    found = load_topology(topology(tmp_path, text))
    assert payload_of(found.tenants["a"]) == b"s"
    assert policy_of(found.tenants["a"].host_policy).selection.mask(HashAlg.SHA256) == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "must hold keys and values"),
        ("tenants: {}", "hosts: "),
        ("hosts: {}", "hosts: "),
        ("hosts: [1]", "hosts: "),
        ("hosts: {h: {chip: abacus}}", "hosts.h.chip: "),
        ("hosts: {h: {scenario: nosuch}}", "hosts.h.scenario: "),
        ("hosts: {h: {ak: dsa}}", "hosts.h.ak: "),
        ("hosts: {h: {colour: red}}", "hosts.h.colour: unknown key"),
        ("hosts: {H: {}}", "hosts.H: "),
        ("hosts: {" + "h" * 33 + ": {}}", "at most 32 characters"),
        ("hosts: {h: {}}\ntenants: {provider: {}}", "this name is the provider's own"),
        ("hosts: {h: {}}\ntenants: {a: {guests: {g: {host: z}}}}", "z is not among the hosts"),
        ("hosts: {h: {}, i: {}}\ntenants: {a: {guests: {g: }}}", "host must be one of h, i"),
        ("hosts: {h: {}}\ntenants: {a: {guests: {g: }}, b: {guests: {g: }}}", "tenant a has a guest of this name"),
        ("hosts: {h: {}}\ntenants: {a: {guests: {g: {scenario: nosuch}}}}", "tenants.a.guests.g.scenario: "),
        ("hosts: {h: {}}\ntenants: {a: {allowlist: {sha1: [0]}}}", "tenants.a.allowlist.sha1: "),
        ("hosts: {h: {}}\ntenants: {a: {allowlist: {sha256: [24]}}}", "tenants.a.allowlist.sha256.0: "),
        ("hosts: {h: {}}\ntenants: {a: {payload: nosuch}}", "tenants.a.payload: "),
        ("hosts: {h: {}}\ntenants: {a: {host_policy: nosuch}}", "tenants.a.host_policy: "),
        ("hosts: {h: {}}\ntenants: {a: {guest_policy: nosuch.json}}", "tenants.a.guest_policy: "),
        ("hosts: {h: {}}\ntenants: {a: {quote_interval_s: 0}}", "tenants.a.quote_interval_s: "),
        ("hosts: {h: {}, h: {}}", "key 'h' is repeated"),
        (
            "hosts: {h: {}}\ntenants: {a: {guests: {g: {agent_id: 6f1d2c3b-4a59-4e6f-8a7b-0c1d2e3f4a5b}, "
            "k: {agent_id: 6f1d2c3b-4a59-4e6f-8a7b-0c1d2e3f4a5b}}}}",
            "two guests have the same agent_id",
        ),
    ],
)
def test_what_cannot_be_a_lab_is_refused_by_file_and_key(tmp_path: Path, text: str, said: str) -> None:
    """One sentence that starts with the file and names the key."""
    path = topology(tmp_path, text)
    with pytest.raises(ConfigError) as refused:
        load_topology(path)
    assert refused.value.detail.startswith(f"{path}: ")
    assert said in refused.value.detail


def test_a_labs_folder_is_beside_its_file(tmp_path: Path) -> None:
    """Folder and file name the same lab; `folder:` in the file moves it."""
    path = topology(tmp_path, "hosts: {h: {}}")
    assert folder_of(path) == folder_of(tmp_path) == tmp_path / ".lab"
    assert folder_of(tmp_path / ".lab") == tmp_path / ".lab"
    assert folder_of(topology(tmp_path, "folder: elsewhere\nhosts: {h: {}}")) == tmp_path / "elsewhere"
