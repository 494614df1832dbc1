"""The command ``llava-moslora``, in a checkout and as an installed wheel without one."""

import os
import shutil
import subprocess
import sys
import zipfile
from configparser import ConfigParser
from pathlib import Path
from types import SimpleNamespace

import pytest

from llava_moslora import cli
from llava_moslora._version import __version__
from llava_moslora.errors import Refusal
from llava_moslora.flags import BY_COMMAND, call_of

ROOT = Path(__file__).parents[1]


def called(monkeypatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["llava-moslora", *words])
    monkeypatch.setenv(BY_COMMAND, "")  # what is set is undone after the test
    cli.dispatch()


def test_help_names_every_command(monkeypatch, capsys):
    called(monkeypatch)
    text = capsys.readouterr().out
    assert all(f"\n  {name} " in text for name in (*cli.COMMANDS, "recipes")) and "{" not in text
    called(monkeypatch, "--version")
    assert capsys.readouterr().out == f"{__version__}\n"


def test_every_script_is_a_command():
    scripts = {file.name for file in (ROOT / "scripts").glob("*.py")}
    assert {script for script, _ in cli.COMMANDS.values()} == scripts


@pytest.mark.parametrize("words, match", [
    (["trian"], r"C-FLAG\] unknown command; found trian; expected train \| .* \| recipes; fix: did you mean train\?"),
    (["zzz"], "fix: see llava-moslora --help"),
    (["recipes", "llama3"], r"C-FLAG\] recipes: no such recipe; found llama3; expected internlm2_7b_pretrain \| "),
    (["train", "--num_gpus"], r"--num_gpus: not a number of GPUs; found nothing; expected at least 1"),
    (["train", "--num_gpus", "0"], r"--num_gpus: not a number of GPUs; found 0"),
])  # fmt: skip
def test_refused(monkeypatch, words, match):
    with pytest.raises(Refusal, match=match):
        called(monkeypatch, *words)


@pytest.mark.parametrize(("script", "words", "shown"), [
    ("", [], "python scripts/export.py"),
    ("scripts/train_vit_llm.py", ["runs/with space ü"], "python scripts/export.py 'runs/with space ü'"),
    (ROOT / "scripts" / "train_vit_llm.py", [], f"python {ROOT / 'scripts' / 'export.py'}"),
    ("elsewhere/main.py", ["a;b"], "python scripts/export.py 'a;b'"),
])  # fmt: skip
def test_what_to_do_next_can_be_pasted(monkeypatch, script, words, shown):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [str(script)])
    monkeypatch.delenv(BY_COMMAND, raising=False)
    assert call_of("export", *words) == shown


@pytest.mark.parametrize("words", [["train"], ["train", "--num_gpus", "2"]])
def test_what_to_do_next_is_said_in_the_words_that_were_used(monkeypatch, words):
    said: list[str] = []
    monkeypatch.setattr(cli, "os", SimpleNamespace(environ=os.environ, execv=lambda *_: said.append(call_of("export"))))
    monkeypatch.setattr(cli.runpy, "run_path", lambda *_, **__: said.append(call_of("convert_adapter", "a b")))
    called(monkeypatch, *words)
    assert said[-1] == "llava-moslora convert-adapter 'a b'" and all(text.startswith("llava-moslora ") for text in said)


def test_several_gpus_start_the_launcher(monkeypatch):
    seen: list = []
    monkeypatch.setattr(os, "execv", lambda *given: seen.append(given))
    monkeypatch.setattr(cli.runpy, "run_path", lambda *_, **__: None)
    called(monkeypatch, "train", "--num_gpus", "4", "--bf16", "True")
    ((launcher, words),) = seen
    assert Path(launcher).name == "deepspeed" and words[1:5] == ["--num_gpus", "4", "--master_addr", "127.0.0.1"]
    assert words[5:] == [str(ROOT / "scripts" / "train_vit_llm.py"), "--bf16", "True"]


def test_every_package_is_in_the_wheel():
    config = ConfigParser()
    config.read(ROOT / "setup.cfg")
    listed = set(config["options"]["packages"].split())
    found = {".".join(file.parent.relative_to(ROOT).parts) for file in (ROOT / "llava_moslora").rglob("__init__.py")}
    assert listed == found | {"llava_moslora.scripts", "llava_moslora.zero_configs"}


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder with the wheel's files, built from a copy of the tree."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("llava_moslora", "scripts", "zero_configs"):
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", build, str(folder)], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def run_installed(installed: Path, cwd: Path, *command: str, **variables: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(installed)} | variables
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


def test_an_installed_wheel_needs_no_checkout(installed, tmp_path):
    """Type marker, recipes, DeepSpeed files and scripts are there; a recipe starts where the user is."""
    module = [sys.executable, "-m", "llava_moslora.cli"]
    assert (installed / "llava_moslora" / "py.typed").is_file()
    listed = run_installed(installed, tmp_path, *module, "recipes")
    names = [line.split()[0] for line in listed.stdout.splitlines()]
    assert names == sorted(cli.recipes()) and "llama3_8b_moslora" in names
    recipe = run_installed(installed, tmp_path, *module, "recipes", "llama3_8b_moslora").stdout.strip()
    assert Path(recipe).is_relative_to(installed)
    (tmp_path / "deepspeed").write_text('#!/bin/sh\npwd\nfor word in "$@"; do echo "$word"; done\n')
    (tmp_path / "deepspeed").chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    started = run_installed(installed, tmp_path, "bash", recipe, PATH=path).stdout.splitlines()
    assert started[0] == str(tmp_path)
    script, config = Path(started[5]), Path(started[7])
    assert script == installed / "llava_moslora/scripts/train_vit_llm.py" and script.is_file()
    assert config.is_relative_to(installed) and config.read_text() == (ROOT / "zero_configs/zero2.json").read_text()
    for name in cli.COMMANDS:
        done = run_installed(installed, tmp_path, *module, name, "--help")
        assert done.returncode == 0 and "usage: " in done.stdout, (name, done.stderr)
    done = run_installed(installed, tmp_path, *module, "export", "--outptu_dir", "x")
    assert done.returncode == 2 and done.stderr.startswith(
        "error[C-FLAG] --outptu_dir: unknown flag; fix: did you mean"
    )
