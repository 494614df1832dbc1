"""Write the golden file: what the real VLMEvalKit reads, scores and asks.

    python -m venv kit && kit/bin/pip install ms-vlmeval==0.0.20
    git clone https://github.com/open-compass/VLMEvalKit
    PYTHONPATH=tests kit/bin/python tests/evaluation/make_golden.py --repository VLMEvalKit \\
        --output tests/evaluation/golden/vlmevalkit.json

The readings and prompts of 2024 come from the functions of that commit, taken out of its files with ``git show``.
"""

import argparse
import ast
import copy
import hashlib
import json
import os
import random
import re
import string
import subprocess
import sys
import tempfile
from functools import partial
from importlib import metadata
from pathlib import Path

from support.golden_cases import (
    judge_cases,
    mathvista_cases,
    option_cases,
    packed,
    short_answers,
    tiny_files,
    yes_no_answers,
)

COMMIT = "ab638e4a36b0a2cf18b03f656e6b94203ed9e369"  # 2024-06-18, the week the MoSLoRA paper appeared


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True)
    parser.add_argument("--seed", type=int, default=17)
    parser.add_argument("--repository", help="a clone of VLMEvalKit; without it nothing of 2024 is written")
    args = parser.parse_args()
    random_ = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        os.environ.update(LMUData=folder, PRED_FORMAT="tsv", HF_HUB_OFFLINE="1")
        golden = {
            "made_with": {name: metadata.version(name) for name in ("ms-vlmeval", "pandas", "numpy")},
            "commit_2024": COMMIT if args.repository else None,
            "seed": args.seed,
        }
        current, old = functions_now(), functions_of_2024(args.repository) if args.repository else None
        golden |= readings(random_, current, old)
        golden["files"] = {
            name: file_scores(name, text, predictions, Path(folder), old)
            for name, (text, predictions) in tiny_files(random_).items()
        }
        golden["judge"] = {
            kind: judge_golden(kind, cases, Path(folder), old) for kind, cases in judge_cases(random_).items()
        }
    Path(args.output).write_text(json_lines(golden) + "\n", encoding="utf-8")


def json_lines(value: object, depth: int = 2) -> str:
    """JSON with a line for every case."""
    if depth and isinstance(value, dict):
        items = (f"{json.dumps(key)}: {json_lines(item, depth - 1)}" for key, item in value.items())
        return "{\n" + ",\n".join(items) + "\n}"
    if depth and isinstance(value, list):
        return "[\n" + ",\n".join(json_lines(item, depth - 1) for item in value) + "\n]"
    return json.dumps(value, ensure_ascii=False)


def functions_now() -> dict:
    """The kit's functions, imported."""
    from vlmeval.dataset.utils.mathvista import post_check
    from vlmeval.dataset.utils.vqa_eval import process_answer, process_line
    from vlmeval.dataset.utils.yorn import YOrN_Extraction
    from vlmeval.utils import can_infer

    return {f.__name__: f for f in (can_infer, process_answer, process_line, YOrN_Extraction, post_check)}


def functions_of_2024(repository: str) -> dict:
    """The same of :data:`COMMIT`, and the two methods that made its prompts."""
    import pandas as pd

    names = {"re": re, "os": os, "cp": copy, "string": string, "pd": pd, "DATASET_TYPE": type_of_2024}
    sources = {
        "vlmeval/smp/misc.py": ("process_punctuation", "istype", "cn_string", "listinstr", "toliststr"),
        "vlmeval/utils/matching_util.py": ("can_infer_option", "can_infer_text", "can_infer"),
        "vlmeval/evaluate/vqa_eval.py": ("_process_digit_article", "process_answer", "process_line"),
        "vlmeval/evaluate/yes_or_no.py": ("YOrN_Extraction",),
        "vlmeval/evaluate/mathvista_eval.py": (
            "list_to_dict",
            "post_check",
            "get_gpt4_ICE",
            "build_mathvista_gpt4_prompt",
        ),
        "vlmeval/evaluate/mmvet_eval.py": ("build_mmvet_gpt4_prompt",),
        "vlmeval/utils/dataset.py": ("build_prompt",),
    }
    for file, wanted in sources.items():
        define(repository, file, wanted, names)
    names["dataset_prompt"] = names.pop("build_prompt")
    define(repository, "vlmeval/vlm/llava/llava_xtuner.py", ("build_prompt",), names)
    return names


