"""Bad records of a source: which are named in the log, and when there are too many of them."""

from __future__ import annotations

import logging
import math
from pathlib import Path

from llava_moslora.config import DataSettings
from llava_moslora.errors import Refusal

LOGGED_PROBLEMS = 20  # all of them are in the report

log = logging.getLogger(__name__)


def log_problems(problems: list[dict], report: Path | None) -> None:
    """Name the first bad records, count the others.

    Args:
        problems: as a report has them.
        report: that lists all of them; None: there is none, because the first one is refused by itself.
    """
    for problem in problems[int(report is None) : LOGGED_PROBLEMS]:
        log.error("%s", problem["line"])
    if (more := len(problems) - LOGGED_PROBLEMS) > 0:
        log.error("and %d more%s", more, "" if report is None else f"; all are listed in {report}")


def refusal_of(problems: list[dict], records: int, settings: DataSettings) -> Refusal | None:
    """The first bad record's, with the number of the others, if the policy for bad records does not allow so many."""
    quarantine, share = settings.on_bad_record == "quarantine", settings.max_bad_share
    if not problems or (quarantine and len(problems) <= share * records):
        return None
    parts = dict(problems[0]["refusal"])
    bad = math.ceil(100 * len(problems) / records) / 100
    if quarantine:
        parts["fix"] = f"this is more than the share of {share:g} allowed by --max_bad_share"
    elif bad < 1:
        skip = "--on_bad_record quarantine" + (f" --max_bad_share {bad:g}" if bad > share else "")
        parts["fix"] = "; or to train without bad records: ".join(filter(None, [parts.get("fix"), skip]))
    if len(problems) > 1:
        parts["what"] += f" (and {len(problems) - 1} more of {records} records cannot be used)"
    return Refusal(**parts)
