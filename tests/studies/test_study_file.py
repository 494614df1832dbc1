"""A study's file: what it means, and every mistake refused with file and key before anything starts."""

import json
import re
from pathlib import Path

import pytest

from llava_moslora.errors import Refusal
from llava_moslora.models.names import SDXL_PARTS
from llava_moslora.studies.metrics import OF_ADAPTERS, check_metrics
from llava_moslora.studies.runs import check_flags, read_study_recipe, runs_of, tuned_runs, tuning_runs
from llava_moslora.studies.study_file import label, read_study
from llava_moslora.training.callbacks.adapter_stats import LOG_NAMES
from support.launching import ROOT
from support.studies import LOSS, RECIPE, write_study

STUDIES = sorted((ROOT / "scripts" / "studies").glob("*.yaml"))
TUNE = {"flag": "learning_rate", "values": ["1e-3", "2e-3"], "seeds": ["11"]}


def checked(file: Path) -> None:
    study = read_study(file)
    recipe = read_study_recipe(study, None)
    runs = tuning_runs(study, recipe, file.parent) or runs_of(study, recipe, file.parent)
    for run, settings in check_flags(study, runs):
        check_metrics(study, run, settings)


def refused(tmp_path, text: str | None = None, **changes) -> str:
    file = write_study(tmp_path, **changes)
    if text is not None:
        file.write_text(text)
    with pytest.raises(Refusal) as caught:
        checked(file)
    assert caught.value.file == file
    return caught.value.line().replace(str(tmp_path), "")


def test_what_a_study_says(tmp_path):
    points = [{"lora_r": "4", "lora_alpha": "8"}, {"lora_r": "8", "lora_alpha": "16"}]
    study = read_study(write_study(tmp_path, points=points, tune=TUNE, baseline="MoSLoRA", flags={"max-steps": "5"}))
    assert (study.name, study.baseline, study.seeds, study.recipe) == ("tiny", "MoSLoRA", (1, 2), tuple(RECIPE))
    assert study.flags == {"max_steps": ("5",)} and label(study.points[1]) == "lora_r=8, lora_alpha=16"
    recipe = read_study_recipe(study, None)
    tuning = tuning_runs(study, recipe, tmp_path)
    assert len(tuning) == 2 * 2 * 2 and all(run.tuning for run in tuning)
    assert tuning[0].name == "LoRA/lora_r=4_lora_alpha=8/learning_rate=1e-3/seed-11"
    chosen = {("LoRA", 0): "1e-3", ("MoSLoRA", 0): "2e-3", ("MoSLoRA", 1): "1e-3"}
    runs = tuned_runs(study, recipe, tmp_path, chosen)
    assert [(run.arm, run.point, run.seed, run.tuned) for run in runs[:3]] == [
        ("LoRA", 0, 1, "1e-3"), ("MoSLoRA", 0, 1, "2e-3"), ("MoSLoRA", 1, 1, "1e-3")
    ]  # fmt: skip
    words = " ".join(runs[0].words)
    assert words.startswith(" ".join(RECIPE)) and "--max_steps 5 --mixer_init identity --train_mixer False" in words
    assert words.endswith(
        f"--lora_r 4 --lora_alpha 8 --learning_rate 1e-3 --seed 1 --resume True --output_dir {runs[0].folder}/run"
    )
    assert len({run.folder for run in [*tuning, *runs]}) == len(tuning) + len(runs)


