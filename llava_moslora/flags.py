"""Command lines of all scripts: parsers whose errors are refusals, flags from settings dataclasses, and --help.

Neither torch nor transformers is imported here: --help and mistyped flags are handled before that.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import os
import re
import shlex
import sys
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from llava_moslora.errors import Refusal, did_you_mean, few

WIDTH, HELP_COLUMN = 100, 35  # of --help
SEE_HELP = "see --help"
# ``~/…`` as a word, after ``--flag=``, after the name of validation data, or in open_clip:ARCH@FILE
HOME = re.compile(r"(--\w+=)?([\w.-]+=|open_clip:(?:[^@]*@)?)?(~/.*)", re.DOTALL)
MOST_NAMED = 12  # unknown flags in one message
NOT_KNOWN = object()  # the default of a flag whose value only its library knows
BY_COMMAND = "LLAVA_MOSLORA_BY_COMMAND"  # in the environment of what the command llava-moslora started
TRUTH = {**dict.fromkeys(("yes", "true", "t", "y", "1"), True), **dict.fromkeys(("no", "false", "f", "n", "0"), False)}


def call_of(script: str, *words: object) -> str:
    """A call of another script to paste into a shell, in the way that this one was called: by the command
    ``llava-moslora``, or as a file of its folder.

    Args:
        script: without folder and suffix. words: its arguments, which are quoted.
    """
    if os.environ.get(BY_COMMAND):
        start = ["llava-moslora", script.replace("_", "-")]
    else:
        beside = Path(sys.argv[0]).with_name(f"{script}.py") if Path(sys.argv[0]).name else Path()
        start = ["python", str(beside if beside.is_file() else f"scripts/{script}.py")]
    return shlex.join([*start, *map(str, words)])


class ScriptParser(argparse.ArgumentParser):
    """argparse, but an unknown flag is a refusal with the closest name; no abbreviations, ``-`` counts as ``_``."""

    def __init__(self, description: str | None, **kwargs: Any):
        kwargs = {"formatter_class": argparse.RawDescriptionHelpFormatter} | kwargs
        super().__init__(description=description, allow_abbrev=False, exit_on_error=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise Refusal("C-FLAG", message, fix=SEE_HELP)

    def unknown(self, name: str) -> str:
        """What to do about an unknown flag ``name`` (without dashes), as the ``fix`` of a refusal."""
        return nearest_flag(name, [action.dest for action in self._actions if action.option_strings])

    def _nearest_choice(self, name: str | None, message: str) -> str:
        """The fix for a value that is not among the choices of the flag ``name``, from argparse's message; else ""."""
        found = re.match(r"invalid choice: (.*?) \(choose from", message, re.DOTALL)
        action = next((a for a in self._actions if name in ("/".join(a.option_strings), a.dest, a.metavar)), None)
        if not found or action is None:
            return ""
        return self.no_choice(action.dest, found[1].strip("'\""), list(map(str, action.choices or ())))

    def no_choice(self, name: str, value: str, choices: Sequence[str]) -> str:
        """What to do about a ``value`` that is none of the ``choices`` of the flag ``name``; "" if nothing is near."""
        return did_you_mean(value, choices)

    def parse_args(self, args=None, namespace=None):
        """
        Raises:
            Refusal: C-FLAG, an unknown flag (with the nearest name), a missing one, a value of the wrong type.
        """
        words = [with_home(_with_underscores(word)) for word in (sys.argv[1:] if args is None else args)]
        # Before argparse, which would name a missing flag first, also one that was mistyped, or a file without flag
        names = dict.fromkeys(word.partition("=")[0] for word in words if re.match("--[A-Za-z]", word))
        if unknown := [name for name in names if name not in self._option_string_actions]:
            raise self.refuse_unknown("flag", unknown)
        if words and not words[0].startswith("-") and not self._get_positional_actions():
            raise self._stray(words[:1])
        try:
            namespace, rest = self.parse_known_args(words, namespace)
        except argparse.ArgumentError as error:
            fix = self._nearest_choice(error.argument_name, error.message) or SEE_HELP
            raise Refusal("C-FLAG", error.message, key=error.argument_name, fix=fix) from error
        if rest:
            raise self._stray(rest)
        return namespace

    def refuse_unknown(self, what: str, names: Sequence[str], file: object = None) -> Refusal:
        """The refusal of unknown flags, or keys of a ``file``: all of them at once.

        Args:
            what: ``flag`` or ``key``. names: with or without dashes.
        """
        fixes = {name: self.unknown(name.lstrip("-")) for name in names[:MOST_NAMED]}
        if len(names) == 1:
            return Refusal("C-FLAG", f"unknown {what}", file=file, key=names[0], fix=fixes[names[0]])
        fix = "; ".join([f"{name}: {fix}" for name, fix in fixes.items() if fix != SEE_HELP] or [SEE_HELP])
        return Refusal("C-FLAG", f"unknown {what}s", file=file, key=few(names, MOST_NAMED), fix=fix)

    def _stray(self, words: Sequence[str]) -> Refusal:
        if "--config" in self._option_string_actions and words[0].lower().endswith((".yaml", ".yml", ".json")):
            return Refusal("C-FLAG", "a file without its flag", file=words[0], fix=f"give it as --config {words[0]}")
        fix = "put its flag before it"
        return Refusal("C-FLAG", "a value without a flag", found=" ".join(words), fix=fix)


