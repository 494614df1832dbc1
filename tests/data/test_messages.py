"""Every record format, in files made by hand from the formats' public descriptions; and records that are refused."""

import json
import re
import tarfile
from dataclasses import dataclass

import datasets
import pytest
import torch
from datasets import Image, List, Value

from llava_moslora.config import DataSettings
from llava_moslora.data.cache import keys_of, report_of, summary
from llava_moslora.data.collate import Collator
from llava_moslora.data.formats import FORMATS, column_names, read_records
from llava_moslora.data.image_transform import ImageTransform
from llava_moslora.errors import Refusal
from llava_moslora.text.conversation import IGNORE_INDEX, Turn
from llava_moslora.training.callbacks.sample_answers import read_samples
from support.labels import show_labels
from support.training_runs import losses, train

TRANSFORM = ImageTransform(8, (8, 8), (0.5,) * 3, (0.5,) * 3)


@dataclass
class Talk:
    """A conversation, its images before the first question."""

    rounds: list[tuple[str, str]]
    images: tuple[str, ...] = ()
    system: str | None = None

    def turns(self, names=("user", "assistant"), image="<image>\n") -> list[tuple[str, str]]:
        turns = [turn for question, answer in self.rounds for turn in ((names[0], question), (names[1], answer))]
        turns[0] = (names[0], image * len(self.images) + turns[0][1])
        return [("system", self.system), *turns] if self.system else turns

    def llava(self, untrained=0) -> dict:
        turns = [{"from": role, "value": text} for role, text in self.turns(("human", "gpt"))]
        for turn in [turn for turn in turns if turn["from"] == "gpt"][:untrained]:
            turn["train"] = False
        return {"image": list(self.images), "conversations": turns}


TALKS = [
    Talk([("What is this?", "A cat."), ("Are you sure?", "Yes, it purrs.")], ("0.png",)),
    Talk([("Hello", "Good morning."), ("And to you?", "Fine.")], system="Be brief."),
    Talk([("Compare\nthem.", "Two cats.")], ("1.png", "2.png")),
    Talk([("Name a colour.", "Red.")], ("3.png",)),
]
PLAIN = [talk for talk in TALKS if not talk.system]  # for formats without a system text
SHORT = [talk for talk in PLAIN if len(talk.rounds) == 1]
TEXTS = [Talk(talk.rounds, system=talk.system) for talk in TALKS]


def chat(talk, image="<image>\n") -> list[dict]:
    return [{"role": role, "content": text} for role, text in talk.turns(image=image)]


def parts(talk, image) -> list[dict]:
    """``chat`` with content parts, in which ``image(name)`` stands for each image."""
    messages = [one | {"content": [{"type": "text", "text": one["content"]}]} for one in chat(talk, image="")]
    first = next(one for one in messages if one["role"] == "user")
    first["content"] = [*map(image, talk.images), *first["content"]]
    return messages


def lines(path, records):
    path.write_text("\n".join(map(json.dumps, records)))
    return path


def array(path, records):
    path.write_text(json.dumps(records))
    return path


def dataset(folder, rows, key, turns):
    """As ``datasets`` holds images; a row's are among ``images``, by name."""
    features = datasets.Features({"images": List(Image()), key: turns})
    with_bytes = [
        row | {"images": [{"bytes": (folder / "images" / name).read_bytes(), "path": name} for name in row["images"]]}
        for row in rows
    ]
    return datasets.Dataset.from_list(with_bytes, features=features)


def parquet(path, data):
    data.to_parquet(path, batch_size=2)
    return path


def saved(path, data):
    data.save_to_disk(path, num_shards=2)
    return path


def shard(path, records):
    """A tar of the records and all images of the folder."""
    with tarfile.open(path, "w") as archive:
        for image in (path.parent / "images").iterdir():
            archive.add(image, f"pics/{image.name}")
        archive.add(lines(path.with_suffix(".jsonl"), records), "records.jsonl")
    return path


