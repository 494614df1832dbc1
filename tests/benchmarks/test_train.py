"""The training benchmark: how it reads, runs and keeps its rows; with tiny parts; and itself where there is a GPU."""

import json
import os
import re
import signal
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from llava_moslora.errors import Refusal
from support.launching import ROOT, run

sys.path.insert(0, str(ROOT / "benchmarks"))

import train_meter
import train_row
from train_meter import PROFILED, figures, kernel_table
from train_parts import LENGTHS, LLAMA_3_8B, TINY, max_length, record_sizes
from train_process import measure
from train_report import Results, comparisons, read_rows, roofline, table
from train_row import Job, Row, ours_command, write_result


@pytest.fixture
def job(tmp_path):
    settings = {"steps": 3, "warm_up": 1, "lengths": "uniform", "layers": None, "tiny": True, "profile": False}
    settings |= {"workers": 0, "folder": str(tmp_path), "data": "data.json", "records": 6, "port": 0}
    return Job(row="zero2+full", batch=2, run=str(tmp_path / "run"), **settings)


def test_rows_are_read():
    assert Row.parse("stock-bf16") == Row("stock-bf16")
    assert Row.parse("zero2") == Row("zero2", recompute="full")
    whole = Row("zero2_offload", recompute="every:2", liger=True, kernel="torch", bits=4, batch=16)
    assert Row.parse("zero2_offload+every:2+4bit+torch+liger@16") == whole
    assert Row.parse(whole.name) == replace(whole, batch=None)
    for text, row in {
        "zero1+selective+packed": Row("zero1", recompute="selective", data="packed"),
        "stock-bf16+llm": Row("stock-bf16", data="llm"),
    }.items():
        assert Row.parse(text) == row and row.name == text


def test_a_word_of_the_row_comes_before_the_flag():
    rows = {name: Row.parse(name).lengths("uniform") for name in ("stock", "stock+llm", "zero1+packed", "zero1+ragged")}
    assert list(rows.values()) == ["uniform", "text", "ragged", "ragged"]


@pytest.mark.parametrize(
    "text",
    ["", "peft", "stock+liger", "stock+packed", "zero2+half", "zero2+every:0", "zero2+none+full", "zero2+llm+ragged"]
    + ["zero2@0", "zero2@", "@4"],
)
def test_what_is_no_row_is_refused(text):
    with pytest.raises(Refusal, match=r"C-FLAG.*--rows"):
        Row.parse(text)


def test_a_row_says_every_setting_that_it_stands_for(job):
    arguments, environment = ours_command(job, Row.parse("zero2+selective+liger+torch+4bit@2"))
    said = dict(zip(arguments[::2], arguments[1::2], strict=True))
    assert said["--recompute"] == "selective" and said["--bits"] == "4" and said["--use_liger_kernel"] == "True"
    assert said["--deepspeed"].endswith("zero_configs/zero2.json")
    assert environment == {"LLAVA_MOSLORA_KERNEL": "torch"}
    arguments, environment = ours_command(job, Row.parse("zero2"))
    said = dict(zip(arguments[::2], arguments[1::2], strict=True))
    assert said["--recompute"] == "full" and said["--bits"] == "16" and said["--use_liger_kernel"] == "False"
    assert environment == {} and "--packing" not in said
    arguments, _ = ours_command(job, Row.parse("zero1+packed"))
    said = dict(zip(arguments[::2], arguments[1::2], strict=True))
    assert said["--packing"] == "True" and said["--data_order"] == "shuffle" and "--vision_tower" in said
    arguments, _ = ours_command(replace(job, lengths="text"), Row.parse("zero1+llm"))
    said = dict(zip(arguments[::2], arguments[1::2], strict=True))
    assert said["--model_max_length"] == "4096"
    assert not {"--vision_tower", "--pretrain_mm_mlp_adapter", "--image_folder", "--vision_lora_r"} & set(said)


@pytest.mark.parametrize("shape", [LLAMA_3_8B, TINY])
def test_the_llm_has_a_position_for_every_token(shape):
    assert max(max_length(lengths) for lengths in LENGTHS) <= shape["max_position_embeddings"]


def test_each_row_is_on_disk_when_it_has_ended_and_one_that_dies_stops_no_other(job, tmp_path, monkeypatch):
    def be(job):
        time.sleep(60 * (job.row == "slow"))
        job.file("has-gpu").touch()
        if job.row == "hanging":
            time.sleep(60)
        if job.row == "dying":
            os.write(2, b"its last words")
            os.kill(os.getpid(), signal.SIGKILL)
        steps = {"ms_per_step": 1.0, "tokens_per_second": 5.0, "losses": [2.0]}
        write_result(job, {"status": "ok", **steps, "startup_seconds": {"until_first_step": 1.0}})

    monkeypatch.setattr(train_row, "run_row", be)
    file = tmp_path / "out" / "result.json"
    results = Results(file, {"device": "cpu", "tiny": True}, [])
    seen = []

    def add(row):
        results.add(row)
        seen.append([row["row"] for row in json.loads(file.read_text())["rows"]])

    names = ["dying", "stock", "hanging", "zero2+full"]
    jobs = [replace(job, row=name, run=str(tmp_path / f"run-{name}")) for name in names]
    measure(jobs, add, by_fork=True, limit=1)
    assert seen == [names[:1], names[:2], names[:3], names]
    dying, stock, hanging, last = results.rows
    assert dying["status"] == "died" and "its last words" in dying["message"]
    assert hanging["status"] == "stopped: out of time"
    assert stock["status"] == last["status"] == "ok"
    begin = time.time()
    measure([replace(job, row="slow"), job], add, by_fork=True, deadline=time.time() + 1)
    assert time.time() - begin < 10
    assert [row["row"] for row in results.rows[4:]] == ["slow"]  # killed before it had the GPU; the other never begun


