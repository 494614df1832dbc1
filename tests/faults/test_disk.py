"""A disk that fills up, at any write of any command: one line, status 4, nothing that was saved is lost or damaged, and
with space the same command ends in the bytes of an undisturbed one.

Each command is a few hundred operations, so every ``DISK_STEP``-th of them fails here; ``DISK_STEP=1`` tries all.
"""

import errno
import json
import os
import random
import shutil
from pathlib import Path

import pytest

from llava_moslora.runs.checkpoints import newest_valid
from llava_moslora.runs.log import read_rows
from llava_moslora.training import trainer
from support import full_disk
from support.campaign import Campaign
from support.export_runs import internlm2
from support.full_disk import STEP, Command, every, none_wrong
from support.golden_cases import tiny_files
from support.launching import flags
from support.tiny import write_data
from support.warm_server import WarmServer

pytestmark = pytest.mark.faults
FORMATS = "hf peft peft_with_base vllm xtuner xtuner_adapters llava llm vision projector".split()


def training(parts, folder: Path, disk: Path) -> Command:
    """With everything that a training writes: cache, report, metrics, TensorBoard, samples, curves, best checkpoint."""
    turns = [{"from": "human", "value": "<image>\nwhat colour?"}, {"from": "gpt", "value": "red"}]
    (folder / "samples.json").write_text(json.dumps([{"id": "a", "image": "0.png", "conversations": turns}]))
    words = flags(
        parts, disk / "run", data_cache=disk / "cache", max_steps=4, save_steps=2, logging_steps=1, save_total_limit=2,
        resume=True, dataloader_num_workers=0, sample_questions=folder / "samples.json", sample_steps=2,
        sample_max_new_tokens=2, eval_data_path=write_data(folder / "held_out", 6), eval_strategy="steps",
        eval_steps=2, load_best_model_at_end=True, per_device_train_batch_size=4, report_to="tensorboard",
    )  # fmt: skip
    timed = ["events.out*", "MANIFEST.json", "trainer_state.json", "metrics.jsonl", "curves.html", "report.html"]
    return Command("train_vit_llm:main", words, free=timed)


def test_training(disk, parts, tmp_path):
    none_wrong(disk.fail_everywhere(training(parts, tmp_path, disk.disk), every(STEP)))
    rows = [row["step"] for row in read_rows(disk.disk / "run" / "metrics.jsonl") if "loss" in row]
    assert rows == [1, 2, 3, 4]  # of the last one, which was continued


def test_resumed_training(disk, parts, tmp_path):
    """What an earlier call saved is neither lost nor damaged: the later steps only add, and prune."""
    command = training(parts, tmp_path, disk.disk)
    disk.undisturbed(command)
    shutil.copytree(disk.disk, tmp_path / "earlier")
    shutil.rmtree(tmp_path / "earlier" / "run" / "checkpoint-4")
    command.reads = {name: tmp_path / "earlier" / name for name in ("run", "cache")}
    grows = ("metrics.jsonl", "samples", "curves", "run.json")
    found = disk.fail_everywhere(command, every(2 * STEP))
    for failed in found:  # files that are replaced or get rows
        failed.wrong = [text for text in failed.wrong if "lost: " not in text or not any(g in text for g in grows)]
    none_wrong([failed for failed in found if failed.wrong])


