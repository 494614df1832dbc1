"""Asking a benchmark: batches fixed beforehand, nothing lost or asked twice after a kill, nothing mixed."""

import json
import random

import pytest

import llava_moslora.evaluation.ask as module
from llava_moslora.data.images import load_bytes
from llava_moslora.errors import Refusal
from llava_moslora.evaluation.ask import Questions, ask, read_answers, source_header
from llava_moslora.evaluation.benchmarks import BENCHMARKS
from llava_moslora.evaluation.checks import open_benchmark
from llava_moslora.evaluation.prompts import prompt
from llava_moslora.evaluation.scoring import question_of
from llava_moslora.inference.generate import answer
from llava_moslora.inference.load import load
from llava_moslora.runs.checkpoints import newest_checkpoint
from llava_moslora.text.conversation import Turn
from support.export_runs import trained_run
from support.golden_cases import tiny_files

FILES = tiny_files(random.Random(0))
HEADER = {"model": "m", "checkpoint": None}


@pytest.fixture(scope="module")
def run(parts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ask") / "run"
    trained_run(folder, parts.llm, parts.clip, parts.projector)
    return folder


@pytest.fixture(scope="module")
def chat_model(run):
    return load(run)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for name, (text, _) in FILES.items():
        (folder / f"{name}.tsv").write_text(text, encoding="utf-8")
    return folder


def questions(data, name, **changes):
    settings = {"prompts": "prompts-2024", "batch_size": 4} | changes
    return Questions.of(BENCHMARKS[name], open_benchmark(BENCHMARKS[name], data), **settings)


def lines(folder):
    return [json.loads(line) for file in sorted(folder.glob("*.jsonl")) for line in file.read_text().splitlines()]


@pytest.fixture
def calls(monkeypatch):
    """Counts questions that reach the model."""
    asked = []

    def counted(chat_model, batch, **how):
        asked.extend(turns[0].text for _, turns in batch)
        return answer(chat_model, batch, **how)

    monkeypatch.setattr(module, "answer", counted)
    return asked


@pytest.mark.parametrize("name", ["mmbench_en", "textvqa", "mme"])
def test_answers_are_those_of_the_packages_own_generation(chat_model, data, tmp_path, name):
    asked = questions(data, name, limit=3, batch_size=1)
    ask(chat_model, asked, HEADER, tmp_path)
    header, answers = read_answers(tmp_path, HEADER)
    assert header == HEADER | asked.header() | {"template": "chatml", "dtype": "torch.float32"}
    assert set(answers) == {row["index"] for row in asked.rows}
    for number, row in zip(asked.numbers, asked.rows, strict=True):
        text = prompt(row, asked.benchmark.kind, "prompts-2024")
        alone = [(asked.table.images(number), [Turn("human", f"<image>\n{text}")])]
        assert answers[row["index"]] == next(
            answer(chat_model, alone, max_new_tokens=asked.benchmark.max_new_tokens, batch_size=1)
        )
        assert {"index": row["index"], "prompt": text, "answer": answers[row["index"]]} in lines(tmp_path)


def test_batches_are_cut_by_length_and_hold_every_row_once(chat_model, data):
    asked = questions(data, "sciqa", batch_size=7)
    batches = asked.batches(chat_model.tokenizer)
    numbers = [number for batch in batches for number in batch]
    assert sorted(numbers) == list(asked.numbers) == list(range(60)) and {len(batch) for batch in batches[:-1]} == {7}
    lengths = [len(chat_model.tokenizer(asked.prompt(number))["input_ids"]) for number in numbers]
    assert lengths == sorted(lengths, reverse=True) and lengths[0] > lengths[-1]


def test_a_limit_is_a_sample_of_whole_units(data):
    asked = questions(data, "mmbench_cn", limit=5)
    groups = {question_of(row) for row in asked.rows}
    assert len(groups) == 5 and max(groups) > 20 and min(groups) < 20
    assert groups < {question_of(row) for row in questions(data, "mmbench_cn", limit=6).rows}
    assert len(asked.rows) == sum(question_of(row) in groups for row in asked.table.rows)
    pairs = [row["image_path"] for row in questions(data, "mme", limit=7).rows]
    assert len(pairs) == 14 and all(pairs.count(name) == 2 for name in pairs)
    assert len({row["category"] for row in questions(data, "mme", limit=14).rows}) == 14
    assert len(questions(data, "mme", limit=1000).rows) == len(questions(data, "mme").rows) == 140


def test_a_stopped_evaluation_asks_only_what_is_open(chat_model, data, tmp_path, calls):
    """Cut anywhere, the answers end the same, and batches that were complete are not asked again."""
    asked = questions(data, "seed", limit=10)
    ask(chat_model, asked, HEADER, tmp_path / "whole")
    file = tmp_path / "whole" / "answers-0.jsonl"
    whole = file.read_bytes()
    ends = [place + 1 for place, byte in enumerate(whole) if byte == 10]  # header, then ten answers
    batches = asked.batches(chat_model.tokenizer)
    random_ = random.Random(1)
    for cut in [0, 5, ends[0], ends[4], ends[4] + 1, ends[5], len(whole) - 1, *random_.sample(range(len(whole)), 5)]:
        folder = tmp_path / str(cut)
        folder.mkdir()
        (folder / file.name).write_bytes(whole[:cut])
        kept = max(0, sum(end <= cut for end in ends) - 1)
        calls.clear()
        ask(chat_model, asked, HEADER, folder)
        assert (folder / file.name).read_bytes() == whole
        assert len(calls) == sum(map(len, batches[kept // 4 :])), cut
    calls.clear()
    ask(chat_model, asked, HEADER, tmp_path / "whole")
    assert calls == [] and file.read_bytes() == whole


def test_two_ranks_share_the_batches(chat_model, data, tmp_path, monkeypatch, calls):
    """As two processes would: rank 0 says what is open, each asks its own; later one rank alone finishes."""
    asked = questions(data, "seed", limit=18)
    ask(chat_model, asked, HEADER, tmp_path / "one")
    monkeypatch.setattr(module, "world_size", lambda: 2)
    for number in (0, 1):
        monkeypatch.setattr(module, "rank", lambda number=number: number)
        monkeypatch.setattr(module, "from_rank_0", lambda value: set())
        if number:
            (tmp_path / "two").mkdir(exist_ok=True)
        ask(chat_model, asked, HEADER, tmp_path / "two")
    first, second = ((tmp_path / "two" / f"answers-{number}.jsonl").read_text().splitlines() for number in (0, 1))
    assert (len(first), len(second)) == (1 + 4 + 4 + 2, 1 + 4 + 4) and first[0] == second[0]
    answers = read_answers(tmp_path / "one", HEADER)[1]
    assert read_answers(tmp_path / "two", HEADER)[1] == answers
    (tmp_path / "two" / "answers-1.jsonl").write_text("\n".join(second[:3]) + '\n{"index": "')
    monkeypatch.undo()
    ask(chat_model, asked, HEADER, tmp_path / "two")
    assert read_answers(tmp_path / "two", HEADER)[1] == answers
    assert len(lines(tmp_path / "two")) == 2 + 18


@pytest.mark.parametrize("field, value", [("model", "other"), ("checkpoint", "checkpoint-3")])
def test_answers_of_another_model_are_refused(chat_model, data, tmp_path, field, value):
    asked = questions(data, "seed", limit=1)
    ask(chat_model, asked, HEADER, tmp_path)
    with pytest.raises(Refusal, match=rf"C-ANSWERS\] .*answers-0.jsonl:{field}: answers of another evaluation; found"):
        ask(chat_model, asked, HEADER | {field: value}, tmp_path)


@pytest.mark.parametrize("changes, field", [
    ({"limit": 2}, "limit"), ({"batch_size": 3}, "batch_size"), ({"prompts": "prompts"}, "prompts"),
])  # fmt: skip
def test_answers_to_other_questions_are_refused(chat_model, data, tmp_path, changes, field):
    ask(chat_model, questions(data, "seed", limit=1), HEADER, tmp_path)
    with pytest.raises(Refusal, match=rf"answers-0.jsonl:{field}: answers of another"):
        ask(chat_model, questions(data, "seed", **({"limit": 1} | changes)), HEADER, tmp_path)


def test_other_data_template_or_dtype_is_refused(chat_model, data, tmp_path):
    asked = questions(data, "seed", limit=1)
    ask(chat_model, asked, HEADER, tmp_path)
    file = tmp_path / "answers-0.jsonl"
    header, row = file.read_text().splitlines()
    for field in ("data", "template", "dtype", "llava_moslora"):
        changed = json.loads(header)
        changed["header"][field] = "other"
        file.write_text(f"{json.dumps(changed)}\n{row}\n")
        with pytest.raises(Refusal, match=rf"answers-0.jsonl:{field}: answers of another evaluation; found other"):
            ask(chat_model, asked, HEADER, tmp_path)


@pytest.mark.parametrize("line", ["{}", "[]", '"index"', "no json", '{"index": "1"}', "null", '{"header": 1}'])
def test_a_damaged_line_is_refused(chat_model, data, tmp_path, line):
    asked = questions(data, "seed", limit=1)
    ask(chat_model, asked, HEADER, tmp_path)
    file = tmp_path / "answers-0.jsonl"
    whole = file.read_text()
    file.write_text(f"{whole}{line}\n")
    with pytest.raises(Refusal, match=r"answers-0.jsonl:record 2: a damaged line"):
        ask(chat_model, asked, HEADER, tmp_path)
    file.write_text(f"{line}\n{whole}")
    with pytest.raises(Refusal, match=r"answers-0.jsonl:record 0: a damaged line"):
        ask(chat_model, asked, HEADER, tmp_path)


def test_the_model_is_named_by_its_files(run, parts):
    checkpoint = newest_checkpoint(run)
    named = source_header(run, checkpoint)
    assert named["checkpoint"] == checkpoint.name and len(named["model"]) == 64
    assert source_header(parts.llm, None) == source_header(parts.llm, None) != source_header(parts.clip, None)


def test_only_the_first_image_of_a_row_is_shown(data, monkeypatch):
    asked = questions(data, "seed", limit=1)
    images = asked.table.images(asked.numbers[0])
    monkeypatch.setattr(asked.table, "images", lambda number: images * 3)
    assert asked.image_and_prompt(asked.numbers[0])[0] == images


def test_an_image_that_is_none_is_refused(chat_model, data, tmp_path, monkeypatch):
    asked = questions(data, "seed", limit=1)
    monkeypatch.setattr(asked.table, "images", lambda number: [load_bytes(b"no image", "file.tsv", record=number)])
    with pytest.raises(Refusal, match=r"I-"):
        ask(chat_model, asked, HEADER, tmp_path)
