"""The data pipeline in one table of ratios: records, images, memory, time to the first batch, padding, packing.

    python benchmarks/data.py --tokenizer playground/models/smollm2-135m-instruct [--records 665298]

All data are synthetic: a data file with the proportions of LLaVA's mix665k (94 % images with short conversations, the
rest long texts) and photograph-like JPEGs of COCO's size. One process, one core, unless a row says otherwise.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from llava_moslora.config import DATA_GROUP, XTUNER_DATA_GROUP, DataSettings
from llava_moslora.data.collate import Collator
from llava_moslora.data.formats import read_records
from llava_moslora.data.image_transform import ImageTransform
from llava_moslora.data.images import load_image
from llava_moslora.data.prepare import prepare
from llava_moslora.data.sampler import GlobalBatchSampler
from llava_moslora.text.conversation import ConversationEncoder
from llava_moslora.text.tokenizer import load_tokenizer

RESULTS = Path(__file__).parent / "results"
WORDS = (
    "the a of image shows red blue small large man woman dog street holding standing near while what is there".split()
)
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def write_records(path: Path, count: int, *, images: bool) -> None:
    """A JSON array of ``count`` records, with mix665k's proportions of short and long ones."""
    random = np.random.default_rng(0)
    text = " ".join(np.asarray(WORDS)[random.integers(0, len(WORDS), 20_000)])

    def some(characters: float) -> str:
        start = int(random.integers(0, len(text) - 12_000))
        return text[start : start + int(min(max(characters, 5), 6000))].strip()

    with path.open("w") as file:
        for k in range(count):
            short = random.random() < 0.94
            rounds = int(random.integers(1, 6))
            turns = []
            for number in range(rounds):
                place = "<image>\n" if images and short and number == 0 else ""
                turns.append({"from": "human", "value": place + some(60)})
                turns.append({"from": "gpt", "value": some(random.lognormal(4.6 if short else 6.0, 0.9))})
            image = {"image": f"coco/{k % 50:03d}.jpg"} if images and short else {}
            row = {"id": str(k), **image, "conversations": turns}
            file.write(("[" if k == 0 else ",\n") + json.dumps(row))
        file.write("]")


