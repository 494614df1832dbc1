"""Where ranks meet: on loopback alone, and between two hosts where the launcher is given an address."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from llava_moslora.errors import Refusal
from llava_moslora.training.process_group import is_loopback, tcp_store
from support.launching import LAUNCHER, ROOT, flags, free_port, launch, run
from support.training_runs import losses

LISTENING = """
import json, os, re, sys
from pathlib import Path
import torch
from torch import distributed
from llava_moslora.training import process_group

process_group.join()
value = torch.ones(1, device="cuda" if torch.cuda.is_available() else "cpu")
distributed.all_reduce(value)
assert value.item() == 2
links = [os.readlink(fd) for fd in Path("/proc/self/fd").iterdir() if fd.is_symlink()]
mine = {m[1] for link in links if (m := re.match(r"socket:\\[(\\d+)\\]", link))}
found = []
for table in ("tcp", "tcp6"):
    for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
        words = line.split()
        if words[3] == "0A" and words[9] in mine:  # listening, and this process's
            found.append(words[1].split(":")[0])
Path(sys.argv[-1], f"rank-{distributed.get_rank()}.json").write_text(json.dumps(found))
distributed.barrier()
os._exit(0)
"""
LOOPBACK = {"0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F"}


def test_loopback_is_known():
    assert is_loopback("127.0.0.1") and is_loopback("localhost") and is_loopback("::1")
    assert not is_loopback("10.0.0.1") and not is_loopback("node-a")


# R6: a port in use
def test_a_port_in_use_is_named():
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(Refusal, match=rf"MASTER_PORT: the port is already in use; found 127.0.0.1:{port}; fix: "):
            tcp_store("127.0.0.1", port, 0, 2)


def test_the_store_answers_on_loopback():
    port = free_port()
    store = tcp_store("127.0.0.1", port, 0, 1)
    store.set("key", "value")
    assert store.get("key") == b"value"
    table = Path("/proc/net/tcp").read_text().splitlines()
    listening = [line.split()[1] for line in table if f":{port:04X}" in line and " 0A " in line]
    assert listening == [f"0100007F:{port:04X}"]


@pytest.mark.slow
def test_no_rank_listens_beyond_loopback(tmp_path):
    (tmp_path / "listening.py").write_text(LISTENING)
    done = run([*LAUNCHER, "--master_port", free_port(), tmp_path / "listening.py", tmp_path])
    assert done.returncode == 0, done.stderr[-2000:]
    for rank in (0, 1):
        found = json.loads((tmp_path / f"rank-{rank}.json").read_text())
        assert set(found) <= LOOPBACK, found
    assert json.loads((tmp_path / "rank-0.json").read_text())  # the rendezvous itself


def namespaces_allowed() -> bool:
    if shutil.which("ip") is None or os.geteuid() != 0:
        return False
    made = subprocess.run(["ip", "netns", "add", "moslora-probe"], capture_output=True)
    subprocess.run(["ip", "netns", "del", "moslora-probe"], capture_output=True)
    return made.returncode == 0


@pytest.fixture
def two_hosts():
    """Two network namespaces joined by a cable, 10.77.0.1 and 10.77.0.2; they share the disk."""
    if not namespaces_allowed():
        pytest.skip("network namespaces need root and iproute2")
    a, b = f"moslora-a{os.getpid()}", f"moslora-b{os.getpid()}"

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True)

    try:
        for name in (a, b):
            ip("netns", "add", name)
        ip("link", "add", "eth0", "netns", a, "type", "veth", "peer", "name", "eth0", "netns", b)
        for name, address in ((a, "10.77.0.1"), (b, "10.77.0.2")):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield a, b
    finally:
        for name in (a, b):
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_two_hosts_lose_what_two_local_ranks_lose(parts, tmp_path, two_hosts, launcher):
    """ZeRO-3 between two network namespaces, by each launcher of the two-host recipe; the same losses, bit for bit."""
    same = {"deepspeed": "zero_configs/zero3.json", "max_steps": 3, "data_order": "shuffle"}
    launch(flags(parts, tmp_path / "local", **same))
    (tmp_path / "hosts").write_text("10.77.0.1 slots=1\n10.77.0.2 slots=1\n")
    there = ["--master_addr", "10.77.0.1", "--master_port", "29517"]
    started = {
        "deepspeed": lambda rank: [LAUNCHER[0], "--hostfile", tmp_path / "hosts", "--no_ssh", "--node_rank", rank],
        "torchrun": lambda rank: ["torchrun", "--nnodes", "2", "--nproc_per_node", "1", "--node_rank", rank],
    }[launcher]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "eth0", "PYTHONPATH": str(ROOT)}
    environment["PATH"] = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
    arguments = ["scripts/train_vit_llm.py", *flags(parts, tmp_path / "hosts-run", **same)]
    processes = [
        subprocess.Popen(
            [str(word) for word in ["ip", "netns", "exec", host, *started(str(rank)), *there, *arguments]],
            env=environment,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank, host in enumerate(two_hosts)
    ]
    said = [process.communicate(timeout=900)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(text[-1500:] for text in said)
    assert losses(tmp_path / "hosts-run") == losses(tmp_path / "local")