def test_rows_are_appended_to_those_of_the_same_device(tmp_path):
    file = tmp_path / "result.json"
    assert read_rows(file, "H100") == []
    row = {"row": "stock", "batch": 8, "lengths": "uniform", "layers": None, "status": "out of memory", "message": "!"}
    Results(file, {"device": "H100", "tiny": False}, []).add(row)
    kept = read_rows(file, "H100")
    assert kept[0]["row"] == "stock" and kept[0]["roofline"]["ms_at_least"] > 0
    Results(file, {"device": "H100", "tiny": False}, kept).add(row | {"row": "stock-bf16"})
    assert [row["row"] for row in read_rows(file, "H100")] == ["stock", "stock-bf16"]
    with pytest.raises(Refusal, match="another device"):
        read_rows(file, "A100")


def test_what_a_roofline_says_is_found_for_the_same_work_alone():
    row = {"row": "stock", "batch": 8, "lengths": "uniform", "layers": None}
    assert roofline(row, tiny=False) == {"ms_at_least": 2405, "peak_allocated_gib": 46.2}
    ours = [roofline(row | {"row": f"zero{stage}+full+liger"}, tiny=False)["ms_at_least"] for stage in (1, 2)]
    assert ours == [1450, 1500]  # Triton's kernels, as on a GPU by default
    assert roofline(row | {"row": "zero3+full+liger"}, tiny=False) is None
    assert roofline(row | {"batch": 2}, tiny=False) is roofline(row | {"layers": 2}, tiny=False) is None


def test_ratios_are_to_stock_at_the_same_size():
    size = {"lengths": "uniform", "layers": None, "status": "ok"}
    rows = [{"row": "stock", "batch": 8, "tokens_per_second": 100.0, **size}]
    rows += [{"row": "zero2+full", "batch": 8, "tokens_per_second": 150.0, **size}]
    rows += [{"row": "zero2+none", "batch": 4, "tokens_per_second": 180.0, **size}]
    lines = table(rows).splitlines()
    assert re.search(r"\b1\.50$", lines[2]) and re.search(r"\b180$", lines[3].rstrip())


def test_the_table_has_the_last_loss_and_the_time_in_kernels():
    row = {"row": "stock", "batch": 8, "lengths": "uniform", "layers": None, "status": "ok", "tokens_per_second": 100.0}
    row |= {"losses": [3.0, 2.5, None], "peak_allocated_gib": 40.0}
    head, line = table([row]).splitlines()
    assert "busy" not in head and line.split() == ["stock@8", "100", "40.0", "2.5000", "1.00"]
    head, *lines = table([row, row | {"row": "zero1+full", "profile": {"busy_ms": 1234.4}}]).splitlines()
    assert "busy ms" in head and lines[1].split()[-3:] == ["2.5000", "1234", "1.00"]


def test_each_row_is_set_beside_stocks_on_the_same_data():
    size = {"lengths": "uniform", "layers": None, "status": "ok", "peak_allocated_gib": 40.0}
    speeds = {"stock": 100.0, "stock-bf16": 120.0, "zero1+full": 180.0}
    rows = [{"row": name, "batch": 8, "tokens_per_second": speed, **size} for name, speed in speeds.items()]
    rows += [{"row": "zero1+none", "batch": 4, "tokens_per_second": 200.0, **size | {"peak_allocated_gib": 60.0}}]
    text = size | {"lengths": "text", "batch": 4}
    rows += [{"row": "zero1+full+llm", "tokens_per_second": 90.0, **text}]
    rows += [{"row": "stock", "tokens_per_second": 1.0, **text}]  # a LLaVA on texts
    rows += [{"row": "stock+llm", **text, "status": "out of memory", "message": "!"}]
    rows += [{"row": "zero2+full", "batch": 8, **size, "status": "error", "message": "!"}]
    assert comparisons(rows).splitlines() == [
        "zero1+full@8 : stock@8  1.80 × tokens/s, 1.00 × memory",
        "zero1+full@8 : stock-bf16@8  1.50 × tokens/s, 1.00 × memory",
        "zero1+none@4 : stock@8  2.00 × tokens/s, 1.50 × memory",
        "zero1+none@4 : stock-bf16@8  1.67 × tokens/s, 1.50 × memory",
        "zero1+full+llm@4 : no stock row on the same data has ended",
    ]


