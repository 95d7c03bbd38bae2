"""Real clusters: hosts with addresses and storage of their own, and cluster/local.sh. Jobs come in by the job API."""

import json
import os
import re
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hosts import end_all, make_hosts, why_no_hosts
from PIL import Image
from tiny import TINY, TINY_MODEL

from fedprompt.config.parsing import load
from fedprompt.runtime.run import run_in_process
from fedprompt.tracking.metrics import read

pytest.importorskip("ray")

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
HOSTS = 2
FOLDER_RUN = [
    *("data.name=folder", "federation.clients=4", "federation.cohort=4", "federation.rounds=2", "partition.kind=iid"),
    *("partition.min_size=2", "runtime.group_size=1", "algorithm.sweeps=3", "tracking.tensorboard=false"),
]
# What answers at an address: an HTTP status, or why there is none.
ASK = """
import sys, urllib.error, urllib.request
try:
    print(urllib.request.urlopen(sys.argv[1], timeout=30).status)
except urllib.error.HTTPError as error:
    print(error.code)
except OSError as error:
    print(type(error.reason).__name__)
"""
# Where a run's workers and driver are, asked of the cluster while the run is under way.
WATCH = """
import subprocess, sys, time
import ray
from ray.util.state import list_actors
ray.init(log_to_driver=False)
nodes = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
run = subprocess.Popen(sys.argv[1:])
seen = set()
while run.poll() is None:
    seen |= {(actor.class_name, nodes[actor.node_id]) for actor in list_actors() if actor.node_id in nodes}
    time.sleep(0.2)
for name, address in sorted(seen):
    print("SEEN", name, address)
sys.exit(run.returncode)
"""

pytestmark = pytest.mark.ray


def environment(**more):
    ours = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    return {**kept, "PATH": path, "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0", **more}


def done(command, env):
    """Run a command to its end; what it printed, if it ended well."""
    ended = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, f"{command}: {ended.stdout[-3000:]}{ended.stderr[-3000:]}"
    return ended.stdout + ended.stderr


class Cluster:
    """Hosts with Ray on them. ``own`` is a folder that every host has for itself; ``disk(host)`` is that one here."""

    def __init__(self, hosts, folder):
        self.hosts, self.own, self._folder = hosts, folder / "own", folder
        self.token = secrets.token_hex(32)
        (folder / "token").write_text(self.token)
        self.outside = environment()
        quickly = {f"RAY_health_check_{what}": "1000" for what in ("period_ms", "timeout_ms", "initial_delay_ms")}
        self.inside = environment(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(folder / "token"), **quickly)
        for host in hosts:
            place = ["--head", "--port=6379"] if host is hosts[0] else [f"--address={hosts[0].address}:6379"]
            size = [f"--node-ip-address={host.address}", "--num-cpus=1", "--object-store-memory=100000000"]
            done(host.command("ray", "start", *place, *size), self.inside)

    def disk(self, number):
        return self._folder / f"host{number}" / self.own.name


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    if lacks := why_no_hosts():
        pytest.skip(lacks)
    folder = tmp_path_factory.mktemp("cluster")
    try:
        hosts = make_hosts(HOSTS, folder, [Path("/tmp/ray"), folder / "own"])
    except OSError as error:
        pytest.skip(str(error))
    try:
        yield Cluster(hosts, folder)
    finally:
        end_all(hosts)


