"""``playground/moslora.ipynb`` runs from top to bottom, and what it shows is true."""

import json
from pathlib import Path

import torch

NOTEBOOK = Path(__file__).parents[2] / "playground/moslora.ipynb"


def test_the_notebook(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    book = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert book["nbformat"] == 4
    cells = [cell for cell in book["cells"] if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] for cell in cells), "saved without outputs, which name this machine"
    seen: dict = {"__name__": "__main__"}
    with torch.random.fork_rng():
        for number, cell in enumerate(cells):
            exec(compile("".join(cell["source"]), f"{NOTEBOOK.name}, code cell {number}", "exec"), seen)
    assert seen["losses"][-1] < 0.1 * seen["losses"][0] and seen["continued_losses"][-1] < seen["continued_losses"][0]
    largest = seen["trained"].abs().max().item()
    for name in ("difference", "merged_difference", "start_difference", "again_difference"):
        assert seen[name] <= 1e-5 * largest, (name, seen[name], largest)
    stored = {p.name: json.loads((p / "adapter_config.json").read_text())["peft_type"] for p in tmp_path.iterdir()}
    assert stored == {
        "adapter": "MOSLORA",
        "plain": "LORA",
        "lora": "LORA",
        "continued": "MOSLORA",
        "lora-again": "LORA",
    }