def test_preparing(disk, parts):
    words = ["--model_name_or_path", parts.llm, "--vision_tower", parts.clip, "--data_path", parts.data]
    words += ["--image_folder", parts.images, "--data_cache", disk.disk / "cache"]
    command = Command("scripts.prepare_data:main", [*words, "--report_dir", disk.disk / "report"])
    none_wrong(disk.fail_everywhere(command, every(max(1, STEP // 4))))


@pytest.mark.parametrize("form", FORMATS)
def test_exporting(disk, run, form):
    words = [run, "--output_dir", disk.disk / "there" / "out", "--format", form, "--no_proof"]
    none_wrong(disk.fail_everywhere(Command("scripts.export:main", words), every(STEP)))


def test_exporting_over_an_export(disk, run, tmp_path):
    """The old export stays until the new one is whole."""
    words = [run, "--output_dir", disk.disk / "out", "--no_proof", "--overwrite"]
    command = Command("scripts.export:main", words)
    disk.undisturbed(command)
    shutil.copytree(disk.disk / "out", tmp_path / "out")
    command.reads = {"out": tmp_path / "out"}
    none_wrong(disk.fail_everywhere(command, every(2 * STEP)))


def test_proving(disk, run):
    """Also in the process of the proof, which is another one."""
    words = [run, "--output_dir", disk.disk / "out", "--format", "projector"]
    command = Command("scripts.export:main", words)
    none_wrong(disk.fail_everywhere(command, every(STEP), again=False))


def test_evaluating(disk, run, tmp_path):
    for name, (text, _) in tiny_files(random.Random(0)).items():
        (tmp_path / f"{name}.tsv").write_text(text, encoding="utf-8")
    words = [run, "--benchmark", "mmbench_en", "--data", tmp_path, "--batch_size", "4", "--output", disk.disk / "out"]
    none_wrong(disk.fail_everywhere(Command("scripts.evaluate:main", words), every(max(1, STEP // 2))))
    results = disk.disk / "out"
    for words in (["--radar", disk.disk / "radar.png"], ["--compare", "--output", disk.disk / "compared"]):
        shutil.copytree(results, tmp_path / words[0] / "out")
        given = [tmp_path / words[0] / "out"] * (2 if "--compare" in words else 1)
        command = Command("scripts.evaluate:main", [*given, *words])
        none_wrong(disk.fail_everywhere(command, every(max(1, STEP // 4))))


def test_evaluating_a_question_file(disk, run, parts, tmp_path):
    questions = [{"id": n, "image": f"{n}.png", "question": "what colour?", "answer": "red"} for n in (0, 1, 3)]
    (tmp_path / "questions.json").write_text(json.dumps(questions))
    words = [run, "--questions", tmp_path / "questions.json", "--image_folder", parts.images, "--batch_size", "2"]
    words += ["--output", disk.disk / "out.json", "--probe", disk.disk / "probe.safetensors"]
    none_wrong(disk.fail_everywhere(Command("scripts.evaluate:main", words), every(max(1, STEP // 4))))


def test_converting(disk, run, tmp_path):
    adapter = run / "checkpoint-1" / "adapter"
    words = [adapter, "--output_dir", disk.disk / "lora", "--format", "lora"]
    none_wrong(disk.fail_everywhere(Command("scripts.convert_adapter:main", words), every(max(1, STEP // 4))))
    words = [internlm2(tmp_path / "internlm2"), "--output_dir", disk.disk / "llama"]
    none_wrong(disk.fail_everywhere(Command("scripts.convert_internlm2:main", words), every(max(1, STEP // 4))))


@pytest.mark.parametrize(
    ("error", "codes"),
    [
        (errno.EDQUOT, ("E-DISK",)),
        (errno.EIO, ("E-DISK",)),
        (errno.EROFS, ("E-PERMISSION", "E-DISK", "C-OUTPUT")),
        (errno.EACCES, ("E-PERMISSION", "E-DISK", "C-OUTPUT")),
    ],
    ids=["quota", "input and output", "read-only", "no rights"],
)
def test_other_errors(disk, run, error, codes):
    words = [run, "--output_dir", disk.disk / "out", "--format", "peft", "--no_proof"]
    command = Command("scripts.export:main", words)
    none_wrong(disk.fail_everywhere(command, every(2 * STEP), error=error, codes=codes))


def limit_file_size(*, size: int, save: int) -> None:
    """A hook: from the ``save``-th save on, no file of this process may grow beyond ``size`` bytes."""
    import resource

    save_all, saves = trainer.publish_checkpoint, []

    def publishing(*arguments) -> None:
        saves.append(1)
        if len(saves) == save:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        try:
            save_all(*arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    trainer.publish_checkpoint = publishing


# R4: a disk full inside a save
@pytest.mark.parametrize("world", [0, 2])
def test_a_save(warm_server, parts, tmp_path, world):
    campaign = Campaign("disk", warm_server, parts, tmp_path, world=world, zero=2 if world else None)
    sizes = sorted(p.stat().st_size for p in (tmp_path / "uninterrupted" / "checkpoint-24").rglob("*") if p.is_file())
    for number, size in enumerate([0, 100, sizes[-1] // 4, sizes[-2] - 1, sizes[-1] // 2, sizes[-1] - 1]):
        run = f"run{number}"
        hook = ["faults.test_disk:limit_file_size", {"size": size, "save": 3}]
        full = campaign.launch(run, 0, hooks=[hook])
        assert full.status == [4] * campaign.ranks, full.printed()[-2000:]
        assert "E-DISK" in full.printed() and "what was published before is untouched" in full.printed()
        names = {p.name for p in (tmp_path / run).iterdir() if "checkpoint" in p.name}
        assert names == {"checkpoint-2", "checkpoint-4"}
        assert newest_valid(tmp_path / run)[0].name == "checkpoint-4"
        assert campaign.launch(run, 1).succeeded
        assert campaign.state_of(tmp_path / run) == campaign.final


def without_a_look_at_the_space() -> None:
    """A hook: else a training that will not fit is refused before its first write."""
    import train_vit_llm

    train_vit_llm.check_space = lambda *_, **__: None


MOUNTED = 'mount -t tmpfs -o size=16m tmpfs "$0" && exec "$@"'


def test_a_small_file_system(parts, tmp_path):
    """A tmpfs of the system's own, where it lets a process mount one: memory that is mapped must not kill it."""
    place = tmp_path / "disk"
    place.mkdir()
    before = ["unshare", "-rm", "sh", "-c", MOUNTED, str(place)]
    if full_disk.ends_well([*before, "true"]) is False:
        pytest.skip("no mount is allowed here")
    with WarmServer(before) as mounted:
        command = training(parts, tmp_path, place)
        inside = mounted.seen(place)

        def launch(name: str):
            hooks = [["faults.test_disk:without_a_look_at_the_space", {}]]
            return mounted.launch(command.words, tmp_path / name, hooks=hooks)

        whole = launch("whole")
        assert whole.succeeded, whole.printed()[-2000:]
        used = sum(path.stat().st_blocks * 512 for path in inside.rglob("*"))
        expected = full_disk.files(inside, command.free)
        for number, share in enumerate((0.02, 0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.97)):
            for path in inside.iterdir():
                shutil.rmtree(path)
            free = os.statvfs(inside).f_bavail * os.statvfs(inside).f_frsize
            (inside / "ballast").write_bytes(bytes(max(0, free - int(share * used))))
            full = launch(f"full{number}")
            lines = [line for line in full.printed().splitlines() if line.startswith("error[")]
            assert full.status == [4] and len(lines) == 1 and "error[E-DISK] " in lines[0], full.printed()[-2000:]
            assert "Traceback" not in full.printed(), full.printed()[-3000:]
            (inside / "ballast").unlink()
            assert launch(f"again{number}").succeeded
            assert full_disk.files(inside, command.free) == expected
