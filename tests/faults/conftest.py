"""Tiny parts for the fault tests, with complete epochs of records; a disk that fails, and commands that write to it."""

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


SCRIPTS = (
    "prepare_data export evaluate convert_adapter convert_internlm2 evaluate_commonsense evaluate_subjects plan study "
    "chat serve"
)


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    from support import full_disk
    from support.warm_server import WarmServer

    library = full_disk.library(tmp_path_factory.mktemp("library"))
    modules = [*(f"scripts.{name}" for name in SCRIPTS.split()), "llava_moslora.export.verify"]
    with WarmServer(environment={"LD_PRELOAD": str(library)}, modules=modules) as warm_server:
        yield warm_server


@pytest.fixture
def disk(server, tmp_path):
    from support.full_disk import Disk

    return Disk(server, tmp_path)


@pytest.fixture(scope="session")
def run(parts, tmp_path_factory):
    from support.export_runs import trained_run

    run = tmp_path_factory.mktemp("run") / "run"
    trained_run(run, parts.llm, parts.clip, parts.projector)
    return run
