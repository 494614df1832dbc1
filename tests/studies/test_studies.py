"""Studies from start to end with a stub in the place of the training: skipped, resumed, failed, changed, killed."""

import json
import os
import random
import signal
import subprocess
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest

from llava_moslora.errors import Refusal
from llava_moslora.studies.processes import Slot, slots_of, training_command
from llava_moslora.studies.runs import Run
from support.launching import ROOT
from support.studies import LORA, LOSS, RECIPE, STEPS, command, in_process, loss, run_study, write_study

MIXED = {"mixer_init": "kaiming_uniform"}


def flags_of(arm: dict, seed: int, **changes) -> dict:
    return {"seed": str(seed), "lora_r": "4", "learning_rate": "1e-3"} | arm | changes


@pytest.fixture
def study(tmp_path, monkeypatch):
    """``study(*words, **changes of the file)`` runs it; the report it wrote."""

    def study(*words: str, **changes) -> dict:
        in_process(monkeypatch, write_study(tmp_path, **changes), tmp_path / "out", *words)
        return json.loads((tmp_path / "out" / "study.json").read_text())

    return study


def test_a_study_from_start_to_end(study, tmp_path, capsys):
    report = study()
    lora, mosl = report["measures"][0]["rows"]
    assert lora["values"] == {str(seed): loss(flags_of(LORA, seed), STEPS) for seed in (1, 2)}
    expected = [loss(flags_of({}, seed), STEPS) - loss(flags_of(LORA, seed), STEPS) for seed in (1, 2)]
    assert list(mosl["difference"]["by_seed"].values()) == expected
    assert mosl["difference"]["mean"] == pytest.approx(sum(expected) / 2) and lora["difference"] is None
    assert lora["verdict"] == "baseline" and mosl["verdict"].startswith("no difference to LoRA above 0.")
    assert float(mosl["verdict"].split()[5]) >= max(abs(mosl["difference"]["low"]), abs(mosl["difference"]["high"]))
    printed = capsys.readouterr().out
    table = (tmp_path / "out" / "study.txt").read_text()
    assert table in printed and "4 runs, 0 of them done" in printed and "equal" not in table
    starts = {path: path.stat().st_mtime_ns for path in tmp_path.glob("out/runs/*/*/done.json")}
    assert len(starts) == 4
    again = study()
    assert {path: path.stat().st_mtime_ns for path in starts} == starts and again == report  # nothing was repeated
    assert "4 runs, 4 of them done" in capsys.readouterr().out

    class Reader(HTMLParser):
        tags, attributes, text = [], [], ""

        def handle_starttag(self, tag, attrs):
            self.tags.append(tag)
            self.attributes += attrs

        def handle_data(self, data):
            self.text += data

    page = Reader()
    page.feed((tmp_path / "out" / "study.html").read_text())
    assert page.tags.count("svg") == 1 and page.tags.count("circle") == 1 + 2 and "script" not in page.tags
    assert not [value for name, value in page.attributes if name in ("src", "href") or "//" in (value or "")]
    assert mosl["verdict"] in page.text and "MoSLoRA/seed-2" in page.text and '"recipe"' in page.text


def test_a_seed_and_an_arm_are_added_by_a_line(study, tmp_path):
    before = study()["measures"][0]["rows"]
    arms = [{"name": "LoRA", "flags": LORA}, {"name": "MoSLoRA"}, {"name": "normal", "flags": {"mixer_init": "normal"}}]
    done = {path: path.stat().st_mtime_ns for path in tmp_path.glob("out/runs/*/*/done.json")}
    after = study(arms=arms, seeds=["1", "2", "3"])["measures"][0]["rows"]
    assert {path: path.stat().st_mtime_ns for path in done} == done
    assert [row["arm"] for row in after] == ["LoRA", "MoSLoRA", "normal"]
    assert all(before[k]["values"].items() < after[k]["values"].items() for k in (0, 1))
    assert all(len(row["values"]) == 3 for row in after)
    fewer = study(seeds=["1", "2"])
    assert fewer["measures"][0]["rows"] == before  # also the correction is that of two arms
    assert len([note for note in fewer["notes"] if "is not part of the study" in note]) == 5


