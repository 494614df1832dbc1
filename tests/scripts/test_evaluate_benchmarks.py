"""Benchmarks by one command, alone and on two ranks, and the comparison of two results."""

import itertools
import json
import random
import sys

import pytest
from PIL import Image

from llava_moslora.errors import Refusal
from llava_moslora.evaluation import judge
from llava_moslora.evaluation.benchmarks import BENCHMARKS
from llava_moslora.evaluation.output import locked
from scripts import evaluate
from support.chat_server import ChatServer
from support.evaluations import evaluated as evaluated_without_model
from support.evaluations import write_data
from support.export_runs import trained_run
from support.golden_cases import tiny_files
from support.kit import kit_python
from support.launching import free_port, run

FILES = tiny_files(random.Random(0))
TORCHRUN = [
    sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_addr", "127.0.0.1",
    "--master_port",
]  # fmt: skip


@pytest.fixture(scope="module")
def runs(parts, tmp_path_factory):
    """Two runs, of other methods."""
    folder = tmp_path_factory.mktemp("evaluate")
    for name in ("moslora", "lora"):
        trained_run(folder / name, parts.llm, parts.clip, parts.projector, method=name)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """All benchmarks but AI2D."""
    folder = tmp_path_factory.mktemp("data")
    for name, (text, _) in FILES.items():
        (folder / f"{name}.tsv").write_text(text, encoding="utf-8")
    return folder


def evaluated(monkeypatch, *words) -> None:
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, words)])
    evaluate.main()


def loaded(*_, **__):
    raise AssertionError("the model was loaded")


def answers(folder) -> list[tuple[str, str, str]]:
    """(benchmark, index, answer) of every line, sorted."""
    rows = [
        (file.parent.name, json.loads(line)) for file in folder.glob("*/answers-*.jsonl") for line in file.open("rb")
    ]
    return sorted((name, row["index"], row["answer"]) for name, row in rows if "header" not in row)


def test_all_that_is_there_is_asked_scored_and_compared(runs, data, tmp_path, monkeypatch, capsys):
    words = ["--benchmark", "all", "--data", data, "--limit", 2, "--paper", "llama-3-moslora-kaiming"]
    evaluated(monkeypatch, runs / "moslora", *words, "--output", tmp_path / "b")
    printed = capsys.readouterr().out
    assert "| MME " in printed and "60.5" in printed and "missing: AI2D_TEST.tsv (ai2d)." in printed
    assert (
        "a sample of 2 rows" in printed
        and "No average: 6 of 9" in printed
        and printed in (tmp_path / "b/results.md").read_text()
    )
    content = json.loads((tmp_path / "b" / "results.json").read_text())
    assert len(content["benchmarks"]) == 8 and content["benchmarks"]["mmbench_en"]["units"] == 2
    assert content["benchmarks"]["mmbench_en"]["answers"] > 2 and content["benchmarks"]["mme"]["answers"] == 4
    assert "No radar.png: mmbench_cn has no question of" in printed and not (tmp_path / "b" / "radar.png").exists()
    assert "mistakes.html" in printed and "data-benchmark" in (tmp_path / "b" / "mistakes.html").read_text()
    evaluated(monkeypatch, runs / "lora", *words, "--output", tmp_path / "a")
    capsys.readouterr()
    evaluated(monkeypatch, tmp_path / "a", tmp_path / "b", "--compare")
    printed = capsys.readouterr().out
    assert "| SEED-Bench image" in printed and "inside the noise" in printed and "MM-Vet" not in printed
    evaluated(monkeypatch, tmp_path / "a", tmp_path / "b", "--compare", "--output", tmp_path / "c", "--data", data)
    assert printed in (tmp_path / "c" / "comparison.md").read_text()
    assert "What only A or only B got right: mistakes.html." in capsys.readouterr().out
    with pytest.raises(
        Refusal, match=r"C-RADAR\] .*a:--radar: no radar chart can be drawn; found mmbench_cn has no question"
    ):
        evaluated(monkeypatch, tmp_path / "a", tmp_path / "b", "--radar", tmp_path / "radar.png")


def test_a_radar_of_any_number_of_results(tmp_path, monkeypatch, capsys):
    names = ("mmbench_en", "mmbench_cn")
    (tmp_path / "data").mkdir()
    write_data(tmp_path / "data", names)
    folders = [evaluated_without_model(tmp_path / name, tmp_path / "data", names) for name in "abc"]
    for number in (1, 3):
        evaluated(monkeypatch, *folders[:number], "--radar", tmp_path / "radar.png", "--normalise")
        assert ", ".join(f"{name} 100.0" for name in "abc"[:number]) in capsys.readouterr().out
        with Image.open(tmp_path / "radar.png") as image:
            assert image.size > (1000, 1000)


