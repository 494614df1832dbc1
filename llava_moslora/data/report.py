"""The report on a prepared data set, one JSON file and one HTML page, to read before training."""

from __future__ import annotations

import html
import json
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from llava_moslora import pages
from llava_moslora.config import DataSettings
from llava_moslora.data.cache import NAMING, report_of, reports_of
from llava_moslora.data.collate import read_record_image
from llava_moslora.data.sampler import GlobalBatchSampler
from llava_moslora.data.sources.container import ImageRef
from llava_moslora.files.disk import replace_file
from llava_moslora.text.conversation import label_runs

BARS = 40
THUMBNAIL = 192


def data_report(dataset: Dataset, *, settings: DataSettings, batch_size: int, rows: np.ndarray | None = None) -> dict:
    """Counts by source and modality, histograms, padding waste; and the counts of :func:`report_of`.

    A record's source is the first folder of its image's name (``coco``, ``gqa``, ...), or ``text``.

    Args:
        settings: groups and weights, on which the padding waste depends, for either order.
        batch_size: records per micro-batch, for the padding waste.
        rows: int64[n], those that are trained on; default: all. The others are only counted, as ``held_out``.
            ``records`` and the counts of records that were too long or bad refer to the whole files.
    """
    counted = report_of(dataset)
    rows = np.arange(len(dataset)) if rows is None else rows
    lengths, trained, has_image, file_of = (
        np.asarray(dataset[name][:])[rows] for name in ("length", "trained", "has_image", "source")
    )
    names, shards = dataset["images"][:], dataset["shard"][:]
    images = [names[row] for row in rows]
    folder = os.path.abspath(settings.image_folder or "")
    first = [
        None if not given else ImageRef.parse(given[0]).name if shards[row] else _below(folder, given[0])
        for given, row in zip(images, rows, strict=True)
    ]
    source = np.asarray(["text" if name is None else name.split("/")[0] if "/" in name else "." for name in first])
    sources = {
        name: {"records": int(here.sum()), "tokens": int(lengths[here].sum()), "trained": int(trained[here].sum())}
        for name in sorted(set(source))
        for here in [source == name]
    }
    cut = sum(counted.get(name, 0) for name in ("turns_dropped", "answers_cut", "left_out"))
    waste = {}
    if len(lengths) >= batch_size:
        for order in ("shuffle", "modality_length"):
            ordered = replace(settings, data_order=order)
            sampler = GlobalBatchSampler.of(dataset, ordered, per_device_batch_size=batch_size, records=rows)
            waste[order] = padding_waste(sampler, dataset["length"][:])
    parts = reports_of(dataset)
    used = np.bincount(file_of, minlength=len(parts)).tolist()
    files = [
        {name: part[name] for name in ("file", "formats", "records")}
        | {"kept": count, "held_out": part["kept"] - count, "seen_per_epoch": weight * count}
        for part, weight, count in zip(parts, settings.data_weights or [1] * len(parts), used, strict=True)
    ]
    return {
        **counted,
        "kept": len(rows),
        "held_out": len(dataset) - len(rows),
        "with_images": int(has_image.sum()),
        "tokens": int(lengths.sum()),
        "images": sum(map(len, images)),
        "trained_tokens": int(trained.sum()),
        "truncated_share": cut / counted["records"],
        "longest": int(lengths.max()),
        "batch_size": batch_size,
        "padding_waste": waste,
        "files": files,
        "sources": sources,
        "lengths": {
            "with images": histogram(lengths[has_image], lengths.max()),
            "text only": histogram(lengths[~has_image], lengths.max()),
        },
        "trained_per_record": {"all": histogram(trained, np.quantile(trained, 0.99))},
    }


def _below(folder: str, name: str) -> str:
    """An absolute name as a relative one, where it is written below ``folder``."""
    return name.removeprefix(folder).lstrip("/") if os.path.isabs(name) else name


def padding_waste(sampler: GlobalBatchSampler, lengths: np.ndarray) -> float:
    """The share of an epoch's tokens that is padding."""
    batches = sampler.epoch_order().reshape(-1, sampler.per_device_batch_size)
    in_batches = np.asarray(lengths)[batches]  # (batches, rows)
    return float(1 - in_batches.sum() / (in_batches.max(axis=1).sum() * in_batches.shape[1]))