def test_a_failed_run_is_named_and_the_others_go_on(study, monkeypatch):
    arms = [{"name": "LoRA", "flags": LORA}, {"name": "big", "flags": {"lora_r": "17"}}, {"name": "MoSLoRA"}]
    with pytest.raises(Refusal, match=r"R-STUDY.*some runs are not complete; found 2 failed"):
        study(arms=arms)
    report = study("--report_only", arms=arms)
    lora, big, mosl = report["measures"][0]["rows"]
    assert len(lora["values"]) == len(mosl["values"]) == 2 and big["values"] == {} and big["missing"] == [1, 2]
    assert big["verdict"] == "no result; 2 of 2 seeds missing"
    assert mosl["difference"]["adjusted"] == mosl["difference"]["p"]
    monkeypatch.setenv("STUB_MENDED", "1")
    assert len(study(arms=arms)["measures"][0]["rows"][1]["values"]) == 2


def test_the_last_line_of_a_failed_runs_log(study, tmp_path, capsys):
    with pytest.raises(Refusal):
        study(arms=[{"name": "LoRA", "flags": {"lora_r": "13"}}, {"name": "MoSLoRA"}])
    table = (tmp_path / "out" / "study.txt").read_text()
    assert "LoRA/seed-1: training: error[E-MEMORY] the memory of the device is not enough" in table
    assert "LoRA/seed-1: training failed, status 4: error[E-MEMORY]" in capsys.readouterr().out
    assert "no seed in common with LoRA: no verdict" in table


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"flags": {"weight_decay": "0.1"}}, r"found --weight_decay 0.1; expected as in .*--weight_decay not given"),
        ({"recipe": [*RECIPE, "--learning_rate", "2e-3"]}, r"found --learning_rate 2e-3; .*: --learning_rate 1e-3"),
    ],
)
def test_a_changed_study_is_never_mixed(study, tmp_path, changes, difference):
    study()
    with pytest.raises(Refusal, match=r"C-CHANGED.*4 runs were made with settings other than.*" + difference):
        study(**changes)
    assert len(list(tmp_path.glob("out/runs/*/*/done.json"))) == 4


def test_only_what_changed_is_repeated_where_that_is_asked_for(study, tmp_path):
    study()
    kept = tmp_path / "out/runs/LoRA/seed-1/done.json"
    when = kept.stat().st_mtime_ns
    arms = [{"name": "LoRA", "flags": LORA}, {"name": "MoSLoRA", "flags": {"learning_rate": "2e-3"}}]
    report = study("--rerun_changed", arms=arms)
    assert kept.stat().st_mtime_ns == when
    expected = loss({**flags_of({}, 2), "learning_rate": "2e-3"}, STEPS)
    assert report["measures"][0]["rows"][1]["values"]["2"] == expected
    other = [*RECIPE[4:], *RECIPE[:4]]  # the same flags in another order
    assert study(recipe=other, arms=arms)["measures"] == report["measures"]


def test_tuning_chooses_on_its_own_seeds(study, tmp_path):
    values = ["1e-3", "2e-3", "4e-3", "2"]  # the last one diverges
    report = study(tune={"flag": "learning_rate", "values": values, "seeds": ["11", "12"]}, seeds=["1", "2", "3"])
    for choice, arm in zip(report["tuned"], (LORA, {}), strict=True):
        means = {v: sum(loss(flags_of(arm, seed, learning_rate=v), STEPS) for seed in (11, 12)) / 2 for v in values[:3]}
        assert {v: m for v, m in choice["curve"].items() if v != "2"} == pytest.approx(means)
        assert choice["curve"]["2"] is None and choice["best"] == min(means, key=means.__getitem__)
    row = report["measures"][0]["rows"][1]
    assert row["tuned"] == report["tuned"][1]["best"] and list(row["values"]) == ["1", "2", "3"]
    assert len([failure for failure in report["failures"] if "R-NONFINITE" in failure["line"]]) == 4
    assert "diverged while tuning" in (tmp_path / "out" / "study.txt").read_text()
    page = (tmp_path / "out" / "study.html").read_text()
    assert "validation loss against --learning_rate" in page and "used for nothing else" in page