def test_complete_answers_are_scored_without_the_model(runs, data, tmp_path, monkeypatch, capsys):
    words = [runs / "moslora", "--data", data, "--limit", 3, "--output", tmp_path / "out"]
    evaluated(monkeypatch, *words, "--benchmark", "seed")
    evaluated(monkeypatch, *words, "--benchmark", "sciqa,textvqa")
    printed = capsys.readouterr().out.split("| benchmark")[-1]
    assert all(title in printed for title in ("SEED-Bench", "SciQA", "TextVQA"))
    before = answers(tmp_path / "out")
    assert len(before) == 9
    monkeypatch.setattr(evaluate, "load", loaded)
    evaluated(monkeypatch, *words, "--benchmark", "seed", "sciqa", "--rules", "rules")
    printed = capsys.readouterr().out
    assert "Rules: rules (ms-vlmeval 0.0.20" in printed and "TextVQA" not in printed
    assert answers(tmp_path / "out") == before
    with pytest.raises(Refusal, match=r"C-ANSWERS\] .*seed/answers-0.jsonl:model: answers of another evaluation"):
        evaluated(monkeypatch, runs / "lora", *words[1:], "--benchmark", "seed")


def test_a_judge(runs, data, tmp_path, monkeypatch, capsys):
    """It fails in the middle: nothing is lost, the rest is scored. Then it works, and then it is no longer needed."""
    words = [runs / "moslora", "--benchmark", "mathvista,mmvet,seed", "--data", data, "--output", tmp_path / "out"]
    limit, counted = ["--limit", 6], itertools.count(1)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    monkeypatch.setattr(judge, "AT_ONCE", 1)

    def reply(body):
        if next(counted) == 9:
            return 401, "no credit for sk-secret", {}
        return "0.5" if body["max_tokens"] == 3 else "3"

    with ChatServer(reply) as server:
        host, flag = server.url.removeprefix("http://"), ["--judge", server.url, "gpt-test"]
        with pytest.raises(Refusal, match=r"E-JUDGE\] http://127.* found status 401: no credit for …; fix: set OPENAI"):
            evaluated(monkeypatch, *words, *limit, *flag)
        printed = capsys.readouterr().out
        assert "| SEED-Bench image" in printed and "needs a judge" in printed and "sk-secret" not in printed
        assert len(server.requests) == 9 and len(answers(tmp_path / "out")) == 18
        monkeypatch.setattr(evaluate, "load", loaded)
        evaluated(monkeypatch, *words, *limit, *flag)
        sent = [body["messages"][0]["content"] for body in server.bodies]
        assert sent.count(sent[8]) == 2 and len(sent) == len(set(sent)) + 1
    before = {file: file.read_bytes() for file in tmp_path.rglob("judge.jsonl")}
    first = capsys.readouterr().out
    evaluated(monkeypatch, *words, *limit, *flag)  # the server is closed
    assert capsys.readouterr().out == first and len(before) == 2
    assert {file: file.read_bytes() for file in tmp_path.rglob("judge.jsonl")} == before
    vet = next(line for line in first.splitlines() if line.startswith("| MM-Vet"))
    assert "| 50.0 " in vet and f"judge gpt-test at {host}" in vet
    assert "Answers are greedy, with a judge for MathVista and MM-Vet." in first and "lower bound by" not in first
    content = json.loads((tmp_path / "out" / "results.json").read_text())
    assert content["benchmarks"]["mmvet"]["header"]["judge"] == "gpt-test" and content["average"] is None
    assert content["conditions"] == ["greedy", "samples", f"judge gpt-test at {host}"]
    assert content["benchmarks"]["seed"]["header"].get("judge") is None
    assert not any(b"sk-secret" in file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())
    evaluated(monkeypatch, *words, *limit)
    printed = capsys.readouterr().out
    assert "Answers are greedy, without a judge." in printed and "needs a judge" in printed


def test_a_judge_is_tried_before_the_model_is_loaded(runs, data, tmp_path, monkeypatch):
    words = [runs / "moslora", "--benchmark", "mmvet", "--data", data, "--output", tmp_path / "out"]
    monkeypatch.setattr(evaluate, "load", loaded)
    with ChatServer(lambda body: (401, "no such key", {})) as server:
        with pytest.raises(Refusal, match=r"E-JUDGE.* status 401: no such key"):
            evaluated(monkeypatch, *words, "--judge", server.url, "gpt-test")
        assert len(server.requests) == 1


