"""Files of models and data sets: from a local directory, the Hub, or the Hub's cache.

A model is `config.json`, `tokenizer.json` and safetensors; a data set is tables in files named after their splits. The
steps are the same for every source: list the names, choose those that are needed (or raise if one is missing), get
them, and check their first bytes. `huggingface_hub` implements the protocol, the cache and the variables HF_HOME,
HF_ENDPOINT, HF_HUB_OFFLINE and HF_TOKEN. Its import takes 0.4 s, so it is imported only for the Hub.
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

from ft.errors import FtError, UsageError, program, shown
from ft.io.formats import check_first_bytes, suffix_of
from ft.io.stall import StalledError, run_with_stall_timeout

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoSibling

CONVERTED_REVISION = "refs/convert/parquet"
STALL = 60.0  # timeout in seconds without a byte from the Hub
CHUNK = 2**16  # bytes that the client downloads at a time: few enough that a slow connection is not taken for a stall


@dataclass(frozen=True)
class Source:
    """A model or data set as the user named it; `kind` is also the name of the flag."""

    kind: Literal["model", "dataset"]
    name: str
    revision: str | None
    is_directory: bool = False
    """It was found on the disk: if it is deleted meanwhile, the name is not looked up on the Hub."""
    named_by: str = ""
    """The argument that names it, for messages; empty for the flag `--model` or `--dataset`."""

    @property
    def flag(self) -> str:
        """The flag or argument that names it."""
        return self.named_by or f"--{self.kind}"


# From the names that a source has, chooses those that are needed; raises FtError if one is missing.
_Choice = Callable[[Collection[str]], list[str]]


def find_files(source: Source, choose: _Choice) -> dict[str, Path]:
    """Get the files that `choose` selects, from a local directory of that name if there is one, else from the Hub.

    Args:
        source: the model or data set.
        choose: returns the names of the needed files, given those that the source has.

    Returns:
        The path of each file by name.

    Raises:
        FtError: a file is missing, has another format, or cannot be read or downloaded.
    """
    directory = Path(os.path.expanduser(source.name))
    try:
        if not (source.name and directory.is_dir()):
            if source.is_directory or is_path(source.name):
                has_parent = directory.parent.is_dir() and directory.parent != Path()
                beside = f", though there is {str(directory.parent)!r}" if has_parent else ""
                raise UsageError(
                    f"there is no directory {source.name!r}{beside}: this is a path, which is not looked up on the "
                    f"Hub: check {source.flag}."
                )
            files = _hub_files(source, choose)
        elif source.revision is None:
            files = {name: directory / name for name in choose(_names_in(directory, source))}
        else:
            raise UsageError(
                f"{directory} is a local directory and has no revisions: leave out --{source.kind}-revision."
            )
        for path in files.values():
            check_first_bytes(path)
    except OSError as error:
        raise FtError(f"cannot read {error.filename}, named by {source.flag}: {error.strerror}.") from error
    return files


def is_path(name: str) -> bool:
    """Whether a name is a path and not a Hub id, even if it has the form of one.

    True for a name that starts like a path, for a checkpoint of a run, and for a name in an existing directory.
    """
    path = Path(name)
    return (
        name.startswith((".", "~"))
        or path.is_absolute()
        or re.fullmatch("checkpoint-[0-9]+", path.name) is not None
        or (len(path.parts) == 2 and path.parent.is_dir())
    )


def _names_in(directory: Path, source: Source) -> list[str]:
    """List the files of a directory: those of a model at its top level, those of a data set at any depth.

    A broken link is listed too, so that reading it raises an error.
    """
    os.listdir(directory)  # raises for a directory that may not be read, which looks empty to `rglob`
    paths = directory.iterdir() if source.kind == "model" else (p for p in directory.rglob("*") if suffix_of(p.name))
    return [path.relative_to(directory).as_posix() for path in paths if not path.is_dir()]


def _hub_files(source: Source, choose: _Choice) -> dict[str, Path]:
    """Get files from the Hub through its cache, or from the cache alone if the Hub cannot be reached.

    The client has a timeout for each request, retries, and has none for some. Here one timeout holds for all requests:
    the time without a byte.
    """
    from huggingface_hub import constants, errors

    seconds = max(STALL, 2.0 * constants.HF_HUB_ETAG_TIMEOUT, 2.0 * constants.HF_HUB_DOWNLOAD_TIMEOUT)
    cached = _cached_files(source, choose)  # before the client records that the branch has moved
    files: dict[str, Path] = {}
    directory = Path(constants.HF_HUB_CACHE) / f"{source.kind}s--{source.name.replace('/', '--')}" / "blobs"
    chunk, constants.DOWNLOAD_CHUNK_SIZE = constants.DOWNLOAD_CHUNK_SIZE, CHUNK
    try:
        run_with_stall_timeout(
            lambda: _fetch(source, choose, files),
            lambda: len(files) + _bytes_in(directory),
            seconds=seconds,
            what=f"{source.name} from {constants.ENDPOINT}",
        )
    except FtError:
        raise
    except (errors.HFValidationError, errors.RevisionNotFoundError) as error:
        raise _failure(error, source) from error
    except Exception as error:  # other errors of the client and of its HTTP library, an answer that is not JSON, ...
        if not cached:
            raise _failure(error, source) from error
        if isinstance(error, StalledError):
            print(f"WARNING: {_failure(error, source)} The files in the cache are used.", file=sys.stderr)
        return cached
    finally:
        constants.DOWNLOAD_CHUNK_SIZE = chunk  # other code of this process downloads with its own
    return files


def _fetch(source: Source, choose: _Choice, files: dict[str, Path]) -> None:
    """Add the path of each file to `files`, one after the other, downloading those that the cache does not have."""
    from huggingface_hub import HfApi, constants, hf_hub_download, try_to_load_from_cache

    api = HfApi()
    describe = api.model_info if source.kind == "model" else api.dataset_info
    # By default this request has no timeout, for a server that accepts a connection and then sends nothing.
    timeout = constants.HF_HUB_ETAG_TIMEOUT
    info = describe(source.name, revision=source.revision, files_metadata=True, timeout=timeout)
    described = {file.rfilename: file for file in info.siblings or []}
    for name in choose(described):
        seen = try_to_load_from_cache(source.name, name, revision=info.sha, repo_type=source.kind)
        # By branch, not by commit: so the cache records the commit of the branch, which it needs when offline.
        path = Path(hf_hub_download(source.name, name, revision=source.revision, repo_type=source.kind))
        if not isinstance(seen, str):  # once, after the download: hashing half a gigabyte at every start is slow
            _check_hash(path, described[name], source)
        files[name] = path


def _bytes_in(directory: Path) -> int:
    """Sizes and allocated blocks of a directory's files: a file may have its final size from the start."""
    try:
        found = [path.lstat() for path in directory.iterdir()]
    except OSError:  # it does not exist yet, or a file has just been renamed
        return 0
    return sum(each.st_size + getattr(each, "st_blocks", 0) for each in found)