def make_photos(folder):
    """Two classes of images, 24 for training and 8 for the test."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 12), ("test", 4)):
        for name in ("cat", "dog"):
            place = folder / part / name
            place.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(place / f"{i}.png")


def answer(url, env, on=None):
    ask = [sys.executable, "-c", ASK, url]
    return done(on.command(*ask) if on else ask, env).strip()


def test_the_job_api_answers_the_head_alone_and_only_with_the_token(cluster):
    head, other = cluster.hosts[:2]
    jobs = "http://127.0.0.1:8265/api/jobs/"
    assert answer(jobs, cluster.outside, head) == "401"
    assert answer(jobs.replace("127.0.0.1", head.address), cluster.outside, other) == "ConnectionRefusedError"
    submit = head.command("ray", "job", "submit", "--", "touch", str(cluster.own / "intruder"))
    refused = subprocess.run(submit, env=cluster.outside, capture_output=True, text=True, timeout=120)
    assert refused.returncode != 0
    assert "401" in refused.stderr or "oken" in refused.stderr
    assert "intruder" not in os.listdir(cluster.disk(0))


def test_a_submitted_run_works_on_every_host_with_data_that_one_host_has(cluster, tmp_path):
    (tmp_path / "watch.py").write_text(WATCH)
    make_photos(cluster.disk(0) / "photos")
    run = ["fedprompt", "run", *TINY_MODEL, *FOLDER_RUN, f"runtime.workers={HOSTS}"]
    paths = [f"data.root={cluster.own / 'photos'}", "--output", str(cluster.own / "run")]
    submit = ["ray", "job", "submit", "--working-dir", str(tmp_path), "--", "python", "watch.py", *run, *paths]
    printed = done(cluster.hosts[0].command(*submit), cluster.inside)
    assert re.search(r"Job '\w+' succeeded", printed)
    seen = set(re.findall(r"SEEN (\w+) (\S+)", printed))
    assert {address for name, address in seen if name == "Worker"} == {host.address for host in cluster.hosts}
    assert {address for name, address in seen if name == "Driver"} == {cluster.hosts[0].address}
    assert json.loads((cluster.disk(0) / "run" / "result.json").read_text())["rounds"] == 2
    assert not any(os.listdir(cluster.disk(number)) for number in range(1, HOSTS))
    assert cluster.token not in printed
    logs = [file for number in range(HOSTS) for file in cluster.disk(number).with_name("ray").rglob("*.log")]
    assert logs
    assert not any(cluster.token in file.read_text(errors="ignore") for file in logs)


def lines(path):
    """Lines of metrics.jsonl without clocks and warnings."""
    return [
        {key: value for key, value in record.items() if key not in ("seconds", "warnings")} for record in read(path)
    ]


@pytest.mark.long
def test_a_host_that_fails_in_the_middle_of_a_run_changes_no_number(cluster, tmp_path):
    """The last test on these hosts: it takes one of them away. What it is compared with runs here, in one process."""
    settings = [*TINY, "federation.rounds=12", "algorithm.sweeps=3", "runtime.group_size=1"]
    places = [f"runtime.workers={HOSTS}", "runtime.cpus_per_worker=0.5"]
    run = ["fedprompt", "run", *settings, *places, "--output", str(cluster.own / "bereft")]
    submit = cluster.hosts[0].command("ray", "job", "submit", "--", *run)
    process = subprocess.Popen(submit, env=cluster.inside, stdout=subprocess.PIPE, text=True)
    rounds = cluster.disk(0) / "bereft" / "metrics.jsonl"
    while not rounds.exists() or len(read(rounds)) < 3:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    cluster.hosts[-1].end()
    printed, _ = process.communicate(timeout=300)
    assert re.search(r"Job '\w+' succeeded", printed), printed[-3000:]
    torch.set_num_threads(1)
    *_, end = run_in_process(load(None, settings), tmp_path / "whole")
    assert lines(rounds) == lines(tmp_path / "whole" / "metrics.jsonl")
    assert json.loads((cluster.disk(0) / "bereft" / "result.json").read_text())["final"] == end["result"]["final"]


@pytest.fixture
def local():
    """What runs cluster/local.sh, in a folder and on ports of its own; ends its cluster whatever happens."""
    with tempfile.TemporaryDirectory(prefix="fp", dir="/tmp") as folder:  # short: Ray makes sockets below
        port = free_port()
        place = {"FEDPROMPT_CLUSTER_DIR": f"{folder}/c", "RAY_PORT": str(port), "DASHBOARD_PORT": str(port + 1)}
        env = environment(**place)
        script = str(ROOT / "cluster" / "local.sh")
        try:
            yield Path(folder), env, lambda *words: done([script, *words], env)
        finally:
            subprocess.run([script, "down"], env=env, capture_output=True)


def free_port():
    """A port that is free, like its neighbours in all likelihood; outside of the range of Ray's workers."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize("failures", [2, 3])
def test_local_sh_starts_a_raylet_that_timed_out_up_to_three_times(local, failures):
    folder, env, _ = local
    (folder / "bin").mkdir()
    ray, starts = folder / "bin" / "python", folder / "starts"  # which runs Ray's command line
    ray.write_text(
        f"#!/bin/sh\necho start >> {starts}\n"
        f"[ $(wc -l < {starts}) -gt {failures} ] || {{ echo timed out; exit 1; }}\n"
        "echo Ray runtime started; exec sleep 300\n"
    )
    ray.chmod(0o755)
    env["PATH"] = f"{ray.parent}:{env['PATH']}"
    ended = subprocess.run([ROOT / "cluster" / "local.sh", "up", "0"], env=env, capture_output=True, text=True)
    assert len(starts.read_text().splitlines()) == 3
    if failures == 2:
        assert (ended.returncode, (folder / "c").exists()) == (0, True)
    else:
        assert (ended.returncode, ended.stderr) == (1, "timed out\nlocal.sh: head did not start\n")
        assert not (folder / "c").exists()


def test_local_sh_starts_a_closed_cluster_runs_a_sweep_as_a_job_and_leaves_nothing(local, tmp_path):
    folder, env, script = local
    said = script("up", "1")
    token = folder / "c" / "token"
    assert token.stat().st_mode & 0o077 == 0
    assert token.read_text() not in said
    url = f"http://127.0.0.1:{env['DASHBOARD_PORT']}"
    assert answer(f"{url}/api/jobs/", env) == "401"
    told = dict(word.split("=", 1) for word in re.search(r"export (.*)", said)[1].split())
    output = tmp_path / "out"
    sweep = ["fedprompt", "sweep", "seeds.yaml", *TINY, "algorithm.name=head", "--output", str(output)]
    submit = ["ray", "job", "submit", "--working-dir", str(folder / "work"), "--", *sweep]
    (folder / "work").mkdir()
    (folder / "work" / "seeds.yaml").write_text("space: {seed: {grid: [0]}}")
    assert re.search(r"Job '\w+' succeeded", done(submit, {**env, **told}))
    assert (output / "results.csv").read_text().count(",done,") == 1
    script("down")
    assert not (folder / "c").exists()
    titles = (file.read_bytes() for file in Path("/proc").glob("[0-9]*/cmdline") if file.exists())
    assert not any(str(folder).encode() in title for title in titles)
