"""The settings objects: plain data with choices and defaults."""

import ast
import sys
from pathlib import Path

import pytest

from llava_moslora import config, defect_report, errors, stopping
from llava_moslora.config import AdapterSettings, DataSettings, ModelSettings, TowerAdapter, TrainingSettings
from llava_moslora.errors import Refusal


def test_they_need_the_standard_library_alone():
    """A planner, a website or a test makes them without torch."""
    for module in (config, errors, stopping, defect_report):
        tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
        names = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        names += [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
        own = {config: {errors.__name__}, errors: {stopping.__name__, defect_report.__name__}}.get(module, set())
        assert {name for name in names if name.split(".")[0] not in sys.stdlib_module_names} == own


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ModelSettings("llm", bits=8), r"--bits: unknown value; found 8; expected 16 \| 4"),
        (lambda: ModelSettings("llm", attn_implementation="fast"), r"--attn_implementation: unknown value; found fast"),
        (
            lambda: DataSettings(["d"], image_engine="gpu"),
            r"--image_engine: unknown value; found gpu; expected pil",
        ),
        (lambda: DataSettings(["d"], data_order="size"), r"--data_order: unknown value; found size"),
        (lambda: DataSettings(["d"], on_bad_record="skip"), r"--on_bad_record: unknown value; found skip"),
        (lambda: TrainingSettings(output_dir="r", loss_average="batch"), r"--loss_average: unknown value; found batch"),
        (lambda: TrainingSettings(), r"--output_dir: missing flag"),
        (lambda: TrainingSettings(output_dir="r", resume=True, overwrite=True), r"--resume, --overwrite: a run is"),
    ],
)
def test_values_that_are_no_choice_are_refused(make, message):
    with pytest.raises(Refusal, match=r"C-FLAG\] " + message):
        make()


def test_each_towers_adapter():
    settings = AdapterSettings(lora_r=8, mixer_init="orthogonal", lora_target_modules=["q_proj"], vision_lora_r=4)
    assert settings.llm == TowerAdapter(8, 128, 0.05, "orthogonal", True, ("q_proj",))
    assert settings.vision == TowerAdapter(4, 16, 0.05, "orthogonal", True)
    own = AdapterSettings(vision_mixer_init="identity", vision_train_mixer=False)
    assert (own.vision.mixer_init, own.vision.train_mixer) == ("identity", False)
    assert (own.llm.mixer_init, own.llm.train_mixer) == ("kaiming_uniform", True)
    assert AdapterSettings(lora_r=0).llm is None and AdapterSettings(vision_lora_r=0).vision is None


def test_lists_are_not_shared():
    DataSettings(["a"]).data_weights.append(2.0)
    assert DataSettings(["a"]).data_weights == []