def test_points_are_an_axis_of_the_figure(study, tmp_path):
    report = study(points=[{"lora_r": "4"}, {"lora_r": "8"}, {"lora_r": "16"}])
    rows = report["measures"][0]["rows"]
    assert [(row["arm"], row["point"]) for row in rows] == [(a, p) for p in range(3) for a in ("LoRA", "MoSLoRA")]
    at_8 = loss(flags_of({}, 1, lora_r="8"), STEPS) - loss(flags_of(LORA, 1, lora_r="8"), STEPS)
    assert rows[3]["difference"]["by_seed"]["1"] == at_8
    page = (tmp_path / "out" / "study.html").read_text()
    assert "validation loss against --lora_r" in page and page.count("<polyline") == 2


def test_a_metric_that_only_a_log_can_tell_is_checked_when_the_first_run_has_ended(study, tmp_path):
    """What was done is kept, and the same study with the name mended goes on from there."""
    wrong = [LOSS | {"metric": "mfu"}]  # on a CPU there is none
    expected = r"measures\[0\].metric: LoRA/seed-1 has ended without this metric; found mfu; .* has: eval_loss, loss"
    with pytest.raises(
        Refusal, match=r"C-STUDY\].*tiny.yaml:" + expected + "; fix: one that it has; finished runs are kept"
    ):
        study(measures=wrong)
    done = list(tmp_path.glob("out/runs/*/*/done.json"))
    assert [path.parent.parent.name for path in done] == ["LoRA"]
    with pytest.raises(Refusal, match=expected):  # at once
        study(measures=wrong)
    assert list(tmp_path.glob("out/runs/*/*/done.json")) == done
    notes = study("--report_only", measures=wrong)["notes"]
    assert notes == ["validation loss: no finished run has a value of mfu"]
    assert len(study()["measures"][0]["rows"][1]["values"]) == 2


@pytest.mark.parametrize(
    ("measure", "message"),
    [
        ({"metric": "delta/lmm"}, "found delta/lmm; expected mixer/llm/largest | mixer/llm/smallest"),
        (
            {"metric": "eval_lost"},
            "LoRA: its runs will not log this metric; found eval_lost; expected loss | grad_norm",
        ),
        ({"metric": "eval_lost"}, "fix: did you mean eval_loss?"),
        ({"metric": "Eval_Loss"}, "fix: did you mean eval_loss?"),
        ({"metric": "eval_b_loss"}, "eval_loss | eval_token_accuracy | eval_runtime; fix: did you mean eval_loss?"),
        ({"metric": "step"}, "its runs will not log this metric; found step"),
        ({"script": "evaluate_commonsense.py", "flags": {"data": "d"}, "value": "boolqq"}, "fix: did you mean boolq?"),
        (
            {"script": "evaluate_commonsense.py", "flags": {"data": "d", "sets": ["piqa"]}, "value": "boolq"},
            "measures[0].value: evaluate_commonsense.py will not give this value; found boolq; expected piqa | mean",
        ),
        ({"script": "evaluate.py", "flags": {"data": "d", "benchmark": "seed,mme"}, "value": "sed"}, "mean seed?"),
        (
            {"script": "evaluate.py", "flags": {"data": "d", "benchmark": "sed"}},
            "flags: evaluate.py refuses these flags",
        ),
    ],
)
def test_what_no_run_will_have_is_refused_before_any_starts(study, tmp_path, measure, message):
    with pytest.raises(Refusal) as caught:
        study(measures=[{"name": "a", "better": "lower"} | measure])
    assert caught.value.code == "C-STUDY" and message in caught.value.line() and "measures[0]" in caught.value.line()
    assert not (tmp_path / "out").exists()


