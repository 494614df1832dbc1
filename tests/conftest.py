"""Fixtures that all rooms share; the tiny parts themselves are built in ``tiny.py``."""

import os
from types import SimpleNamespace

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session")
def parts(tmp_path_factory) -> SimpleNamespace:
    """Paths of a tiny ``llm``, ``clip``, ``siglip``, ``projector``, ``data`` (JSON) and its ``images``."""
    from tiny import (
        write_clip,
        write_data,
        write_llm,
        write_projector,
        write_siglip,
    )  # seconds of imports that most tests do not need

    folder = tmp_path_factory.mktemp("parts")
    return SimpleNamespace(
        llm=write_llm(folder / "llm"),
        clip=write_clip(folder / "clip"),
        siglip=write_siglip(folder / "siglip"),
        projector=write_projector(folder / "projector.safetensors"),
        data=write_data(folder / "data"),
        images=folder / "data" / "images",
    )