def _cached_files(source: Source, choose: _Choice) -> dict[str, Path] | None:
    """Find the files in the cache; None if it does not have all of them.

    For a data set also the revision that the Hub has converted to parquet: it is in the cache only if it was needed.
    """
    from huggingface_hub import errors, snapshot_download

    converted = [CONVERTED_REVISION] if source.kind == "dataset" and source.revision is None else []
    for revision in [source.revision, *converted]:
        try:
            directory = Path(
                snapshot_download(
                    source.name,
                    revision=revision,
                    repo_type=source.kind,
                    local_files_only=True,
                    allow_patterns=[],  # only look up the directory: `choose` raises if it is incomplete
                )
            )
            present = [name for name in _names_in(directory, source) if (directory / name).exists()]
            return {name: directory / name for name in choose(present)}
        except errors.HFValidationError:
            return None
        except (errors.LocalEntryNotFoundError, FtError):
            continue
    return None


def _check_hash(path: Path, described: "RepoSibling", source: Source) -> None:
    """Compare a download with the hash that the Hub lists, and delete it if they differ.

    The client only compares sizes, except for transfers by Xet. The Hub lists large files with their SHA-256, others
    with Git's blob hash: the SHA-1 of a header and the content.
    """
    lfs = described.lfs
    hasher = hashlib.sha256() if lfs else hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with path.open("rb") as file:
        actual = hashlib.file_digest(file, lambda: hasher).hexdigest()
    listed = lfs.sha256 if lfs else described.blob_id
    if listed is not None and actual != listed:
        for entry in (path.resolve(), path):  # the content, and the cache's link to it
            entry.unlink(missing_ok=True)
        raise FtError(
            f"{described.rfilename} of {source.name} arrived damaged (hash {actual}, not {listed}) and was deleted: "
            f"run again; if it persists, check HF_ENDPOINT or use a local directory (--{source.kind} DIR)."
        )


