"""The process group of a run: its rendezvous is on loopback, unless the launcher was given another host's address."""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
from datetime import timedelta

import torch
from torch import distributed

from llava_moslora.errors import Refusal
from llava_moslora.training.watchdog import announce_rank

TIMEOUT = timedelta(minutes=30)  # the first rank may have to wait for one that tokenises the data
MARGIN = timedelta(seconds=30)  # collectives wait this much longer than the watchdog, which can name the rank


def join(timeout: timedelta = TIMEOUT) -> None:
    """Start the process group that the launcher's environment describes (RANK, WORLD_SIZE, MASTER_ADDR, …).

    torch's own rendezvous listens on every interface, even if MASTER_ADDR is 127.0.0.1. Here rank 0 passes it a
    socket that is bound only to loopback, and gloo and NCCL are set to use loopback too. torchrun runs the
    rendezvous in a separate process that starts before this one; its socket cannot be bound here.

    Args:
        timeout: for the other ranks to arrive; a collective waits ``MARGIN`` longer.

    Raises:
        Refusal: E-PORT, another process listens on MASTER_PORT.
    """
    import deepspeed  # seconds of imports that a run without it does not need
    from deepspeed.accelerator import get_accelerator

    address = os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    if is_loopback(address):
        address = "127.0.0.1" if address == "localhost" else address  # and not ::1 on some of the ranks
        for library in ("GLOO", "NCCL"):
            os.environ.setdefault(f"{library}_SOCKET_IFNAME", "lo")
        if not distributed.is_initialized() and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
            store = tcp_store(address, int(os.environ["MASTER_PORT"]), rank, world, timeout)
            accelerator = get_accelerator()
            device = None
            if accelerator.device_name() == "cuda" and world > 1:  # as DeepSpeed does if it starts the group
                device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
            distributed.init_process_group(
                accelerator.communication_backend_name(),
                store=store,
                rank=rank,
                world_size=world,
                timeout=timeout + MARGIN,
                device_id=device,
            )
    deepspeed.init_distributed(timeout=timeout + MARGIN)
    announce_rank()


def is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"


def tcp_store(address: str, port: int, rank: int, world: int, timeout: timedelta = TIMEOUT) -> distributed.TCPStore:
    """The key-value store of the rendezvous: rank 0 serves it, only on ``address``, and the others connect."""
    if rank > 0:
        return distributed.TCPStore(address, port, world, is_master=False, timeout=timeout)
    try:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        listener = socket.create_server((address, port), family=family)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        raise Refusal(
            "E-PORT", "the port is already in use", key="MASTER_PORT", found=f"{address}:{port}",
            fix="another port: deepspeed --master_port N, torchrun --master_port N",
        ) from error  # fmt: skip
    return distributed.TCPStore(
        address, port, world, is_master=True, timeout=timeout, master_listen_fd=listener.detach()
    )