MESSAGE = List({"role": Value("string"), "content": Value("string")})
IN_PARTS = List({"role": Value("string"), "content": List({"type": Value("string"), "text": Value("string")})})
PAIR = List({name: Value("string") for name in ("user", "assistant", "source")})

# format, and how its file is made in a folder: source, the talks in it, and how many first answers are not trained
FILES = {
    "messages, text": ("messages", lambda at: (lines(at / "a.jsonl", [
        {"messages": chat(talk), "images": talk.images} for talk in TALKS]), TALKS)),
    "messages, no places": ("messages", lambda at: (lines(at / "b.jsonl", [
        {"messages": chat(talk, image=""), "images": [{"path": n, "bytes": None} for n in talk.images], "videos": [],
         "tools": None} for talk in TALKS]), TALKS)),
    "messages, OpenAI's parts": ("messages", lambda at: (lines(at / "c.jsonl", [
        {"messages": parts(talk, lambda n: {"type": "image_url", "image_url": {"url": n}})}
        for talk in TALKS]), TALKS)),
    "messages, parts with files": ("messages", lambda at: (array(at / "d.json", [
        {"id": k, "messages": parts(talk, lambda n: {"type": "image", "image": n})}
        for k, talk in enumerate(TALKS)]), TALKS)),
    "messages, TRL's Parquet": ("messages", lambda at: (parquet(at / "e.parquet", dataset(at, [
        {"messages": parts(talk, lambda n: {"type": "image"}), "images": talk.images} for talk in TALKS],
        "messages", IN_PARTS)), TALKS)),
    "messages, save_to_disk": ("messages", lambda at: (saved(at / "f", dataset(at, [
        {"messages": chat(talk), "images": talk.images} for talk in TALKS], "messages", MESSAGE)), TALKS)),
    "messages, a shard": ("messages", lambda at: (shard(at / "o.tar", [
        {"messages": chat(talk), "images": [f"pics/{n}" for n in talk.images]} for talk in TALKS]), TALKS)),
    "ShareGPT, LLaMA-Factory's": ("ShareGPT", lambda at: (array(at / "g.json", [
        {"conversations": [{"from": role, "value": text} for role, text in talk.turns(("human", "gpt"))
                           if role != "system"], "system": talk.system or "", "tools": "", "images": talk.images}
        for talk in TALKS]), TALKS)),
    "ShareGPT, user and assistant": ("ShareGPT", lambda at: (lines(at / "h.jsonl", [
        {"conversations": [{"from": role, "value": text} for role, text in talk.turns()], "image": talk.images or None}
        for talk in TALKS]), TALKS)),
    "ShareGPT, role and content": ("ShareGPT", lambda at: (lines(at / "i.jsonl", [
        {"conversations": chat(talk), "images": talk.images} for talk in TALKS]), TALKS)),
    "prompt and completion, text": ("prompt/completion", lambda at: (lines(at / "j.jsonl", [
        {"prompt": talk.rounds[0][0], "completion": talk.rounds[0][1], "image": talk.images[0]}
        if len(talk.images) == 1 else
        {"prompt": talk.turns()[0][1], "completion": talk.rounds[0][1], "images": talk.images}
        for talk in SHORT]), SHORT)),
    "prompt and completion, messages": ("prompt/completion", lambda at: (lines(at / "k.jsonl", [
        {"prompt": chat(talk, image="")[:-1], "completion": chat(talk)[-1:], "images": talk.images}
        for talk in TALKS]), TALKS, 1)),
    "The Cauldron": ("The Cauldron", lambda at: (parquet(at / "l.parquet", dataset(at, [
        {"texts": [{"user": q, "assistant": a, "source": "AI2D"} for q, a in talk.rounds], "images": talk.images}
        for talk in PLAIN], "texts", PAIR)), PLAIN)),
    "alpaca": ("alpaca", lambda at: (array(at / "m.json", [
        {"instruction": talk.rounds[-1][0].split("\n")[0], "input": "\n".join(talk.rounds[-1][0].split("\n")[1:]),
         "output": talk.rounds[-1][1], "system": talk.system, "history": [list(pair) for pair in talk.rounds[:-1]]}
        for talk in TEXTS]), TEXTS)),
    "alpaca, as Stanford's": ("alpaca", lambda at: (parquet(at / "n.parquet", datasets.Dataset.from_list([
        {"instruction": talk.rounds[0][0], "input": "", "output": talk.rounds[0][1]} for talk in SHORT])),
        [Talk(talk.rounds) for talk in SHORT])),
}  # fmt: skip