def test_values_are_texts_and_variables_are_the_environments(tmp_path, monkeypatch):
    monkeypatch.setenv("LLM_FOLDER", "some where")
    file = tmp_path / "s.yaml"
    file.write_text(
        "recipe: [--model_name_or_path, '${LLM_FOLDER}', --data_path, '${TEXT_FILE:-a.json}']\n"
        "seeds: [007, 1]\narms: [{name: yes, flags: {learning_rate: 1e-3, lora_target_modules: [q, v]}}, {name: no}]\n"
        "measures: [{name: loss, metric: eval_loss, better: lower}]\n"
    )
    study = read_study(file)
    assert study.recipe == ("--model_name_or_path", "some where", "--data_path", "a.json")
    assert [arm.name for arm in study.arms] == ["yes", "no"] and study.seeds == (7, 1)
    assert study.arms[0].flags == {"learning_rate": ("1e-3",), "lora_target_modules": ("q", "v")}
    assert "TEXT_FILE: -x" not in json.dumps(study.recipe)
    file.write_text(file.read_text().replace(":-a.json", ""))
    with pytest.raises(Refusal, match=r"recipe\[3\]: a variable that is not set; found \$\{TEXT_FILE\}; fix: TEXT_F"):
        read_study(file)


WRONG = [
    ({"seed": ["1"]}, r"tiny.yaml:seed: unknown key; found seed; expected recipe \| seeds \|"),
    ({"seeds": None}, r"tiny.yaml:seeds: missing"),
    ({"seeds": []}, r"tiny.yaml:seeds: an empty list"),
    ({"seeds": "1"}, r"tiny.yaml:seeds: not a list; found 1"),
    ({"seeds": ["1", "2", "01"]}, r"tiny.yaml:seeds: duplicate; found 1; expected each once"),
    ({"seeds": ["1", "-2"]}, r"tiny.yaml:seeds: not a seed; found -2"),
    ({"seeds": ["1.5"]}, r"tiny.yaml:seeds: not a seed; found 1.5"),
    ({"recipe": "nowhere.sh"}, r"tiny.yaml:recipe: no such recipe; found /nowhere.sh"),
    ({"recipe": ["lora_r", "4"]}, r"tiny.yaml:recipe: not a list of flags; found lora_r 4"),
    ({"recipe": [*RECIPE, "--lora_rr", "4"]}, r"tiny.yaml:recipe: --lora_rr: unknown flag; fix: did you mean --lora_r"),
    ({"arms": [{"flags": {}}]}, r"tiny.yaml:arms\[0\].name: missing"),
    ({"arms": ["LoRA"]}, r"tiny.yaml:arms\[0\]: not a mapping; found LoRA"),
    ({"arms": [{"name": "a"}, {"name": "A"}]}, r"tiny.yaml:arms: two arms with the same name, or the same folder; "),
    ({"arms": [{"name": "a", "flag": {}}]}, r"tiny.yaml:arms\[0\].flag: unknown key; .*expected name \| flags"),
    ({"arms": [{"name": "a", "flags": {"lora_rank": "4"}}]}, r"tiny.yaml:arms\[0\].flags.lora_rank: --lora_rank: unk"),
    ({"arms": [{"name": "a", "flags": {"lora_r": "four"}}]}, r":arms\[0\].flags.lora_r: --lora_r: invalid int value"),
    ({"arms": [{"name": "a", "flags": {"mixer_init": "zeros"}}]}, r":arms\[0\].flags.mixer_init: --mixer_init: inval"),
    ({"arms": [{"name": "a", "flags": {"data_share": "2"}}]}, r"flags.data_share: --data_share: out of range; found 2"),
    ({"arms": [{"name": "a", "flags": {"seed": "3"}}]}, r"arms\[0\].flags.seed: not a flag to set here; .*study's s"),
    ({"arms": [{"name": "a", "flags": {"output-dir": "x"}}]}, r"flags.output-dir: not a flag to set here"),
    ({"flags": {"resume": "False"}}, r"tiny.yaml:flags.resume: not a flag to set here"),
    ({"flags": {"max_steps": None}}, r"tiny.yaml:flags.max_steps: not a text; found nothing"),
    ({"flags": {"max_steps": {"a": "b"}}}, r"tiny.yaml:flags.max_steps: not a text"),
    ({"flags": {"max_steps": ["3", "--seed"]}}, r"tiny.yaml:flags.max_steps: not the value of a flag; found 3 --seed"),
    ({"flags": {"max_steps": "3", "max-steps": "4"}}, r"tiny.yaml:flags.max-steps: the flag occurs twice"),
    ({"baseline": "DoRA"}, r"tiny.yaml:baseline: not the name of an arm; found DoRA; expected LoRA \| MoSLoRA"),
    ({"arms": [{"name": "a", "paper": ["1", "2"]}]}, r"arms\[0\].paper: one value per point; found 2; "),
    ({"arms": [{"name": "a", "paper": ["x"]}]}, r"tiny.yaml:arms\[0\].paper: not a number; found x"),
    ({"points": [{"lora_r": "4"}, {"lora_r": "4"}]}, r"tiny.yaml:points: duplicate"),
    ({"points": [{"mixer_init": "normal"}]}, r"tiny.yaml:points.mixer_init: also set by an arm or tuned; found LoRA"),
    ({"points": [{"lora_r": "4"}, {"lora_rr": "4"}]}, r"tiny.yaml:points\[1\].lora_rr: --lora_rr: unknown flag"),
    ({"tune": TUNE | {"seeds": ["2"]}}, r"tiny.yaml:tune.seeds: tuned on a seed that the result uses.*found 2"),
    ({"tune": TUNE | {"values": ["fast"]}}, r"tiny.yaml:tune.learning_rate: --learning_rate: invalid float value"),
    ({"tune": TUNE | {"flag": "mixer_init"}}, r"tiny.yaml:arms\[0\].flags.mixer_init: it is tuned"),
    ({"tune": {"flag": "learning_rate"}}, r"tiny.yaml:tune.values: missing"),
    ({"measures": []}, r"tiny.yaml:measures: an empty list"),
    ({"measures": [LOSS, LOSS]}, r"tiny.yaml:measures: two measures with the same name; found validation_loss"),
    ({"measures": [LOSS | {"better": "less"}]}, r"measures\[0\].better: unknown value; found less; expected lower"),
    ({"measures": [LOSS | {"at": "first"}]}, r"tiny.yaml:measures\[0\].at: unknown value; found first"),
    ({"measures": [LOSS | {"script": "evaluate.py"}]}, r"tiny.yaml:measures\[0\].metric: unknown key"),
    ({"measures": [{"name": "a", "better": "higher", "script": "rm.py"}]}, r"measures\[0\].script: unknown value"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), WRONG, ids=[message[:60] for _, message in WRONG])
