"""Tiny parts for the fault tests, with complete epochs of records."""

from types import SimpleNamespace

import pytest

from support.campaign import RECORDS


@pytest.fixture(scope="session")
def parts(tmp_path_factory) -> SimpleNamespace:
    from support.tiny import write_clip, write_data, write_llm, write_projector

    folder = tmp_path_factory.mktemp("parts")
    return SimpleNamespace(
        llm=write_llm(folder / "llm"),
        clip=write_clip(folder / "clip"),
        projector=write_projector(folder / "projector.safetensors"),
        data=write_data(folder / "data", RECORDS),
        images=folder / "data" / "images",
    )
