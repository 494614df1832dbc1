"""Answers before the seconds that torch, transformers and PEFT take to import; and PEFT, which learns MOSLORA later."""

import subprocess
import sys
from functools import cache

import pytest

from support.launching import ROOT

SCRIPTS = sorted(path.name for path in (ROOT / "scripts").glob("*.py"))
HEAVY = ("torch", "transformers", "peft", "datasets", "accelerate", "deepspeed", "bitsandbytes", "gradio", "pydantic")
# Run first: at the end of the process those of them that were imported are named, and its status is 99.
NOTING = f"""
import atexit, os, runpy, sys
def check():
    if found := [name for name in {HEAVY!r} if name in sys.modules]:
        print("imported:", *found, file=sys.stderr, flush=True)
        os._exit(99)
atexit.register(check)
"""


@cache
def python(program: str, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", NOTING + program, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)


def answer(script: str, *arguments: str) -> subprocess.CompletedProcess:
    return python("del sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__')", f"scripts/{script}", *arguments)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_needs_no_library(script):
    done = answer(script, "--help")
    assert done.returncode == 0 and done.stdout.startswith("usage: "), done.stderr
    assert done.stderr == ""


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_mistyped_flag_needs_no_library(script):
    """It is named also where a flag that must be given is missing."""
    done = answer(script, "--ouptut_dir", "x")
    assert done.returncode == 2
    assert done.stderr.startswith("error[C-FLAG] --ouptut_dir: unknown flag; fix: ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--learnin_rate 1", r"--learnin_rate: unknown flag; fix: did you mean --learning_rate?"),
        ("--learning_rate fast", "--learning_rate: invalid float value: 'fast'"),
        ("--lr_scheduler_type linera", "--lr_scheduler_type: invalid choice: 'linera'"),
        ("--lr_scheduler_type Linear", "fix: did you mean linear?"),
        ("--method Dora", "fix: did you mean dora?"),
        ("--method mosolra", "fix: did you mean moslora?"),
        ("--mixer_init zeros", "--mixer_init: invalid choice: 'zeros'"),
        ("--push_to_hub True", "--push_to_hub: nothing is uploaded while training"),
        ("--config nowhere.yaml", "nowhere.yaml:--config: no such file"),
        ("--deepspeed nowhere.json", "nowhere.json:--deepspeed: no such file"),
        ("--recompute some", "--recompute: unknown mode"),
    ],
)
def test_wrong_flags_of_a_training_need_no_library(words, message):
    required = "--model_name_or_path m --data_path d --output_dir r".split()
    done = answer("train_vit_llm.py", *required, *words.split())
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize(("words", "message"), [
    ("--model_name_or_path {0}/nowhere", r"nowhere:--model_name_or_path: no such folder; fix: check the path"),
    ("--image_folder {0}/file", r"error[I-FOLDER] {0}/file: not a folder; fix: check --image_folder"),
    ("--output_dir {0}", r"error[C-OUTPUT] {0}:--output_dir: the folder is not empty; found dangling, file; fix: "),
    ("--output_dir {0}/dangling/run", r"dangling:--output_dir: a link to a place that is not there"),
])  # fmt: skip
def test_wrong_folders_of_a_training_need_no_library(tmp_path, words, message):
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "not mounted")
    folders = f"--model_name_or_path {tmp_path} --data_path d --output_dir {tmp_path}/run {words.format(tmp_path)}"
    done = answer("train_vit_llm.py", *folders.split())
    assert done.returncode == 2 and message.format(tmp_path) in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1 and sorted(path.name for path in tmp_path.iterdir()) == ["dangling", "file"]


def test_the_package_is_imported_without_libraries():
    done = python("import llava_moslora; print(llava_moslora.__version__)")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "program",
    [
        "import llava_moslora, importlib.util as u; u.find_spec('peft'); import peft",  # looked for before, as PEFT is
        "import peft, llava_moslora",
        pytest.param("import llava_moslora; from peft import PeftModel", marks=pytest.mark.slow),
        pytest.param("from llava_moslora import MosLoraConfig", marks=pytest.mark.slow),
    ],
)
def test_peft_knows_moslora_in_whatever_order_they_are_imported(program):
    check = (
        "; import sys, peft, llava_moslora"
        "; from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as known"
        "; assert known['MOSLORA'] is llava_moslora.MosLoraConfig and llava_moslora.MosLoraConfig.layer_classes"
        "; assert not any(type(finder).__name__ == '_AfterPeft' for finder in sys.meta_path)"
    )
    done = subprocess.run([sys.executable, "-c", program + check], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


# ---- --help ----


def test_help_of_a_training_fits_on_two_screens():
    lines = answer("train_vit_llm.py", "--help").stdout.splitlines()
    assert len(lines) <= 100 and max(map(len, lines)) <= 100
    assert [line[:-1] for line in lines if line.endswith(":") and not line.startswith((" ", "usage"))][:3] == [
        "model", "data", "adapters",
    ]  # fmt: skip


def test_help_names_every_flag_of_this_package_and_its_choices():
    from llava_moslora.flags import flags_of
    from llava_moslora.training.command_line import SETTINGS

    text = " ".join(answer("train_vit_llm.py", "--help").stdout.split())
    for flag in (flag for settings in SETTINGS for flag in flags_of(settings)):
        assert f" --{flag.name} " in text
        assert all(str(choice) in text for choice in flag.choices or ()), flag.name
    for name in ("learning_rate 5e-05", "lr_scheduler_type cosine", "warmup_steps 0.03", "deepspeed", "save_steps 500"):
        assert f" --{name} " in text


def test_help_all_shows_the_trainers_flags_too():
    short, whole = (answer("train_vit_llm.py", "--help", *more).stdout for more in ([], ["all"]))
    assert whole.startswith(short) and "--adam_beta1" in whole.removeprefix(short)
    assert max(map(len, whole.splitlines())) <= 100


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_has_a_text(script):
    lines = answer(script, "--help").stdout.splitlines()
    for number, line in enumerate(lines):
        if line.startswith("  -"):
            described = len(line.split("  ")) > 2 or lines[number + 1].startswith(" " * 10)
            assert described, line
