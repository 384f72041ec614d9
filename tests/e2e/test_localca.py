"""The tool that swtpm_setup runs, as a program of its own against a host agent that says what the test says."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from harness.provider import localca
from tests.support.tpms import short_folder

TIME_S = 120.0
VMID = "vm-1:80000000-0000-0000-0000-000000000abc"
CERTIFICATE = b"0\x82 stands for DER"
GRANTED = json.dumps({"certificate": base64.b64encode(CERTIFICATE).decode()}).encode() + b"\n"


class Site:
    """The tool's surroundings in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.socket = folder / "local"
        self.config = folder / "localca.conf"
        self.config.write_text(f"# comment = x\n\n socket\t=  {self.socket} \nother = y\n")
        self.out = folder / "out"
        self.out.mkdir()
        self.log = folder / "log"

    def arguments(self, kind: str = "ek", **changes: str | None) -> list[str]:
        """As swtpm_setup gives them; None leaves one out."""
        given: dict[str, str | None] = {
            "type": kind,
            "ek": "ab" * 256,
            "dir": str(self.out),
            "vmid": VMID,
            "tpm-spec-family": "2.0",
            "tpm-spec-level": "0",
            "tpm-spec-revision": "164",
            "tpm-manufacturer": "id:00001014",
            "tpm-model": "swtpm",
            "tpm-version": "id:20191023",
            "configfile": str(self.config),
            "optsfile": str(self.config),
            "logfile": str(self.log),
        }
        pairs = [(f"--{name}", value) for name, value in (given | changes).items() if value is not None]
        return [part for pair in pairs for part in pair] + ["--tpm2"]

    def run(self, kind: str = "ek", **changes: str | None) -> subprocess.CompletedProcess[str]:
        """Runs the tool by its own first line, as swtpm_setup does."""
        command = [localca.__file__, *self.arguments(kind, **changes)]
        return subprocess.run(command, capture_output=True, text=True, timeout=TIME_S, check=False, env={})

    def run_here(self, kind: str = "ek", **changes: str | None) -> subprocess.CompletedProcess[str]:
        """The same in this process: what escapes from it fails the test."""
        arguments = self.arguments(kind, **changes)
        with contextlib.redirect_stderr(io.StringIO()) as told:
            code = localca.main(arguments)
        return subprocess.CompletedProcess(arguments, code, stdout="", stderr=told.getvalue())

    def files(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in self.out.iterdir()}


class HostAgent:
    """Answers every connection with the same bytes; remembers what it was asked."""

    def __init__(self, answer: bytes) -> None:
        self.answer = answer
        self.asked: list[bytes] = []


@contextmanager
def host_agent(path: Path, answer: bytes | None) -> Iterator[HostAgent]:
    """A host agent's socket. None: it takes the request and never answers."""
    agent = HostAgent(answer or b"")
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(path))
    server.listen()
    kept: list[socket.socket] = []

    def serve() -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            kept.append(connection)
            with connection.makefile("rb") as lines:
                agent.asked.append(lines.readline())
            if answer is not None:
                try:
                    connection.sendall(agent.answer)
                    connection.shutdown(socket.SHUT_RDWR)
                except OSError:
                    continue  # the tool has had enough

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield agent
    finally:
        server.shutdown(socket.SHUT_RDWR)
        server.close()
        thread.join(TIME_S)
        for connection in kept:
            connection.close()


@pytest.fixture
def site() -> Iterator[Site]:
    with short_folder() as folder:
        yield Site(folder)


def failure(site: Site, ended: subprocess.CompletedProcess[str]) -> str:
    """The one sentence of a failure: on standard error and in the log, with exit code 1 and no certificate."""
    assert ended.returncode == 1, ended
    assert ended.stdout == ""
    [sentence] = ended.stderr.splitlines()
    assert site.log.read_text() == ended.stderr
    assert site.files() == {}
    return sentence


@pytest.mark.parametrize(("kind", "name"), [("ek", "ek.cert"), ("platform", "platform.cert")])
def test_a_certificate_is_asked_for_and_written(site: Site, kind: str, name: str) -> None:
    """The request holds what swtpm_setup said; exit code 0 and nothing on standard error."""
    with host_agent(site.socket, GRANTED) as agent:
        ended = site.run(kind)
    with host_agent(site.folder / "other", GRANTED):
        site.config.write_text(f"socket = {site.folder / 'other'}\n")
        assert site.run_here(kind).returncode == 0
    assert (ended.returncode, ended.stderr) == (0, "")
    assert site.files() == {name: CERTIFICATE}
    assert [json.loads(line) for line in agent.asked] == [
        {
            "op": "issue",
            "type": kind,
            "ek": "ab" * 256,
            "vmid": VMID,
            "tpm": {"manufacturer": "id:00001014", "model": "swtpm", "version": "id:20191023"},
        }
    ]


def test_the_tool_needs_nothing_but_the_systems_python(site: Site) -> None:
    """No module beside its file passes for the standard library's (there is an operator.py), nor does PYTHONPATH."""
    (site.folder / "base64.py").write_text("raise SystemExit(9)")
    with host_agent(site.socket, GRANTED):
        command = [localca.__file__, *site.arguments()]
        ended = subprocess.run(
            command, capture_output=True, timeout=TIME_S, check=False, env={"PYTHONPATH": str(site.folder)}
        )
    assert ended.returncode == 0, ended


def test_the_interpreter_of_the_lab_runs_it_too(site: Site) -> None:
    """With -I -S, as the lab's wrapper does."""
    with host_agent(site.socket, GRANTED):
        command = [sys.executable, "-I", "-S", localca.__file__, *site.arguments()]
        assert subprocess.run(command, capture_output=True, timeout=TIME_S, check=False).returncode == 0


