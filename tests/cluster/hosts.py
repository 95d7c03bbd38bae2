"""Hosts for tests: namespaces with an address each, joined by a bridge, with processes and storage of their own.

A host is a process that holds its namespaces; when it ends, the kernel ends everything that runs inside.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

NAMESPACES = ("--net", "--mount", "--ipc", "--pid")
NETWORK = "10.77.0"


class Host:
    """One host. Folders in ``private`` exist on all hosts, and hold on each what lies below its own ``disk``."""

    def __init__(self, number: int, disk: Path, private: Sequence[Path]) -> None:
        self.address = f"{NETWORK}.{number + 1}"
        mounts = []
        for folder in private:
            (disk / folder.name).mkdir(parents=True)
            folder.mkdir(parents=True, exist_ok=True)
            mounts.append(f"mount --bind {disk / folder.name} {folder}")
        start = " && ".join([*mounts, "ip link set lo up", f"touch {disk}/up", "exec sleep 900"])
        spaces = ["unshare", *NAMESPACES, "--fork", "--kill-child", "--mount-proc", "sh", "-c", start]
        # However the test's process ends, the host ends with it.
        self._holder = subprocess.Popen(["setpriv", "--pdeathsig", "KILL", *spaces], stderr=subprocess.PIPE, text=True)
        while not (disk / "up").exists():
            if self._holder.poll() is not None:
                raise OSError(f"no namespaces: {self._holder.stderr.read().strip()}")
            time.sleep(0.02)
        (self.pid,) = Path(f"/proc/{self._holder.pid}/task/{self._holder.pid}/children").read_text().split()

    def command(self, *command: str) -> list[str]:
        """The command line that runs a command on this host."""
        return ["nsenter", f"--target={self.pid}", *NAMESPACES, "--", *command]

    def ip(self, line: str) -> None:
        """Configure this host's network; process ids in the line are the test's."""
        subprocess.run(["nsenter", f"--target={self.pid}", "--net", "ip", *line.split()], check=True)

    def end(self) -> None:
        """End the host with all that runs on it, if it has not ended."""
        self._holder.kill()
        self._holder.wait()
        self._holder.stderr.close()


def make_hosts(count: int, disks: Path, private: Sequence[Path]) -> list[Host]:
    """Make hosts that reach each other and nothing else; the bridge between them is on the first. Raises OSError."""
    hosts: list[Host] = []
    try:
        for number in range(count):
            hosts.append(Host(number, disks / f"host{number}", private))
        first = hosts[0]
        first.ip("link add bridge type bridge")
        first.ip(f"address add {first.address}/24 dev bridge")
        first.ip("link set bridge up")
        for number, host in enumerate(hosts[1:], start=1):
            first.ip(f"link add port{number} type veth peer name wire netns {host.pid}")
            first.ip(f"link set port{number} master bridge up")
            host.ip(f"address add {host.address}/24 dev wire")
            host.ip("link set wire up")
    except subprocess.CalledProcessError as error:
        end_all(hosts)
        raise OSError(f"no network between namespaces: {error}") from None
    except OSError:
        end_all(hosts)
        raise
    return hosts


def end_all(hosts: Sequence[Host]) -> None:
    """End hosts, the first one last: it has the bridge."""
    for host in reversed(hosts):
        host.end()


def why_no_hosts() -> str | None:
    """Say what this machine lacks, or None."""
    if os.geteuid() != 0:
        return "namespaces with addresses of their own need root"
    missing = [tool for tool in ("unshare", "nsenter", "setpriv", "ip") if shutil.which(tool) is None]
    if missing:
        return f"not installed: {', '.join(missing)} (Debian: util-linux, iproute2)"
    tried = subprocess.run(["unshare", *NAMESPACES, "--fork", "--mount-proc", "true"], capture_output=True, text=True)
    return None if tried.returncode == 0 else f"no namespaces here: {tried.stderr.strip()}"
