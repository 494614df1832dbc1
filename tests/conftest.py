"""Fixtures that tests of several folders share; what they build is in ``support/``, imported only when asked for."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session")
def parts(tmp_path_factory) -> SimpleNamespace:
    """Paths of a tiny ``llm``, ``clip``, ``siglip``, ``projector``, ``data`` (JSON) and its ``images``."""
    from support.tiny import write_clip, write_data, write_llm, write_projector, write_siglip

    folder = tmp_path_factory.mktemp("parts")
    return SimpleNamespace(
        llm=write_llm(folder / "llm"),
        clip=write_clip(folder / "clip"),
        siglip=write_siglip(folder / "siglip"),
        projector=write_projector(folder / "projector.safetensors"),
        data=write_data(folder / "data"),
        images=folder / "data" / "images",
    )


@pytest.fixture(scope="session")
def warm_server():
    """The server that starts training commands without importing everything again, see ``support/warm_server.py``."""
    from support.warm_server import WarmServer

    with WarmServer() as server:
        yield server


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """``tiny_folder(name)``: the saved folder of a tiny tokenizer, a key of ``support.tokenizer_folders.TINY``."""
    from support.tokenizer_folders import TINY

    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = TINY[name](tmp_path_factory.mktemp(name))
        return made[name]

    return folder


@pytest.fixture(scope="session")
def real_folder(tmp_path_factory):
    """``real_folder(name)``: the folder of a published tokenizer, a key of ``support.tokenizer_folders.REAL``; skips
    where it is not found."""
    from support.tokenizer_folders import REAL

    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = REAL[name](tmp_path_factory.mktemp(f"real-{name}"))
        return made[name]

    return folder


@pytest.fixture(scope="session")
def tiny(tiny_folder):
    """``tiny(name)``: a tiny tokenizer, prepared for images."""
    return _loader(tiny_folder)


@pytest.fixture(scope="session")
def real(real_folder):
    """``real(name)``: a published tokenizer, prepared for images."""
    return _loader(real_folder)


def _loader(folder):
    from llava_moslora.text.tokenizer import load_tokenizer

    loaded = {}

    def tokenizer(name: str):
        if name not in loaded:
            loaded[name] = load_tokenizer(folder(name))
        return loaded[name]

    return tokenizer
