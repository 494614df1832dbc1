"""Subjects of a DreamBooth study (the paper's section 4.3): their photos, class words and prompts.

The folder is google/dreambooth's ``dataset/`` unchanged: a folder of photos per subject, and
``prompts_and_classes.txt`` with the class of each subject and two lists of 25 prompts, one for objects and one for
animals. A custom folder needs the same file::

    Classes

    subject_name,class
    can,can

    Prompts

    Object Prompts

    prompt_list = [
    'a {0} {1} in the jungle'.format(unique_token, class_token)
    ]
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from llava_moslora.data.images import load_image
from llava_moslora.errors import Refusal, unknown_value

PROMPT_FILE = "prompts_and_classes.txt"
PHOTOS = (".jpg", ".jpeg", ".png", ".webp")
LIVE = ("cat", "dog")  # classes whose prompts are the list of live subjects, in google/dreambooth's set
OBJECT_LIST, LIVE_LIST = "Object Prompts", "Live Subject Prompts"
_PROMPT = re.compile(r"""['"](.*)['"]\.format\(unique_token, class_token\),?""")


@dataclass(frozen=True)
class Subject:
    """One subject.

    Attributes:
        folder: of its photos. class_word: what it is, such as ``stuffed animal``.
        templates: prompts with ``{0}`` for the identifier and ``{1}`` for the class word.
    """

    name: str
    folder: Path
    class_word: str
    photos: tuple[str, ...]
    templates: tuple[str, ...]

    def prompts(self, identifier: str) -> list[str]:
        """The prompts with ``identifier`` (``sks``); with "" those without one, which CLIP-T compares images with."""
        filled = (template.format(identifier, self.class_word) for template in self.templates)
        return [" ".join(prompt.split()) for prompt in filled]

    def images(self) -> list[Image.Image]:
        """The photos, upright, in RGB.

        Raises:
            Refusal: as :func:`llava_moslora.data.images.load_image`.
        """
        return [load_image(photo, self.folder) for photo in self.photos]


def read_subjects(data: str | Path, names: Sequence[str] = ()) -> list[Subject]:
    """The subjects of a data set, in the order of its file.

    Args:
        data: the folder with ``prompts_and_classes.txt``, or the one above it (google/dreambooth itself).
        names: only these; default: every one that has a folder.

    Raises:
        Refusal: D-FILE, no such folder, file or photos; D-PARSE, the file is not of this form; C-FLAG, unknown subject.
    """
    root = Path(data)
    if not (root / PROMPT_FILE).is_file() and (root / "dataset" / PROMPT_FILE).is_file():
        root /= "dataset"
    file = root / PROMPT_FILE
    if not file.is_file():
        raise Refusal(
            "D-FILE", "no such file", file=file, key="--subjects",
            fix="give google/dreambooth's folder dataset/, or one like it; nothing is downloaded",
        )  # fmt: skip
    classes, prompts = parse_prompts(file)
    if unknown := [name for name in names if name not in classes]:
        raise unknown_value("--names", unknown[0], list(classes), "unknown subject")
    subjects = []
    for name in names or classes:
        folder = root / name
        if not folder.is_dir() and not names:
            continue  # part of the set
        found = sorted(p.name for p in folder.glob("*") if p.suffix.lower() in PHOTOS)
        if not found:
            raise Refusal("D-FILE", "no photos of the subject", file=folder, expected=" ".join(PHOTOS))
        which = LIVE_LIST if classes[name] in LIVE and LIVE_LIST in prompts else OBJECT_LIST
        if which not in prompts:
            raise Refusal("D-PARSE", f"no list {which!r}", file=file, key=name)
        subjects.append(Subject(name, folder, classes[name], tuple(found), prompts[which]))
    if not subjects:
        raise Refusal("D-FILE", "no folder of any subject", file=root, expected=" | ".join(classes))
    return subjects


def parse_prompts(file: Path) -> tuple[dict[str, str], dict[str, tuple[str, ...]]]:
    """Subject → class word, and heading → prompt templates, of ``prompts_and_classes.txt``.

    Raises:
        Refusal: D-PARSE, a line that is none of the file's form, a name twice or with a path in it, or no subject.
    """
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise Refusal("D-PARSE", "cannot be read as UTF-8", file=file, found=error) from error
    classes: dict[str, str] = {}
    prompts: dict[str, tuple[str, ...]] = {}
    heading = ""
    for number, line in enumerate(map(str.strip, lines), 1):
        if line in ("", "Classes", "Prompts", "subject_name,class", "prompt_list = [", "]"):
            continue
        if line.endswith(" Prompts"):
            heading = line
            prompts[heading] = ()
        elif heading and (match := _PROMPT.fullmatch(line)) and _is_template(match[1]):
            prompts[heading] += (match[1],)
        elif not heading and line.count(",") == 1:
            name, word = (part.strip() for part in line.split(","))
            if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name) or not word or name in classes:
                raise Refusal("D-PARSE", "no subject and class, or twice", file=file, key=f"line {number}", found=line)
            classes[name] = word
        else:
            what = "not a subject with its class, and not a prompt"
            raise Refusal("D-PARSE", what, file=file, key=f"line {number}", found=line[:80])
    prompts = {heading: templates for heading, templates in prompts.items() if templates}
    if not classes or not prompts:
        raise Refusal("D-PARSE", "no subjects, or no prompts", file=file, found=f"{len(classes)}, {len(prompts)}")
    return classes, prompts


def _is_template(text: str) -> bool:
    """Whether ``{0}`` and ``{1}`` are its only fields: str.format would read anything else from the objects."""
    return set(re.findall(r"\{[^}]*\}?", text)) == {"{0}", "{1}"} and "}" not in re.sub(r"\{[01]\}", "", text)
