"""A page with the mistakes of a model, or the differences between two models: image, prompt, answer, parsed answer and
rule, and ground truth, with filters.

One self-contained file. It is written answer by answer, so that only one image is in memory at a time.
"""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from llava_moslora import pages
from llava_moslora.errors import Refusal
from llava_moslora.evaluation.mistakes import ALIKE, DIFFERENCES, MISTAKES, RIGHT, UNJUDGED, Answered, Chosen
from llava_moslora.evaluation.prompts import prompt
from llava_moslora.evaluation.rows import LETTERS, Row, literal_list
from llava_moslora.evaluation.scoring import Outcome, options_of
from llava_moslora.evaluation.tsv import Table
from llava_moslora.files.disk import replacing

THUMBNAIL = 224  # pixels of the longer side
LONGEST_TEXT = 2000  # characters of a prompt or an answer that are shown
CATEGORIES = ("l2-category", "category", "task")  # columns; the first that a row has is its category
GRADED = ("vqa", "mmvet")  # kinds whose answers can be partly right


def write_page(file: Path, title: str, chosen: Sequence[Chosen], *, missing: Sequence[str] = ()) -> None:
    """Write the page of one model's mistakes, or of the differences between A and B.

    Args:
        chosen: at least one benchmark.
        missing: benchmarks that have a result, but whose file was not read.
    """
    with replacing(file) as stream:
        for piece in _pieces(title, chosen, missing):
            stream.write(piece.encode("utf-8", "replace"))


def _pieces(title: str, chosen: Sequence[Chosen], missing: Sequence[str]) -> Iterator[str]:
    """The document, piece by piece."""
    wanted = DIFFERENCES if len(chosen[0].answered.answers) == 2 else MISTAKES
    yield pages.begin(title, STYLE, SCRIPT)
    yield "".join(f"<p>{html.escape(note)}</p>" for note in _notes(chosen, wanted, missing))
    columns = [*wanted, RIGHT if wanted == MISTAKES else ALIKE]
    columns += [UNJUDGED] * any(one.counts[UNJUDGED] for one in chosen)
    yield pages.table(
        ([one.answered.benchmark.title, *(f"{one.counts[state]:,}" for state in columns), f"{len(one.numbers):,}"]
         for one in chosen),
        ["answers", *columns, "on this page"],
    )  # fmt: skip
    yield _filters(chosen, wanted)
    for one in chosen:
        yield f"<section><h2>{html.escape(one.answered.benchmark.title)}</h2>"
        for number in one.numbers:
            yield _article(one.answered, number, one.states[number])
        yield "</section>"
    yield pages.END


def _notes(chosen: Sequence[Chosen], wanted: Sequence[str], missing: Sequence[str]) -> Iterator[str]:
    """What is on the page and what is not."""
    what = "answers that are not right" if wanted == MISTAKES else "answers of which one model's is better"
    there, shown = (sum(counts[state] for counts in of for state in wanted) for of in (
        [one.counts for one in chosen], [one.shown for one in chosen]
    ))  # fmt: skip
    if shown == there:
        yield f"All {there:,} {what}."
    else:
        yield (
            f"{shown:,} of {there:,} {what}, sampled with a fixed seed. {there - shown:,} are left out: "
            f"--mistakes {max(one.needed for one in chosen)} shows all."
        )
    if right := sum(one.shown[RIGHT] for one in chosen):
        yield f"{right:,} right answers are included for comparison; the filter shows them."
    if wanted == DIFFERENCES and any(one.answered.benchmark.kind in GRADED for one in chosen):
        yield "For graded answers, right and wrong mean better and worse than the other model's."
    if missing:
        yield f"Not on this page, because their files were not read: {', '.join(missing)}."


def _filters(chosen: Sequence[Chosen], wanted: Sequence[str]) -> str:
    """Hidden until the script runs, which fills the categories."""
    shown = sum((one.shown for one in chosen), Counter())
    benchmarks = [one.answered.benchmark for one in chosen]
    states = [("|".join(wanted), f"{'all' if wanted == DIFFERENCES else 'not right'} ({shown.total() - shown[RIGHT]})")]
    states += [(state, f"{state} ({shown[state]})") for state in (*wanted, RIGHT) if shown[state]]
    return (
        "<form hidden>"
        + _select("benchmark", [("", "all benchmarks"), *((one.name, one.title) for one in benchmarks)])
        + _select("category", [("", "all categories")])
        + _select("state", states)
        + '<input name=text type=search placeholder="search text" aria-label="search text"><output></output></form>'
    )


def _select(name: str, options: Iterable[tuple[str, str]]) -> str:
    items = (f'<option value="{html.escape(value)}">{html.escape(shown)}</option>' for value, shown in options)
    return f"<select name={name} aria-label={name}>{''.join(items)}</select>"


