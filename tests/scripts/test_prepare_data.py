"""The flags of prepare_data.py are those of training that decide what it does."""

import sys

import pytest

from llava_moslora.config import DataSettings
from llava_moslora.errors import Refusal
from scripts.prepare_data import main, parse
from support.text_runs import write_alpaca
from support.tiny import write_gemma2

REQUIRED = ["--model_name_or_path", "llm", "--data_path", "a.json", "b.json"]


def test_flags_land_in_the_settings():
    words = ["--vision_tower", "clip", "--version", "plain", "--data_weights", "1", "2.5", "--decode_images", "True"]
    model, data, report = parse([*REQUIRED, *words, "--max_bad_share", "0.1", "--report_dir", "r"])
    assert (model.model_name_or_path, model.vision_tower, model.version) == ("llm", "clip", "plain")
    assert data == DataSettings(
        ["a.json", "b.json"], data_weights=[1.0, 2.5], decode_images=True, max_bad_share=0.1
    )  # and the defaults are training's
    assert (report.report_dir, report.per_device_train_batch_size) == ("r", 16)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--image_engine", "torch"], "--image_engine: unknown flag"),  # it would have no effect
        (["--data_order", "shuffle"], "--data_order: unknown flag"),
        (["--bits", "4"], "--bits: unknown flag"),
        (["--dta_cache", "x"], r"--dta_cache: unknown flag; fix: did you mean --data_cache\?"),
        (["--on_bad_record", "skip"], "--on_bad_record: invalid choice: .*fail.*quarantine"),
        (["--model_max_length", "long"], "--model_max_length: invalid int value: 'long'"),
        (["--decode_images", "perhaps"], "--decode_images: .*perhaps"),
    ],
)
def test_wrong_flags_are_answered(words, message):
    with pytest.raises(Refusal, match=r"C-FLAG\] " + message):
        parse([*REQUIRED, *words])


def test_missing_flags_are_named():
    with pytest.raises(Refusal, match="--data_path"):
        parse(REQUIRED[:2])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--image_folder", "."], "--image_folder: has no effect without a vision tower"),
        (["--follow_image_links", "True"], "--follow_image_links: has no effect without a vision tower"),
        (["--decode_images", "True"], "--decode_images: has no effect without a vision tower"),
        (["--version", "plain"], "--version: has no effect without a vision tower"),
        (["--vision_tower", "CLIP", "--train_on_prompt", "True"], "--train_on_prompt: is for an LLM without a vision"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_flags_of_images_and_text_are_those_of_training(parts, tmp_path, monkeypatch, words, message):
    data = write_alpaca(tmp_path / "alpaca.json")
    words = [str(parts.clip) if word == "CLIP" else word for word in words]
    given = ["--model_name_or_path", parts.llm, "--data_path", data, "--data_cache", tmp_path / "cache"]
    monkeypatch.setattr(sys, "argv", ["prepare_data.py", *map(str, given), *words])
    with pytest.raises(Refusal, match=r"C-FLAG\] " + message):
        main()
    assert not (tmp_path / "cache").exists()  # before the work


def test_an_llm_that_is_not_trained_is_refused_before_the_work(tmp_path, monkeypatch):
    llm, data = write_gemma2(tmp_path / "llm"), write_alpaca(tmp_path / "alpaca.json")
    given = ["--model_name_or_path", llm, "--data_path", data, "--data_cache", tmp_path / "cache"]
    monkeypatch.setattr(sys, "argv", ["prepare_data.py", *map(str, given)])
    with pytest.raises(Refusal, match=r"C-MODEL\] .*final_logit_softcapping"):
        main()
    assert not (tmp_path / "cache").exists()
