"""The flags of prepare_data.py are those of training that decide what it does."""

import pytest

from llava_moslora.config import DataSettings
from llava_moslora.errors import Refusal
from scripts.prepare_data import parse

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