def type_of_2024(dataset: str) -> str:
    if dataset == "MME":
        return "Y/N"
    return "VQA" if dataset in ("TextVQA_VAL", "MathVista_MINI", "MMVet") else "multi-choice"


def define(repository: str, file: str, wanted: tuple[str, ...], names: dict) -> None:
    """Run the definitions of ``wanted`` in ``file`` of the commit, and nothing else of it."""
    command = ["git", "-C", repository, "show", f"{COMMIT}:{file}"]
    tree = ast.parse(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    found = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name in wanted]
    for node in found:
        node.returns, node.decorator_list = None, []
    exec(compile(ast.Module(found, []), file, "exec"), names)
    assert set(wanted) <= set(names), (file, wanted)


def readings(random_: random.Random, current: dict, old: dict | None) -> dict:
    """Cases with the result of the current functions and of those of 2024."""

    def both(name: str, *arguments: object) -> list:
        results = [kit[name](*copy.deepcopy(arguments)) if kit else None for kit in (current, old)]
        return [None if result is False else result for result in results]

    def accuracy(kit: dict, truths: list[str], prediction: str) -> float:
        match = kit["process_line"]({"answer": repr(truths), "prediction": prediction})["match"]
        return sum(match) / len(match)

    def mathvista(kit: dict, row: dict, prediction: str) -> list:
        row = row | {"prediction": prediction, "res": prediction}
        read = kit["post_check"](row, prefetch=True)
        return [str(read) if read else None, kit["post_check"](row, prefetch=False)]

    kits = [kit for kit in (current, old) if kit]
    words = contractions()
    options, short, maths = option_cases(random_, 697), short_answers(random_, 379), mathvista_cases(random_, 180)
    texts = sorted({text for truths, prediction in short for text in (*truths, prediction)} | set(words))
    return {
        "options": [[o, packed(a), *both("can_infer", a, o)] for o, a in options],
        "yes_no": [[packed(a), *both("YOrN_Extraction", a)] for a in yes_no_answers(random_, 200)],
        "normalised": [[text, *both("process_answer", text)] for text in texts],
        "vqa": [[truths, p, *(accuracy(kit, truths, p) for kit in kits)] for truths, p in short],
        "mathvista": [[row, p, *(mathvista(kit, row, p) for kit in kits)] for row, p in maths],
    }


def contractions() -> list[str]:
    """Every word that the kit's table of contractions knows, on both sides."""
    from vlmeval.dataset.utils import vqa_eval

    tree = ast.parse(Path(vqa_eval.__file__).read_text(encoding="utf-8"))
    tables = [
        n.value
        for n in ast.walk(tree)
        if isinstance(n, ast.Assign) and getattr(n.targets[0], "id", "") == "contractions"
    ]
    return [word for pair in ast.literal_eval(tables[0]).items() for word in pair]


def file_scores(name: str, text: str, predictions: dict[str, str], folder: Path, old: dict | None) -> dict:
    """A whole file through the kit: its prompts, and its score table."""
    import pandas as pd
    from vlmeval.dataset import build_dataset

    path = folder / f"{name}.tsv"
    path.write_text(text, encoding="utf-8")
    result = {"tsv": text, "predictions": predictions}
    for kind in type_and_parents(name):
        kind.DATASET_MD5 = {}
    dataset = build_dataset(name)
    data = dataset.data.copy()
    result["prompts"] = prompts(dataset, name, old)
    data["prediction"] = [predictions[str(index)] for index in data["index"]]
    if name == "MathVista_MINI":
        table = mathvista_table(data, folder)
    elif name == "MMVet":
        table = mmvet_table(data, folder)
    else:
        data.pop("image")
        predicted = folder / f"model_{name}.pkl"  # a table of another format would lose predictions such as "None"
        data.to_pickle(predicted)
        table = dataset.evaluate(str(predicted), model="exact_matching", nproc=1)
    lines = table.astype(object).where(pd.notna(table), None).to_dict("records")
    # The kit's splits come out of a set.
    result["table"] = sorted(lines, key=lambda line: line["split"]) if "split" in table else lines
    return result


def type_and_parents(name: str) -> list[type]:
    from vlmeval.dataset import image_mcq, image_vqa, image_yorn

    if name in ("MathVista_MINI", "MMVet"):
        return [getattr(image_vqa, name.removesuffix("_MINI"))]
    return [image_mcq.ImageMCQDataset, image_yorn.ImageYORNDataset, image_vqa.ImageVQADataset]


