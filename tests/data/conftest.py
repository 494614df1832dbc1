"""Data files, images and prepared data sets for the data tests."""

import json
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llava_moslora.config import DataSettings
from llava_moslora.data.prepare import prepare


@pytest.fixture
def write_json(tmp_path):
    """``write_json(records)``: the path of a data file."""

    def write(records: object, name: str = "data.json") -> Path:
        path = tmp_path / name
        path.write_text(json.dumps(records), encoding="utf-8")
        return path

    return write


@pytest.fixture
def image_folder(tmp_path):
    """A folder with 0.png … 3.png of different shapes."""
    folder = tmp_path / "images"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for k, (width, height) in enumerate([(8, 8), (20, 10), (9, 30), (5, 4)]):
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(folder / f"{k}.png")
    return folder


@pytest.fixture
def prepare_files(tiny, tmp_path):
    """``prepare_files(sources, image_folder, ...)``: a prepared data set; by default with the tiny ChatML tokenizer and
    4 tokens per image. Options are fields of ``DataSettings`` or arguments of ``prepare``."""
    names = {f.name for f in fields(DataSettings)}

    def prepare_(sources, image_folder=None, **options):
        sources = sources if isinstance(sources, list) else [sources]
        prompt = {"tokenizer": tiny("chatml"), "template": "chatml", "tokens_per_image": 4}
        settings = DataSettings(
            data_path=[str(source) for source in sources],
            image_folder=image_folder and str(image_folder),
            data_cache=str(tmp_path / "cache"),
            **{name: value for name, value in options.items() if name in names},
        )
        return prepare(settings, **prompt | {name: value for name, value in options.items() if name not in names})

    return prepare_
