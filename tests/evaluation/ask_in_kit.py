"""Asks a run through VLMEvalKit's own inference loop, and writes what reached the model; for ``test_kit_prompts.py``.

    KIT_PYTHON ask_in_kit.py RUN PACKAGES LIMIT OUTPUT DATASET ...

LMUData names the folder of the TSV files. PACKAGES has what ``llava_moslora`` needs and the kit's Python lacks; the
kit's own packages come first. OUTPUT is JSON: data set → index → what :class:`support.recorder.Recorder` saw.
"""

import json
import os
import site
import sys
from functools import partial
from pathlib import Path


def main() -> None:
    run, packages, limit, output, *names = sys.argv[1:]
    site.addsitedir(packages)
    from vlmeval.config import supported_VLM
    from vlmeval.dataset import build_dataset, image_mcq, image_vqa, image_yorn
    from vlmeval.inference import infer_data_job

    from llava_moslora.evaluation import vlmevalkit
    from llava_moslora.inference.load import load
    from support.recorder import Recorder

    for kind in (image_mcq.ImageMCQDataset, image_yorn.ImageYORNDataset, image_vqa.ImageVQADataset,
                 image_vqa.MathVista, image_vqa.MMVet):  # fmt: skip
        kind.DATASET_MD5 = {}  # or it downloads
    recorder = Recorder()
    vlmevalkit.load = lambda path: recorder.watch(load(path))
    vlmevalkit.answer = recorder.answer
    supported_VLM["tiny"] = partial(vlmevalkit.model_class(), run, max_new_tokens=3)
    seen = {}
    for name in names:
        os.makedirs(f"work/{name}")
        dataset = build_dataset(name)
        recorder.rows.clear()
        infer_data_job("tiny", f"work/{name}", "tiny", dataset, limit=int(limit))
        indices = [str(index) for index in dataset.data["index"]]
        seen[name] = dict(zip(indices, recorder.rows.copy(), strict=True))
    Path(output).write_text(json.dumps(seen), encoding="utf-8")


if __name__ == "__main__":
    main()
