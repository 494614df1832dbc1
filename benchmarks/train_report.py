"""The rows of benchmarks/train.py on disk and as a table, with the lower bounds of a roofline."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

from train_row import STOCK, Row

from llava_moslora.errors import Refusal

# (row, batch) → (milliseconds per step, peak GiB) on an H100 from a roofline: the sum over operations of the larger of
# FLOPs / 700 TFLOP/s and bytes / 3.0 TB/s, a lower bound, at 2,048 tokens and 200 labels per record; ours with ZeRO-2.
# "~": from figures for an H200, split into products and memory traffic and converted to these two rates. None: not
# computed.
ROOFLINE = {
    ("stock", 8): (2405, 46.2),
    ("stock-bf16", 8): (2053, 44.9),
    ("full+torch", 8): (2140, 27.2),
    ("every:2+torch", 8): (1840, 72.0),
    ("none+torch", 8): (1539, 115.1),
    ("full+torch", 4): (1101, 22.9),
    ("none+torch", 4): (799, 66.8),
    ("full+torch", 16): (None, 35.8),
    ("full+liger+torch", 8): (1840, 26.4),  # ~
    ("none+liger+torch", 8): (1310, 93.0),  # ~
    ("none+liger+torch", 4): (None, 55.7),
    ("full+triton", 8): (1800, 26.8),  # ~
    ("full+liger+triton", 8): (1500, 26.0),  # ~
    ("selective+liger+triton", 8): (1080, 73.9),  # ~
    ("none+liger+triton", 8): (1050, 93.6),  # ~
}
WITHOUT_ZERO_2 = {
    "zero0": (50, 1.7),
    "zero1": (50, 1.7),
    "zero2": (0, 0.0),
}  # (ms, GiB) less than ZeRO-2


def roofline(row: dict, tiny: bool) -> dict | None:
    """The bounds computed for this row, or None; the adapters' kernel is Triton's unless the row names one."""
    if tiny or row["layers"] or row["lengths"] != "uniform":
        return None
    parsed = Row.parse(row["row"])
    if parsed.base not in STOCK and parsed.kernel is None:
        parsed = replace(parsed, kernel="triton")
    ms, peak = ROOFLINE.get((parsed.name.removeprefix(f"{parsed.base}+"), row["batch"]), (None, None))
    if (ms is peak is None) or (parsed.base not in STOCK and parsed.base not in WITHOUT_ZERO_2):
        return None
    saved_ms, saved_gib = WITHOUT_ZERO_2.get(parsed.base, (0, 0.0))
    return {"ms_at_least": ms and ms - saved_ms, "peak_allocated_gib": round(peak - saved_gib, 1)}


class Results:
    """The rows, written to disk whenever one is added."""

    def __init__(self, output: Path | None, facts: dict, rows: list[dict]):
        self.output, self.facts, self.rows = output, facts, rows

    def add(self, row: dict) -> None:
        if expected := roofline(row, self.facts["tiny"]):
            row["roofline"] = expected
        self.rows.append(row)
        print(table(self.rows, last=True), flush=True)
        if self.output is None:
            return
        self.output.parent.mkdir(parents=True, exist_ok=True)
        part = self.output.with_name(f".{self.output.name}.part")
        part.write_text(json.dumps(self.facts | {"rows": self.rows}, indent=1) + "\n")
        os.replace(part, self.output)
        if "profile" in row:
            file = self.output.with_name(f"{self.output.stem}-profile.txt")
            with file.open("a") as out:
                out.write(profile_text(row))


def read_rows(output: Path, device: str) -> list[dict]:
    """The rows that ``output`` holds.

    Raises:
        Refusal: they were measured on another device.
    """
    if not output.exists():
        return []
    found = json.loads(output.read_text())
    if found["device"] != device:
        raise Refusal(
            "C-FLAG", "the file holds rows of another device", file=output, key="--append", found=found["device"],
            expected=device, fix="another --output",
        )  # fmt: skip
    return found["rows"]


def setting(row: dict) -> tuple:
    """Rows that are alike in it train on the same batches."""
    return row["lengths"], row["layers"], Row.parse(row["row"]).llm_alone, row["batch"]


def label(row: dict) -> str:
    words = [f"{row['row']}@{row['batch']}"]
    words += [row["lengths"]] * (row["lengths"] != "uniform" and Row.parse(row["row"]).data is None)
    return " ".join([*words, *[f"{row['layers']} layers"] * bool(row["layers"])])


def table(rows: list[dict], last: bool = False) -> str:
    """A line per row, or a longer one for the last row only; ratios are to the last ``stock`` of the same size."""
    base = {setting(r): r["tokens_per_second"] for r in of_base("stock", rows)}
    profiled = any("profile" in row for row in rows)  # on a GPU: the time in which a kernel runs
    head = f"{'':<36}{'tokens/s':>9}{'MFU':>7}{'GiB':>7}{'reserved':>9}{'loss':>8}"
    lines = [] if last else [f"{head}{'busy ms':>9}{'× stock':>8}" if profiled else f"{head}{'× stock':>8}"]
    for row in rows[-1:] if last else rows:
        if row["status"] != "ok":
            lines.append(f"{label(row):<36} {row['status']}: {' '.join(row['message'].split())[:120]}")
            continue
        cells = [("tokens_per_second", 9, ".0f"), ("mfu", 7, ".1%")]
        cells += [("peak_allocated_gib", 7, ".1f"), ("peak_reserved_gib", 9, ".1f")]
        found = row | {"loss": last_loss(row), "busy": row.get("profile", {}).get("busy_ms")}
        found["ratio"] = row["tokens_per_second"] / base[setting(row)] if setting(row) in base else None
        cells += [("loss", 8, ".4f"), *[("busy", 9, ".0f")] * profiled, ("ratio", 8, ".2f")]
        line = f"{label(row):<36}" + "".join(_cell(found.get(name), width, form) for name, width, form in cells)
        if last:
            startup = row["startup_seconds"]["until_first_step"]
            line += f"  {row['ms_per_step']:.0f} ms, start-up {startup:.0f} s"
        lines.append(line)
    return "\n".join(lines)


def _cell(value: float | None, width: int, form: str) -> str:
    return f"{'' if value is None else format(value, form):>{width}}"


def last_loss(row: dict) -> float | None:
    """After the last step. Every row starts from the same weights, but stock's adapters are others: only shown."""
    return next((loss for loss in reversed(row.get("losses", [])) if loss is not None), None)


