"""A run folder for the tests of runs."""

import pytest

from llava_moslora.runs.record import write_run
from support.run_folders import open_new, save, settings


@pytest.fixture
def run(tmp_path):
    """A run with checkpoints 1 and 2, whose process has ended."""
    folder = tmp_path / "run"
    open_new(folder).release()
    write_run(folder, settings())
    for step in (1, 2):
        save(folder, step)
    return folder