def test_a_mistake_is_refused_with_file_and_key(tmp_path, changes, message):
    line = refused(tmp_path, **changes)
    assert re.search(message, line), line
    assert list(tmp_path.iterdir()) == [tmp_path / "tiny.yaml"]  # nothing was started


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"C-PARSE\] /tiny.yaml: not a mapping of keys of a study; found nothing"),
        ("[1, 2]", r"not a mapping of keys of a study; found sequence"),
        ("seeds: [1]\nseeds: [2]", r"/tiny.yaml:seeds: the key occurs twice; found lines 1 and 2"),
        ("arms: [{name: a, name: b}]", r"/tiny.yaml:name: the key occurs twice"),
        ("arms: &a [x]\nseeds: *a", r"an alias, \*a, which is not supported"),
        ("arms: !!python/object:os.system x", r"the tag .*, which is not supported"),
        ("arms: [", r"C-PARSE\] /tiny.yaml: neither YAML nor JSON"),
    ],
)
def test_what_is_no_yaml_of_a_study(tmp_path, text, message):
    assert re.search(message, refused(tmp_path, text=text))


def test_no_such_file(tmp_path):
    with pytest.raises(Refusal, match=r"C-PATH\] .*none.yaml:STUDY: no such file"):
        read_study(tmp_path / "none.yaml")


@pytest.mark.parametrize("file", STUDIES, ids=lambda file: file.stem)
def test_the_ready_studies_pass_the_parser(file):
    study = read_study(file)
    assert study.about and len(study.seeds) >= 3
    checked(file)


def test_the_parts_of_adapters_are_those_that_a_training_logs():
    parts = {name.split("/")[1] for name in OF_ADAPTERS}
    assert parts == set(LOG_NAMES.values()) - set(SDXL_PARTS)  # a study trains no SDXL
