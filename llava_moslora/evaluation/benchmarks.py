"""The nine benchmarks of the MoSLoRA paper's Table 5, its numbers, and the axes of its Figure 5.

File names and md5 are those of VLMEvalKit (``DATASET_MD5``, the same at ab638e4a of 2024-06-18 and in ms-vlmeval
0.0.20); numbers of questions are the benchmarks' own.

One difference from the paper's setup cannot be named per benchmark: the kit of 2024 stored every image again as JPEG
(``dump_image``, Pillow's quality of 75) before the model saw it; here the model sees the pixels of the file.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Benchmark:
    """One column of Table 5.

    Attributes:
        name: on the command line.
        title: of the column in Table 5.
        file: name of the TSV, without ``.tsv``, and of VLMEvalKit's dataset.
        kind: how it is prompted and scored, a key of :data:`llava_moslora.evaluation.scoring.KINDS`.
        questions: number in the published file; the rotations of a circular one count once.
        md5: of the file that VLMEvalKit names.
        columns: that must be there besides ``index``, ``question`` and an image.
        max_new_tokens: for an answer. ``LLaVA_XTuner`` (``prompts.py``) allows 5 for letters and yes or no, else 512.
        paper: how the paper's number was obtained, if not from greedy answers scored by rules; beams and sampling are
            ``LLaVA_XTuner``'s.
        answers: name of the TSV with the answers, if ``file`` may lack them.
    """

    name: str
    title: str
    file: str
    kind: str
    questions: int
    md5: str
    columns: tuple[str, ...]
    max_new_tokens: int
    paper: str = ""
    answers: str = ""


_OPTIONS = ("A", "B", "answer")
_SERVER = "paper: scored by MMBench's server"
_SAMPLED = "paper, by LLaVA_XTuner: beams of 5, sampled at temperature 1"
_JUDGED = f"{_SAMPLED}; judge gpt-4-1106-preview"

BENCHMARKS = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark(
            "mmbench_en", "MMBench EN", "MMBench_TEST_EN", "circular", 1784, "6939fadb0ce626fefc0bdc9c64efc528",
            _OPTIONS, 5, _SERVER, "MMBench",
        ),
        Benchmark(
            "mmbench_cn", "MMBench CN", "MMBench_TEST_CN", "circular", 1784, "7e1239baf0ee4c8b513e19705a0f317e",
            _OPTIONS, 5, _SERVER, "MMBench_CN",
        ),
        Benchmark(
            "seed", "SEED-Bench image", "SEEDBench_IMG", "multiple-choice", 14233, "68017231464752261a2526d6ca3a10c0",
            _OPTIONS, 5,
        ),
        Benchmark(
            "ai2d", "AI2D", "AI2D_TEST", "multiple-choice", 3088, "0f593e0d1c7df9a3d69bf1f947e71975", _OPTIONS, 5,
        ),
        Benchmark(
            "sciqa", "SciQA", "ScienceQA_TEST", "multiple-choice", 2017, "e42e9e00f9c59a80d8a5db35bc32b71f",
            _OPTIONS, 5,
        ),
        Benchmark(
            "textvqa", "TextVQA", "TextVQA_VAL", "vqa", 5000, "b233b31f551bbf4056f2f955da3a92cd", ("answer",), 32,
            _SAMPLED,
        ),
        Benchmark(
            "mathvista", "MathVista", "MathVista_MINI", "mathvista", 1000, "f199b98e178e5a2a20e7048f5dcb0464",
            ("answer", "question_type", "answer_type", "choices", "answer_option", "task"), 512, _JUDGED,
        ),
        Benchmark(
            "mmvet", "MM-Vet", "MMVet", "mmvet", 218, "748aa6d4aa9d4de798306a63718455e3", ("answer", "category"), 512,
            _JUDGED,
        ),
        Benchmark(
            "mme", "MME", "MME", "yes-no", 2374, "b36b43c3f09801f5d368627fb92187c3",
            ("answer", "category", "image_path"), 5,
        ),
    )
}  # fmt: skip

_COLUMNS = ("mmbench_en", "mmbench_cn", "seed", "ai2d", "sciqa", "textvqa", "mathvista", "mmvet", "mme", "average")
# Table 5, with the average of its columns: (LLM, method, init of the mixer) → percent.
# MME is (perception + cognition) / 2800 × 100.
_TABLE_5 = {
    ("LLaMA-3", "LoRA", ""): (72.0, 67.8, 68.8, 61.4, 74.8, 47.1, 27.7, 33.1, 58.4, 56.8),
    ("LLaMA-3", "MoSLoRA", "orthogonal"): (73.0, 68.2, 69.0, 61.2, 75.7, 47.2, 27.6, 33.4, 60.6, 57.3),
    ("LLaMA-3", "MoSLoRA", "kaiming"): (72.5, 67.5, 68.9, 60.6, 76.0, 47.1, 27.5, 33.8, 60.5, 57.1),
    ("InternLM2", "QLoRA", ""): (70.8, 68.9, 70.4, 62.2, 72.5, 49.8, 30.2, 33.9, 61.6, 57.8),
    ("InternLM2", "QMoSLoRA", "orthogonal"): (73.5, 71.2, 71.1, 64.8, 71.8, 49.8, 30.2, 35.0, 62.0, 58.8),
    ("InternLM2", "QMoSLoRA", "kaiming"): (73.8, 72.6, 70.3, 66.1, 72.2, 50.2, 30.6, 35.2, 64.1, 59.5),
}
PAPER = {model: dict(zip(_COLUMNS, row, strict=True)) for model, row in _TABLE_5.items()}

# Figure 5: the abilities of MMBench as its files name them in l2-category → title of the axis, in the figure's order.
# Twelve axes: the six of mmbench_cn, then the six of mmbench_en.
ABILITIES = {
    "attribute_reasoning": "Attribute Reasoning",
    "coarse_perception": "Coarse Perception",
    "finegrained_perception (cross-instance)": "Fine-grained Perception (Cross-instance)",
    "finegrained_perception (instance-level)": "Fine-grained Perception (Single-instance)",
    "logic_reasoning": "Logical Reasoning",
    "relation_reasoning": "Relation Reasoning",
}
