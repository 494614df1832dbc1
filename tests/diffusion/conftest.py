"""A tiny Stable Diffusion XL and pictures of a subject, for every test of this folder."""

from types import SimpleNamespace

import pytest


@pytest.fixture(scope="session")
def parts(tmp_path_factory) -> SimpleNamespace:
    """Paths of a tiny ``sdxl``, of its subject's ``pictures``, and of others of its ``kind``."""
    from support.sdxl import write_pictures, write_sdxl

    folder = tmp_path_factory.mktemp("sdxl")
    return SimpleNamespace(
        sdxl=write_sdxl(folder / "sdxl"),
        pictures=write_pictures(folder / "pictures"),
        kind=write_pictures(folder / "kind", count=3, size=96),
    )


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")