def prompts(dataset: object, name: str, old: dict | None) -> dict[str, list[str]]:
    """Index → the text that LLaVA_XTuner is asked: now, and that of 2024 where it is another."""
    from vlmeval.vlm.llava.llava_xtuner import LLaVA_XTuner

    class Stub:
        meta_only, dataset_name = False, name

        def use_custom_prompt(self, dataset: str) -> bool:
            return type_of_2024(name) == "multi-choice"

        def dump_image(self, *_: object) -> list[str]:
            return []

    def texts(line: dict) -> list[str]:
        line["image"] = "x" * 65
        stub = Stub()
        stub.dataset = name
        if stub.use_custom_prompt(name):
            makers = [partial(LLaVA_XTuner.build_prompt, stub), old and partial(old["build_prompt"], stub)]
        else:
            makers = [lambda line, dataset_: dataset.build_prompt(line), old and partial(old["dataset_prompt"], stub)]
        messages = [make(line, name) for make in makers if make]
        found = [next(part["value"] for part in message if part["type"] == "text") for message in messages]
        found = [text.replace("<image>", "") for text in found]  # as its generate_inner does
        return found if len(set(found)) > 1 else found[:1]

    dataset.dump_image = lambda line: []
    return {str(line["index"]): texts(dict(line)) for _, line in dataset.data.iterrows()}


class Scripted:
    """A judge that replies to one try after another, and at last always the same; it keeps what it was sent."""

    def __init__(self, *replies: str):
        self.replies, self.prompts, self.temperatures = list(replies), set(), []

    def generate(self, prompt: str, temperature: float) -> str:
        from vlmeval.dataset.utils.mathvista import FAIL_MSG

        self.prompts.add(prompt)
        self.temperatures.append(temperature)
        reply = self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]
        return reply or FAIL_MSG  # as the kit's API does


def judge_golden(kind: str, cases: list, folder: Path, old: dict | None) -> dict:
    """What the kit asks its judge, at which temperatures, and the table that it makes of the replies."""
    import pandas as pd
    from vlmeval.dataset.utils import mathvista, mmvet

    evaluate = {"mathvista": mathvista.MathVista_auxeval, "mmvet": mmvet.MMVet_auxeval}[kind]
    result: dict = {"cases": [], "prompts": {}}
    lines = []
    for row, answer, replies in cases:
        judge, line = Scripted(*replies), row | {"prediction": answer}
        made = evaluate(judge, line)
        lines.append(line | made)
        (prompt,) = judge.prompts or {""}
        if prompt and old:
            assert prompt == old[f"build_{kind}_gpt4_prompt"](line), "the prompts of 2024 are others"
        if prompt and len(result["prompts"]) < 3:
            result["prompts"][row["index"]] = prompt
        digest = hashlib.sha256(prompt.encode()).hexdigest()
        result["cases"].append([row, answer, replies, digest if prompt else None, judge.temperatures])
    data = pd.DataFrame(lines)
    data.to_pickle(folder / f"{kind}.pkl")
    accuracy = {"mathvista": mathvista.MathVista_acc, "mmvet": lambda file: mmvet.MMVet_acc(file)[0]}[kind]
    return result | {"table": accuracy(str(folder / f"{kind}.pkl")).to_dict("records")}


def mathvista_table(data: object, folder: Path) -> object:
    """The kit's table when its judge never answers: what the rules alone decide."""
    from vlmeval.dataset.utils.mathvista import MathVista_acc, MathVista_auxeval

    results = [MathVista_auxeval(Scripted(""), data.iloc[k]) for k in range(len(data))]
    data["res"], data["log"] = [[str(result[key]) for result in results] for key in ("res", "log")]
    data.to_pickle(folder / "mathvista.pkl")
    return MathVista_acc(str(folder / "mathvista.pkl"))


def mmvet_table(data: object, folder: Path) -> object:
    """The kit's table of these replies of a judge, the same one at every attempt."""
    from vlmeval.dataset.utils.mmvet import MMVet_acc, MMVet_auxeval

    lines = [data.iloc[k] for k in range(len(data))]
    data["score"] = [MMVet_auxeval(Scripted(line["prediction"]), line)["score"] for line in lines]
    data.to_pickle(folder / "mmvet.pkl")
    return MMVet_acc(str(folder / "mmvet.pkl"))[0]


if __name__ == "__main__":
    sys.exit(main())
