"""Hosts on one machine: a network, process, mount and name namespace each, joined by a cable or, if they are more than
two, by a switch, with sshd in them.

What a host starts dies with it, and hosts die with the process that made them, whatever ends it. Files are shared, as
on a cluster with a network file system; /dev/shm and /run are not.
"""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
INTERFACE = "rose0"
_NUMBERS = itertools.count(1)
_PROGRAMS = {
    "ip": "iproute2",
    "sshd": "openssh-server",
    "ssh": "openssh-client",
    "ssh-keygen": "openssh-client",
    "nsenter": "util-linux",
    "unshare": "util-linux",
    "setpriv": "util-linux",
}
_PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])

#: Runs as process 1 of a host; the arguments are its folder and its name.
_INIT = """
set -e
hostname "$2"
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /run
mkdir /run/sshd
mount --bind "$1/hosts" /etc/hosts
mount --bind "$1/ssh_config" /etc/ssh/ssh_config
exec "$3" -D -e -f "$1/sshd_config"
"""


def why_not() -> str | None:
    """Why hosts cannot be made here; None where they can."""
    missing = sorted({package for program, package in _PROGRAMS.items() if shutil.which(program, path=_PATH) is None})
    if missing:
        return f"apt install {' '.join(missing)}"
    if os.geteuid() != 0:
        return "network namespaces need root"
    if not Path("/etc/ssh/ssh_config").is_file():
        return "no /etc/ssh/ssh_config to put another one over"
    command = [shutil.which("unshare", path=_PATH) or "", "--net", "--mount", "--pid", "--uts", "--fork"]
    command += ["mount", "-t", "tmpfs", "tmpfs", "/run"]
    tried = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return None if tried.returncode == 0 else f"namespaces are not permitted: {tried.stderr.strip()}"


