"""The text about the Trainer's flags: the end of ``--help all``, and ``docs/flags.md``.

python -m llava_moslora.training.flag_texts > docs/flags.md
"""

from __future__ import annotations

from dataclasses import replace

from llava_moslora.training.trainer_flags import FLAGS, FORMER, Honoured, Refused, flags


def more_help() -> str:
    """The Trainer's other flags, for ``--help all``."""
    others = [flag for flag in flags() if not flag.group and flag.name != "output_dir"]
    honoured = [flag for flag in others if isinstance(FLAGS.get(flag.name), Honoured)]
    lines = ["\nthe Trainer's other flags:"]
    lines += [line for flag in honoured for line in replace(flag, help=first_sentence(flag.help)).help_lines()]
    lines += ["", "refused, unless they have their default:"]
    for flag in others:
        if isinstance(rule := FLAGS.get(flag.name), Refused):
            lines += replace(flag, help=f"{rule.why}; {rule.instead}", choices=None).help_lines()
    return "\n".join(lines) + "\n"


def first_sentence(text: str) -> str:
    return text.partition(". ")[0].rstrip(".")


def table() -> str:
    """``docs/flags.md``."""
    rows = []
    for name, rule in sorted(FLAGS.items()):
        if isinstance(rule, Honoured):
            test = rule.test if "/" in rule.test else f"tests/training/test_trainer_flags.py::{rule.test}"
            only = ""
            if rule.needs is not None:
                other, wanted = rule.needs
                values = "" if wanted == (True,) else " " + ", ".join(map(str, wanted))
                only = f" without `--{other}`" if wanted == (None,) else f" with `--{other}{values}`"
            rows.append(f"| `--{name}` | honoured{only} | `{test}` |")
        else:
            rows.append(f"| `--{name}` | refused | {rule.why}; {rule.instead} |")
    former = [f"| `--{name}` | {instead} |" for name, instead in sorted(FORMER.items())]
    return "\n".join([
        "# Flags of the Trainer", "",
        "<!-- made by python -m llava_moslora.training.flag_texts -->", "",
        "`scripts/train_vit_llm.py` takes every flag of transformers' `TrainingArguments` that has an effect here. The",
        "others are refused if they have a value other than their default: no flag is accepted without effect.",
        "A flag of a newer transformers that is not in this table is refused too. This package's own flags are in",
        "`scripts/train_vit_llm.py --help`.", "",
        "| flag | | test, or why and what to use instead |", "| --- | --- | --- |", *rows, "",
        "Flags that no longer exist, and flags of LLaVA's script, are unknown; the message says what to do:", "",
        "| flag | instead |", "| --- | --- |", *former, "",
    ])  # fmt: skip


if __name__ == "__main__":
    print(table(), end="")
