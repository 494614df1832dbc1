"""Fixtures of the data tests: a data file and a folder of images."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


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