def test_our_results_are_there_when_the_kit_fails(runs, data, tmp_path, monkeypatch, capsys):
    program = tmp_path / "python"
    program.write_text(
        '#!/bin/sh\n[ $# = 1 ] && echo \'{"kit": "ms-vlmeval 0.0.20"}\' || { echo no memory >&2; exit 1; }'
    )
    program.chmod(0o755)
    words = [runs / "moslora", "--benchmark", "seed", "--data", data, "--limit", 3, "--output", tmp_path / "out"]
    with pytest.raises(Refusal, match=r"E-KIT\] .*vlmevalkit.log: VLMEvalKit failed; found no memory"):
        evaluated(monkeypatch, *words, "--scorer", "vlmevalkit", "--kit_python", program)
    assert "| SEED-Bench image" in capsys.readouterr().out and (tmp_path / "out/results.json").is_file()


@pytest.mark.slow
def test_the_real_kit_scores_the_same(runs, data, tmp_path, monkeypatch, capsys):
    """Our rules of 2024 next to the kit's of today; answers that score, in the place of a random model's."""
    words = [runs / "moslora", "--benchmark", "mmbench_cn,seed,textvqa,mme,mathvista", "--data", data, "--limit", 30]
    words += ["--output", tmp_path / "out"]
    evaluated(monkeypatch, *words)
    for name in ("mmbench_cn", "seed", "textvqa", "mme"):
        file, predictions = tmp_path / "out" / name / "answers-0.jsonl", FILES[BENCHMARKS[name].file][1]
        header, *rows = map(json.loads, file.read_text().splitlines())
        rows = [row | {"answer": predictions[row["index"]]} for row in rows]
        file.write_text("".join(json.dumps(row) + "\n" for row in (header, *rows)))
    capsys.readouterr()
    evaluated(monkeypatch, *words, "--scorer", "vlmevalkit", "--kit_python", kit_python())
    ours, kits = (text.splitlines() for text in capsys.readouterr().out.split("\n| benchmark ", 1))
    assert sum(line.startswith("| ") for line in ours) == 2 + 5
    for title in ("MMBench CN (test)", "SEED-Bench image", "TextVQA", "MME"):
        (line,) = (line for line in kits if line.startswith(f"| {title}"))
        _, _, kit, own, verdict, _ = (cell.strip() for cell in line.split("|"))
        assert kit == own and float(kit) > 20 and verdict == "the same"
    assert any("MathVista" in line and "needs a judge" in line for line in kits)
    assert "VLMEvalKit" in (tmp_path / "out/results.md").read_text()


def test_two_ranks_continue_after_a_kill(runs, data, tmp_path, monkeypatch):
    """Their answers are those of one rank; what is missing in one rank's file is asked again, and nothing else."""
    words = ["--benchmark", "seed", "mme", "--data", data, "--batch_size", 4, "--limit", 18]
    evaluated(monkeypatch, runs / "moslora", *words, "--output", tmp_path / "one")
    command = ["scripts/evaluate.py", runs / "moslora", *words, "--output", tmp_path / "two"]
    done = run([*TORCHRUN, free_port(), *command])
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("| SEED-Bench image") == 1
    assert answers(tmp_path / "two") == answers(tmp_path / "one") and len(answers(tmp_path / "two")) == 18 + 36
    file = tmp_path / "two" / "mme" / "answers-1.jsonl"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    others = {p: p.read_bytes() for p in (tmp_path / "two").glob("*/answers-*.jsonl") if p != file}
    assert len(others) == 3
    done = run([*TORCHRUN, free_port(), *command])
    assert done.returncode == 0, done.stderr[-3000:]
    assert answers(tmp_path / "two") == answers(tmp_path / "one")
    assert all(p.read_bytes().startswith(content) for p, content in others.items())
    assert all(p.read_bytes() == content for p, content in others.items() if p.parent.name == "seed")


