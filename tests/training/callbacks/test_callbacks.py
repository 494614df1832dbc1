"""What a run shows: metrics that survive a resume, answers to fixed questions, the adapter's health."""

import json
import math
import shutil

import pytest
import torch

from llava_moslora.config import DataSettings
from llava_moslora.errors import Refusal
from llava_moslora.text.tokenizer import load_tokenizer
from llava_moslora.training.callbacks.sample_answers import read_samples
from support.launching import flags, launch
from support.text_runs import text_flags, write_alpaca
from support.training_runs import adapter, losses, rows, train

STEPS = 4
WATCHED = {"max_steps": STEPS, "save_steps": 2, "health_steps": 2, "sample_steps": 2, "sample_max_new_tokens": 4}


@pytest.fixture(scope="module")
def questions(parts, tmp_path_factory):
    """Two records of the data, one with an image and one without."""
    file = tmp_path_factory.mktemp("questions") / "questions.json"
    records = json.loads(parts.data.read_text())
    file.write_text(json.dumps([records[0], records[2]]))
    return file


@pytest.fixture(scope="module")
def watched(parts, questions, tmp_path_factory):
    folder = tmp_path_factory.mktemp("watched") / "run"
    train(parts, folder, sample_questions=questions, **WATCHED)
    return folder


def test_a_run_that_is_watched_is_the_run_that_is_not(parts, watched, tmp_path):
    """Dropout on: one number drawn for an answer, or one module left in eval mode, and every later loss is another."""
    train(parts, tmp_path / "run", **WATCHED | {"health_steps": 0})
    assert losses(tmp_path / "run") == losses(watched)
    one, other = adapter(tmp_path / "run", STEPS), adapter(watched, STEPS)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_metrics_have_a_row_per_step(watched):
    assert [row["step"] for row in rows(watched)] == [1, 2, 3, 4]
    for row in rows(watched):
        assert row["tokens_per_second"] > 0 and row["samples_per_second"] > 0 and math.isfinite(row["grad_norm"])
        assert "mfu" not in row and "peak_memory_gib" not in row  # nobody knows a CPU's peak


def test_health_is_what_the_checkpoint_says(watched):
    """Singular values and ‖ΔW‖ by the book, from the adapter file; the gradient's norm is that of its parts."""
    row = rows(watched)[STEPS - 1]
    saved = adapter(watched, STEPS)
    for tower, part, scaling in [("llm", "language_model", 128 / 4), ("vision", "vision_tower", 16 / 2)]:
        mixers = [name for name in saved if part in name and "lora_mixer" in name]
        values = [torch.linalg.svdvals(saved[name]) for name in mixers]
        deltas = [
            scaling * saved[n.replace("lora_mixer", "lora_B")] @ saved[n] @ saved[n.replace("lora_mixer", "lora_A")]
            for n in mixers
        ]
        whole = math.sqrt(sum(float(delta.square().sum()) for delta in deltas))
        assert row[f"delta/{tower}"] == pytest.approx(whole, rel=1e-5)
        assert row[f"delta_largest/{tower}"] == pytest.approx(max(float(d.norm()) for d in deltas), rel=1e-5)
        assert row[f"mixer/{tower}/largest"] == pytest.approx(max(float(v[0]) for v in values), rel=1e-5)
        assert row[f"mixer/{tower}/smallest"] == pytest.approx(min(float(v[-1]) for v in values), rel=1e-4, abs=1e-7)
        assert 1 < row[f"mixer/{tower}/rank"] < (4 if tower == "llm" else 2)
    gradient = math.hypot(*(value for name, value in row.items() if name.startswith("gradient/")))
    assert gradient == pytest.approx(row["grad_norm"], rel=1e-5)
    # Warm-up begins at 0, so at step 2 every B is still zero and only it has a gradient; step 4 saw no image.
    early = rows(watched)[1]
    assert early["gradient/vision/lora_B"] > 0 and early["gradient/projector"] > 0 and early["gradient/llm/lora_A"] == 0
    assert row["gradient/llm/lora_A"] > 0 and row["gradient/llm/lora_mixer"] > 0 and row["gradient/projector"] == 0
    assert not any("/" in name for name in rows(watched)[0])  # step 1 was not due


def test_questions_are_answered_at_the_start_on_time_and_at_the_end(watched):
    answered = [json.loads(line) for line in (watched / "samples.jsonl").read_text().splitlines()]
    assert [row["step"] for row in answered] == [0, 2, 4]
    assert all(len(row["answers"]) == 2 for row in answered)
    page = (watched / "samples.html").read_text()
    assert page.count('<img src="data:image/jpeg;base64,') == 1 and page.count("what colour is the shape?") == 2
    assert page.count("<td>reference</td>") == 2 and "://" not in page


def test_answers_are_those_of_the_checkpoint(parts, watched, questions):
    """The model that answers while it is trained answers as the same checkpoint, loaded."""
    from llava_moslora.inference.generate import answer
    from llava_moslora.inference.load import load_run

    asked = [(sample.images, sample.turns) for sample in samples_of(parts, questions)]
    answered = [json.loads(line) for line in (watched / "samples.jsonl").read_text().splitlines()]
    assert list(answer(load_run(watched), asked, max_new_tokens=4)) == answered[-1]["answers"]


def samples_of(parts, file, template="chatml", **changes):
    settings = DataSettings([str(file)], **{"image_folder": str(parts.images)} | changes)
    tokenizer = load_tokenizer(parts.llm)
    return read_samples(settings, tokenizer=tokenizer, template=template, tokens_per_image=4)


TALK = [{"role": "user", "content": "what colour is the shape?"}, {"role": "assistant", "content": "red"}]