@pytest.fixture
def compared(tmp_path, image_folder, prepare_files, write_json):
    """``compared(name)``: the prepared file of that name and the same records in LLaVA's form."""

    def prepare_both(name):
        source, talks, *untrained = FILES[name][1](tmp_path)
        inside = source.suffix in ("", ".parquet", ".tar") and any(talk.images for talk in talks)
        rows = prepare_files(source, None if inside else image_folder, model_max_length=150)
        records = [talk.llava(untrained=len(talk.rounds) - 1 if untrained else 0) for talk in talks]
        return rows, prepare_files(write_json(records, "llava.json"), image_folder, model_max_length=150)

    return prepare_both


@pytest.mark.parametrize("name", FILES)
def test_ids_labels_and_pixels_are_those_of_llavas_form(compared, image_folder, name):
    rows, llava = compared(name)
    assert len(rows) == len(llava) > 1
    for column in ("input_ids", "labels", "length", "trained", "has_image", "record"):
        assert rows[column][:] == llava[column][:], column
    batch, expected = (Collator(0, image_folder, TRANSFORM)(list(each)) for each in (rows, llava))
    assert batch.keys() == expected.keys()
    assert all(torch.equal(batch[key], expected[key]) for key in batch if key != "record")
    assert re.match(rf"record format of \S+: {FILES[name][0]}\ndata: records: {len(rows)}  kept: ", summary(rows))
    assert "llava.json: LLaVA\n" in summary(llava)


@pytest.mark.parametrize("name", FILES)
def test_questions_to_answer_meanwhile_are_those_of_llavas_form(name, tiny, tmp_path, image_folder):
    """The model is asked for the last answer of each record, and sees the pixels that training sees."""
    source, talks, *_ = FILES[name][1](tmp_path)
    inside = source.suffix in ("", ".parquet", ".tar") and any(talk.images for talk in talks)
    asked = {"tokenizer": tiny("chatml"), "template": "chatml", "tokens_per_image": 4}
    samples = read_samples(DataSettings([str(source)], image_folder=None if inside else str(image_folder)), **asked)
    llava = array(tmp_path / "llava.json", [talk.llava() for talk in talks])
    expected = read_samples(DataSettings([str(llava)], image_folder=str(image_folder)), **asked)
    assert [[(turn.role, turn.text) for turn in sample.turns] for sample in samples] == [
        [(turn.role, turn.text) for turn in sample.turns] for sample in expected
    ]
    assert [sample.reference for sample in samples] == [talk.rounds[-1][1] for talk in talks]
    pixels = [[image.tobytes() for image in sample.images] for sample in samples]
    assert pixels == [[image.tobytes() for image in sample.images] for sample in expected]
    assert [len(sample.images) for sample in samples] == [len(talk.images) for talk in talks]


def test_one_step_of_training_over_all_files(parts, tmp_path, image_folder):
    """Its loss is that of the same records in LLaVA's form; the files lie in one mixture, with one that has images in
    it and one that has not."""
    sources, records = [], []
    for _, make in FILES.values():
        source, talks, *untrained = make(tmp_path)
        sources.append(source)
        records += [talk.llava(untrained=len(talk.rounds) - 1 if untrained else 0) for talk in talks]
    options = {"image_folder": image_folder, "max_steps": 1, "data_order": "sequential", "lora_dropout": 0,
               "vision_lora_dropout": 0, "per_device_train_batch_size": len(records), "use_cpu": True}  # fmt: skip
    train(parts, tmp_path / "all", data_path=sources, **options)
    train(parts, tmp_path / "llava", data_path=array(tmp_path / "llava.json", records), **options)
    assert losses(tmp_path / "all") == losses(tmp_path / "llava") != []


