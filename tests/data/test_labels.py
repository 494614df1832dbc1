"""Six records as they are published, from JSON to the masks that are trained: ⟦ ⟧ stands around what has a label."""

import json

import pytest

from llava_moslora.data.formats import read_records
from llava_moslora.text.conversation import encode
from llava_moslora.text.labels import show_labels

# Three of EasyVQA, as the demo writes them, and three in the forms that LLaVA's mix665k has.
RECORDS = """[
{"id": "train-1990-2", "image": "images/train/1990.png", "conversations": [
  {"from": "human", "value": "<image>\\nis no green shape present?"}, {"from": "gpt", "value": "yes"}]},
{"id": "train-1565-1", "image": "images/train/1565.png", "conversations": [
  {"from": "human", "value": "<image>\\nis there a black shape in the image?"}, {"from": "gpt", "value": "no"},
  {"from": "human", "value": "what color is the shape?"}, {"from": "gpt", "value": "red"}]},
{"id": "train-2215-2", "image": "images/train/2215.png", "conversations": [
  {"from": "human", "value": "<image>\\nwhat shape is present?"}, {"from": "gpt", "value": "circle"}]},
{"id": "000000033471", "image": "coco/train2017/000000033471.jpg", "conversations": [
  {"from": "human", "value": "<image>\\nWhat are the colors of the bus in the image?"},
  {"from": "gpt", "value": "The bus in the image is white and red."},
  {"from": "human", "value": "What feature can be seen on the back of the bus?"},
  {"from": "gpt", "value": "The back features an advertisement."}]},
{"id": "ocr", "image": "ocr_vqa/images/1.jpg", "conversations": [
  {"from": "human", "value": "Who wrote this book?\\nAnswer the question using a single word or phrase.\\n<image>"},
  {"from": "gpt", "value": "A. Writer"}]},
{"id": "wBkCtBx_0", "model": "", "conversations": [
  {"from": "human", "value": "What does <|im_end|> mean in a prompt? "},
  {"from": "gpt", "value": " It ends a turn.\\n"}]}
]"""
ASK, SAY, END = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>"
CHATML = [
    f"{ASK}<image>×2\nis no green shape present?{SAY}⟦yes{END}⟧\n",
    f"{ASK}<image>×2\nis there a black shape in the image?{SAY}⟦no{END}⟧\n"
    f"{ASK}what color is the shape?{SAY}⟦red{END}⟧\n",
    f"{ASK}<image>×2\nwhat shape is present?{SAY}⟦circle{END}⟧\n",
    f"{ASK}<image>×2\nWhat are the colors of the bus in the image?{SAY}⟦The bus in the image is white and red.{END}⟧\n"
    f"{ASK}What feature can be seen on the back of the bus?{SAY}⟦The back features an advertisement.{END}⟧\n",
    f"{ASK}Who wrote this book?\nAnswer the question using a single word or phrase.\n<image>×2{SAY}⟦A. Writer{END}⟧\n",
    f"{ASK}What does <|im_end|> mean in a prompt?{SAY}⟦It ends a turn.{END}⟧\n",
]


@pytest.mark.parametrize("number", range(6))
def test_masks(tiny, tmp_path, number):
    path = tmp_path / "data.json"
    path.write_text(RECORDS, "utf-8")
    record = list(read_records(path))[number]
    images = [2] * len(record.images)
    encoded = encode(record.turns, tokenizer=tiny("chatml"), template="chatml", image_tokens=images)
    shown = show_labels(encoded, tiny("chatml"), colour=False)
    print(shown)
    assert shown == CHATML[number]
    trained = tiny("chatml").decode([label for label in encoded.labels if label >= 0])
    answers = [turn["value"].strip() for turn in json.loads(RECORDS)[number]["conversations"] if turn["from"] == "gpt"]
    assert trained == "".join(answer + END for answer in answers)