def _failure(error: BaseException, source: Source) -> FtError:
    """The message for an error of the Hub's client: the cause and the remedy."""
    from huggingface_hub import constants, errors

    if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ is not None:
        error = error.__cause__  # "not in the cache either": the cause is why the download failed
    status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else None
    flag, what = source.flag, f"{source.kind} {source.name}"
    example = f" ({flag} DIR)" if flag.startswith("--") else ""
    hub, cache = constants.ENDPOINT, constants.HF_HUB_CACHE
    instead = f"a local directory works too{example}; `{program()} --demo` needs no network."
    match error:
        case errors.HFValidationError():
            name = shown(source.name)
            text = f"there is no directory {name}, and this is not a Hub id (`name` or `owner/name`): check {flag}."
        case StalledError(seconds=seconds):
            text = f"{hub} sent nothing of {what} for {seconds:g} s: try again later, or check HF_ENDPOINT; {instead}"
        case errors.GatedRepoError():
            page = f"{hub}/datasets/{source.name}" if source.kind == "dataset" else f"{hub}/{source.name}"
            text = f"{what} is gated: accept its conditions at {page}, then set HF_TOKEN to a token of that account."
        case errors.RevisionNotFoundError():
            text = (
                f"{what} has no revision {source.revision}: name a branch, tag or commit at {hub} by "
                f"--{source.kind}-revision."
            )
        case errors.HfHubHTTPError() if status in (401, 403) or isinstance(error, errors.RepositoryNotFoundError):
            # The Hub answers the same for missing and for private repositories.
            text = (
                f"{hub} has no {what}, or none that you may read ({status}); nor is there a directory of that name. "
                f"Check {flag}, or set HF_TOKEN to a valid token with access."
            )
        case errors.HfHubHTTPError(response=response):
            url = str(response.url).partition("?")[0]  # the query may be a signature
            text = f"{url} answered {status}: try again later, or check HF_ENDPOINT; {instead}"
        case errors.OfflineModeIsEnabled():
            text = (
                f"HF_HUB_OFFLINE is set and the cache {cache} does not have all files of {what}: unset it for the "
                f"first run, or set HF_HOME to the right place; {instead}"
            )
        case errors.FileMetadataError() | json.JSONDecodeError() | KeyError() | TypeError():
            text = f"{hub} does not answer for {what} as the Hub does: check HF_ENDPOINT and any proxy; {instead}"
        case OSError(errno=int()):
            text = f"cannot write {what} to the cache {cache}: {error.strerror}. Free disk space, or set HF_HOME."
        case _ if "Bearer" in str(error) or isinstance(error, UnicodeEncodeError):  # a header that cannot be sent
            text = "HF_TOKEN (or the token file in HF_HOME) has invalid characters: copy it again."
        case _:
            # Only the first line, up to "(…)", where the client quotes the end of a signed URL.
            reason = re.split(r"\n|\(…\)", str(error))[0].rstrip(" .") or type(error).__name__
            text = f"cannot fetch {what} from {hub}: {reason}. Check the network, or set HF_ENDPOINT; {instead}"
    is_wrong_name = isinstance(
        error, errors.HFValidationError | errors.RevisionNotFoundError | errors.RepositoryNotFoundError
    ) and not isinstance(error, errors.GatedRepoError)
    kind = UsageError if is_wrong_name else FtError
    return kind(re.sub(r"//[^/\s@]+@", "//", text))  # without the password in the URL of a mirror