def test_every_format_has_a_file():
    assert {name for name, _ in FILES.values()} | {"LLaVA"} == {one.name for one in FORMATS}


@pytest.fixture
def refuse(tmp_path):
    """``refuse(record)``: the line that refuses a file with this record."""

    def refused(record):
        with pytest.raises(Refusal) as refusal:
            list(read_records(array(tmp_path / "data.json", [record])))
        assert refusal.value.exit_status == 2 and str(refusal.value).isprintable()
        return str(refusal.value)

    return refused


HUMAN, GPT = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}
USER, ASSISTANT = {"from": "user", "value": "Hi"}, {"from": "assistant", "value": "Ho"}


def said(content, **more):
    """A record of messages with that content of the user."""
    return {"id": 7, "messages": [{"role": "user", "content": content}, GPT], **more}


def marked(turn=GPT, **marks):
    return {"messages": [HUMAN, GPT, HUMAN, turn | marks]}


MALFORMED = [
    # no known format
    ({"id": 7, "dialog": []}, r"SCHEMA\] .*record 0 id=7: unknown record format; found keys id, dialog; "
     r"expected conversations \| messages \| prompt and completion \| texts \| instruction and output; "
     r"fix: rename columns with --data_columns, such as messages=dialog"),
    ({"prompt": "a", "chosen": "b", "rejected": "c"}, r"SCHEMA\] .*found keys prompt, chosen, rejected"),
    ({}, r"SCHEMA\] .*record 0: unknown record format; found no keys"),
    # messages
    (said("x") | {"messages": None}, r"SCHEMA\] .*record 0 id=7:messages: a record needs a non-empty .*; found null"),
    (said("x") | {"messages": []}, r"SCHEMA\] .*messages: .*; found an empty list"),
    ({"messages": ["x"]}, r"SCHEMA\] .*messages\[0\]: a turn must be an object with 'role', .*; found a string"),
    ({"messages": [USER, ASSISTANT]},
     r"SCHEMA\] .*messages\[0\]: .*'role', a string, and 'content'.*; found keys from, v"),
    (said(None), r"SCHEMA\] .*messages\[0\]: a turn must be .*; found keys role, content"),
    (said(" \n"), r"EMPTY\] .*messages\[0\].content: the human turn is empty"),
    (said([]), r"EMPTY\] .*messages\[0\].content: the human turn is empty"),
    ({"messages": [{"role": "bot", "content": "x"}]},
     r"ROLE\] .*messages\[0\].role: unknown role; found bot; expected sys"),
    ({"messages": [GPT, HUMAN]},
     r"ROLE\] .*:messages: the turns are not in order; found gpt, human; expected .*\(user\)"),
    ({"messages": [HUMAN, HUMAN, GPT]}, r"ROLE\] .*found human, human, gpt"),
    ({"messages": [HUMAN]}, r"ROLE\] .*found human; expected .*ending with gpt"),
    # content parts
    (said(["x"]), r"SCHEMA\] .*messages\[0\].content\[0\]: not a content part; found a string"),
    (said([{"type": "audio"}]), r"SCHEMA\] .*not a content part; found type audio; expected .*\"type\": \"image\""),
    (said([{"type": "text"}]), r"SCHEMA\] .*content\[0\]: not a content part; found type text"),
    (said([{"type": "video", "video": "a.mp4"}]),
     r"VIDEO\] .*content\[0\]: videos are not supported; fix: .*as images"),
    (said([{"type": "image", "image": 5}]), r"SCHEMA\] .*content\[0\].image: must be a file name .*; found 5"),
    (said([{"type": "image", "image": {"bytes": "AA"}}]), r"SCHEMA\] .*must be a file name"),
    ({"messages": [HUMAN, GPT | {"content": [{"type": "image"}]}]}, r"IMAGES\] .*messages\[1\].content\[0\]: an image "
     r"outside of user turns; found a gpt turn.*; fix: move it"),
    # URLs: nothing is downloaded
    (said([{"type": "image_url", "image_url": {"url": "https://a.b/c.png"}}]),
     r"I-PATH\] .*content\[0\].image_url: images are read from files, never from a URL; found https://a.b/c.png; "
     r"fix: save it as a file and write the file's name"),
    (said([{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}]), r"I-PATH\] .*found data:image"),
    (said("<image>\nx", images=["http://a.b/c.png"]), r"I-PATH\] .*record 0 id=7:images: .*never from a URL"),
    # images
    (said("<image>\nx", images=["a.png", "b.png"]), r"IMAGES\] .*found 1 <image>; expected 2 for 2 images"),
    (said([{"type": "image"}, {"type": "image"}], images=["a.png"]),
     r"IMAGES\] .*found 2 <image>; expected 1 for 1 im"),
    (said([{"type": "image"}]), r"IMAGES\] .*the record has an <image> line but no image"),
    (said([{"type": "image", "path": "a.png"}], images=["a.png"]),
     r"IMAGES\] .*found 1 <image>; expected 2 for 2 images"),
    (said("x", images=[None]), r"SCHEMA\] .*images: must be a file name .*; found None"),
    (said("x", images=["a"], image="b"), r"SCHEMA\] .*image, images: images under two keys; found image and.*: keep"),
    (said("x", videos=["a.mp4"]), r"VIDEO\] .*:videos: videos are not supported"),
    # tools
    ({"messages": [HUMAN, {"role": "tool", "content": "4"}, GPT]},
     r"ROLE\] .*messages\[1\]: tool calls are not supported; found tool; fix: remove the record, or write"),
    ({"messages": [HUMAN, GPT | {"content": None, "tool_calls": [{"id": 1}]}]},
     r"ROLE\] .*messages\[1\]: .*found tool_calls"),
    ({"conversations": [USER, {"from": "function_call", "value": "{}"}, {"from": "observation", "value": "4"}]},
     r"ROLE\] .*conversations\[1\]: tool calls .*; found function_call"),
    (said("x", tools='[{"name": "add"}]'), r"ROLE\] .*:tools: tool calls are not supported"),
    # the system text
    ({"system": "s", "messages": [{"role": "system", "content": "s"}, HUMAN, GPT]},
     r"ROLE\] .*:system: two system texts"),
    (said("x", system=["s"]), r"SCHEMA\] .*:system: must be a string; found an array"),
    # turns that are not trained
    (marked(train="no"),
     r"SCHEMA\] .*messages\[3\].train: a turn is either trained on or not; found 'no'; expected true"),
    (marked(loss=0.5), r"SCHEMA\] .*messages\[3\].loss: a turn is either .*; found 0.5"),
    (marked(train=True, loss=0), r"SCHEMA\] .*messages\[3\]: two marks that disagree; found train True, loss 0"),
    ({"messages": [HUMAN | {"train": True}, GPT]},
     r"SCHEMA\] .*messages\[0\].train: only the assistant's turns can be trained"),
    ({"messages": [HUMAN, GPT | {"train": False}]},
     r"LABELS\] .*record 0: no turn of this record is trained; fix: remove"),
    # ShareGPT
    ({"conversations": {}, "images": []}, r"SCHEMA\] .*conversations: a record needs a non-empty .*; found an object"),
    ({"conversations": [USER, HUMAN]},
     r"SCHEMA\] .*conversations\[0\]: a turn must be an object with 'role'.*keys from"),
    ({"conversations": [USER, {"from": "bing", "value": "x"}]},
     r"ROLE\] .*conversations\[1\].from: unknown role; found bing"),
    ({"conversations": [USER, ASSISTANT], "images": ["a.png"]}, r"IMAGES\] .*found 0 <image>; expected 1 for 1 images"),
    # prompt and completion
    ({"prompt": 5, "completion": "x"}, r"SCHEMA\] .*:prompt: .*found a number"),
    ({"prompt": "x", "completion": ""}, r"EMPTY\] .*:completion: the gpt turn is empty"),
    ({"prompt": [HUMAN, GPT], "completion": [GPT]}, r"ROLE\] .*:prompt, completion: .*found human, gpt, gpt"),
    # The Cauldron
    ({"texts": ["x"]}, r"SCHEMA\] .*texts\[0\]: must be an object with 'user' and 'assistant'; found a string"),
    ({"texts": [{"user": "x", "source": "y"}]}, r"SCHEMA\] .*texts\[0\].assistant: must be a string; found null"),
    ({"texts": [{"user": " ", "assistant": "y"}], "images": ["a"]},
     r"EMPTY\] .*texts\[0\].user: the human turn is empty"),
    # alpaca
    ({"instruction": "x", "output": 5}, r"SCHEMA\] .*:output: must be a string; found a number"),
    ({"instruction": "x", "input": ["y"], "output": "z"}, r"SCHEMA\] .*:input: must be a string; found an array"),
    ({"instruction": "x", "output": "z", "history": [["y"]]},
     r"SCHEMA\] .*history\[0\]: not a \[question, answer\] pair; found an arr"),
    ({"instruction": "x", "output": "z", "history": 3},
     r"SCHEMA\] .*history: a record needs a non-empty list .*; found a number"),
    ({"instruction": "x", "output": "z", "images": ["a.png"]}, r"IMAGES\] .*found 0 <image>; expected 1 for 1 images"),
]  # fmt: skip