def histogram(values: np.ndarray, largest: float) -> dict:
    """``edges`` (one more than counts) from 0 to ``largest``, and ``counts``; larger values are in the last bar."""
    edges = np.linspace(0, max(float(largest), 1), BARS + 1)
    counts, _ = np.histogram(np.minimum(values, edges[-1]), edges)
    return {"edges": edges.round(2).tolist(), "counts": counts.tolist()}


def write_report(
    folder: str | Path,
    dataset: Dataset,
    *,
    settings: DataSettings,
    tokenizer: PreTrainedTokenizerFast,
    batch_size: int,
    rows: np.ndarray | None = None,
    title: str | None = None,
    samples: int = 10,
) -> Path:
    """Write ``report.json`` and ``report.html`` into ``folder``; returns the page. It needs no network to be read.

    Args:
        settings: that ``dataset`` was prepared with.
        batch_size: records per micro-batch, for the padding waste.
        rows: int64[n], those that are trained on; default: all. Only they are shown.
        title: of the page; default: the data files.
        samples: records that are shown, drawn at random.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rows = np.arange(len(dataset)) if rows is None else rows
    report = data_report(dataset, settings=settings, batch_size=batch_size, rows=rows)
    replace_file(folder / "report.json", json.dumps(report, indent=1).encode())
    chosen = sorted(np.random.default_rng(0).permutation(rows)[:samples].tolist())
    files = [Path(one["file"]).name for one in report["files"]]
    shown = [_sample(dataset[k], files, tokenizer, settings) for k in chosen]
    page = folder / "report.html"
    replace_file(page, _page(report, shown, title or " ".join(settings.data_path)).encode())
    return page


def _sample(row: dict, files: list[str], tokenizer: PreTrainedTokenizerFast, settings: DataSettings) -> str:
    """One record: its images and its text, with trained parts highlighted."""
    images, folder, links = "", settings.image_folder, settings.follow_image_links
    where = {"record": row["record"], "record_id": row["id"]}
    for name in row["images"]:
        image = read_record_image(row, name, folder, links, where)
        shown = html.escape(ImageRef.parse(name).name if row["shard"] else name)
        images += f"<figure>{pages.thumbnail(image, THUMBNAIL)}<figcaption>{shown}</figcaption></figure>"
    runs = label_runs(row["input_ids"], row["labels"], tokenizer)
    text = "".join(f'<span class="{kind}">{html.escape(part)}</span>' for kind, part in runs)
    heading = f"record {row['record']}" + (f" · {html.escape(row['id'])}" if row["id"] else "")
    heading += f" · {html.escape(files[row['source']])}" if len(files) > 1 else ""
    size = f"{row['length']} tokens, {row['trained']} trained"
    body = f"<div class=sample>{images}<pre>{text}</pre></div>"
    return f"<article><h3>{heading} <small>{size}</small></h3>{body}</article>"


def _page(report: dict, samples: list[str], title: str) -> str:
    waste = report["padding_waste"]
    facts = {
        name: f"{report[name.replace(' ', '_')]:,}" for name in ("records", "kept", "with images", "images", "tokens")
    }
    facts |= {"held out": f"{report['held_out']:,}"} if report["held_out"] else {}
    facts |= {
        "trained tokens": f"{report['trained_tokens']:,} ({report['trained_tokens'] / report['tokens']:.1%})",
        "longest record": f"{report['longest']:,} tokens",
        "truncated": f"{report['truncated_share']:.2%}",
        "duplicate ids": f"{report.get('duplicate_ids', 0):,}",
        **({NAMING: f"{n:,}"} if (n := report["control_names_as_text"]) else {}),
        "problems": f"{len(report['problems']):,}",
    }
    columns = ["records", "kept", *(["held_out"] if report["held_out"] else []), "seen_per_epoch"]
    cut = {"lost trailing turns": "turns_dropped", "answer cut": "answers_cut", "left out": "left_out"}
    tables = [
        _table("Files", ["file", "format", *(column.replace("_", " ") for column in columns)],
               [[Path(row["file"]).name, ", ".join(row["formats"]), *(f"{row[key]:,.0f}" for key in columns)]
                for row in report["files"]]),
        _table("Sources", ["source", "records", "tokens", "trained"],
               [[name, *(f"{n:,}" for n in row.values())] for name, row in report["sources"].items()]),
        _table("Longer than the limit", ["treatment", "records"],
               [[name, f"{report.get(key, 0):,}"] for name, key in cut.items()]),
        _table(f"Padding at {report['batch_size']} records per batch", ["order", "share of tokens"],
               [[name, f"{share:.1%}"] for name, share in waste.items()]),
    ]  # fmt: skip
    charts = [
        _chart("Tokens per record", report["lengths"]),
        _chart("Trained tokens per record (last bar: longest 1 %)", report["trained_per_record"]),
    ]
    kinds = Counter(problem["refusal"]["code"] for problem in report["problems"])
    problems = "".join(f"<li>{html.escape(problem['line'])}</li>" for problem in report["problems"])
    summary = ", ".join(f"{count} × {kind}" for kind, count in kinds.most_common()) or "none"
    cards = "".join(f"<div class=fact><b>{value}</b>{name}</div>" for name, value in facts.items())
    body = f"""<div class=facts>{cards}</div>