def test_figures_are_medians():
    steps = [{"ms": ms, "tokens": 1000, "flops": 2e12} for ms in (10.0, 20.0, 90.0)]
    assert figures(steps, 4e14) == {
        "ms_per_step": 20.0,
        "tokens_per_second": 50000.0,
        "model_tflop_per_step": 2.0,
        "mfu": 0.25,
    }
    assert figures([], None) == {}


class SlowProfiler:
    """In place of torch's, which needs seconds to start and to stop."""

    def __init__(self, **_):
        pass

    def start(self):
        time.sleep(0.3)

    def stop(self):
        time.sleep(0.3)

    def events(self):
        return []


def test_what_a_profiler_needs_is_in_no_step(job, monkeypatch):
    monkeypatch.setattr(torch.profiler, "profile", SlowProfiler)
    job = replace(job, profile=True)
    trainer = SimpleNamespace(args=SimpleNamespace(device=torch.device("cpu")), model=None)
    monkeypatch.setattr(
        train_meter, "Throughput", lambda *_: SimpleNamespace(counts={"tokens": 8, "flops": 2}, peak=None)
    )
    timer = train_meter.StepTimer(trainer, job, 0.0, time.monotonic())
    timer.on_train_begin()
    for step in range(job.total_steps):
        state = SimpleNamespace(global_step=step)
        timer.on_step_begin(None, state, None)
        time.sleep(0.01)
        timer.losses.append(torch.tensor(float(step)))
        timer.on_step_end(None, SimpleNamespace(global_step=step + 1), None)
    found = timer.result()
    assert len(found["ms"]) == len(found["losses"]) == 3 + PROFILED and all(9 < ms < 200 for ms in found["ms"])
    assert found["losses"] == [0, 1, 2, 3, 4] and found["profile"]["wall_ms"] < 200


def test_a_profile_is_grouped_and_per_step():
    x = torch.randn(64, 64)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        for _ in range(3 * PROFILED):
            torch.mm(x, x)
    found = kernel_table(profiler, wall_ms=1e3)
    product = next(kernel for kernel in found["kernels"] if kernel["name"] == "aten::mm")
    assert product["group"] == "product" and product["calls"] == 3
    assert found["wall_ms"] == 1e3 / PROFILED and 0 < found["busy_ms"] < found["wall_ms"]
    assert product["ms"] > 0
    in_groups = sum(group["ms"] for group in found["groups"].values())
    assert in_groups >= product["ms"] - 0.005  # groups are rounded to 0.01 ms, kernels to 0.001


def test_more_ragged_records_begin_with_the_same_ones():
    few, many = (record_sizes("ragged", count, 576, tiny=False) for count in (8, 64))
    assert many[:8] == few and len(set(many)) > 40
    assert all(labels < tokens <= 2048 for _, tokens, labels in many)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_refuses():
    done = run([sys.executable, "benchmarks/train.py"])
    assert done.returncode == 4 and "needs a GPU" in done.stderr and "--tiny" in done.stderr


@pytest.mark.slow
def test_tiny_parts_on_a_cpu(tmp_path):
    rows = ["stock", "stock-bf16", "zero2+full", "zero2+none+4bit@1"]
    rows += ["stock+llm", "zero1+selective+llm", "zero1+full+packed", "zero7+full"]
    sizes = ["--tiny", "--steps", 3, "--warm-up", 1, "--batch", 2, "--workers", 1, "--profile"]
    command = [sys.executable, "benchmarks/train.py", *sizes, "--rows", *rows, "--output", tmp_path / "r.json"]
    done = run(command, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["tiny"] and [row["row"] for row in result["rows"]] == [row.partition("@")[0] for row in rows]
    *ran, refused = result["rows"]
    assert refused["status"] == "refused" and "zero7.json" in refused["message"]
    for row in ran:
        assert row["status"] == "ok" and row["tokens_per_second"] > 0 and len(row["losses"]) == 3 + PROFILED
        assert row["profile"]["kernels"]
    # B is 0 at first, so the same records have the same loss under stock and under ours
    for stock, ours in ((ran[0], ran[2]), (ran[4], ran[5])):
        assert ours["losses"][0] == pytest.approx(stock["losses"][0], abs=0.01)
    assert "aten::mm" in (tmp_path / "r-profile.txt").read_text()


@pytest.mark.gpu
def test_real_shapes_on_a_gpu(tmp_path):
    rows = ["--rows", "stock", "zero2+full", "--layers", "2", "--steps", "6", "--output", tmp_path / "r.json"]
    done = run([sys.executable, "benchmarks/train.py", *rows])
    assert done.returncode == 0, done.stderr
    for row in json.loads((tmp_path / "r.json").read_text())["rows"]:
        assert row["status"] == "ok" and row["mfu"] > 0 and row["peak_allocated_gib"] > 1