@pytest.mark.parametrize(("record", "message"), MALFORMED)
def test_malformed_records_are_refused_in_one_line(refuse, record, message):
    assert re.search(message, refuse(record))


def test_marks_leave_ids_as_they_are_and_take_labels(prepare_files, write_json, tiny):
    turns = [HUMAN, GPT, HUMAN, GPT, HUMAN, GPT]
    whole = prepare_files(write_json([{"messages": turns}]), model_max_length=200)[0]
    for number, (key, off) in enumerate([("train", False), ("loss", 0), ("loss", 0.0), ("weight", 0), ("loss", False)]):
        marked = [*turns[:3], GPT | {key: off}, *turns[4:]]
        marked[0] = HUMAN | {key: off}  # a question never has labels
        marked[5] = GPT | {key: True}
        rows = prepare_files(write_json([{"messages": marked, "id": number}]), model_max_length=200)
        assert rows[0]["input_ids"] == whole["input_ids"] and rows[0]["length"] == whole["length"]
        assert 3 * rows[0]["trained"] == 2 * whole["trained"]
        assert report_of(rows)["turns_not_trained"] == 1
        shown = show_labels(rows[0]["input_ids"], rows[0]["labels"], tiny("chatml"))
        assert [part.partition("⟧")[0] for part in shown.split("⟦")[1:]] == ["Ho<|im_end|>"] * 2
        assert [rounds.count("⟦") for rounds in shown.split("<|im_start|>user")[1:]] == [1, 0, 1]