def test_questions_of_other_columns(parts, tmp_path):
    file = tmp_path / "questions.jsonl"
    file.write_text("\n".join([json.dumps({"dialog": TALK})] * 2))
    sample, _ = samples_of(parts, file, data_columns=["messages=dialog"])
    assert [turn.text for turn in sample.turns] == ["what colour is the shape?"] and sample.reference == "red"
    with pytest.raises(Refusal, match=r"D-SCHEMA.*questions\.jsonl:record 0: unknown record format"):
        samples_of(parts, file)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"messages": [TALK[0]]}, r"D-ROLE.*q\.jsonl:record 0:messages: the turns are not in order"),
        ({"messages": TALK, "tools": "[]x"}, r"D-ROLE.*q\.jsonl:record 0:tools: tool calls are not supported"),
        ({"messages": TALK, "images": ["gone.png"]}, r"I-MISSING.*there is no such image.*check --sample_image_folder"),
        ({"messages": [TALK[0], TALK[1] | {"loss": 0}]}, r"D-LABELS.*no turn of this record is trained"),
        (None, r"D-FILE.*there is no such file; fix: check --sample_questions"),
        ([], r"D-NONE.*q\.jsonl:--sample_questions: there are no records"),
    ],
    ids=["order", "tools", "image", "labels", "missing", "empty"],
)
def test_questions_are_refused_as_training_data_are(parts, tmp_path, record, message):
    if record is not None:
        (tmp_path / "q.jsonl").write_text(json.dumps(record))
    with pytest.raises(Refusal, match=message):
        samples_of(parts, tmp_path / "q.jsonl")


def test_too_many_questions_are_refused(parts, tmp_path):
    (tmp_path / "q.jsonl").write_text("\n".join([json.dumps({"messages": TALK})] * 65))
    with pytest.raises(Refusal, match=r"D-MANY.*--sample_questions.*found more than 64"):
        samples_of(parts, tmp_path / "q.jsonl")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"messages": TALK * 2}, r"D-ROLE.*q\.jsonl:record 0: this prompt template has only one round"),
        ({"messages": TALK, "images": ["0.png"]}, r"D-IMAGES.*q\.jsonl:record 0: .*but there is no vision tower"),
    ],
    ids=["two rounds", "an image"],
)
def test_questions_that_cannot_be_asked_are_refused_before_the_model_is_loaded(
    parts, tmp_path, monkeypatch, record, message
):
    import scripts.train_vit_llm as script

    monkeypatch.setattr(script, "build_model", lambda *_: pytest.fail("the model was loaded"))
    (tmp_path / "q.jsonl").write_text(json.dumps(record))
    words = text_flags(parts, write_alpaca(tmp_path / "alpaca.json"), sample_questions=tmp_path / "q.jsonl")
    with pytest.raises(Refusal, match=message):
        train(parts, tmp_path / "run", **words)


def test_tensorboard_has_the_same_losses(watched):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(watched / "tensorboard")).Reload()
    shown = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert shown == [(row["step"], pytest.approx(row["loss"])) for row in rows(watched)]
    assert "mixer/llm/largest" in events.Tags()["scalars"]


def test_a_resumed_run_shows_every_step_once(parts, watched, questions, tmp_path):
    """Killed after step 3, the checkpoint of step 2 being the newest: step 3 is taken and shown again, once."""
    again = tmp_path / "run"
    shutil.copytree(watched, again)
    shutil.rmtree(again / "checkpoint-4")
    metrics = (again / "metrics.jsonl").read_text().splitlines(keepends=True)
    (again / "metrics.jsonl").write_text("".join(metrics[:3]) + metrics[3][:20])  # the kill cut a row
    train(parts, again, sample_questions=questions, resume=True, **WATCHED)
    assert [row["step"] for row in rows(again)] == [1, 2, 3, 4]
    assert losses(again) == losses(watched)
    answered = [(again / "samples.jsonl").read_text(), (watched / "samples.jsonl").read_text()]
    assert answered[0] == answered[1]


def test_run_folder_says_what_was_run_on_what(watched):
    record = json.loads((watched / "run.json").read_text())
    assert record["settings"]["training"]["health_steps"] == 2 and record["versions"]["torch"] and record["command"]
    report = json.loads((watched / "data" / "report.json").read_text())
    assert report["records"] == 16
    assert (watched / "data" / "report.html").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zero1", "zero2", "zero2_offload", "zero3", "zero3_offload"])
def test_health_of_two_ranks(parts, tmp_path, name):
    """Partitioned masters and gradients add up to what one process has."""
    same = {"lora_dropout": 0, "vision_lora_dropout": 0, "health_steps": 1}
    train(parts, tmp_path / "one", per_device_train_batch_size=4, **same)
    launch(flags(parts, tmp_path / "two", deepspeed=f"zero_configs/{name}.json", **same))
    for one, two in zip(rows(tmp_path / "one"), rows(tmp_path / "two"), strict=True):
        for figure in ["grad_norm", *(name for name in one if "/" in name)]:
            assert two[figure] == pytest.approx(one[figure], rel=1e-4, abs=1e-7), figure


@pytest.mark.slow
def test_answers_of_two_ranks(parts, questions, tmp_path):
    """Under ZeRO-2 one rank answers while the other waits: the same losses as without questions."""
    same = {"deepspeed": "zero_configs/zero2.json", "max_steps": 3, "sample_steps": 2, "sample_max_new_tokens": 4}
    launch(flags(parts, tmp_path / "asked", sample_questions=questions, **same))
    launch(flags(parts, tmp_path / "alone", **same))
    assert losses(tmp_path / "asked") == losses(tmp_path / "alone")
    answered = [json.loads(line)["step"] for line in (tmp_path / "asked" / "samples.jsonl").read_text().splitlines()]
    assert answered == [0, 2, 3]
