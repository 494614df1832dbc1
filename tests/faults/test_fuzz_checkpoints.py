"""A thousand damaged checkpoints: each is skipped, or it is what was saved. Never a third result."""

import random
import shutil
from pathlib import Path

import pytest

from llava_moslora.files import manifest
from llava_moslora.runs.checkpoints import newest_valid, publish_checkpoint

CASES = 1000


def checkpoint(run: Path, step: int) -> Path:
    """Files of the kinds that a real one has."""

    def write(folder: Path) -> None:
        noise = random.Random(step)
        (folder / "adapter").mkdir()
        for name in ("adapter/adapter_model.safetensors", "optimizer.safetensors"):
            (folder / name).write_bytes(noise.randbytes(3000))
        for name in ("position.json", "random-0.json", "random-1.json"):
            (folder / name).write_text(f'{{"adam_steps": {step}, "noise": {noise.random()}}}')

    publish_checkpoint(run / f"checkpoint-{step}", write, lambda: {"step": step, "world_size": 2, "seed": 42})
    return run / f"checkpoint-{step}"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def damage(folder: Path, chance: random.Random) -> str:
    """One change of one kind, anywhere in the folder."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    file, other = chance.sample(files, 2)
    content = bytearray(file.read_bytes())
    place = chance.randrange(len(content))
    kind = chance.choice(
        ["flip", "byte", "cut", "grow", "empty", "delete", "swap", "rename", "zeros", "insert", "link"]
    )
    if kind == "flip":
        content[place] ^= 1 << chance.randrange(8)
    elif kind == "byte":
        content[place] = (content[place] + 1 + chance.randrange(255)) % 256
    elif kind == "cut":
        del content[place:]
    elif kind == "grow":
        content += chance.randbytes(1 + chance.randrange(9))
    elif kind == "empty":
        content.clear()
    elif kind == "zeros":
        content[place : place + 64] = bytes(len(content[place : place + 64]))
    elif kind == "insert":
        content[place:place] = chance.randbytes(1)
    if kind == "delete":
        file.unlink()
    elif kind == "rename":
        file.rename(file.with_name("renamed"))
    elif kind == "swap":
        mine, theirs = file.read_bytes(), other.read_bytes()
        file.write_bytes(theirs), other.write_bytes(mine)
    elif kind == "link":
        shutil.copy(other, folder.parent / "elsewhere")
        file.unlink()
        file.symlink_to(folder.parent / "elsewhere")
    else:
        file.write_bytes(content)
    return f"{kind} {file.name}"


def third_results(folder: Path, cases: int) -> list[str]:
    """Damages after which the damaged checkpoint was taken although something of it had changed."""
    run = folder / "run"
    run.mkdir()
    checkpoint(run, 10)
    newest = checkpoint(run, 20)
    whole, found = contents(newest), []
    facts = manifest.read_facts(newest)
    for case in range(cases):
        kind = damage(newest, random.Random(case))
        taken, skipped = newest_valid(run)
        if taken == newest:
            # bytes that decide nothing may differ (white space in the manifest); what is read may not
            after = contents(newest)
            same = all(after.get(name) == content for name, content in whole.items() if name != manifest.MANIFEST)
            read_facts = {k: v for k, v in manifest.read_facts(newest).items() if k != "schema"}
            if not same or read_facts != {k: v for k, v in facts.items() if k != "schema"}:
                found.append(f"{case}: {kind}")
        else:
            assert taken.name == "checkpoint-10" and len(skipped) == 1, f"{case}: {kind}"
        shutil.rmtree(newest)
        for name, content in whole.items():
            (newest / name).parent.mkdir(parents=True, exist_ok=True)
            (newest / name).write_bytes(content)
    return found


# K3: a flipped bit
@pytest.mark.faults
def test_damage_is_never_taken_for_a_checkpoint(tmp_path):
    assert third_results(tmp_path, CASES) == []


def test_some_damage_is_never_taken_for_a_checkpoint(tmp_path):
    assert third_results(tmp_path, 60) == []


def test_the_fuzz_notices_a_manifest_without_hashes(tmp_path, monkeypatch):
    monkeypatch.setattr(manifest, "sha256", lambda path: "unknown")
    monkeypatch.setattr(manifest, "_own_hash", lambda content: "unknown")
    assert len(third_results(tmp_path, 60)) > 5
