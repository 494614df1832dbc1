"""Running the scripts as a user does: as processes, alone or on two ranks."""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
LAUNCHER = [str(Path(sys.executable).parent / "deepspeed"), "--num_accelerators", "2", "--master_addr", "127.0.0.1"]


def run(command: list[str], **environment) -> subprocess.CompletedProcess:
    env = (
        os.environ
        | {"OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        | environment
    )
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, env=env, cwd=ROOT, timeout=600)


def flags(parts, output: Path, **changes) -> list[str]:
    settings = {
        "model_name_or_path": parts.llm,
        "vision_tower": parts.clip,
        "pretrain_mm_mlp_adapter": parts.projector,
        "data_path": parts.data,
        "image_folder": parts.images,
        "data_cache": output.parent / "cache",
        "lora_r": 4,
        "vision_lora_r": 2,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 2,
        "max_steps": 2,
        "output_dir": output,
    } | changes
    given = {
        name: value if isinstance(value, list) else [value] for name, value in settings.items() if value is not None
    }
    return [str(word) for name, values in given.items() for word in (f"--{name}", *values)]


def launch(arguments: list[str]) -> None:
    """Train on two ranks."""
    port = free_port()
    done = run([*LAUNCHER, "--master_port", str(port), "scripts/train_vit_llm.py", *arguments])
    for buffer in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_*"):
        buffer.unlink()  # 69 MB a rank, which DeepSpeed leaves behind on a CPU
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def refused(command: list[str]) -> str:
    """The one line that a refused training command prints; with DeepSpeed it is the only rank of a launcher."""
    rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    environment = {name: str(value) for name, value in rank.items()} if "--deepspeed" in command else {}
    done = run([sys.executable, "scripts/train_vit_llm.py", *command], **environment)
    lines = [line for line in done.stderr.splitlines() if line.startswith("error[")]
    assert len(lines) == 1 and "Traceback" not in done.stderr, done.stderr
    assert done.returncode == (3 if lines[0].startswith("error[K-") else 2)
    return lines[0]