ANSWERS = {
    b'{"error": "GuestNotHere", "detail": "domain X runs"}\n': "the host agent refuses: domain X runs",
    b'{"error": "GuestNotHere"}\n': "the host agent refuses: no reason given",
    b"{}\n": "the host agent refuses: no reason given",
    b'{"certificate": null}\n': "the host agent refuses: no reason given",
    b'{"certificate": 5}\n': "the host agent's certificate is not base64",
    b'{"certificate": ["AAAA"]}\n': "the host agent's certificate is not base64",
    b'{"certificate": "A"}\n': "the host agent's certificate is not base64",
    b'{"certificate": "A A="}\n': "the host agent's certificate is not base64",
    b"[]\n": "the host agent's answer is not a JSON object",
    b"5\n": "the host agent's answer is not a JSON object",
    b'"certificate"\n': "the host agent's answer is not a JSON object",
    b"garbage\n": "the host agent's answer is not a JSON object",
    b"\xff\xfe\n": "the host agent's answer is not a JSON object",
    b"\n": "the host agent's answer is not a JSON object",
    b"[" * 60_000 + b"\n": "the host agent's answer is not a JSON object",
    b"": "the host agent gave no whole answer",
    GRANTED[:-1]: "the host agent gave no whole answer",
    b"x" * 200_000: "the host agent gave no whole answer",
}


def test_a_refusal_is_one_sentence_of_the_program(site: Site) -> None:
    """What swtpm_setup puts into its log, and the guest manager into its answer."""
    with host_agent(site.socket, b'{"error": "GuestNotHere", "detail": "domain X runs"}\n'):
        assert failure(site, site.run()) == "localca: ek certificate: the host agent refuses: domain X runs"


@pytest.mark.parametrize("answer", ANSWERS, ids=lambda answer: ascii(answer[:40]))
def test_any_other_answer_is_one_sentence_and_exit_code_1(site: Site, answer: bytes) -> None:
    """Refusals, garbage, half an answer, too much of it: no certificate, no traceback."""
    with host_agent(site.socket, answer):
        sentence = failure(site, site.run_here())
    assert sentence == f"localca: ek certificate: {ANSWERS[answer]}"


def test_a_host_agent_that_does_not_run_is_named(site: Site) -> None:
    """The socket that the configuration names."""
    assert str(site.socket) in failure(site, site.run_here())


def test_a_socket_path_that_is_too_long_is_one_sentence(site: Site) -> None:
    """Longer than the kernel takes."""
    site.config.write_text(f"socket = /{'x' * 200}\n")
    assert "x" * 200 in failure(site, site.run_here())


@pytest.mark.parametrize("content", [None, "", "socket\n", "# socket = /x\n", "sockets = /x\n"])
def test_a_configuration_without_a_socket_is_named(site: Site, content: str | None) -> None:
    """Missing, empty, or with other keys only."""
    site.config.unlink() if content is None else site.config.write_text(content)
    assert str(site.config) in failure(site, site.run_here())


def test_a_configuration_that_is_no_text_is_one_sentence(site: Site) -> None:
    """Not UTF-8."""
    site.config.write_bytes(b"\xff\xfe")
    failure(site, site.run_here())


def test_a_folder_that_does_not_exist_is_one_sentence(site: Site) -> None:
    """The certificate was granted and cannot be written."""
    with host_agent(site.socket, GRANTED):
        assert "nowhere" in failure(site, site.run_here(dir=str(site.folder / "nowhere")))


def test_a_log_that_cannot_be_written_changes_nothing(site: Site) -> None:
    """Standard error has the sentence."""
    ended = site.run(logfile=str(site.folder / "nowhere" / "log"))
    assert ended.returncode == 1
    assert len(ended.stderr.splitlines()) == 1


@pytest.mark.parametrize("name", ["type", "ek", "dir", "vmid", "configfile"])
def test_a_missing_argument_is_not_a_success(site: Site, name: str) -> None:
    """swtpm_setup always gives it; the message names it."""
    missing: dict[str, str | None] = {name: None}
    command = [localca.__file__, *site.arguments("ek", **missing)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=TIME_S, check=False)
    assert ended.returncode != 0
    assert f"--{name}" in ended.stderr


def test_another_type_of_certificate_is_not_a_success(site: Site) -> None:
    """Only ek and platform exist."""
    assert site.run("iak").returncode != 0


def test_a_host_agent_that_gives_no_answer_ends_the_tool_in_time(
    site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    """It took the request and is silent."""
    with host_agent(site.socket, None):
        assert localca.main(site.arguments(), deadline_s=0.1) == 1
    assert capsys.readouterr().err == (
        f"localca: ek certificate: the host agent at {site.socket} gave no answer within 0.1 s\n"
    )


def test_a_host_agent_that_answers_too_slowly_ends_the_tool_in_time(site: Site) -> None:
    """A byte now and then does not push the deadline away."""
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(site.socket))
    server.listen()
    ended = threading.Event()

    def drip() -> None:
        connection, _ = server.accept()
        with connection:
            while not ended.wait(0.02):
                try:
                    connection.send(b" ")
                except OSError:
                    return

    thread = threading.Thread(target=drip)
    thread.start()
    try:
        assert localca.main(site.arguments(), deadline_s=0.2) == 1
    finally:
        ended.set()
        thread.join(TIME_S)
        server.close()
    assert "no answer within 0.2 s" in site.log.read_text()


def test_the_default_deadline_is_below_that_of_swtpm_setup() -> None:
    """The tool gives up, and says why, before the lab gives swtpm_setup up after 60 s."""
    assert localca.DEADLINE_S < 60


def test_the_tool_is_executable() -> None:
    """swtpm_setup runs it directly."""
    assert os.access(localca.__file__, os.X_OK)
