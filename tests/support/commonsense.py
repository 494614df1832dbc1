"""Records in the format of LLM-Adapters' eight test files, made by hand; and its prompt and rules, typed anew."""

import json
import re
from pathlib import Path

# Test prompt of commonsense_evaluate.py: one space before the newline, none in the empty lines.
REFERENCE_PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request. \n"
    "\n"
    "                ### Instruction:\n"
    "                {instruction}\n"
    "\n"
    "                ### Response:\n"
    "                "
)
FOLDERS = {
    "boolq": ("boolq", ["true", "false"]),
    "piqa": ("piqa", ["solution1", "solution2"]),
    "social_i_qa": ("social_i_qa", ["answer1", "answer2", "answer3"]),
    "hellaswag": ("hellaswag", ["ending1", "ending2", "ending3", "ending4"]),
    "winogrande": ("winogrande", ["option1", "option2"]),
    "arc_easy": ("ARC-Easy", ["answer1", "answer2", "answer3", "answer4"]),
    "arc_challenge": ("ARC-Challenge", ["answer1", "answer2", "answer3", "answer4"]),
    "openbookqa": ("openbookqa", ["answer1", "answer2", "answer3", "answer4"]),
}


def records(options: list[str], count: int = 5) -> list[dict]:
    rows = []
    for index in range(count):
        answer = options[index % len(options)]
        text = f'Please choose: is it {{{{no}}}} template? "quoted" – {"or ".join(options)} ({index})'
        instruction = f"{text}\n\nAnswer format: {'/'.join(options)}"
        rows.append({"instruction": instruction, "input": "", "output": f"the correct answer is {answer}"})
        rows[-1]["answer"] = answer
    return rows


def write_sets(folder: Path, count: int = 5) -> Path:
    for place, options in FOLDERS.values():
        (folder / place).mkdir(parents=True)
        (folder / place / "test.json").write_text(json.dumps(records(options, count)))
    return folder


def extract_answer(name: str, sentence: str) -> str:
    """LLM-Adapters' rule: the first option that occurs, "" where none does."""
    options = {
        "boolq": r"true|false",
        "piqa": r"solution1|solution2",
        "hellaswag": r"ending1|ending2|ending3|ending4",
        "winogrande": r"option1|option2",
    }
    found = re.findall(options.get(name, r"answer1|answer2|answer3|answer4|answer5"), sentence.strip())
    return found[0] if found else ""


# What a model might say; RIGHT and WRONG stand for options.
ANSWERS = [
    "the correct answer is RIGHT", " RIGHT.", "WRONG or RIGHT", "RIGHT, not WRONG", "I do not know", "", "rIGHT",
    "\n  RIGHT\nRIGHT", "the correct answer is RIGHT2",
]  # fmt: skip