@dataclass
class Host:
    """One of them."""

    name: str
    namespace: str
    init: psutil.Process
    """Process 1 inside; with it everything on the host ends."""

    def start(self, command: Sequence[str], log: Path, env: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
        """Start a command on the host, from the repository's root; what it prints goes to ``log``."""
        enter = ["nsenter", f"--target={self.init.pid}", "--net", "--mount", "--uts", "--pid", "--"]
        # not nsenter --wd: that folder would be of the other mount namespace, and files cannot be renamed across
        enter += ["sh", "-c", 'cd "$0" && exec "$@"', str(ROOT)]
        with log.open("ab") as file:
            return subprocess.Popen(
                [*enter, *command],
                stdout=file,
                stderr=file,
                stdin=subprocess.DEVNULL,
                env={**os.environ, **(env or {})},
            )

    def processes(self) -> list[psutil.Process]:
        """All processes on the host."""
        try:
            inside = Path(f"/proc/{self.init.pid}/ns/pid_for_children").readlink()
        except OSError:  # the host is dead
            return []
        found = []
        for process in psutil.process_iter():
            try:
                if Path(f"/proc/{process.pid}/ns/pid").readlink() == inside:
                    found.append(process)
            except OSError:  # ended meanwhile
                continue
        return found

    def sweep(self) -> None:
        """Kill what still runs there, but sshd."""
        for process in self.processes():
            if process.pid != self.init.pid:
                process.kill()

    def kill(self) -> None:
        """End the host and all its processes at once, as a power cut."""
        self.init.kill()
        psutil.wait_procs([self.init], timeout=10)

    def cable(self, state: str) -> None:
        """``up`` or ``down``."""
        _ip("-n", self.namespace, "link", "set", INTERFACE, state)


@dataclass(frozen=True)
class SlowLink:
    """What the cable is like, in each direction."""

    delay_ms: float
    loss: float
    """A fraction of frames."""
    rate_mbit: float

    @staticmethod
    def why_not() -> str | None:
        """Why there can be none here; None where there can."""
        if not Path("/dev/net/tun").exists():
            return "no /dev/net/tun"
        return why_not()

    def start(self, names: Sequence[str]) -> subprocess.Popen[bytes]:
        """Put it between two network namespaces."""
        numbers = [str(number) for number in (self.delay_ms, self.loss, self.rate_mbit)]
        command = ["setpriv", "--pdeathsig", "KILL", sys.executable, str(Path(__file__).parent / "slow_link.py")]
        process = subprocess.Popen([*command, *names, INTERFACE, *numbers], stdout=subprocess.PIPE)
        assert process.stdout is not None and process.stdout.readline() == b"ready\n", "the slow link did not start"
        return process


@contextmanager
def joined_hosts(folder: Path, count: int = 2, link: SlowLink | None = None) -> Iterator[tuple[Host, ...]]:
    """node1, node2, ...

    Args:
        folder: for keys and configs, empty, and readable on all.
        link: between two; None: as fast as the machine.
    """
    _remove_those_left_behind()
    names = [f"rose-{os.getpid()}-{next(_NUMBERS)}" for _ in range(count)]
    switch = f"rose-{os.getpid()}-{next(_NUMBERS)}" if count > 2 else None
    spaces = names + [switch] * (switch is not None)
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for space in spaces:
            _ip("netns", "add", space)
        if switch is not None:
            _plug_into(switch, names)
        elif link is None:
            _ip("link", "add", INTERFACE, "netns", names[0], "type", "veth", *_end(INTERFACE, names[1]))
        else:
            processes.append(link.start(names))
        _write_configs(folder, count)
        hosts = []
        for i, name in enumerate(names, 1):
            _ip("-n", name, "addr", "add", f"10.213.7.{i}/24", "dev", INTERFACE)
            _ip("-n", name, "link", "set", "lo", "up")
            _ip("-n", name, "link", "set", INTERFACE, "up")
            processes.append(_boot(folder, name, f"node{i}"))
            hosts.append(Host(f"node{i}", name, _child_of(processes[-1])))
        for host in hosts:
            _wait_for_ssh(host, folder, f"node{count}")
        yield tuple(hosts)
    finally:
        for process in processes:
            process.kill()  # unshare --kill-child takes the host's process 1 with it, and so all of the host
            process.wait()
        for space in spaces:
            subprocess.run(["ip", "netns", "del", space], capture_output=True, env={**os.environ, "PATH": _PATH})


def _plug_into(switch: str, names: Sequence[str]) -> None:
    """A cable from each of these namespaces to a bridge in another one."""
    _ip("-n", switch, "link", "add", "switch", "type", "bridge")
    for i, name in enumerate(names, 1):
        _ip("link", "add", INTERFACE, "netns", name, "type", "veth", *_end(f"port{i}", switch))
        _ip("-n", switch, "link", "set", f"port{i}", "master", "switch", "up")
    _ip("-n", switch, "link", "set", "switch", "up")


def _end(name: str, namespace: str) -> tuple[str, ...]:
    """The other end of a cable."""
    return ("peer", "name", name, "netns", namespace)


def _boot(folder: Path, namespace: str, name: str) -> subprocess.Popen[bytes]:
    outside = ["ip", "netns", "exec", namespace, "setpriv", "--pdeathsig", "KILL"]
    isolate = ["unshare", "--mount", "--pid", "--uts", "--fork", "--kill-child", "--mount-proc"]
    sshd = shutil.which("sshd", path=_PATH) or ""
    with (folder / f"{name}.log").open("wb") as log:
        return subprocess.Popen(
            [*outside, *isolate, "sh", "-c", _INIT, "init", str(folder), name, sshd],
            stdout=log,
            stderr=log,
            env={**os.environ, "PATH": _PATH},
        )


def _write_configs(folder: Path, count: int) -> None:
    for key in ("host_key", "user_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key)], check=True)
    lines = ["127.0.0.1 localhost", *(f"10.213.7.{i} node{i}" for i in range(1, count + 1))]
    (folder / "hosts").write_text("\n".join(lines) + "\n")
    (folder / "sshd_config").write_text(
        f"HostKey {folder}/host_key\nAuthorizedKeysFile {folder}/user_key.pub\nStrictModes no\nUsePAM no\n"
        "PasswordAuthentication no\nPermitRootLogin prohibit-password\nPidFile none\n"
    )
    (folder / "ssh_config").write_text(
        f"Host node*\n  IdentityFile {folder}/user_key\n  IdentitiesOnly yes\n  StrictHostKeyChecking no\n"
        "  UserKnownHostsFile /dev/null\n  LogLevel ERROR\n"
    )


def _child_of(process: subprocess.Popen[bytes]) -> psutil.Process:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and process.poll() is None:
        children = psutil.Process(process.pid).children()
        if children:
            return children[0]
        time.sleep(0.02)
    raise AssertionError("unshare started no process")


def _wait_for_ssh(host: Host, folder: Path, target: str) -> None:
    log, deadline = folder / f"ssh-{host.name}.log", time.monotonic() + 20
    while True:
        if host.start(["ssh", "-o", "ConnectTimeout=2", target, "true"], log).wait() == 0:
            return
        if time.monotonic() > deadline:
            raise AssertionError(log.read_text() + (folder / f"{host.name}.log").read_text())
        time.sleep(0.1)


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, env={**os.environ, "PATH": _PATH})
    assert done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr}"


def _remove_those_left_behind() -> None:
    """Namespaces of test processes that were killed before they could clean up."""
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, env={**os.environ, "PATH": _PATH})
    for name in (line.split()[0] for line in listed.stdout.splitlines() if line):
        parts = name.split("-")
        if len(parts) == 3 and parts[0] == "rose" and parts[1].isdigit() and not psutil.pid_exists(int(parts[1])):
            subprocess.run(["ip", "netns", "del", name], capture_output=True, env={**os.environ, "PATH": _PATH})
