"""Starts a training command many times at the cost of one import: a server that has imported everything, and forks.

A launch runs the real ``main()`` of scripts/train_vit_llm.py with real arguments, on one rank or several, in new
processes that are killed or run to the end. What was computed is in ``OUTPUT-RANK.steps``: one JSON line per
micro-batch.

``python -m support.warm_server`` is the server: it reads one JSON request per line and answers with one JSON line.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


class WarmServer:
    """Starts the server and sends it requests. A context manager.

    Args:
        before: words before the server's command, such as ``unshare``.
        environment: more variables of its processes.
        modules: what it imports besides all that training needs.
    """

    def __init__(self, before: Sequence[str] = (), environment: dict | None = None, modules: Sequence[str] = ()):
        self.before, self.environment, self.modules = before, environment or {}, modules

    def __enter__(self) -> WarmServer:
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        packages = ":".join(filter(None, [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH")]))
        environment = os.environ | ENVIRONMENT | {"PATH": path, "PYTHONPATH": packages}
        self.server = subprocess.Popen(
            [*self.before, sys.executable, "-m", "support.warm_server", *self.modules],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment | self.environment,
        )
        return self

    def __exit__(self, *_) -> None:
        self.server.kill()  # every launch has ended; it only waits for requests
        self.server.wait()
        self.server.stdin.close(), self.server.stdout.close()

    def seen(self, path: Path) -> Path:
        """``path`` as the server sees it, which may have mounts of its own."""
        return Path(f"/proc/{self.server.pid}/root{path}")

    def launch(self, arguments: list[str], output: Path, *, world: int = 0, **how) -> Launch:
        """Run the training command once, and wait for its end.

        Args:
            arguments: the command line of scripts/train_vit_llm.py.
            output: stem of the files that are written: ``OUTPUT-RANK.out`` and ``OUTPUT-RANK.steps``.
            world: ranks; 0 is one process without a launcher.
            how: ``kill``: seconds after which ``signal`` (default SIGKILL) is sent to ``ranks`` (default: all);
                ``at_step``: send it once rank 0 has computed a micro-batch of this step instead; ``hooks``:
                ``["MODULE:FUNCTION", {argument: value}]``, called in the child before ``main``; ``main``:
                ``MODULE:FUNCTION`` instead of training's; ``limit``: seconds after which everything left is killed
                and the launch counts as stuck; ``kill_stopped``: kill the ranks that were sent the signal once all
                others have ended (a stopped process cannot end); ``cont_after``: seconds until SIGCONT follows.
        """
        request = {"arguments": [str(a) for a in arguments], "output": str(output), "world": world, **how}
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        answer = self.server.stdout.readline()
        assert answer, f"the server died, status {self.server.poll()}"
        return Launch(Path(output), max(world, 1), **json.loads(answer))


class Launch:
    """How one run of the training command ended.

    Attributes:
        status: int per rank: exit status, or minus the signal that ended it.
        seconds: from the fork to the end of the last rank.
        survived: seconds from the end of the first rank to the end of the last.
        began: when it was forked, on the clock of ``micro_batches``.
        stuck: whether it had to be ended at its time limit.
    """

    def __init__(self, output: Path, world: int, *, status: list[int], seconds, survived, began, stuck: bool):
        self.output, self.world, self.status = output, world, status
        self.seconds, self.survived, self.began, self.stuck = seconds, survived, began, stuck

    @property
    def succeeded(self) -> bool:
        return set(self.status) == {0}

    def printed(self, rank: int = 0) -> str:
        file = Path(f"{self.output}-{rank}.out")  # not there yet if it was killed right after the fork
        return file.read_text(errors="replace") if file.exists() else ""

    def micro_batches(self, rank: int = 0) -> list[dict]:
        """Micro-batches of a rank in order: step, records, loss (hexadecimal float)."""
        file = Path(f"{self.output}-{rank}.steps")
        lines = file.read_text().splitlines() if file.exists() else []
        return [json.loads(line) for line in lines if line.endswith("}")]  # a kill may cut the last line


# ---- the server ----


def serve() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries that print do not disturb the answers
    _import_everything()
    for line in sys.stdin:
        answers.write(json.dumps(_launch(json.loads(line))) + "\n")
        answers.flush()


def _import_everything() -> None:
    """All that training imports, also late: nothing here may start threads or a process group."""
    sys.path.insert(0, str(ROOT / "scripts"))
    names = (
        "torch torch._dynamo torch.distributed.tensor transformers transformers.models.llama.modeling_llama "
        "transformers.models.clip.modeling_clip transformers.models.llava.modeling_llava transformers.integrations "
        "transformers.integrations.deepspeed accelerate.utils.deepspeed deepspeed deepspeed.comm "
        "deepspeed.runtime.engine deepspeed.runtime.zero.stage3 deepspeed.runtime.zero.stage_1_and_2 peft "
        "peft.tuners.lora.bnb bitsandbytes datasets tensorboard torch.utils.tensorboard PIL.Image train_vit_llm"
    )
    for name in [*names.split(), *sys.argv[1:]]:
        importlib.import_module(name)
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

    with contextlib.suppress(Exception):  # built by the first launch if it is missing
        ShareMemCommBuilder().load(verbose=False)


def _launch(request: dict) -> dict:
    world, output = request["world"], request["output"]
    port = _free_port()
    begin = time.monotonic()
    children = {_fork(rank, world, port, request): rank for rank in range(max(world, 1))}
    pids = list(children)
    at = begin + request["kill"] if request.get("kill") is not None else None
    until = begin + request.get("limit", 600)
    status: dict[int, int] = {}
    first_death, sent, stuck = None, False, False
    while children:
        now = time.monotonic()
        # One rank alone dies when all have found each other: before that the others wait for it, until a launcher ends
        # them, which these ranks have not.
        due = at is not None and now >= at and ("ranks" not in request or _together(Path(f"{output}-0.out")))
        due = due or ("at_step" in request and _began(Path(f"{output}-0.steps"), request["at_step"]))
        if due and not sent:
            for rank in request.get("ranks", range(len(pids))):
                if pids[rank] in children:
                    os.kill(pids[rank], request.get("signal", signal.SIGKILL))
            sent, first_death = True, now
            cont_at = now + request["cont_after"] if "cont_after" in request else None
        if sent and cont_at is not None and now >= cont_at:
            for rank in request.get("ranks", range(len(pids))):
                if pids[rank] in children:
                    os.kill(pids[rank], signal.SIGCONT)
            cont_at = None
        if now > until:
            stuck = True
            for pid in children:
                os.kill(pid, signal.SIGKILL)
        if request.get("kill_stopped") and sent and children and {*children.values()} <= {*request["ranks"]}:
            for pid in children:
                os.kill(pid, signal.SIGKILL)
        for pid in list(children):
            ended, code = os.waitpid(pid, os.WNOHANG)
            if ended:
                first_death = first_death or time.monotonic()
                status[children.pop(pid)] = os.waitstatus_to_exitcode(code)
        time.sleep(0.002)
    end = time.monotonic()
    for buffer in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_*"):
        buffer.unlink()  # 69 MB a rank, which DeepSpeed leaves behind on a CPU
    return {
        "status": [status[rank] for rank in sorted(status)],
        "seconds": end - begin,
        "survived": end - first_death,
        "began": begin,
        "stuck": stuck,
    }


def _together(output: Path) -> bool:
    return "\ndevice: " in "\n" + output.read_text(errors="replace")


def _began(watch: Path, step: int) -> bool:
    return watch.exists() and f'"step": {step},' in watch.read_text()


def _fork(rank: int, world: int, port: int, request: dict) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 70  # EX_SOFTWARE: an error that nothing caught
    try:
        out = os.open(f"{request['output']}-{rank}.out", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(out, 1), os.dup2(out, 2), os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.stdout = sys.stderr = open(out, "w", buffering=1, errors="replace")  # noqa: SIM115
        if world:
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
            place |= {"LOCAL_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            os.environ.update({name: str(value) for name, value in place.items()})
        os.environ["STEPS_FILE"] = f"{request['output']}-{rank}.steps"
        sys.argv = ["scripts/train_vit_llm.py", *request["arguments"]]
        import train_vit_llm

        train_vit_llm.MosLoraTrainer = _recording(train_vit_llm.MosLoraTrainer)
        for hook, named in request.get("hooks", []):
            _resolve(hook)(**named)
        from llava_moslora.errors import run_script

        run_script(_resolve(request.get("main", "train_vit_llm:main")))
        code = 0
    except SystemExit as leaving:
        code = int(leaving.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)  # a forked process leaves no thread pool or process group to wind down


def _resolve(name: str):
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)


def _recording(trainer: type) -> type:
    """A trainer that notes every micro-batch, taken from the batch itself: loaders run ahead."""

    class Recording(trainer):
        def get_batch_samples(self, epoch_iterator, num_batches, device):
            self.seen = []

            def noting():
                for batch in epoch_iterator:
                    self.seen.append(batch["record"].tolist())
                    yield batch

            return super().get_batch_samples(noting(), num_batches, device)

        def training_step(self, model, inputs, num_items_in_batch=None):
            loss = super().training_step(model, inputs, num_items_in_batch)
            note(self.state.global_step + 1, self.seen.pop(0), loss)
            return loss

    return Recording


def note(step: int, records: list[int], loss) -> None:
    line = json.dumps({"step": step, "records": records, "loss": float(loss).hex(), "time": time.monotonic()})
    with open(os.environ["STEPS_FILE"], "a") as file:
        file.write(line + "\n")


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


if __name__ == "__main__":
    serve()