def with_home(word: str) -> str:
    """A word of a command line with the user's folder for ``~/``, which shells leave in quotes and after ``=``."""
    if (found := HOME.fullmatch(word)) is None:
        return word
    return (found[1] or "") + (found[2] or "") + os.path.expanduser(found[3])


def _with_underscores(word: str) -> str:
    if not re.match("--[A-Za-z]", word):
        return word
    name, equals, value = word.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value


def nearest_flag(flag: str, known: Iterable[str]) -> str:
    """Which flag was probably meant, as the ``fix`` of a refusal."""
    name = flag.lstrip("-").split("=")[0].replace("-", "_")
    close = difflib.get_close_matches(name, sorted(known), n=5)
    # people get the end of a name wrong more often than its beginning: --lora_rank means --lora_r, not --local_rank
    best = max(close, key=lambda other: len(os.path.commonprefix([name, other])), default=None)  # noqa: RUF071
    return f"did you mean --{best}?" if best else SEE_HELP


@dataclass(frozen=True)
class Flag:
    """One flag, as a field of a settings dataclass declares it.

    Attributes:
        annotation: the field's type, as it is written: ``int``, ``str | None``, ``list[float]``.
        default: ``dataclasses.MISSING`` for a flag that must be given.
        instead: value that is no choice → the flags that mean it.
        group: heading in --help; a flag without one is not shown there.
    """

    name: str
    annotation: str
    default: Any
    help: str = ""
    choices: tuple | None = None
    group: str = ""
    instead: Mapping[str, str] = field(default_factory=dict)

    def add_to(self, parser: argparse.ArgumentParser) -> None:
        convert, several = _conversion(self.annotation)
        how: dict[str, Any] = {"type": convert, "help": self.help, "choices": self.choices}
        if several:
            how["nargs"] = "+"
        elif convert is truth:
            how |= {"nargs": "?", "const": True}
        if self.default is dataclasses.MISSING:
            how["required"] = True
        else:
            how["default"] = argparse.SUPPRESS if self.default is NOT_KNOWN else self.default
        parser.add_argument(f"--{self.name}", **how)
        if self.default is True:
            parser.add_argument(f"--no_{self.name}", action="store_false", dest=self.name, default=argparse.SUPPRESS)

    def help_lines(self) -> list[str]:
        """The flag with its default, and what it is for."""
        shown = ""
        if self.default not in (dataclasses.MISSING, NOT_KNOWN, None, "", []):
            shown = " ".join(map(str, self.default)) if isinstance(self.default, list) else str(self.default)
        left = f"  --{self.name} {shown}".rstrip()
        listed = " | ".join(map(str, self.choices or ()))
        named = all(re.search(rf"\b{re.escape(str(choice))}\b", self.help) for choice in self.choices or ())
        text = self.help if named or "| …" in self.help else f"{self.help}: {listed}"
        lines = textwrap.wrap(text, WIDTH - HELP_COLUMN, break_on_hyphens=False) or [""]
        first = f"{left + '  ':{HELP_COLUMN}}{lines[0]}"
        if len(first) > WIDTH:
            first, lines = left, ["", *lines]
        return [first.rstrip(), *(" " * HELP_COLUMN + line for line in lines[1:])]


