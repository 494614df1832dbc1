"""Every reader of files from outside, on thousands of wrong files: a result or a refusal, in 5 s and 1 GB.

``FUZZ_CASES`` is the number of cases of all readers together, ``FUZZ_SEED`` decides which. One is repeated with
``FUZZ_ONLY=READER:NUMBER``. With ``FIGURES=1`` the counts are added to those in ``benchmarks/results/fuzz.json``: each
reader goes on where it ended there, up to its share of ``FUZZ_CASES``, so that many short runs make a long one.
"""

from __future__ import annotations

import json
import os
import platform
import tarfile

import pytest

from support import fuzzing
from support.fuzzing import ACCEPTED, REFUSED, Outcome, Reader, fuzz, verdict
from support.launching import ROOT

CASES, SEED = int(os.environ.get("FUZZ_CASES", "20000")), int(os.environ.get("FUZZ_SEED", "1"))
RESULTS = ROOT / "benchmarks" / "results" / "fuzz.json"


def readers() -> list[Reader]:
    from support import fuzzed_evaluations, fuzzed_files, fuzzed_models

    return [*fuzzed_models.READERS, *fuzzed_files.READERS, *fuzzed_evaluations.READERS]


def earlier() -> dict:
    new = {"seed": SEED, "cases": 0, "findings": 0, "seconds": 0.0, "machine": {}, "readers": {}}
    return json.loads(RESULTS.read_text()) if os.environ.get("FIGURES") and RESULTS.is_file() else new


def add(results: dict, outcome: Outcome) -> None:
    """The counts of ``outcome`` to those of earlier runs."""
    row = results["readers"].setdefault(outcome.reader, {"cases": 0, "accepted": 0, "refused": 0, "findings": 0})
    count = sum(outcome.counts.values())
    row["cases"] += count
    row["accepted"] += outcome.counts[ACCEPTED]
    row["refused"] += outcome.counts[REFUSED]
    row["findings"] += len(outcome.findings)
    row["slowest_s"] = round(max(row.get("slowest_s", 0), outcome.slowest), 2)
    row["largest_mb"] = round(max(row.get("largest_mb", 0), outcome.megabytes))
    results["cases"] += count
    results["findings"] += len(outcome.findings)
    results["seconds"] = round(results["seconds"] + outcome.seconds, 1)
    results["machine"] = {"cores": os.cpu_count(), "python": platform.python_version(), "machine": platform.machine()}
    if os.environ.get("FIGURES"):
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")


