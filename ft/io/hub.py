"""Where files come from: the Hub, its cache, or a local folder.

A model is `config.json`, `tokenizer.json` and safetensors; a data set is tables in files named after their splits. The
steps are the same for every source: list the names, choose those that are needed (or say which one is missing), get
them, and look at their first bytes. The protocol, the cache and the variables HF_HOME, HF_ENDPOINT, HF_HUB_OFFLINE and
HF_TOKEN are the business of `huggingface_hub`, imported only when needed: a local folder has no use for its 0.4 s.
"""

import hashlib
import json
import os
import re
import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ft.errors import FtError, shown
from ft.io.formats import suffix_of
from ft.io.stall import StalledError, unless_stalled

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoSibling

from ft.io.formats import check_first_bytes

CONVERTED_REVISION = "refs/convert/parquet"
STALL = 60.0  # seconds without a byte after which the Hub is given up
CHUNK = 2**16  # bytes that the client downloads at a time: few enough that a slow line is not taken for a silent one


@dataclass(frozen=True)
class Source:
    """What the user asked for; `kind` is also the name of the flag that says so."""

    kind: Literal["model", "dataset"]
    name: str
    revision: str | None
    is_folder: bool = False
    """It was found on the disk: should it vanish, no Hub is asked for what has its name."""


# Given the names that a source has, the names that are needed; raises FtError if one is missing.
_Choice = Callable[[Collection[str]], list[str]]


def find_files(source: Source, choose: _Choice) -> dict[str, Path]:
    """Get the files that `choose` wants: from a folder if there is one of that name, else from the Hub."""
    folder = Path(os.path.expanduser(source.name))
    try:
        if not (source.name and folder.is_dir()):
            if source.is_folder or is_path(source.name):
                beside = f", though there is {str(folder.parent)!r}" if folder.parent.is_dir() else ""
                raise FtError(
                    f"there is no folder {source.name!r}{beside}: that is a path, for which no Hub is asked: "
                    f"check --{source.kind}."
                )
            files = _hub_files(source, choose)
        elif source.revision is None:
            files = {name: folder / name for name in choose(_names_in(folder, source))}
        else:
            raise FtError(f"{folder} is a local folder and has no revisions: leave out --{source.kind}-revision.")
        for path in files.values():
            check_first_bytes(path)
    except OSError as error:
        raise FtError(f"cannot read {error.filename}, named by --{source.kind}: {error.strerror}.") from error
    return files


def is_path(name: str) -> bool:
    """Whether a name means a place on the disk and no repository, though it may have the form of a Hub id.

    So it is with what begins like a path, with the checkpoint of a run, and with a name in a folder that exists.
    """
    path = Path(name)
    return (
        name.startswith((".", "~"))
        or path.is_absolute()
        or re.fullmatch("checkpoint-[0-9]+", path.name) is not None
        or (len(path.parts) == 2 and path.parent.is_dir())
    )


def _names_in(folder: Path, source: Source) -> list[str]:
    """List the files of a folder: those of a model at its top, those of a data set at any depth.

    A link that leads nowhere is listed too, so that it is told of and not passed over.
    """
    os.listdir(folder)  # as one that may not be read looks empty to `rglob`
    paths = folder.iterdir() if source.kind == "model" else (p for p in folder.rglob("*") if suffix_of(p.name))
    return [path.relative_to(folder).as_posix() for path in paths if not path.is_dir()]


def _hub_files(source: Source, choose: _Choice) -> dict[str, Path]:
    """Get files from the Hub: through its cache, and from the cache alone where the Hub does not give them.

    The client waits for each answer by itself, again and again, and for some without an end. Here one limit holds for
    all of it: the time in which no byte arrives.
    """
    from huggingface_hub import constants, errors

    constants.DOWNLOAD_CHUNK_SIZE = CHUNK
    seconds = max(STALL, 2.0 * constants.HF_HUB_ETAG_TIMEOUT, 2.0 * constants.HF_HUB_DOWNLOAD_TIMEOUT)
    cached = _cached_files(source, choose)  # before the client notes that the branch has moved
    files: dict[str, Path] = {}
    folder = Path(constants.HF_HUB_CACHE) / f"{source.kind}s--{source.name.replace('/', '--')}" / "blobs"
    try:
        unless_stalled(
            lambda: _fetch(source, choose, files),
            lambda: len(files) + _bytes_in(folder),
            seconds=seconds,
            what=f"{source.name} from {constants.ENDPOINT}",
        )
    except FtError:
        raise
    except (errors.HFValidationError, errors.RevisionNotFoundError) as error:
        raise _failure(error, source) from error
    except Exception as error:  # the client's other errors, those of its HTTP library, an answer that is no JSON, ...
        if not cached:
            raise _failure(error, source) from error
        if isinstance(error, StalledError):
            print(f"WARNING: {_failure(error, source)} The files in the cache are taken.", file=sys.stderr)
        return cached
    return files


def _fetch(source: Source, choose: _Choice, files: dict[str, Path]) -> None:
    """Put where the files are into `files`, one after the other, downloading those that the cache does not hold."""
    from huggingface_hub import HfApi, constants, hf_hub_download, try_to_load_from_cache

    api = HfApi()
    describe = api.model_info if source.kind == "model" else api.dataset_info
    # By itself the client would wait for ever for a server that accepts a connection and then says nothing.
    timeout = constants.HF_HUB_ETAG_TIMEOUT
    info = describe(source.name, revision=source.revision, files_metadata=True, timeout=timeout)
    described = {file.rfilename: file for file in info.siblings or []}
    for name in choose(described):
        seen = try_to_load_from_cache(source.name, name, revision=info.sha, repo_type=source.kind)
        # By branch, not by commit: this tells the cache what the branch stands for, which it needs when offline.
        path = Path(hf_hub_download(source.name, name, revision=source.revision, repo_type=source.kind))
        if not isinstance(seen, str):  # once, after the download: half a gigabyte is not hashed at every start
            _check_hash(path, described[name], source)
        files[name] = path


