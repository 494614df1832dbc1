"""Runs and exports loaded to answer, answers in pieces, and the terminal chat over both."""

import subprocess
import sys
import threading
import time

import pytest
import torch
from PIL import Image

from llava_moslora.errors import Refusal
from llava_moslora.export.export import export
from llava_moslora.inference.generate import answer, batch, first_logits
from llava_moslora.inference.load import load
from llava_moslora.inference.stream import stream
from llava_moslora.text.conversation import Turn
from support.export_runs import trained_run
from support.launching import ROOT


@pytest.fixture(scope="module")
def folders(parts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    trained_run(folder / "run", parts.llm, parts.clip, parts.projector)
    return {"run": folder / "run", "export": export(folder / "run", folder / "export", prove=False)["hf"]}


def questions(parts) -> list:
    image = Image.open(parts.images / "0.png").convert("RGB")
    follow_up = [Turn("human", "<image>\nwhat colour?"), Turn("gpt", "blue"), Turn("human", "is it?")]
    return [
        ([image], [Turn("human", "<image>\nwhat colour?")]),
        ([], [Turn("human", "yes?")]),
        ([image], follow_up),
    ]


def test_a_run_and_its_export_are_asked_alike(folders, parts):
    run, merged = load(folders["run"]), load(folders["export"])
    assert merged.template == run.template and merged.transform == run.transform
    for question in questions(parts):
        expected = first_logits(run, question)
        assert (first_logits(merged, question) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_pieces_are_the_whole_answer(folders, parts):
    chat_model = load(folders["export"])
    for question in questions(parts):
        pieces = list(stream(chat_model, question, max_new_tokens=24))
        assert "".join(pieces) == next(answer(chat_model, [question], max_new_tokens=24))
    assert any(len(list(stream(chat_model, question, max_new_tokens=24))) > 1 for question in questions(parts))


def test_a_stream_can_be_left_and_its_errors_arrive(folders, parts, monkeypatch):
    chat_model = load(folders["run"])
    pieces = stream(chat_model, questions(parts)[0], max_new_tokens=10_000)
    next(pieces)
    pieces.close()  # returns only when the generation has ended: 10,000 tokens would take minutes

    def broken(**_):
        raise RuntimeError("out of luck")

    monkeypatch.setattr(chat_model.model, "generate", broken)
    with pytest.raises(RuntimeError, match="out of luck"):
        list(stream(chat_model, questions(parts)[0]))


def test_an_answer_ends_when_it_is_told_to(folders, parts):
    chat_model, question, stopped = load(folders["run"]), questions(parts)[0], threading.Event()
    whole = "".join(stream(chat_model, question, max_new_tokens=200))
    begun = time.monotonic()
    short = "".join(stream(chat_model, question, max_new_tokens=200, max_seconds=0.01))
    assert whole.startswith(short) and len(short) < len(whole) and time.monotonic() - begun < 10
    pieces = stream(chat_model, question, max_new_tokens=2000, stopped=stopped)
    said = [next(pieces)]
    stopped.set()
    said += pieces
    assert len("".join(said)) < len("".join(stream(chat_model, question, max_new_tokens=2000)))


def test_the_positions_of_the_llm_are_not_exceeded(folders, parts, monkeypatch):
    chat_model, question = load(folders["run"]), questions(parts)[1]
    prompt = batch(chat_model, [question])["input_ids"].shape[1]
    config = chat_model.model.config.text_config
    expected = "".join(stream(chat_model, question, max_new_tokens=3))
    monkeypatch.setattr(config, "max_position_embeddings", prompt + 3)
    assert "".join(stream(chat_model, question, max_new_tokens=100)) == expected
    monkeypatch.setattr(config, "max_position_embeddings", prompt)
    with pytest.raises(
        Refusal, match=rf"D-LENGTH\] .* found {prompt} tokens; expected fewer than {prompt}; fix: .*over"
    ):
        next(stream(chat_model, question))


def test_sampling_is_asked_for(folders, parts):
    chat_model, question = load(folders["export"]), questions(parts)[0]
    torch.manual_seed(0)
    warm = {"".join(stream(chat_model, question, max_new_tokens=12, temperature=5.0)) for _ in range(3)}
    assert len(warm) > 1


def test_every_token_can_be_sampled(folders, parts, monkeypatch):
    """``top_p`` alone decides: not the 50 most likely tokens, which transformers takes if it is not told otherwise."""
    chat_model, question, scores = load(folders["export"]), questions(parts)[0], []
    stock = chat_model.model.generate

    def generate(**how):
        scores.append(stock(**how, return_dict_in_generate=True, output_scores=True).scores[0])

    monkeypatch.setattr(chat_model.model, "generate", generate)
    "".join(stream(chat_model, question, max_new_tokens=1, temperature=1.0))
    assert scores[0].isfinite().all()


def test_neither_a_run_nor_an_export(tmp_path):
    with pytest.raises(Refusal, match=r"C-PATH\] .*: neither a run nor a model; expected .*run\.json"):
        load(tmp_path)
    with pytest.raises(Refusal, match=r"C-PATH\] .*nowhere: no such folder"):
        load(tmp_path / "nowhere")


def test_the_chat_in_the_terminal(folders, parts):
    """Two turns about one image, a wrong file and a typed placeholder between them; the answers are those asked for
    in one go."""
    lines = [
        "what colour?",
        "/image nowhere.png",
        "<image> and this?",
        "is it?",
        "/clear",
        "yes?",
        "/exit",
        "not asked",
    ]
    command = [sys.executable, "scripts/chat.py", folders["export"], "--image", parts.images / "0.png",
               "--max_new_tokens", "8"]  # fmt: skip
    done = subprocess.run(
        [str(word) for word in command], input="\n".join(lines), capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    chat_model = load(folders["export"])
    image = Image.open(parts.images / "0.png").convert("RGB")
    turns = [Turn("human", "<image>\nwhat colour?")]
    first = next(answer(chat_model, [([image], turns)], max_new_tokens=8))
    turns += [Turn("gpt", first), Turn("human", "is it?")]
    second = next(answer(chat_model, [([image], turns)], max_new_tokens=8))
    third = next(answer(chat_model, [([], [Turn("human", "yes?")])], max_new_tokens=8))
    said = [f"you> what colour?\n{first}\n", f"you> is it?\n{second}\n", f"you> yes?\n{third}\n"]
    assert all(text in done.stdout for text in said), done.stdout
    assert "more" not in done.stdout
    assert "nowhere.png" in done.stderr and "error[D-IMAGES]" in done.stderr and "Traceback" not in done.stderr
