"""Batches: shapes, padding, images in the order of their placeholders, errors that name the record."""

import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from transformers import CLIPVisionConfig, LlamaConfig, LlamaForCausalLM, LlavaConfig, LlavaForConditionalGeneration

from llava_moslora.data.collate import Collator, pack, pad_left_prompts
from llava_moslora.data.image_transform import ImageTransform
from llava_moslora.data.images import load_image
from llava_moslora.errors import Refusal

TRANSFORM = ImageTransform(8, (8, 8), (0.5,) * 3, (0.5,) * 3)


def make(length, images=(), record=0, id="r"):
    ids = list(range(1, length + 1))
    return {"input_ids": ids, "labels": [-100, *ids[1:]], "images": list(images), "shard": "", "record": record,
            "number": record, "id": id}  # fmt: skip


def test_batch(image_folder):
    collate = Collator(99, image_folder, TRANSFORM)
    batch = collate([make(3, ["1.png", "0.png"], 7), make(5, [], 8), make(2, ["2.png"], 9)])
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in batch.items()} == {
        "input_ids": (torch.int64, (3, 5)),
        "labels": (torch.int64, (3, 5)),
        "record": (torch.int64, (3,)),
        "lengths": (torch.int64, (3,)),
        "label_positions": (torch.int64, (7,)),
        "pixel_values": (torch.float32, (3, 3, 8, 8)),
    }
    assert batch["input_ids"].tolist() == [[1, 2, 3, 99, 99], [1, 2, 3, 4, 5], [1, 2, 99, 99, 99]]
    assert batch["lengths"].tolist() == [3, 5, 2]
    assert batch["labels"].tolist() == [[-100, 2, 3, -100, -100], [-100, 2, 3, 4, 5], [-100, 2, -100, -100, -100]]
    assert batch["record"].tolist() == [7, 8, 9]
    for pixels, name in zip(batch["pixel_values"], ["1.png", "0.png", "2.png"], strict=True):
        assert torch.equal(pixels, TRANSFORM(load_image(name, image_folder)))


def test_positions_are_counted_in_the_flattened_batch(image_folder):
    """Of labels, but for a row's first token; of placeholders, in the order of the images; packed rows too."""
    one, two = make(4, ["1.png"], 7), make(3, ["0.png"], 8)
    one["input_ids"], two["input_ids"] = [1, 60, 60, 4], [60, 60, 5]
    two["labels"] = [9, -100, 5]
    for pack_to, labels, images in [(None, [1, 2, 3, 6], [1, 2, 4, 5]), (8, [1, 2, 3, 4, 6], [1, 2, 4, 5])]:
        batch = Collator(99, image_folder, TRANSFORM, pack_to=pack_to, image_token_id=60)([one, two])
        assert batch["label_positions"].tolist() == labels
        assert batch["image_positions"].tolist() == images
    text = Collator(99, None, TRANSFORM, image_token_id=60)([make(3)])
    assert "image_positions" not in text


def test_text_only_batch_has_no_pixels():
    assert "pixel_values" not in Collator(0, None, TRANSFORM)([make(3), make(4)])


# D21: a record without a label
def test_errors_name_the_record(image_folder):
    collate = Collator(0, image_folder, TRANSFORM)
    with pytest.raises(Refusal, match=r"\[I-MISSING\] .*nope.png:record 41 id=abc"):
        collate([make(3), make(3, ["nope.png"], 41, "abc")])
    masked = make(3, record=42, id="abc") | {"labels": [-100] * 3}
    with pytest.raises(Refusal, match=r"\[D-LABELS\] record 42 id=abc: no token of this record has a label"):
        collate([make(3), masked])


# R7: an error in a loader process
@pytest.mark.parametrize("workers", [0, 2])
def test_a_worker_names_the_record_too(image_folder, workers):
    """The refusal's text crosses the process boundary."""
    records = [make(3, ["0.png"], k, f"id{k}") for k in range(6)]
    records[4]["images"] = ["broken.png"]
    (image_folder / "broken.png").write_bytes((image_folder / "0.png").read_bytes()[:60])
    loader = DataLoader(records, batch_size=2, collate_fn=Collator(0, image_folder, TRANSFORM), num_workers=workers)
    with pytest.raises(Exception, match=r"\[I-DECODE\] .*record 4 id=id4:image: the image is damaged"):
        list(loader)


def test_collator_is_small_to_send_to_workers(image_folder):
    collate = pickle.loads(pickle.dumps(Collator(0, image_folder, TRANSFORM)))
    assert collate([make(3, ["0.png"])])["pixel_values"].shape == (1, 3, 8, 8)


def test_packed_rows(image_folder):
    records = [make(3, ["1.png"], 7), make(5, [], 8), make(2, ["2.png"], 9), make(4, ["0.png"], 10)]
    batch = Collator(99, image_folder, TRANSFORM, pack_to=8)(records)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5, 1, 2], [1, 2, 3, 4, 1, 2, 3]]  # two rows, both of 7
    assert batch["labels"].tolist() == [[-100, 2, 3, 4, 5, -100, 2], [-100, 2, 3, 4, -100, 2, 3]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 1], [0, 1, 2, 3, 0, 1, 2]]
    assert "attention_mask" not in batch
    assert batch["record"].tolist() == [8, 9, 10, 7] and batch["lengths"].tolist() == [5, 2, 4, 3]
    for pixels, name in zip(batch["pixel_values"], ["2.png", "0.png", "1.png"], strict=True):
        assert torch.equal(pixels, TRANSFORM(load_image(name, image_folder)))


