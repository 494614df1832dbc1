"""Sample answers: fixed questions that the model answers every so many steps of training, collected on one page."""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from PIL import Image
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, TrainerCallback

from llava_moslora import pages
from llava_moslora.config import DataSettings
from llava_moslora.data.cache import Preparation
from llava_moslora.data.collate import read_record_image
from llava_moslora.data.formats import check_record, column_names
from llava_moslora.data.images import load_bytes
from llava_moslora.data.sources.source import Source, container_of
from llava_moslora.data.tokenise import naming, usable_images
from llava_moslora.errors import Refusal
from llava_moslora.files.disk import replace_file
from llava_moslora.inference.generate import answer
from llava_moslora.inference.load import ChatModel
from llava_moslora.runs.log import append_row, delete_rows_after, read_rows
from llava_moslora.text.conversation import ConversationEncoder, Turn
from llava_moslora.training.eval_mode import eval_mode

ANSWERS_FILE, ANSWERS_PAGE = "samples.jsonl", "samples.html"
MAX_QUESTIONS = 64
THUMBNAIL_SIZE = 256  # pixels of the longer side


@dataclass(frozen=True)
class Sample:
    """A question with its images; ``reference`` is the answer that the record gives."""

    images: tuple[Image.Image, ...]
    turns: tuple[Turn, ...]
    reference: str


def read_samples(
    settings: DataSettings, *, tokenizer: PreTrainedTokenizerFast, template: str, tokens_per_image: int
) -> list[Sample]:
    """The records of a file as questions: the model answers in place of the last answer of each.

    Args:
        settings: its ``data_path`` is the file, in any format of training data.
        template: name of the prompt template.
        tokens_per_image: placeholders per image; 0 without a vision tower: a record with an image is refused.

    Raises:
        Refusal: as :func:`llava_moslora.data.prepare.prepare` of the same file; D-MANY, more than
            :data:`MAX_QUESTIONS` records.
    """
    (file,) = settings.data_path
    try:
        preparation = Preparation(Source(file), settings, tokenizer, template, tokens_per_image)
        given = list(islice(_records(preparation), MAX_QUESTIONS + 1))
    except Refusal as refusal:  # which speaks of training data
        parts = {name: text and _own_flags(text) for name, text in vars(refusal).items() if name in ("key", "fix")}
        raise Refusal(**{**vars(refusal), **parts}) from None
    if len(given) > MAX_QUESTIONS:
        raise Refusal(
            "D-MANY", "too many questions to answer them repeatedly", file=file, key="--sample_questions",
            found=f"more than {MAX_QUESTIONS}", expected=f"at most {MAX_QUESTIONS}", fix="a file with a few of them",
        )  # fmt: skip
    if not given:
        raise Refusal("D-NONE", "there are no records", file=file, key="--sample_questions")
    return given


def _records(preparation: Preparation) -> Iterator[Sample]:
    source, settings = preparation.source, preparation.settings
    columns = column_names(settings.data_columns)
    encoder = ConversationEncoder(preparation.tokenizer, preparation.template)
    for file in source.shards if source.is_sharded else [source.name]:
        shard = file if source.is_sharded else ""
        for index, raw in enumerate(container_of(file).read(file, load_bytes if shard else None)):
            record = check_record(raw.value, index, file, raw.problem, columns)
            names = usable_images(record, raw, shard, preparation)
            with naming(record, file):
                encoder.encode_prompt(record.turns[:-1], [preparation.tokens_per_image] * len(names))
            where = {"record": index, "record_id": record.id or None}
            images = (
                read_record_image({"shard": shard}, name, settings.image_folder, settings.follow_image_links, where)
                for name in names
            )
            yield Sample(tuple(images), record.turns[:-1], record.turns[-1].text)


def _own_flags(text: str) -> str:
    return text.replace("--data_path", "--sample_questions").replace("--image_folder", "--sample_image_folder")


class SampleAnswers(TrainerCallback):
    """Answers ``samples`` at the start, every ``steps`` steps and at the end, greedily, on the main process.

    Prints them and writes ``samples.jsonl`` and ``samples.html`` (images included, readable without a network).
    Training is not affected: random states, modes and gradients stay as they were.

    Args:
        samples: without any it does nothing.
        chat_model: the model in training with its tokenizer, template and image transform.
        run: the run folder.
    """

    def __init__(self, samples: Sequence[Sample], chat_model: ChatModel, run: Path, *, steps: int, max_new_tokens: int):
        self.samples, self.chat_model, self.run = samples, chat_model, run
        self.steps, self.max_new_tokens = steps, max_new_tokens

    def on_train_begin(self, args, state, control, **_):
        if self.samples and state.is_world_process_zero:
            delete_rows_after(self.run / ANSWERS_FILE, state.global_step)
            rows = read_rows(self.run / ANSWERS_FILE)
            if not rows or rows[-1]["step"] != state.global_step:  # a resumed run may have them already
                self.answer_samples(state.global_step)

    def on_step_end(self, args, state, control, **_):
        step = state.global_step
        if self.samples and state.is_world_process_zero and (step % self.steps == 0 or step == state.max_steps):
            self.answer_samples(step)

    def answer_samples(self, step: int) -> None:
        questions = [(sample.images, sample.turns) for sample in self.samples]
        with eval_mode(self.chat_model.model):
            answers = list(answer(self.chat_model, questions, max_new_tokens=self.max_new_tokens))
        for sample, text in zip(self.samples, answers, strict=True):
            tqdm.write(f"step {step} · {sample.turns[-1].text.strip()!r} → {text!r}")
        append_row(self.run / ANSWERS_FILE, {"step": step, "answers": answers})
        rows = read_rows(self.run / ANSWERS_FILE)
        write_page(self.run / ANSWERS_PAGE, self.samples, rows, str(self.run))


def write_page(file: Path, samples: Sequence[Sample], rows: list[dict], title: str) -> None:
    """One section per question with its images, its answers by step, the newest last, and the reference."""
    sections = []
    for number, sample in enumerate(samples):
        images = "".join(pages.thumbnail(image, THUMBNAIL_SIZE) for image in sample.images)
        turns = "".join(f"<p class={turn.role}>{html.escape(turn.text)}</p>" for turn in sample.turns)
        answers = [(row["step"], row["answers"][number]) for row in rows]
        table = pages.table([*answers, ("reference", sample.reference)])
        sections.append(f"<article><div class=images>{images}</div><div>{turns}{table}</div></article>")
    body = f"<p>{len(samples)} questions, answered at {len(rows)} steps.</p>{''.join(sections)}"
    replace_file(file, pages.page(title, body, STYLE).encode())


STYLE = """
p { white-space: pre-wrap; margin: 0 0 .4em; } article { display: flex; gap: 1.5em; padding: 1em 0; }
.images { flex: 0 0 256px; } .images img { display: block; margin-bottom: .5em; }
.human { font-weight: 600; } .gpt, .system { color: #777; }
td { padding: .1em .8em .1em 0; vertical-align: top; white-space: pre-wrap; }
td:first-child { text-align: right; color: #777; white-space: nowrap; }
tr:last-child td { color: var(--a); border-top: 1px solid var(--line); }
"""