def test_metrics_follow_from_every_runs_own_flags(study):
    """Of several validation sets also each one's; where one arm evaluates nothing, that arm is named."""
    two = {"eval_data_path": ["x=a.json", "y=b.json"], "validation_split": "0"}
    with pytest.raises(Refusal, match=r"found eval_z_loss; expected .*eval_x_loss.*eval_y_token_accuracy.*mean eval_"):
        study(flags=two, measures=[LOSS | {"metric": "eval_z_loss"}])
    arms = [{"name": "LoRA", "flags": LORA}, {"name": "b", "flags": {"eval_strategy": "no", "validation_split": "0"}}]
    with pytest.raises(
        Refusal, match=r"metric: b: its runs will not log this metric; found eval_loss; .*fix: evaluate"
    ):
        study(arms=arms)


def kill_at(file: Path, output: Path, moments: list[float]) -> None:
    """Start the study, kill it with -9 after each of the moments, and then let it end."""
    env = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "STUB_SECONDS": "0.05", "CUDA_VISIBLE_DEVICES": ""}
    for moment in moments:
        process = subprocess.Popen(command(file, output), env=env, cwd=file.parent, stdout=subprocess.DEVNULL)
        begun = time.monotonic()
        while process.poll() is None and not (output / "runs").exists():  # the moment counts from the first run
            time.sleep(0.01)
            assert time.monotonic() < begun + 1000
        time.sleep(moment)
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = run_study(file, output, STUB_SECONDS="0.05")
    assert done.returncode == 0, done.stderr


def compare_killed(tmp_path: Path, moments: list[float]) -> None:
    (tmp_path / "whole").mkdir(), (tmp_path / "killed").mkdir()
    whole, killed = write_study(tmp_path / "whole"), write_study(tmp_path / "killed")
    assert run_study(whole, tmp_path / "whole" / "out").returncode == 0
    kill_at(killed, tmp_path / "killed" / "out", moments)
    for name in ("study.txt", "study.json"):
        text = (tmp_path / "killed" / "out" / name).read_text().replace(str(tmp_path / "killed"), "FOLDER")
        assert text == (tmp_path / "whole" / "out" / name).read_text().replace(str(tmp_path / "whole"), "FOLDER")


@pytest.mark.slow
def test_a_study_killed_twice_ends_in_the_same_table(tmp_path):
    compare_killed(tmp_path, [0.3, 0.8])


@pytest.mark.faults
def test_a_study_killed_at_ten_random_moments_ends_in_the_same_table(tmp_path):
    chance = random.Random(7)
    compare_killed(tmp_path, [chance.uniform(0, 2) for _ in range(10)])


def test_two_studies_do_not_share_a_folder(study, tmp_path):
    from filelock import FileLock

    (tmp_path / "out").mkdir()
    with FileLock(tmp_path / "out" / ".lock"), pytest.raises(Refusal, match=r"C-LOCKED.*another process works on"):
        study()


def test_gpus_are_dealt_to_runs_side_by_side():
    assert slots_of(["0", "1", "2", "3", "4"], 2, 1) == [Slot(0, ("0", "1")), Slot(1, ("2", "3"))]
    assert slots_of([], 0, 3) == [Slot(0), Slot(1), Slot(2)]
    with pytest.raises(Refusal, match=r"--gpus: fewer GPUs than a run needs; found 1; expected 2"):
        slots_of(["0"], 2, 1)


def test_deepspeed_runs_start_through_its_launcher(tmp_path):
    plain = Run("a/seed-1", "a", 0, 1, "", False, tmp_path, ("--lora_r", "4"), tmp_path)
    zero = Run("a/seed-1", "a", 0, 1, "", False, tmp_path, ("--deepspeed", "zero1.json"), tmp_path)
    assert training_command(plain, Slot(0, ("3",)))[1:] == [str(ROOT / "scripts/train_vit_llm.py"), "--lora_r", "4"]
    words = training_command(zero, Slot(1, ("2", "3")))
    assert Path(words[0]).name == "deepspeed" and words[1:3] == ["--include", "localhost:2,3"]
    assert words[-3:] == [str(ROOT / "scripts/train_vit_llm.py"), "--deepspeed", "zero1.json"]
    assert training_command(plain, Slot(1, ("2", "3")))[1:3] == ["--include", "localhost:2,3"]
    assert training_command(zero, Slot(0))[1:3] == ["--num_accelerators", "1"]
