"""The settings of a tower's image processor: old and new files, and what training would not follow is refused."""

import json
from pathlib import Path

import pytest

from llava_moslora.errors import Refusal
from llava_moslora.models.preprocessing import (
    SIGLIP_PROCESSOR,
    check_settings,
    processor_settings,
    read_preprocessing,
)

HALVES = [0.5] * 3
OLD = {"size": 33, "crop_size": 33, "image_mean": HALVES, "image_std": HALVES, "resample": 3}


def test_old_and_new_config_files(tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(OLD))
    expected = processor_settings({"shortest_edge": 33}, {"height": 33, "width": 33}, HALVES, HALVES, 3)
    assert read_preprocessing(tmp_path, 33) == expected
    (tmp_path / "preprocessor_config.json").rename(tmp_path / "old.json")
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": OLD}))
    assert read_preprocessing(tmp_path, 33) == expected


def test_missing_settings_are_refused(tmp_path):
    with pytest.raises(Refusal, match=r"\[K-MISSING\] .*preprocessor_config.json: the tower's image processor"):
        read_preprocessing(tmp_path, 33)
    (tmp_path / "preprocessor_config.json").write_text('{"size": 33, "image_std": [1, 1, 1]}')
    with pytest.raises(Refusal, match=r"\[K-PROCESSOR\] .*image_mean: not usable; expected three numbers"):
        read_preprocessing(tmp_path, 33)


@pytest.mark.parametrize(
    "change",
    [
        {"do_resize": False},
        {"do_rescale": False},
        {"do_normalize": False},
        {"do_center_crop": "no"},
        {"rescale_factor": 0},
        {"rescale_factor": "1/255"},
        {"image_std": [0, 0, 0]},
        {"image_std": 0.5},
        {"image_mean": ["0.5"] * 3},
        {"size": 10**6},
        {"size": {"shortest_edge": None}},
        {"size": {"height": 33}},
        {"crop_size": "33"},
        {"resample": "bicubic"},
    ],
)
def test_settings_that_would_not_be_followed_are_refused(change):
    (key,) = change
    good = processor_settings({"height": 33, "width": 33}, None, HALVES, HALVES, 3, SIGLIP_PROCESSOR)
    check_settings(good, Path("tower.json"))
    with pytest.raises(Refusal, match=rf"\[K-PROCESSOR\] tower.json:{key}: .*; expected ") as refusal:
        check_settings(good | change, Path("tower.json"))
    assert refusal.value.found == change[key]