def flags_of(settings: type, names: Iterable[str] | None = None) -> list[Flag]:
    """The fields of a settings dataclass whose module has ``from __future__ import annotations``."""
    flags = []
    for f in dataclasses.fields(settings):
        if not f.init or (names is not None and f.name not in names):
            continue
        default = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
        group = str(f.metadata.get("group") or getattr(settings, "heading", ""))
        help_, choices = f.metadata.get("help", ""), f.metadata.get("choices")
        instead = f.metadata.get("instead", {})
        flags.append(Flag(f.name, str(f.type), default, help_, choices, group, instead))
    return flags


def truth(text: str) -> bool:
    if text.lower() not in TRUTH:
        raise argparse.ArgumentTypeError(f"neither True nor False: {text!r}")
    return TRUTH[text.lower()]


def json_object(text: str) -> dict:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"not a JSON object: {text!r}")
    return value


def _conversion(annotation: str) -> tuple[Callable[[str], Any], bool]:
    """From an annotation: what converts one word, and whether a flag takes several."""
    parts = [part for part in re.split(r"\s*\|\s*", annotation) if part != "None"]
    if parts and all(part.startswith("list[") for part in parts):
        return _conversion(parts[0][len("list[") : -1])[0], True
    if len(parts) == 1 and parts[0].startswith("dict["):
        return json_object, False
    known: dict[str, Callable[[str], Any]] = {"int": int, "float": float, "bool": truth}
    return known.get(" ".join(parts), str), False


class SettingsParser(ScriptParser):
    """Flags in groups. ``--help`` shows those with a heading, ``--help all`` ends with ``more()``.

    Args:
        headings: in the order of --help; groups with others follow.
    """

    def __init__(
        self,
        flags: Sequence[Flag],
        description: str | None,
        headings: Iterable[str] = (),
        more: Callable[[], str] | None = None,
    ):
        super().__init__(description, usage="%(prog)s --FLAG VALUE ...", add_help=False)
        self.flags, self.headings, self.more = flags, headings, more
        how: dict[str, Any] = {"dest": argparse.SUPPRESS, "default": argparse.SUPPRESS, "nargs": "?" if more else 0}
        self.add_argument("-h", "--help", action=_Help, choices=["all"] if more else None, **how)
        for flag in flags:
            flag.add_to(self)

    def no_choice(self, name: str, value: str, choices: Sequence[str]) -> str:
        instead = next((flag.instead for flag in self.flags if flag.name == name), {})
        return instead.get(value.lower()) or super().no_choice(name, value, choices)

    def format_help(self) -> str:
        groups: dict[str, list[str]] = {heading: [] for heading in self.headings}
        for flag in self.flags:
            if flag.group:
                groups.setdefault(flag.group, []).extend(flag.help_lines())
        shown = "Flags without a default are required, unless their text says otherwise."
        if self.more is not None:
            shown = f"{shown[:-1]}; --help all: the Trainer's."
        body = "\n".join(line for heading, lines in groups.items() if lines for line in (f"{heading}:", *lines))
        return f"{self.format_usage()}\n{(self.description or '').strip()}\n\n{shown}\n{body}\n"


class _Help(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        assert isinstance(parser, SettingsParser)
        print(parser.format_help() + (parser.more() if values == "all" and parser.more else ""), end="")
        parser.exit()