<div class=row>{"".join(charts)}</div><div class=row>{"".join(tables)}</div>
<h2>{len(samples)} records, drawn at random</h2>
<p><span class=trained>trained</span> <span class=masked>not trained</span>
<span class=image>image placeholders</span></p>{"".join(samples)}
<h2>Problems: {html.escape(summary)}</h2><ol class=problems>{problems}</ol>"""
    return pages.page(title, body, STYLE)


def _table(title: str, head: list[str], rows: list[list[str]]) -> str:
    return f"<section><h2>{html.escape(title)}</h2>{pages.table(rows, head)}</section>"


def _chart(title: str, series: dict[str, dict]) -> str:
    """Stacked bars as SVG, one colour per series."""
    width, height, bottom = 480, 180, 20
    counts = np.asarray([one["counts"] for one in series.values()])  # (series, bars)
    edges = next(iter(series.values()))["edges"]
    scale = (height - bottom - 10) / max(counts.sum(axis=0).max(), 1)
    step = width / counts.shape[1]
    bars = ""
    for bar in range(counts.shape[1]):
        base = height - bottom
        label = f"{edges[bar]:g}–{edges[bar + 1]:g}: " + ", ".join(
            f"{count:,} {name}" for name, count in zip(series, counts[:, bar], strict=True)
        )
        for number, count in enumerate(counts[:, bar]):
            tall = float(count) * scale
            base -= tall
            bars += f"<rect class=s{number} x={bar * step:.1f} y={base:.1f} width={step - 1:.1f} height={tall:.1f} />"
        area = f"x={bar * step:.1f} y=0 width={step:.1f} height={height}"
        bars += f"<rect class=hover {area}><title>{label}</title></rect>"
    ticks = "".join(
        f"<text x={share * width:.0f} y={height - 4} text-anchor={anchor}>{edges[0] + share * edges[-1]:,.0f}</text>"
        for share, anchor in [(0, "start"), (0.25, "middle"), (0.5, "middle"), (0.75, "middle"), (1, "end")]
    )
    legend = " ".join(f"<span class=s{k}>■</span> {html.escape(name)}" for k, name in enumerate(series))
    return (
        f"<section><h2>{html.escape(title)}</h2><svg viewBox='0 0 {width} {height}'>{bars}{ticks}</svg>"
        f"<p>{legend if len(series) > 1 else ''}</p></section>"
    )


STYLE = """
h2 { font-size: 1.05em; margin: 1.5em 0 .4em; } h3 { font-size: .95em; margin: 1em 0 .3em; }
.row { display: flex; flex-wrap: wrap; gap: 0 3em; } .row section { flex: 1 1 300px; }
.facts { display: flex; flex-wrap: wrap; gap: .6em 2em; }
.fact { color: #777; } .fact b { display: block; font-size: 1.25em; color: CanvasText; }
table { border-collapse: collapse; width: 100%; } th, td { text-align: right; padding: .15em .6em; }
th { font-weight: 500; color: #777; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
svg { width: 100%; } svg text { font-size: 11px; fill: #777; }
.s0 { fill: var(--a); color: var(--a); } .s1 { fill: var(--b); color: var(--b); }
.hover { fill: transparent; } .hover:hover { fill: #8883; }
.sample { display: flex; gap: 1em; align-items: flex-start; }
figure { margin: 0; } figcaption { font-size: .75em; max-width: 192px; overflow-wrap: anywhere; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; font-size: 13px; flex: 1; }
.trained { background: #2f7d5b33; } .masked { color: #777; } .image { color: var(--b); }
.problems { font-size: 13px; overflow-wrap: anywhere; }
"""
