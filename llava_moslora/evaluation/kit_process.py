"""The VLMEvalKit process of ``--scorer vlmevalkit``: runs in the Python that has the kit, started by ``kit.py``.

    PYTHON kit_process.py               # prints {"kit": "ms-vlmeval 0.0.20"}, or null where it is not installed
    PYTHON kit_process.py JOB RESULT    # scores the answers in JOB and writes the kit's tables, both JSON

JOB holds, for every data set of the kit, ``file`` (its TSV), ``answers`` (index → text) and ``truths`` (index → letter,
for a file without answers). The kit's own files (predictions, readings, tables) are written to a folder of the data
set's name in the current one. Nothing is imported from the package that asked: the comparison would then prove nothing.
"""

import importlib.util
import json
import os
import sys
import uuid
from collections.abc import Callable
from importlib import metadata
from pathlib import Path


def main() -> None:
    here = os.path.dirname(os.path.realpath(__file__))
    sys.path[:] = [folder for folder in sys.path if os.path.realpath(folder) != here]  # its names must not hide others
    if len(sys.argv) == 1:
        print(json.dumps({"kit": version() if importlib.util.find_spec("vlmeval") else None}))
        return
    job, result = (Path(name).absolute() for name in sys.argv[1:])
    start, tables = os.getcwd(), {}
    for name, part in json.loads(job.read_text(encoding="utf-8")).items():
        os.makedirs(name)
        os.chdir(name)
        tables[name] = scores(name, **part)
        os.chdir(start)
    found = {"kit": version(), "pandas": metadata.version("pandas"), "tables": tables}
    result.write_text(json.dumps(found, ensure_ascii=False), encoding="utf-8")


def version() -> str:
    for name in ("ms-vlmeval", "vlmeval"):
        try:
            return f"{name} {metadata.version(name)}"
        except metadata.PackageNotFoundError:
            continue
    return "vlmeval, not installed by pip"


def scores(name: str, file: str, answers: dict, truths: dict) -> list:
    """The kit's table for answers to all or some rows of ``file``, a dict per line."""
    import pandas as pd
    from vlmeval.dataset import build_dataset, image_base
    from vlmeval.dataset.utils import multiple_choice

    def read(self: object, url: str, file_md5: object = None) -> pd.DataFrame:
        """In place of the kit's reader, which replaces a file of another md5 by a download and stores one of over 1 GB
        once more. No figure depends on the images."""
        return pd.read_csv(file, sep="\t", usecols=lambda column: column.lower() != "image")

    def run_all(function: Callable, tasks: list, save: str, keys: list, **how: object) -> list:
        """In place of the kit's, which writes every result so far after each one: over 9 minutes for SEED-Bench."""
        results = [function(**task) for task in tasks]
        pd.to_pickle({key: results[number] for number, key in enumerate(keys)}, save)
        return results

    if not hasattr(image_base.ImageBaseDataset, "prepare_tsv"):
        sys.exit("this version reads its files otherwise, and might download: take ms-vlmeval 0.0.20")
    unique = uuid.uuid4().hex
    multiple_choice.track_progress_rich = run_all
    image_base.ImageBaseDataset.prepare_tsv = read
    multiple_choice.timestr = lambda: unique  # it names a file in /tmp by the second, and leaves it there
    dataset = build_dataset(name)
    data = dataset.data
    indices = pd.Series([str(index) for index in data["index"]], index=data.index)
    if lacking := sorted(set(answers) - set(indices)):
        sys.exit(f"pandas reads no row of index {lacking[0]} in {file}, nor {len(lacking) - 1} others")
    if truths and ("answer" not in data or data["answer"].isna().all()):
        data["answer"] = indices.map(truths)
    asked = data[indices.isin(answers)].copy()
    asked["prediction"] = [answers[str(index)] for index in asked["index"]]
    predictions = f"llava_moslora_{name}.pkl"  # from its other formats "None" and "" come back as "nan"
    asked.to_pickle(predictions)
    table = dataset.evaluate(predictions, model="exact_matching", nproc=1)
    for left in Path("/tmp").glob(f"{unique}.*"):
        left.unlink()
    return table.astype(object).where(pd.notna(table), None).to_dict("records")


if __name__ == "__main__":
    main()