def test_a_record_cut_before_its_first_trained_turn_is_left_out(prepare_files, write_json):
    records = [{"messages": [HUMAN, GPT | {"train": False}, HUMAN, GPT]}, {"messages": [HUMAN, GPT]}]
    rows = prepare_files(write_json(records), model_max_length=200)
    assert [len(rows), rows[0]["labels"].count(IGNORE_INDEX) < rows[0]["length"]] == [2, True]
    cut = prepare_files(write_json(records), model_max_length=rows[0]["length"] - 5)
    assert cut["record"][:] == [1] and report_of(cut)["left_out"] == 1


def test_a_prompts_own_answers_are_not_trained(tmp_path):
    record = {"prompt": [HUMAN, GPT, HUMAN], "completion": [GPT]}
    (found,) = read_records(array(tmp_path / "a.json", [record]))
    assert [turn.trained for turn in found.turns if turn.role == "gpt"] == [False, True]


def test_images_are_taken_in_the_order_of_their_places(tmp_path):
    named, next_one = {"type": "image", "image": "named.png"}, {"type": "image"}
    content = [named, {"type": "text", "text": " and "}, next_one, {"type": "text", "text": "differ by <image>?"}]
    record = {"messages": [{"role": "user", "content": content}, GPT], "images": ["1.png", {"path": "2.png"}]}
    (found,) = read_records(array(tmp_path / "a.json", [record]))
    assert found.images == ("named.png", "1.png", "2.png")
    assert found.turns[0] == Turn("human", "<image>\nand\n<image>\ndiffer by <image>?")


