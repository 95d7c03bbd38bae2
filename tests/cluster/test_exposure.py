"""Who reaches a run's Ray: its own cluster only with the run's token, and only from this machine."""

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from ports import listening, stranger_gets

ray = pytest.importorskip("ray")

from fedprompt.runtime.ray.clusters import own_cluster  # noqa: E402

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.ray


def listed():
    """The table of docs/cluster.md: (process, number of ports, what a stranger gets)."""
    page = (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([^`|]+)` \| (\d+|one each) \| .+? \| (refused|answered) \|", page, re.MULTILINE)
    return {process: (count, gets) for process, count, gets in rows}


@ray.remote(num_cpus=0)
class Actor:
    def where_tokens_are(self):
        """Names of the files of Ray's session in which the token is."""
        token, session = os.environ["RAY_AUTH_TOKEN"], Path(ray._private.worker._global_node.get_session_dir_path())
        return [str(file) for file in session.rglob("*") if file.is_file() and token in file.read_text(errors="ignore")]


@pytest.fixture(scope="module")
def actor():
    with own_cluster(num_cpus=2):
        actor = Actor.remote()
        ray.get(actor.__ray_ready__.remote())
        yield actor


def test_every_port_is_on_loopback_and_in_the_table_and_refuses_who_has_no_token_unless_the_table_says_why(actor):
    ports, table = listening(os.getpid()), listed()
    assert {"fedprompt", "gcs_server", "raylet", "ray::*"} <= {port.process for port in ports}
    assert [port for port in ports if not port.address.is_loopback] == []
    assert [port for port in ports if port.process not in table] == []
    for process, count in Counter(port.process for port in ports if port.process != "ray::*").items():
        assert count <= int(table[process][0]), process
    gets = {port: stranger_gets(port.number) for port in ports}
    assert {p: got for p, got in gets.items() if table[p.process][1] == "refused" and got != "refused"} == {}
    assert ray.get(actor.where_tokens_are.remote()) == []  # it still answers us


def test_the_table_has_a_reason_for_every_port_that_answers():
    page = (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")
    answered = re.findall(r"^\| `[^`]+` \|.+\| answered \| (.+) \|$", page, re.MULTILINE)
    assert answered
    assert all(len(reason.split()) > 5 for reason in answered)


SECOND = """
import os
from pathlib import Path
import ray
from fedprompt.runtime.ray.clusters import own_cluster

before = {name: value for name, value in os.environ.items() if "AUTH" in name}
tokens = set()
for _ in range(2):
    with own_cluster(num_cpus=1):
        tokens.add(os.environ["RAY_AUTH_TOKEN"])
        assert os.environ["RAY_AUTH_MODE"] == "token"
        assert ray.get(ray.remote(lambda: 7).remote()) == 7
assert len(tokens) == 2
assert before == {name: value for name, value in os.environ.items() if "AUTH" in name}
print(oct(Path.home().joinpath(".ray", "auth_token").stat().st_mode))
"""


def test_every_cluster_of_our_own_has_a_new_token_and_the_users_settings_and_token_stay_theirs(tmp_path):
    token = tmp_path / ".ray" / "auth_token"
    token.parent.mkdir()
    token.write_text("theirs")
    token.chmod(0o644)
    environment = {**os.environ, "HOME": str(tmp_path), "RAY_AUTH_MODE": "disabled"}
    ended = subprocess.run([sys.executable, "-c", SECOND], env=environment, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert ended.stdout.split()[-1] == "0o100600"
    assert token.read_text() == "theirs"
