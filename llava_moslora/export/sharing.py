"""An export on the Hugging Face Hub: checked before the export begins, uploaded afterwards, in one commit.

Nothing is uploaded without ``--push_to_hub``. The token is that of the environment or of ``hf auth login``.
A repository is only written to if it is empty or contains an unchanged earlier push of this package; of an earlier
push, files that its manifest lists and the new one lacks are deleted. The Hub keeps all earlier commits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from llava_moslora._version import __version__
from llava_moslora.errors import Refusal, few, printable
from llava_moslora.export.output_folder import has_changed, listed_files
from llava_moslora.files.manifest import MANIFEST
from llava_moslora.flags import call_of

CARD = "README.md"
KEPT = ".gitattributes"  # the Hub's own, in every repository
TITLE = "llava_moslora"  # prefix of the title of every commit made here
FLAG = "--push_to_hub"


def check_repository(repo: str, *, private: bool = False, overwrite: bool = False) -> None:
    """Check everything that would make :func:`push` to ``repo`` fail and can be known before there is an export.

    Raises:
        Refusal: C-FLAG, the name; E-HUB, offline, no token or one that only reads, no connection; C-HUB, as
            :func:`push`.
    """
    expected = "OWNER/NAME, of letters, digits, -, _ and ."
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise Refusal("C-FLAG", "not a valid repository name", key=FLAG, found=error, expected=expected) from error
    if "/" not in repo:
        raise Refusal("C-FLAG", "no owner", key=FLAG, found=repo, expected=expected)
    if constants.is_offline_mode():
        raise Refusal("E-HUB", "the Hub is disabled", key=FLAG, found="HF_HUB_OFFLINE", fix="unset it")
    login = "hf auth login, or HF_TOKEN in the environment, with a write token"
    if get_token() is None:
        raise Refusal("E-HUB", "no Hub token", key=FLAG, fix=login)
    with _one_line(repo, "check name, token and network"):
        api = HfApi()
        if api.whoami().get("auth", {}).get("accessToken", {}).get("role") == "read":
            raise Refusal("E-HUB", "this token is read-only", key=FLAG, fix=login)
        _look(api, repo, private, overwrite)


def push(folder: Path, repo: str, *, private: bool = False, overwrite: bool = False) -> str:
    """Upload the finished export in ``folder``, except hidden files, as one commit to ``repo``, created if needed.

    ``README.md`` may have been edited since the export. The same call repeats an interrupted upload; large files that
    already arrived are not sent again.

    Args:
        private: a repository that only its owner sees; an existing public one is refused.
        overwrite: write to a repository that holds something else, or that was changed since the last push.

    Returns:
        The address of the commit.

    Raises:
        Refusal: C-HUB, not a finished export, or a repository that is not written to; E-HUB, the Hub or the network
            failed. The export stays as it is.
    """
    names = files_to_push(folder)
    again = f"check token and network, then: {call_of('export', folder, FLAG, repo)}"
    with _one_line(repo, again + (" --private" if private else "") + (" --overwrite" if overwrite else "")):
        api = HfApi()
        if (found := _look(api, repo, private, overwrite)) is None:
            api.create_repo(repo, private=private or None)  # None: public, or the organisation's default
            found = _look(api, repo, private, overwrite)
        assert found is not None, "just created"
        head, earlier = found
        operations: list = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=folder / name) for name in names]
        operations += [CommitOperationDelete(path_in_repo=name) for name in sorted(earlier - set(names))]
        title = f"{TITLE} {__version__}: {folder.name}"
        return api.create_commit(repo, operations, commit_message=title, parent_commit=head).commit_url


def files_to_push(folder: Path) -> list[str]:
    """Every file of the finished export in ``folder`` except hidden ones, as relative paths.

    Raises:
        Refusal: C-HUB, not a finished export, or a file other than the model card changed since it was written.
    """
    if (listed := listed_files(folder)) is None:
        raise Refusal(
            "C-HUB", "not a finished export", file=folder, key=FLAG, expected="a folder that scripts/export.py wrote",
            fix="for a run, give --output_dir too",
        )  # fmt: skip
    wrong = [name for name in listed if not (folder / name).is_file()]
    wrong += [n for n in listed if n not in wrong and n != CARD and has_changed(folder / n, listed[n])]
    if wrong:
        raise Refusal(
            "C-HUB", "files that are missing or changed since the export", file=folder, found=few(sorted(wrong), 5),
            fix="export again",
        )  # fmt: skip
    names = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
    return [name.as_posix() for name in names if not any(part.startswith(".") for part in name.parts)]


def _look(api: HfApi, repo: str, private: bool, overwrite: bool) -> tuple[str | None, set[str]] | None:
    """The newest commit of ``repo`` and the files of the earlier push in it; None if there is no such repository.

    Raises:
        Refusal: C-HUB, it is not written to.
    """
    try:
        info = api.model_info(repo)
    except RepositoryNotFoundError:
        return None
    if private and not info.private:
        fix = "another name, or make it private in its settings on the Hub"
        raise Refusal("C-HUB", "this repository is public", file=repo, key="--private", fix=fix)
    files = {sibling.rfilename for sibling in info.siblings or ()} - {KEPT}
    if not files:
        return info.sha, set()
    earlier = _earlier_push(api, repo, info.sha) if MANIFEST in files else None
    if not overwrite:
        fix = "another name, or --overwrite to write to it anyway"
        if earlier is None:
            what = "this repository contains something other than an export of this package"
            raise Refusal("C-HUB", what, file=repo, key=FLAG, found=few(sorted(files), 5), fix=fix)
        if not (newest := api.list_repo_commits(repo)[0].title).startswith(TITLE):
            what = "this repository was changed since the last push"
            raise Refusal("C-HUB", what, file=repo, key=FLAG, found=f"the commit {newest!r}", fix=fix)
    return info.sha, (earlier or set()) & files


def _earlier_push(api: HfApi, repo: str, commit: str | None) -> set[str] | None:
    """The files of the export in ``repo``, as its manifest lists them; None if it holds none."""
    with TemporaryDirectory() as place:
        api.hf_hub_download(repo, MANIFEST, revision=commit, local_dir=place)
        listed = listed_files(Path(place))
    return None if listed is None else {*listed, MANIFEST}


@contextmanager
def _one_line(repo: str, fix: str) -> Iterator[None]:
    try:
        yield
    except Refusal:
        raise
    except Exception as error:  # of huggingface_hub, its HTTP client and hf_xet; they share no base class
        errors: list[BaseException] = [error]
        if isinstance(error, RuntimeError) and error.__cause__:  # it names a file, and its cause has the reason
            errors.append(error.__cause__)
        found = printable("; ".join(f"{type(one).__name__}: {' '.join(str(one).split())}" for one in errors))
        raise Refusal("E-HUB", "the Hub request failed", file=repo, key=FLAG, found=found, fix=fix) from error