def _bytes_in(folder: Path) -> int:
    """The size of a folder's files, and what the disk holds of them, as one may have its size from the start."""
    try:
        found = [path.lstat() for path in folder.iterdir()]
    except OSError:  # it does not exist yet, or a file has just been renamed
        return 0
    return sum(each.st_size + getattr(each, "st_blocks", 0) for each in found)


def _cached_files(source: Source, choose: _Choice) -> dict[str, Path] | None:
    """Find the files in the cache; None where it does not hold them all.

    Of a data set, what the Hub has converted does as well: it is there only where it was fetched in place of the other.
    """
    from huggingface_hub import errors, snapshot_download

    converted = [CONVERTED_REVISION] if source.kind == "dataset" and source.revision is None else []
    for revision in [source.revision, *converted]:
        try:
            folder = Path(
                snapshot_download(
                    source.name,
                    revision=revision,
                    repo_type=source.kind,
                    local_files_only=True,
                    allow_patterns=[],  # only look up the folder: `choose` says whether it is complete
                )
            )
            present = [name for name in _names_in(folder, source) if (folder / name).exists()]
            return {name: folder / name for name in choose(present)}
        except errors.HFValidationError:
            return None
        except (errors.LocalEntryNotFoundError, FtError):
            continue
    return None


def _check_hash(path: Path, described: "RepoSibling", source: Source) -> None:
    """Compare a download with the hash that the Hub lists, and delete it if they differ.

    The client compares no more than sizes, except for transfers by Xet. Large files are listed with their SHA-256, the
    others with Git's hash: the SHA-1 of a header and the content.
    """
    lfs = described.lfs
    hasher = hashlib.sha256() if lfs else hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with path.open("rb") as file:
        actual = hashlib.file_digest(file, lambda: hasher).hexdigest()
    listed = lfs.sha256 if lfs else described.blob_id
    if listed is not None and actual != listed:
        for entry in (path.resolve(), path):  # the cache keeps the content in one place, and a link to it in another
            entry.unlink(missing_ok=True)
        raise FtError(
            f"{described.rfilename} of {source.name} arrived damaged (hash {actual}, not {listed}) and was deleted: "
            f"run again; if it stays so, check HF_ENDPOINT or use a local folder (--{source.kind} DIR)."
        )


def _failure(error: BaseException, source: Source) -> FtError:
    """Say what an error of the Hub's client means and what helps."""
    from huggingface_hub import constants, errors

    if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ is not None:
        error = error.__cause__  # "not in the cache either": what matters is why the Hub did not give it
    status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else None
    flag, what = f"--{source.kind}", f"{source.kind} {source.name}"
    hub, cache = constants.ENDPOINT, constants.HF_HUB_CACHE
    instead = f"a local folder works too ({flag} DIR); `python run.py --demo` needs no network."
    match error:
        case errors.HFValidationError():
            name = shown(source.name)
            text = f"there is no folder {name}, and that is no Hub id (`name` or `owner/name`): check {flag}."
        case StalledError(seconds=seconds):
            text = f"{hub} sent nothing of {what} for {seconds:g} s: try again later, or check HF_ENDPOINT; {instead}"
        case errors.GatedRepoError():
            page = f"{hub}/datasets/{source.name}" if source.kind == "dataset" else f"{hub}/{source.name}"
            text = f"{what} is gated: accept its conditions at {page}, then set HF_TOKEN to a token of that account."
        case errors.RevisionNotFoundError():
            text = f"{what} has no revision {source.revision}: give {flag}-revision a branch, tag or commit at {hub}."
        case errors.HfHubHTTPError() if status in (401, 403) or isinstance(error, errors.RepositoryNotFoundError):
            # The Hub does not tell strangers which repositories exist, so "missing" and "private" look the same.
            text = (
                f"{hub} has no {what}, or none that you may read ({status}); nor is there a folder of that name. Check "
                f"{flag}, or set HF_TOKEN to a valid token with access."
            )
        case errors.HfHubHTTPError(response=response):
            url = str(response.url).partition("?")[0]  # what follows may be a signature
            text = f"{url} answered {status}: try again later, or check HF_ENDPOINT; {instead}"
        case errors.OfflineModeIsEnabled():
            text = (
                f"HF_HUB_OFFLINE is set and the cache {cache} does not hold all of {what}: unset it for the first run, "
                f"or set HF_HOME to the right place; {instead}"
            )
        case errors.FileMetadataError() | json.JSONDecodeError() | KeyError() | TypeError():
            text = f"{hub} does not answer for {what} as the Hub does: check HF_ENDPOINT and any proxy; {instead}"
        case OSError(errno=int()):
            text = f"cannot keep {what} in the cache {cache}: {error.strerror}. Make room there, or set HF_HOME."
        case _ if "Bearer" in str(error) or isinstance(error, UnicodeEncodeError):  # a header that cannot be sent
            text = "HF_TOKEN (or the token file in HF_HOME) holds characters that no token has: copy it again."
        case _:
            # The first line will do, and that only up to "(…)", where the client quotes the end of a signed address.
            reason = re.split(r"\n|\(…\)", str(error))[0].rstrip(" .") or type(error).__name__
            text = f"cannot fetch {what} from {hub}: {reason}. Check the network, or set HF_ENDPOINT; {instead}"
    return FtError(re.sub(r"//[^/\s@]+@", "//", text))  # without the password in the address of a mirror