@pytest.mark.faults
def test_every_reader(tmp_path):
    found, results, all_readers = [], earlier(), readers()
    only, _, number = os.environ.get("FUZZ_ONLY", "").rpartition(":")
    for place, reader in enumerate(all_readers):
        if only and only != reader.name:
            continue
        first = results["readers"].get(reader.name, {}).get("cases", 0)
        numbers = range(int(number), int(number) + 1) if only else range(first, CASES // len(all_readers) + 1)
        if not numbers:
            continue
        outcome = fuzz(reader, tmp_path / str(place), SEED, numbers)
        add(results, outcome)
        print(f"{reader.name}: {dict(outcome.counts)}, {outcome.slowest:.1f} s, {outcome.megabytes:.0f} MB", flush=True)
        print(*outcome.findings, sep="\n", end="\n" * bool(outcome.findings), flush=True)
        found += outcome.findings
    assert found == [], "\n".join(found)


def test_a_few_cases_of_every_reader(tmp_path):
    found = []
    for place, reader in enumerate(readers()):
        found += fuzz(reader, tmp_path / str(place), SEED, range(5)).findings
    assert found == [], "\n".join(found)


def test_the_fuzz_notices_what_is_no_refusal(tmp_path, monkeypatch):
    """A reader that raises something else, one that hangs, one that takes too much memory, one that dies."""

    def read(folder):
        content = (folder / "x").read_bytes()
        if not content:
            raise KeyError("x")
        if len(content) < 5:
            while True:
                pass
        if len(content) > 20:
            os.abort()
        return bytearray(3 << 30) if content != b"right file" else None

    monkeypatch.setattr(fuzzing, "SECONDS", 0.3)
    reader = Reader("mutant", {"x": "bytes"}, lambda folder: (folder / "x").write_bytes(b"right file"), read)
    found = fuzz(reader, tmp_path, SEED, range(40)).findings
    said = "\n".join(found)
    assert all(word in said for word in ("KeyError", "hangs", "MemoryError", "status 6")), said


def _shape(**changes):
    from support.tiny import write_clip, write_llm

    def write(folder):
        for make, name in ((write_llm, "llm"), (write_clip, "clip")):
            file = make(folder / name) / "config.json"
            file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return write


def _layers(folder):
    from llava_moslora.errors import Refusal
    from llava_moslora.models.llm import llm_on_meta, read_llm_config
    from llava_moslora.models.vision import read_vision_config

    with pytest.raises(Refusal, match="num_hidden_layers: out of range"):
        read_vision_config(folder / "clip")
    llm_on_meta(read_llm_config(folder / "llm"), folder)


def _template(folder):
    from support.tokenizer_folders import TINY

    TINY["chatml"](folder)
    loop = "{% for a in range(99999) %}"
    (folder / "chat_template.jinja").write_text(f"{loop}{loop}{{{{ a }}}}{'{% endfor %}' * 2}")


def _derive(folder):
    from llava_moslora.text.tokenizer import load_tokenizer
    from llava_moslora.text.tokenizer_template import derive_template

    derive_template(load_tokenizer(folder))


def _power(folder):
    _template(folder)
    (folder / "chat_template.jinja").write_text("{{ 10 ** 10 ** 9 }}")


def _vocabulary(folder):
    from support.tokenizer_folders import TINY

    TINY["chatml"](folder)
    state = json.loads((folder / "tokenizer.json").read_text())
    state["model"]["vocab"]["far"] = 2**31
    (folder / "tokenizer.json").write_text(json.dumps(state))


def _tokenizer(folder):
    from llava_moslora.text.tokenizer import load_tokenizer

    load_tokenizer(folder)


def _keys(last):
    def write(folder):
        keys = ", ".join(f'"k{k}": 1' for k in range(200_000))
        (folder / "data.json").write_text(f"[{{{keys}{last}}}]")

    return write


def _records(folder):
    from llava_moslora.data.formats import read_records

    list(read_records(folder / "data.json"))


def _flags(folder):
    (folder / "run.yaml").write_text("".join(f"key{k}: 1\n" for k in range(200_000)))


def _parse(folder):
    from llava_moslora.training.config_file import read_config

    read_config(folder / "run.yaml")


def _tar(folder):
    """A member that says it has 10^14 bytes: skipping them would be 10^10 reads."""
    with tarfile.open(folder / "x.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        member = tarfile.TarInfo("a.bin")
        member.pax_headers = {"size": str(10**14)}
        archive.addfile(member)


def _read_tar(folder):
    from llava_moslora.data.sources.tar import Tar

    list(Tar().read(str(folder / "x.tar"), lambda *_: None))


HOSTILE = {
    "200,000 keys": (_keys(""), _records, "200000 keys in one record"),
    "200,000 keys and one twice": (_keys(', "last": 1, "last": 2'), _records, "'last' occurs twice"),
    "200,000 flags in YAML": (_flags, _parse, "too large"),
    "a tar member of 10^14 bytes": (_tar, _read_tar, "not a complete"),
    "a template of 10^10 loops": (_template, _derive, "stopped after"),
    "a template with a power of powers": (_power, _derive, "huge number"),
    "10^9 layers": (_shape(num_hidden_layers=10**9), _layers, "num_hidden_layers: out of range"),
    "a vocabulary id of 2^31": (_vocabulary, _tokenizer, "id out of range"),
}


# L1: each of these once hung, or took all memory
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile(tmp_path, name):
    make, read, said = HOSTILE[name]
    make(tmp_path)
    found = verdict(lambda: read(tmp_path))
    assert found["verdict"] == REFUSED and said in found["said"], found
    assert found["megabytes"] < 500