def test_the_padding_of_packed_rows_is_a_record_of_its_own():
    """Positions restart there too, so that no token sees it."""
    batch = Collator(99, None, TRANSFORM, pack_to=8)([make(5), make(6)])
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 99]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 0]]
    assert batch["labels"].tolist()[1] == [-100, 2, 3, 4, 5, -100]


@pytest.mark.parametrize(
    ("lengths", "rows"),
    [
        ([5, 5, 5, 5], [[5], [5], [5], [5]]),  # nothing to gain, and longer rows cost more
        ([4, 3, 3], [[4, 3, 3]]),
        ([7, 6, 2, 1], [[7, 1], [6, 2]]),  # first fit in 10 would be 7 2 1 | 6
        ([6, 4, 4, 3, 3], [[6, 4], [4, 3, 3]]),
        ([12, 3, 2], [[12], [3, 2]]),  # a record too long for a row has its own
    ],
)
def test_rows_have_little_padding(lengths, rows):
    packed = pack([make(length, record=k) for k, length in enumerate(lengths)], 10)
    assert [[len(one["input_ids"]) for one in row] for row in packed] == rows


def test_packing_never_pads_more_than_one_record_a_row():
    random = np.random.default_rng(0)
    for _ in range(50):
        lengths = random.integers(1, 40, 16)
        rows = pack([make(int(length)) for length in lengths], 64)
        sums = [sum(len(one["input_ids"]) for one in row) for row in rows]
        assert sum(sums) == lengths.sum() and max(sums) <= 64
        assert len(rows) * max(sums) <= 16 * lengths.max()


@pytest.mark.parametrize("lengths", [[5], [9, 9, 9], [1] * 20, [8, 1, 8, 7, 2, 3, 3, 3], [12, 3]])
def test_packing_keeps_every_record_whole(lengths):
    rows = pack([make(length, record=k) for k, length in enumerate(lengths)], 10)
    assert sorted(one["record"] for row in rows for one in row) == list(range(len(lengths)))
    for row in rows:
        assert len(row) == 1 or sum(len(one["input_ids"]) for one in row) <= 10


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_loss_equals_the_unpacked_one(attention):
    """And no record sees another: changing one leaves the others' logits as they are."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, attn_implementation=attention, use_cache=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    records = [make(length, record=k) for k, length in enumerate([7, 12, 3, 9, 5])]
    losses = []
    for pack_to in (None, 16, 40):
        batch = Collator(0, None, TRANSFORM, pack_to=pack_to)(records)
        for ours_only in ("record", "lengths", "label_positions"):
            del batch[ours_only]
        losses.append(model(**batch).loss.item())
    assert losses[1:] == pytest.approx([losses[0]] * 2, abs=1e-6)
    batch.pop("labels")
    before = model(**batch).logits
    batch["input_ids"][0, :12] = 49  # the first, longest record of the row
    after = model(**batch).logits
    assert torch.equal(before[0, 12:], after[0, 12:])
    assert not torch.equal(before[0, :12], after[0, :12])


def test_packed_llava_keeps_every_image_with_its_record(image_folder):
    torch.manual_seed(0)
    text = LlamaConfig(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=49, vision_feature_layer=-2)
    model = LlavaForConditionalGeneration(config).eval()
    records = []
    for k, (length, names) in enumerate([(9, ["0.png"]), (6, []), (14, ["1.png", "2.png"]), (7, ["3.png"]), (4, [])]):
        one = make(length, names, k)
        one["input_ids"] = [49] * 4 * len(names) + one["input_ids"][4 * len(names) :]
        one["labels"] = [-100] * (4 * len(names) + 1) + one["labels"][4 * len(names) + 1 :]
        records.append(one)
    losses = []
    for pack_to in (None, 16, 24, 100):
        batch = Collator(0, image_folder, TRANSFORM, pack_to=pack_to)(records)
        for ours_only in ("record", "lengths", "label_positions"):
            del batch[ours_only]
        losses.append(model(**batch, use_cache=False).loss.item())
    assert losses[1:] == pytest.approx([losses[0]] * 3, abs=1e-6)


def test_left_padding():
    batch = pad_left_prompts([[1, 2, 3], [4]], 9)
    assert batch["input_ids"].tolist() == [[1, 2, 3], [9, 9, 4]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]


def test_sixteen_bit_and_transparent_images_pass_through(image_folder):
    Image.fromarray(np.full((4, 4), 65535, dtype=np.uint16)).save(image_folder / "deep.png")
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(image_folder / "clear.png")
    pixels = Collator(0, image_folder, TRANSFORM)([make(2, ["deep.png", "clear.png"])])["pixel_values"]
    assert torch.equal(pixels[0], pixels[1])  # both white
