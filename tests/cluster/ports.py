"""Which TCP ports a process and all that it started listen on, and what they answer to somebody without a token.

Requests go to this machine's loopback only, a few per port.
"""

from __future__ import annotations

import ipaddress
import os
import re
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from pathlib import Path

import grpc

from benchmarks.processes import family

# A method of every service of Ray's, written where anything can be written.
METHODS = (
    "InternalKVGcsService/InternalKVPut",
    "JobInfoGcsService/AddJob",
    "NodeInfoGcsService/GetAllNodeInfo",
    "NodeManagerService/GetNodeStats",
    "ObjectManagerService/Push",
    "CoreWorkerService/GetCoreWorkerStats",
    "ReporterService/GetTraceback",
    "LogService/ListLogs",
    "events.EventAggregatorService/AddEvents",
)
REQUESTS = (("POST", "/api/job_agent/jobs/"), ("POST", "/get_or_create_runtime_env"), ("GET", "/metrics"), ("GET", "/"))
NAMES = {
    "gcs_server": r"\S*/gcs_server ",
    "raylet": r"\S*/raylet ",
    "monitor.py": r"\S+ -u \S*/monitor\.py ",
    "dashboard.py": r"\S+ \S*/dashboard\.py ",
    "ray::DashboardAgent": r"ray::DashboardAgent",
    "ray::RuntimeEnvAgent": r"ray::RuntimeEnvAgent",
    "ray::*": r"ray::",
}


@dataclass(frozen=True)
class Port:
    """A listening socket: the process's name as docs/cluster.md has it, its address and number."""

    process: str
    address: ipaddress.IPv4Address | ipaddress.IPv6Address
    number: int


def listening(pid: int) -> list[Port]:
    """All TCP ports on which a process or anything that it started listens."""
    sockets = _sockets()
    titles = {pid: "fedprompt", **{process.pid: _name(process.title) for process in family(pid)}}
    ports = {
        Port(name, *sockets[inode]) for number, name in titles.items() for inode in _inodes(number) if inode in sockets
    }
    return sorted(ports, key=lambda port: (port.process, port.number))


def stranger_gets(number: int) -> str:
    """``refused`` where a port demands a token of everybody, else what it answered."""
    codes = _grpc_codes(number)
    if grpc.StatusCode.UNAUTHENTICATED in codes.values():
        served = {method for method, code in codes.items() if code is not grpc.StatusCode.UNIMPLEMENTED}
        open_ = {method for method in served if codes[method] is not grpc.StatusCode.UNAUTHENTICATED}
        return f"answers {open_}" if open_ else "refused"
    statuses = [_http_status(number, *request) for request in REQUESTS]
    return "refused" if {*statuses} <= {401, 403} else f"HTTP {statuses}, gRPC {codes}"


def _grpc_codes(number: int) -> dict[str, grpc.StatusCode]:
    codes = {}
    with grpc.insecure_channel(f"127.0.0.1:{number}", [("grpc.enable_http_proxy", 0)]) as channel:
        for method in METHODS:
            try:
                channel.unary_unary(f"/ray.rpc.{method}")(b"", timeout=10)
                codes[method] = grpc.StatusCode.OK
            except grpc.RpcError as error:
                codes[method] = error.code()
    return codes


def _http_status(number: int, method: str, path: str) -> int | str:
    connection = HTTPConnection("127.0.0.1", number, timeout=10)
    try:
        connection.request(method, path, body=b"{}" if method == "POST" else None)
        return connection.getresponse().status
    except (OSError, HTTPException) as error:
        return type(error).__name__
    finally:
        connection.close()


def _name(title: str) -> str:
    return next((name for name, pattern in NAMES.items() if re.match(pattern, title)), title[:80])


def _inodes(pid: int) -> set[str]:
    found = set()
    with suppress(OSError):  # it has ended meanwhile
        for file in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):
                found.update(re.findall(r"^socket:\[(\d+)\]$", os.readlink(file)))
    return found


def _sockets() -> dict[str, tuple[ipaddress.IPv4Address | ipaddress.IPv6Address, int]]:
    """Address and port of every listening socket of this machine, by inode."""
    found = {}
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *rest = line.split()
            if state == "0A":
                host, _, port = local.partition(":")
                words = [bytes.fromhex(host[i : i + 8])[::-1] for i in range(0, len(host), 8)]
                address = ipaddress.ip_address(b"".join(words))
                found[rest[5]] = (getattr(address, "ipv4_mapped", None) or address, int(port, 16))
    return found