COLUMNS = ["messages=dialog", "images=pics", "id=key"]


def test_columns_of_other_names(prepare_files, write_json, image_folder):
    records = [{"id": k, "messages": chat(talk), "images": talk.images} for k, talk in enumerate(TALKS)]
    others = [{"key": k, "dialog": chat(talk), "pics": talk.images, "id": [5], "images": "?"}
              for k, talk in enumerate(TALKS)]  # fmt: skip
    rows = prepare_files(write_json(others, "b.json"), image_folder, model_max_length=150, data_columns=COLUMNS)
    expected = prepare_files(write_json(records), image_folder, model_max_length=150)
    assert [rows[name][:] for name in expected.column_names] == [expected[name][:] for name in expected.column_names]
    with pytest.raises(Refusal, match=r"\[D-SCHEMA\] .*b\.json:record 0 .*id: must be a string or a number"):
        prepare_files(write_json(others, "b.json"), image_folder)


@pytest.mark.parametrize("shape", [list, dict], ids=["an array", "a line"])
def test_one_record_with_columns_of_other_names(prepare_files, write_json, shape):
    record = {"key": "a", "dialog": [HUMAN, GPT]}
    file = write_json([record] if shape is list else record, "one.jsonl")
    rows = prepare_files(file, model_max_length=100, data_columns=["messages=dialog", "id=key"])
    assert len(rows) == 1 and rows[0]["id"] == "a"
    with pytest.raises(Refusal, match=r"\[D-SCHEMA\] .*one\.jsonl:record 0: .*; found keys key, dialog; .*_columns"):
        prepare_files(file, model_max_length=100)


def test_columns_are_part_of_the_caches_key(prepare_files, write_json):
    file = write_json([{"messages": [HUMAN, GPT], "other": [HUMAN, GPT | {"content": "Another"}]}])
    given = ([], ["messages=messages"], ["messages=other"], ["messages=other", "id=id"], ["id=id", "messages=other"])
    rows = [prepare_files(file, model_max_length=100, data_columns=columns) for columns in given]
    keys = [keys_of(one)[0] for one in rows]
    assert len(set(keys)) == 4 and keys[3] == keys[4]
    assert rows[2]["input_ids"][:] != rows[0]["input_ids"][:] == rows[1]["input_ids"][:]


@pytest.mark.parametrize(("words", "message"), [
    (["dialog"],
     r"\[C-FLAG\] --data_columns: not a column of a record format; found dialog; expected NAME=COLUMN, NAME"),
    (["dialog=messages"], r"found dialog=messages; expected .* completion \| conversations \| "),
    (["messages="], r"found messages="),
    (["messages=a", "messages=b"], r"--data_columns: named twice; found messages=b"),
])  # fmt: skip
def test_refused_columns(prepare_files, write_json, words, message):
    with pytest.raises(Refusal, match=message):
        prepare_files(write_json([{"messages": [HUMAN, GPT]}]), model_max_length=100, data_columns=words)
    assert column_names(["messages=a=b"]) == {"messages": "a=b"}


def test_formats_may_be_mixed_in_a_file(prepare_files, write_json, image_folder):
    file = write_json([TALKS[0].llava(), {"messages": chat(TALKS[1])}, TALKS[2].llava()])
    rows = prepare_files(file, image_folder, model_max_length=150)
    assert summary(rows).startswith(f"record format of {file}: LLaVA (2), messages (1)\ndata: records: 3  ")
