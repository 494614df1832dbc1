"""Every refusal of a record or an image says what to do about it, read from the source of the package."""

import ast

from support.launching import ROOT

FILES = [*sorted((ROOT / "llava_moslora" / "data").rglob("*.py")), ROOT / "llava_moslora/text/conversation.py"]
NOT_MORE = ("D-JSON", "D-LABELS", "D-VIDEO")  # whose phrase is all that was found


def refusals():
    """Constructed refusals whose code is written there: file and line, code, names of their other arguments."""
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text())):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Name)
                and node.func.id == "Refusal"
                and node.args
            ):
                code = node.args[0].value if isinstance(node.args[0], ast.Constant) else "D-PARSE"  # JsonStream's
                yield f"{file.name}:{node.lineno}", code, {keyword.arg for keyword in node.keywords}


REFUSALS = [one for one in refusals() if one[1][:2] in ("D-", "I-")]


def test_a_refusal_of_data_names_a_fix():
    assert len(REFUSALS) > 40
    assert [(place, code) for place, code, parts in REFUSALS if "fix" not in parts] == []


def test_a_refusal_of_a_records_content_names_what_was_found():
    """Those in the files that read a record; the record itself is added by ``check_record``."""
    read = [one for one in REFUSALS if one[0].startswith(("formats.py", "messages.py")) and one[1] not in NOT_MORE]
    assert len(read) > 15
    silent = [place for place, _, parts in read if "found" not in parts and "file" not in parts]
    assert silent == []