def write_photographs(folder: Path, count: int) -> list[str]:
    """JPEGs of 640×480 with the smooth areas, edges and grain of a photograph; about 100 kB each."""
    (folder / "coco").mkdir(parents=True)
    random = np.random.default_rng(0)
    names = []
    for k in range(count):
        coarse = Image.fromarray(random.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((640, 480), 3)
        grain = random.normal(0, 6, (480, 640, 3))
        pixels = np.clip(np.asarray(coarse) + grain, 0, 255).astype(np.uint8)
        names.append(f"coco/{k:03d}.jpg")
        Image.fromarray(pixels).save(folder / names[-1], quality=90)
    return names


def encode_naively(conversation: list[dict], tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """As LLaVA's ``train.py`` does it: render, tokenise, then tokenise every round again to find the answers."""
    rounds = [conversation[k : k + 2] for k in range(0, len(conversation), 2)]
    texts = [
        (f"<|im_start|>user\n{ask['value']}<|im_end|>\n<|im_start|>assistant\n", f"{reply['value']}<|im_end|>\n")
        for ask, reply in rounds
    ]
    ids = tokenizer("".join(ask + reply for ask, reply in texts)).input_ids
    labels, at = [-100] * len(ids), 0
    for ask, reply in texts:
        question, whole = len(tokenizer(ask).input_ids), len(tokenizer(ask + reply).input_ids)
        labels[at + question : at + whole] = ids[at + question : at + whole]
        at += whole
    return labels


def rate(work: Callable[[], int], seconds: float = 4.0) -> float:
    """Items per second of ``work``, which returns how many it did; the best of the repetitions that fit the time."""
    best, until = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < until:
        begin = time.perf_counter()
        count = work()
        best = max(best, count / (time.perf_counter() - begin))
    return best


def records_per_second(folder: Path, tokenizer: PreTrainedTokenizerFast) -> dict:
    path = folder / "some.json"
    write_records(path, 2000, images=False)

    encoder = ConversationEncoder(tokenizer, "chatml")

    def ours() -> int:
        return sum(len(encoder.encode(record.turns).input_ids) > 0 for record in read_records(path))

    def naive() -> int:
        return sum(len(encode_naively(r["conversations"], tokenizer)) > 0 for r in json.loads(path.read_text()))

    found = {"ours_per_s": rate(ours), "naive_per_s": rate(naive)}
    return found | {"ratio": found["ours_per_s"] / found["naive_per_s"]}


def images_per_second(folder: Path) -> dict:
    names = write_photographs(folder / "photographs", 50)
    root = folder / "photographs"
    size = {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}
    found: dict = {}
    for mode, reference in (("pad", LlavaImageProcessorPil), ("crop", CLIPImageProcessorPil)):
        transform = ImageTransform(336, (336, 336), MEAN, STD, aspect_ratio=mode)
        theirs = reference(**size, do_pad=mode == "pad")

        def ours(transform: ImageTransform = transform) -> int:
            return sum(len(transform(load_image(name, root))) == 3 for name in names)

        def pil(theirs: object = theirs) -> int:
            opened = (Image.open(root / name).convert("RGB") for name in names)
            return sum(theirs(image, return_tensors="pt")["pixel_values"].shape[1] == 3 for image in opened)

        image = load_image(names[0], root)
        assert torch.equal(transform(image), theirs(image, return_tensors="pt")["pixel_values"][0])
        found[mode] = {"ours_per_s": rate(ours), "pil_per_s": rate(pil)}
        found[mode]["ratio"] = found[mode]["ours_per_s"] / found[mode]["pil_per_s"]
    return found | torchvision_rate(root, names, size)


def torchvision_rate(root: Path, names: list[str], size: dict) -> dict:
    """Our torch engine against transformers' torchvision processor; same pixels."""
    try:
        import torchvision  # noqa: F401  (an optional dependency of transformers)
    except ImportError:
        return {"torchvision": "not installed"}
    from transformers.models.llava.image_processing_llava import LlavaImageProcessor

    theirs = LlavaImageProcessor(**size, do_pad=True)
    transform = ImageTransform(336, (336, 336), MEAN, STD, aspect_ratio="pad", engine="torch")
    image = load_image(names[0], root)
    assert torch.equal(transform(image), theirs(image, return_tensors="pt")["pixel_values"][0])

    def ours() -> int:
        return sum(len(transform(load_image(name, root))) == 3 for name in names)

    def vision() -> int:
        opened = (Image.open(root / name).convert("RGB") for name in names)
        return sum(theirs(image, return_tensors="pt")["pixel_values"].shape[1] == 3 for image in opened)

    found = {"ours_per_s": rate(ours), "torchvision_per_s": rate(vision)}
    return {"pad, torch": found | {"ratio": found["ours_per_s"] / found["torchvision_per_s"]}}


def peak_of_reading(path: Path) -> dict:
    """Peak memory of a new process that reads the whole file, of one that only imports, and of json.load."""
    codes = {
        "imports": "import llava_moslora.data.formats",
        "ours": "from llava_moslora.data.formats import read_records\nprint(sum(1 for _ in read_records(sys.argv[1])))",
        "json_load": "import json\nprint(len(json.load(open(sys.argv[1]))))",
    }
    peaks = {}
    for name, code in codes.items():
        report = "\nimport resource; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
        command = [sys.executable, "-c", f"import sys\n{code}{report}", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks[f"{name}_mb"] = int(done.stdout.split()[-1]) / 1024
    return peaks | {"file_mb": path.stat().st_size / 2**20}


def first_batch(folder: Path, path: Path, tokenizer: PreTrainedTokenizerFast) -> tuple[dict, np.ndarray]:
    """Seconds to build the cache (2 processes), and from a warm cache to the first batch; and the records' lengths."""
    settings = DataSettings(data_path=[str(path)], data_cache=str(folder / "cache"), preprocessing_num_workers=2)
    prompt = {"tokenizer": tokenizer, "template": "chatml", "tokens_per_image": 576}
    begin = time.perf_counter()
    dataset = prepare(settings, **prompt)
    built = time.perf_counter() - begin
    begin = time.perf_counter()
    dataset = prepare(settings, **prompt)
    found = time.perf_counter() - begin
    sampler = GlobalBatchSampler.of(dataset, settings, per_device_batch_size=16)
    loader = DataLoader(
        dataset, batch_sampler=sampler, collate_fn=Collator(0, None, ImageTransform(1, (1, 1), MEAN, STD))
    )
    next(iter(loader))
    total = time.perf_counter() - begin
    size = sum(part.stat().st_size for part in (folder / "cache").rglob("*.arrow"))
    times = {"build_s": built, "records": len(dataset), "build_per_s": len(dataset) / built, "arrow_mb": size / 2**20}
    return times | {"warm_prepare_s": found, "warm_first_batch_s": total}, np.asarray(dataset["length"][:])


def mix_lengths(text: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lengths and modalities: 94 % of the file's texts with an image of 576 tokens before them."""
    imaged = np.random.default_rng(1).random(len(text)) < 0.94
    return np.minimum(2048, text + 576 * imaged), imaged


def padding(text: np.ndarray) -> dict:
    """Share of padding at 16 records per device, on one rank and on eight."""
    lengths, imaged = mix_lengths(text)
    orders = {f"group {group}": {"group": group} for group in (XTUNER_DATA_GROUP, 75, DATA_GROUP, 200)}
    found = {}
    for name, options in {**orders, "shuffle": {"order": "shuffle"}}.items():
        for ranks in (1, 8):
            sampler = GlobalBatchSampler(
                lengths, imaged, per_device_batch_size=16, world_size=ranks, **options
            )  # fmt: skip
            batches = lengths[sampler.epoch_order()].reshape(-1, 16, ranks)  # of a micro-batch, rank r takes r::ranks
            found[f"{name}, {ranks} ranks"] = float(1 - batches.sum() / (batches.max(axis=1).sum() * 16))
    return found


def packing(text: np.ndarray, batches: int = 3) -> dict:
    """Tokens per second, padding not counted, of forward and backward of one Llama layer of width 1,024 on the same
    records: one per row against several per row of 2,048, in the grouped order and shuffled. (PyTorch's attention on a
    CPU computes the whole square of a packed row, a third of this layer's work; flash attention would not.)"""
    lengths, imaged = mix_lengths(text)
    config = LlamaConfig(vocab_size=512, hidden_size=1024, intermediate_size=2816, num_hidden_layers=1,
                         num_attention_heads=8, num_key_value_heads=2, max_position_embeddings=2048)  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    found: dict = {}
    for order in ("modality_length", "shuffle"):
        sampler = GlobalBatchSampler(lengths, imaged, per_device_batch_size=16, order=order)
        chosen = sampler.epoch_order().reshape(-1, 16)[np.linspace(1, sampler.global_batches - 2, batches).astype(int)]
        for name, pack_to in (("one per row", None), ("packed", 2048)):
            collate = Collator(0, None, ImageTransform(1, (1, 1), MEAN, STD), pack_to=pack_to)
            seconds = real = padded = 0.0
            for batch in chosen:
                ids = [np.arange(length) % 500 for length in lengths[batch]]
                rows = [{"input_ids": one.tolist(), "labels": one.tolist(), "images": [], "shard": "", "record": k,
                         "number": k, "id": ""} for k, one in enumerate(ids)]  # fmt: skip
                inputs = collate(rows)
                for ours_only in ("record", "lengths", "label_positions"):
                    del inputs[ours_only]
                begin = time.perf_counter()
                model(**inputs, use_cache=False).loss.backward()
                seconds += time.perf_counter() - begin
                real, padded = real + lengths[batch].sum(), padded + inputs["input_ids"].numel()
            found[f"{order}, {name}"] = {"tokens_per_s": real / seconds, "padding": float(1 - real / padded)}
        both = [found[f"{order}, {name}"]["tokens_per_s"] for name in ("packed", "one per row")]
        found[f"{order}, ratio"] = both[0] / both[1]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True, help="folder of a ChatML tokenizer")
    parser.add_argument("--records", type=int, default=665_298)
    args = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = load_tokenizer(args.tokenizer)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        result = {"records": records_per_second(folder, tokenizer), "images": images_per_second(folder)}
        path = folder / "mix.json"
        write_records(path, args.records, images=False)
        result["reading"] = peak_of_reading(path)
        result["cache"], lengths = first_batch(folder, path, tokenizer)
        result["padding_waste"], result["packing"] = padding(lengths), packing(lengths)
    result["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "data.json").write_text(json.dumps(result, indent=1))
    for part, rows in result.items():
        for name, value in rows.items() if isinstance(rows, dict) else [("", rows)]:
            print(f"{part:14} {name:20} {json.dumps(value, default=str)}")


if __name__ == "__main__":
    main()