def _article(answered: Answered, number: int, state: str) -> str:
    benchmark, row = answered.benchmark, answered.table.rows[number]
    category = next((row[column] for column in CATEGORIES if column in row), "")
    data = {"benchmark": benchmark.name, "category": category, "state": state}
    attributes = "".join(f' data-{name}="{html.escape(value)}"' for name, value in data.items())
    lines = []
    for who, outcomes, answers in zip(("A ", "B "), answered.outcomes, answered.answers, strict=False):
        who = who if len(answered.answers) == 2 else ""
        lines.append((f"{who}answered", _cut(answers[row["index"]]) or "(nothing)"))
        lines.append((f"{who}read as", _read(row, outcomes[row["index"]])))
    lines.append(("truth", _cut(TRUTHS.get(benchmark.kind, _as_it_is)(row))))
    place = " · ".join(filter(None, (benchmark.title, f"index {row['index']}", category, state)))
    return (
        f"<article{attributes}{' hidden' if state == RIGHT else ''}>"
        f"<div class=images>{_image(answered.table, number)}</div>"
        f"<div><p>{html.escape(_cut(prompt(row, benchmark.kind, answered.prompts)))}</p>{pages.table(lines)}"
        f"<small>{html.escape(place)}</small></div></article>\n"
    )


def _image(table: Table, number: int) -> str:
    """The first image, which the model was shown; or why it cannot be read now."""
    try:
        return pages.thumbnail(table.images(number)[0], THUMBNAIL)
    except Refusal as refusal:
        return f"<p>{html.escape(refusal.line())}</p>"


def _read(row: Row, outcome: Outcome) -> str:
    """The parsed answer, its rule, and its score."""
    if outcome.rule == "unread":
        return "unread: no rule could parse it"
    text, options = outcome.read or "", _options(row)
    if outcome.rule in ("letter", "text") and text in options:
        text += f". {options[text]}"
    right = {0.0: "wrong", 1.0: "right"}.get(outcome.right, f"{outcome.right:.0%} right")
    return f"{_cut(text)} (rule: {outcome.rule}; {right})"


def _cut(text: str) -> str:
    more = len(text) - LONGEST_TEXT
    return text if more <= 0 else f"{text[:LONGEST_TEXT]}… ({more:,} more characters)"


def _options(row: Row) -> dict[str, str]:
    """Letter → text, of MathVista from its list of choices."""
    choices = map(str, literal_list(row.get("choices", "")) or [])
    return options_of(row) or dict(zip(LETTERS, choices, strict=False))


def _right_option(row: Row) -> str:
    letter = row.get("answer_option", row["answer"])
    return f"{letter}. {_options(row)[letter]}" if letter in _options(row) else row["answer"]


def _people(row: Row) -> str:
    """The answers of several people, the most frequent first."""
    counts = Counter(map(str, literal_list(row["answer"]) or []))
    return ", ".join(f"{text} × {count}" for text, count in counts.most_common())


def _as_it_is(row: Row) -> str:
    return row["answer"]


TRUTHS: dict[str, Callable[[Row], str]] = {
    "multiple-choice": _right_option,
    "circular": _right_option,
    "mathvista": _right_option,
    "vqa": _people,
}

STYLE = """
[hidden] { display: none !important; }
form { position: sticky; top: 0; display: flex; flex-wrap: wrap; gap: .6em; align-items: center; padding: .7em 0;
  background: Canvas; border-bottom: 1px solid var(--line); z-index: 1; margin-top: 1.2em; }
select, input { font: inherit; padding: .2em .4em; max-width: 20em; } output { color: #777; }
h2 { font-size: 1.05em; margin: 1.5em 0 .4em; } p, td { white-space: pre-wrap; overflow-wrap: anywhere; }
article { display: flex; gap: 1.5em; padding: 1em 0; content-visibility: auto; contain-intrinsic-size: auto 240px; }
article p { margin: 0 0 .6em; } article > div + div { flex: 1; min-width: 0; }
.images { flex: 0 0 224px; } .images img { display: block; } .images p { font-size: .85em; }
th, td { padding: .1em 1em .1em 0; text-align: right; vertical-align: top; } th { font-weight: 500; color: #777; }
th:first-child, td:first-child, article td { text-align: left; }
article td { unicode-bidi: isolate; } article td:first-child { color: #777; white-space: nowrap; }
article tr:nth-child(odd) td:last-child { font-weight: 600; }
article tr:last-child td:last-child { color: var(--a); font-weight: 400; }
@media (max-width: 640px) {
  form { position: static; } article { flex-direction: column; gap: .6em; } .images { flex: none; }
}
"""

SCRIPT = """
const form = document.forms[0], all = [...document.querySelectorAll("article")];
const {benchmark, category, state, text} = form.elements;
function fill() {
  const of = all.filter(one => !benchmark.value || one.dataset.benchmark === benchmark.value);
  const names = [...new Set(of.map(one => one.dataset.category))].filter(Boolean).sort();
  category.replaceChildren(new Option("all categories", ""), ...names.map(name => new Option(name, name)));
}
function show() {
  const words = text.value.toLowerCase(), states = state.value.split("|");
  let count = 0;
  for (const one of all) {
    const {dataset} = one;
    one.hidden = !((!benchmark.value || dataset.benchmark === benchmark.value)
      && (!category.value || dataset.category === category.value)
      && (!state.value || states.includes(dataset.state))
      && one.textContent.toLowerCase().includes(words));
    count += !one.hidden;
  }
  for (const part of document.querySelectorAll("section")) part.hidden = !part.querySelector("article:not([hidden])");
  form.querySelector("output").value = `${count} of ${all.length} shown`;
}
form.addEventListener("input", event => { if (event.target === benchmark) fill(); show(); });
form.addEventListener("submit", event => event.preventDefault());
form.hidden = false;
fill();
show();
"""
