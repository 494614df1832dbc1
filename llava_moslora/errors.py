"""The one error type of the package: everything a user can cause is refused in one line that says how to mend it.

A refusal prints as::

    error[C-FLAG] --lora_rr: unknown flag; fix: did you mean --lora_r?

The letter before the dash names the subject and decides the exit status of a script, so that a shell script or a job
scheduler can tell a typing error (2) from a damaged checkpoint (3), a missing compiler (4), a diverged run (5) and an
interrupted one that only needs to be started again (75, ``EX_TEMPFAIL`` of sysexits.h).
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable

EXIT_STATUS = {
    "C": 2,  # configuration: a flag, a configuration file, a combination of settings
    "D": 2,  # data: a record or a data file
    "I": 2,  # image
    "K": 3,  # checkpoint or model file
    "E": 4,  # environment: disk, memory, compiler, device
    "R": 5,  # the run itself: a non-finite loss
    "P": 75,  # interrupted, by a signal or by the end of another rank: start it again, it goes on
}


class Refusal(ValueError):
    """What the user gave cannot be used. All parts but ``code`` and ``what`` are optional.

    Args:
        code: ``LETTER-WORD``; the letter is a key of :data:`EXIT_STATUS`.
        what: the rule that was broken, as a phrase.
        file: the file or folder at fault.
        record: index of the record in ``file``, from 0.
        record_id: the record's own ``id``.
        key: the flag, JSON key or tensor name at fault.
        found: what was there. Control characters are escaped, long values cut.
        expected: what should have been there.
        fix: what to do.
    """

    def __init__(
        self,
        code: str,
        what: str,
        *,
        file: object = None,
        record: int | None = None,
        record_id: object = None,
        key: str | None = None,
        found: object = None,
        expected: object = None,
        fix: str | None = None,
    ):
        assert code[:1] in EXIT_STATUS, f"unknown refusal code {code!r}"
        self.code, self.what, self.file, self.record, self.record_id = code, what, file, record, record_id
        self.key, self.found, self.expected, self.fix = key, found, expected, fix
        super().__init__(self.line())

    @property
    def exit_status(self) -> int:
        return EXIT_STATUS[self.code[0]]

    def line(self) -> str:
        """The refusal as one printable line without a trailing newline."""
        place = "" if self.file is None else printable(self.file)
        if self.record is not None:
            place += f":record {self.record}"
        if self.record_id is not None:
            place += f" id={printable(self.record_id)}"
        if self.key is not None:
            place += (":" if place else "") + printable(self.key)
        parts = [f"{place}: {self.what}" if place else self.what]
        for name in ("found", "expected"):
            if (value := getattr(self, name)) is not None:
                parts.append(f"{name} {printable(value)}")
        if self.fix:
            parts.append(f"fix: {self.fix}")
        return f"error[{self.code}] " + "; ".join(parts)

    def __reduce__(self):  # a data worker's refusal crosses a process boundary and must arrive whole
        parts = {k: v for k, v in self.__dict__.items() if k not in ("code", "what")}
        return _rebuild, (self.code, self.what, parts)


def _rebuild(code: str, what: str, parts: dict) -> Refusal:
    return Refusal(code, what, **parts)


def printable(value: object, limit: int = 300) -> str:
    """``value`` as one line: control, bidirectional and newline characters escaped, cut after ``limit`` characters."""
    text = value if isinstance(value, str) else str(value)
    text = "".join(
        c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text[: limit + 1]
    )
    return text if len(text) <= limit else text[:limit] + "…"


def run_script(main: Callable[[], None]) -> None:
    """Run a script's ``main``; a :class:`Refusal` becomes one line on stderr and its exit status, without a traceback.

    With ``LLAVA_MOSLORA_DEBUG=1`` in the environment the traceback is printed before it.
    """
    try:
        main()
    except Refusal as refusal:
        if int(os.environ.get("RANK", "0")) > 0:
            # All ranks usually refuse the same thing at the same time. Rank 0 says it; the launcher then ends the
            # others within a second, and one that is still here was alone in refusing.
            time.sleep(5)
        if os.environ.get("LLAVA_MOSLORA_DEBUG"):
            traceback.print_exc()
        print(refusal.line(), file=sys.stderr, flush=True)
        sys.exit(refusal.exit_status)