def of_base(base: str, rows: list[dict]) -> list[dict]:
    return [row for row in rows if row["status"] == "ok" and Row.parse(row["row"]).base == base]


def comparisons(rows: list[dict]) -> str:
    """A line for each row of this package and each of stock on the same data, with the same records per step where
    there is such a row, else with others; and for a row without any."""
    lines = []
    for row in rows:
        if Row.parse(row["row"]).base in STOCK or row["status"] != "ok":
            continue
        compared = False
        for base in STOCK:
            like = [other for other in of_base(base, rows) if setting(other)[:-1] == setting(row)[:-1]]
            other = next((o for o in reversed(like) if o["batch"] == row["batch"]), like[-1] if like else None)
            if other is None:
                continue
            compared = True
            speed = row["tokens_per_second"] / other["tokens_per_second"]
            line = f"{label(row)} : {label(other)}  {speed:.2f} × tokens/s"
            if row.get("peak_allocated_gib") and other.get("peak_allocated_gib"):
                line += f", {row['peak_allocated_gib'] / other['peak_allocated_gib']:.2f} × memory"
            lines.append(line)
        lines += [f"{label(row)} : no stock row on the same data has ended"] * (not compared)
    return "\n".join(lines)


def profile_text(row: dict) -> str:
    profile = row["profile"]
    lines = [f"== {row['row']}@{row['batch']} {row['lengths']}, per step: {profile['wall_ms']:.1f} ms"]
    lines[0] += f", of which a kernel runs in {profile['busy_ms']:.1f} ms"
    lines += [f"{g['ms']:>10.2f} ms {g['calls']:>8.0f} × {name}" for name, g in profile["groups"].items()]
    lines += [""]
    lines += [f"{k['ms']:>10.2f} ms {k['calls']:>8.0f} × {k['group']:<20} {k['name']}" for k in profile["kernels"]]
    return "\n".join([*lines, "", ""])
