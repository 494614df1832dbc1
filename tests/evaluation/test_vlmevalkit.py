"""VLMEvalKit's side is a stand-in of the two names that the class uses; ``test_kit_prompts.py`` has the real one."""

import sys
from types import ModuleType

import pytest

from llava_moslora.data.images import load_image
from llava_moslora.evaluation.prompts import LETTER, LETTER_CHINESE
from llava_moslora.evaluation.vlmevalkit import model_class, prompt, question
from llava_moslora.inference.generate import answer
from llava_moslora.inference.load import load
from llava_moslora.text.conversation import Turn
from support.export_runs import trained_run


@pytest.fixture
def vlmeval(monkeypatch):
    class BaseModel:
        def dump_image(self, line, dataset):
            return [line["file"]]

    modules = {name: ModuleType(name) for name in ("vlmeval", "vlmeval.dataset", "vlmeval.vlm", "vlmeval.vlm.base")}
    modules["vlmeval.vlm.base"].BaseModel = BaseModel
    modules["vlmeval.dataset"].DATASET_TYPE = {"MMBench": "MCQ", "MME": "Y/N", "MMVet": "VQA"}.get
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_a_row_is_asked_as_the_run_was_trained(vlmeval, parts, tmp_path, tower):
    trained_run(tmp_path / "run", parts.llm, vars(parts)[tower], parts.projector)
    model = model_class()(str(tmp_path / "run"), max_new_tokens=8)
    row = {"question": "what colour?", "A": "red", "B": "blue", "C": float("nan"), "file": str(parts.images / "0.png")}
    assert model.use_custom_prompt("MMBench") and not model.use_custom_prompt("MMVet")
    found = model.generate_inner(model.build_prompt(row, "MMBench"), "MMBench")
    turns = [Turn("human", f"<image>\nwhat colour?\nA. red\nB. blue\n{LETTER}")]
    asked = [([load_image("0.png", parts.images)], turns)]
    assert found == next(answer(load(tmp_path / "run"), asked, max_new_tokens=5))
    free = model.generate_inner(model.build_prompt(row, "MMBench"), "MMVet")
    assert free == next(answer(load(tmp_path / "run"), asked, max_new_tokens=8)) != found


def test_prompts_and_messages(parts):
    assert prompt({"question": "Is it red? Please answer yes or no."}, "Y/N") == "Is it red? Please answer yes or no."
    numbers = {"question": "how many?", "hint": float("nan"), "A": 1, "B": 2.5, "C": float("nan")}
    assert prompt(numbers, "MCQ") == f"how many?\nA. 1\nB. 2.5\n{LETTER}"
    assert prompt({"question": "q?", "hint": "look", "A": "红", "B": "blue"}, "MCQ") == (
        f"look\nq?\nA. 红\nB. blue\n{LETTER_CHINESE}"
    )
    file = str(parts.images / "0.png")
    message = [
        {"type": "text", "value": "<image>first"},
        {"type": "image", "value": file},
        {"type": "text", "value": "x"},
    ]
    images, turns = question(message)
    assert len(images) == 1 and turns == [Turn("human", "<image>\nfirst\nx")]
    assert question([{"type": "text", "value": "x"}]) == ([], [Turn("human", "x")])