@pytest.mark.parametrize("words, match", [
    ([], r"C-FLAG\] exactly one of these flags is needed; found none"),
    (["--compare", "--benchmark", "seed"], r"C-FLAG\] exactly one .* found --benchmark --compare"),
    (["--benchmark", "seed", "--output", "o"], r"--data: missing: --benchmark needs it"),
    (["--benchmark", "seed", "--data", "d"], r"--output: missing"),
    (["--questions", "q.json"], r"--image_folder: missing: --questions needs it"),
    (["--questions", "q.json", "--image_folder", "i", "--limit", "3"], r"--limit: has no effect with --questions"),
    (["--benchmark", "seed", "--data", "d", "--output", "o", "--blank"], r"--blank: has no effect with --benchmark"),
    (["--benchmark", "seed", "--data", "d", "--output", "o", "--limit", "0"], r"--limit: out of range; found 0"),
    (["--benchmark", "seed", "--data", "d", "--output", "o", "--batch_size", "0"], r"--batch_size: out of range"),
    (["--benchmark", "vqav2", "--data", "d", "--output", "o"], r"--benchmark: invalid choice: 'vqav2' .*mmb.*fix: see"),
    (["--benchmark", "seed", "--data", "d", "--output", "o", "--rules", "x"], r"--rules: invalid choice: 'x' .*rul"),
    (["--benchmark", "seed", "--data", "d", "--output", "o", "--prompts", "x"], r"--prompts: invalid choice"),
    (["--benchmark", "seed", "--data", "d", "--output", "o", "--paper", "x"], r"--paper: invalid choice.*llama-3-lora"),
    (["--benchmark", "seed", "--data", "d", "--output", "o", "--judge", "http://h", "m"],
     r"--judge: has no effect without mathvista or mmvet; fix: omit it"),
    (["--benchmark", "mmvet", "--data", "d", "--output", "o", "--judge", "h", "m"], r"--judge: not the URL of a"),
    (["--compare", "--judge", "http://h", "m"], r"--judge: has no effect with --compare"),
    (["--benchmark", "seed", "--data", "d", "--output", "o", "--scorer", "x"], r"--scorer: invalid choice.*vlmeva"),
    (["--benchmark", "seed", "--data", "d", "--output", "o", "--kit_python", "p"], r"--kit_python: has no effect with"),
    (["--compare", "--scorer", "vlmevalkit"], r"--scorer: has no effect with --compare"),
    (["--benchmark", "seed", "--data", "d", "--output", "o", "--scorer", "vlmevalkit", "--kit_python", "/no/python"],
     r"--kit_python: no such program; found /no/python"),
    (["--benchmark", "all", "--data", "missing", "--output", "o"], r"D-FILE\] missing:--data: no benchmark file found"),
    (["--benchmark", "seed", "--data", "d", "--output", "o", "--mistakes", "-1"], r"--mistakes: out of range"),
    (["--benchmark", "seed", "--data", "d", "--output", "o", "--normalise"], r"--normalise: has no effect"),
    (["--compare"], r"--compare: exactly two results can be compared; found run"),
    (["--compare", "--data", "d"], r"--output: missing: --data needs it"),
    (["--compare", "--normalise"], r"--output: missing: --normalise needs it"),
    (["--compare", "--output", "o", "--mistakes", "3"], r"--data: missing: --mistakes needs it"),
    (["--radar", "r.png", "--data", "d"], r"--data: has no effect with --radar"),
    (["--radar", "/proc/none/r.png"], r"C-OUTPUT\] .*:--radar: this folder is not writable"),
    (["--radar", "r.png"], r"C-PATH\] run: no results; expected a folder with NAME/score.json"),
])  # fmt: skip
def test_flags_are_refused_before_loading(monkeypatch, tmp_path, words, match):
    monkeypatch.setattr(evaluate, "load", loaded)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Refusal, match=match):
        evaluated(monkeypatch, "run", *words)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_used_is_refused_before_loading(runs, data, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "load", loaded)
    (tmp_path / "file").touch()
    words = [runs / "moslora", "--benchmark", "seed", "--data"]
    for output in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(Refusal, match=r"C-OUTPUT\] .*:--output: this folder is not writable"):
            evaluated(monkeypatch, *words, data, "--output", output)
    with pytest.raises(Refusal, match=r"D-FILE\] .*SEEDBench_IMG.tsv:--data: no file for seed"):
        evaluated(monkeypatch, *words, tmp_path, "--output", tmp_path / "out")
    with pytest.raises(Refusal, match=r"C-PATH\] .*: no results"):
        evaluated(monkeypatch, tmp_path, tmp_path, "--compare")


def test_one_evaluation_at_a_time(runs, data, tmp_path, monkeypatch):
    words = [runs / "moslora", "--benchmark", "seed", "--data", data, "--limit", 1, "--output", tmp_path]
    with (
        locked(tmp_path / ".lock-0"),
        pytest.raises(Refusal, match=r"C-LOCKED\] .*:--output: another process is evaluating into this folder"),
    ):
        evaluated(monkeypatch, *words)
    evaluated(monkeypatch, *words)


def test_neither_a_run_nor_an_export(data, tmp_path, monkeypatch):
    with pytest.raises(Refusal, match=r"C-PATH\] .*: no such folder"):
        evaluated(monkeypatch, tmp_path / "no", "--benchmark", "seed", "--data", data, "--output", tmp_path / "out")
