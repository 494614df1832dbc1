"""Writes the report of an evaluation or a comparison: table, radar chart, page of mistakes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from llava_moslora.errors import Refusal
from llava_moslora.evaluation.compare import compare
from llava_moslora.evaluation.mistakes import Answered, answered_by_both, choose
from llava_moslora.evaluation.mistakes_page import write_page
from llava_moslora.evaluation.paper_row import recognise_row
from llava_moslora.evaluation.radar import RADAR, SETS, lacking, radar_of, write_radar
from llava_moslora.evaluation.results import NO_ROW, PAGE, RESULTS, Result, comparison_table, write_results
from llava_moslora.evaluation.tsv import Table
from llava_moslora.files.disk import replace_file

COMPARISON = "comparison.md"
Results = Mapping[str, Result]


def write_report(
    output: Path,
    source: str,
    results: Results,
    tables: Mapping[str, Table],
    *,
    missing: Sequence[str] = (),
    paper: str = "",
    mistakes: int,
) -> str:
    """Write ``results.json``, ``results.md``, ``radar.png`` and ``mistakes.html``, and return the table as text.

    Args:
        source: the run or export that was asked.
        tables: of the benchmarks of this command; ``results`` has those of earlier ones too.
        missing: requested benchmarks without a file.
        paper: a row of Table 5, :data:`NO_ROW`, or "" for the matching one, if it is certain.
        mistakes: maximum per benchmark on the page; 0: no page.
    """
    row, notes = ("" if paper == NO_ROW else paper), []
    if not paper:
        row, sentence = recognise_row(source)
        notes.append(sentence)
    if asked_mmbench := any(name in results for name in SETS):
        notes.append(_radar_note(results))
    if mistakes:
        notes.append(f"Mistakes with their images: {PAGE}.")
    text = write_results(output, source, results, missing, row, notes)
    for file in (RADAR, PAGE):  # of an earlier command
        (output / file).unlink(missing_ok=True)
    if asked_mmbench and not lacking(results):
        write_radar(output / RADAR, radar_of([(Path(source).resolve().name, results)]))
    if mistakes:
        chosen = [
            choose(Answered.read(table, [output / name], [results[name]]), mistakes) for name, table in tables.items()
        ]
        others = [name for name in results if name not in tables]
        write_page(output / PAGE, f"Mistakes of {source}", chosen, missing=others)
    return text


def comparison(folders: Sequence[str], results: Sequence[Results]) -> str:
    """Whether B is better than A, as a table and in words."""
    scores = [{name: result.score for name, result in of.items()} for of in results]
    return f"A: {folders[0]}\nB: {folders[1]}\n\n{comparison_table(compare(*scores))}"


def write_comparison(
    output: Path,
    text: str,
    folders: Sequence[str],
    results: Sequence[Results],
    *,
    data: str | None = None,
    mistakes: int,
    normalise: bool = False,
) -> str:
    """Write ``comparison.md``, ``radar.png``, and ``mistakes.html`` with what only A or only B got right; returns what
    stands below the table.

    Args:
        text: of :func:`comparison`.
        data: folder of the benchmarks' files; None: no page, as it shows their images.
        mistakes: how many of each benchmark and either kind are on the page at most; 0: no page.

    Raises:
        Refusal: C-OUTPUT, the folder of an evaluation, whose own files would be lost; C-RADAR; C-COMPARE.
    """
    if (output / RESULTS).exists():
        raise Refusal(
            "C-OUTPUT", "the folder of an evaluation", file=output, key="--output", fix="choose another --output"
        )
    notes = []
    for file in (RADAR, PAGE):
        (output / file).unlink(missing_ok=True)
    if any(name in of for of in results for name in SETS):
        notes.append(_radar_note(*results))
        if not any(map(lacking, results)):
            write_radar(output / RADAR, radar_of(named(folders, results), normalise=normalise))
    if data is None:
        notes.append(f"No {PAGE}: it needs --data.")
    elif mistakes:
        chosen = [choose(one, mistakes) for one in answered_by_both(data, [Path(f) for f in folders], results)]
        shown = [one.answered.benchmark.name for one in chosen]
        others = [name for name in results[0] if name in results[1] and name not in shown]
        if chosen:
            write_page(output / PAGE, f"A: {folders[0]}, B: {folders[1]}", chosen, missing=others)
        notes.append(
            f"What only A or only B got right: {PAGE}." if chosen else f"No {PAGE}: no file of theirs in {data}."
        )
    below = "".join(f"{note}\n" for note in notes)
    replace_file(output / COMPARISON, f"{text}\n{below}".encode())
    return below


def named(folders: Sequence[str], results: Sequence[Results]) -> list[tuple[str, Results]]:
    """Results under the name of their folder, or under its path where the names do not differ."""
    names = [Path(folder).resolve().name for folder in folders]
    return list(zip(names if len(set(names)) == len(names) else folders, results, strict=True))


def _radar_note(*models: Results) -> str:
    reason = next(filter(None, map(lacking, models)), "")
    return f"No {RADAR}: {reason}." if reason else f"Abilities of MMBench: {RADAR}."
