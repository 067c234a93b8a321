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
import shutil
import tempfile
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ft.errors import FtError
from ft.layout import SUFFIXES, NoSplitError, sort_into_splits, suffix_of

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoSibling

CONFIG, TOKENIZER = "config.json", "tokenizer.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
# How files begin. What comes in their place is nothing at all, a Git LFS pointer, or a web page.
BEGINNING = {
    ".json": rb"(?:\xef\xbb\xbf|\xff\xfe|\xfe\xff\0)?\s*[\[{]",
    ".parquet": rb"PAR1",
    ".safetensors": rb"(?s:.{8})\{",
    ".gz": rb"\x1f\x8b",
}
CONVERTED_REVISION = "refs/convert/parquet"


@dataclass(frozen=True)
class ModelFiles:
    """Where a model's files are. `source` is what the user named, for messages."""

    source: str
    config: Path
    tokenizer: Path
    weights: tuple[Path, ...]
    """The safetensors file, or its shards in the order of their names; empty where not asked for."""


@dataclass(frozen=True)
class _Source:
    """What the user asked for; `kind` is also the name of the flag that says so."""

    kind: Literal["model", "dataset"]
    name: str
    revision: str | None


# Given the names that a source has, the names that are needed; raises FtError if one is missing.
_Choice = Callable[[Collection[str]], list[str]]


def model_files(model: str, revision: str | None = None, *, with_weights: bool = True) -> ModelFiles:
    """Find a model's files: in the folder `model`, else in the cache or on the Hub under that id.

    Weights are `model.safetensors`, else the shards that `model.safetensors.index.json` names.

    Raises:
        FtError: no such folder, repository, revision or file; no connection; a file that is not what it should be.
    """
    source = _Source("model", model, revision)

    def needed(names: Collection[str]) -> list[str]:
        weights = INDEX if INDEX in names and WEIGHTS not in names else WEIGHTS
        return _all_of([CONFIG, TOKENIZER] + [weights] * with_weights, names, model)

    files = _files(source, needed)
    weights = [files[WEIGHTS]] if WEIGHTS in files else []
    if INDEX in files:
        shards = _shard_names(files[INDEX])
        weights = list(_files(source, lambda names: _all_of(shards, names, model)).values())
    return ModelFiles(model, files[CONFIG], files[TOKENIZER], tuple(weights))


def dataset_files(
    dataset: str, revision: str | None = None, part: str | None = None, *, first_of: Sequence[str] = ()
) -> dict[str, list[Path]]:
    """Find a data set's files: the file `dataset`, those in that folder, or those in the cache or on the Hub.

    On the Hub only parquet files count, first those of the revision, then those that the Hub itself has made of other
    formats, on the branch `refs/convert/parquet`.

    Args:
        dataset: a file, which is the training split; a folder; a Hub id.
        revision: branch, tag or commit on the Hub.
        part: the folder of one of several data sets that lie side by side.
        first_of: get only the first of these splits that there is, the others are not downloaded; left out: all.

    Returns:
        The shards, in order, of `train` and, where they exist, of `validation` and `test`; or of the first of
        `first_of`.

    Raises:
        FtError: as for `model_files`; no training split, a missing shard, or several files for the same part.
    """
    path = Path(os.path.expanduser(dataset))
    if path.is_file():
        return {"train": [_single_file(path)]}
    if not path.exists() and suffix_of(dataset):
        raise FtError(f"there is no file {dataset!r}: check --dataset.")
    try:
        return _dataset_files(_Source("dataset", dataset, revision), part, first_of)
    except NoSplitError as error:
        if path.is_dir() or revision is not None:
            raise
        from huggingface_hub.errors import RevisionNotFoundError

        try:
            return _dataset_files(_Source("dataset", dataset, CONVERTED_REVISION), part, first_of)
        except FtError as failure:
            if isinstance(failure.__cause__, RevisionNotFoundError):  # there is no such branch
                raise error from None
            raise


def _dataset_files(source: _Source, part: str | None, first_of: Sequence[str]) -> dict[str, list[Path]]:
    is_folder = Path(os.path.expanduser(source.name)).is_dir()
    suffixes = SUFFIXES if is_folder else (".parquet",)

    def sorted_names(names: Collection[str]) -> dict[str, list[str]]:
        return sort_into_splits(names, source.name, part, suffixes, first_of=first_of)

    def needed(names: Collection[str]) -> list[str]:
        # The first shard of the training split comes last: a cache that holds it, even of an interrupted run, holds
        # all others too. The Hub's own shards (0000, 0001, ...) do not tell how many they are.
        return [name for shards in sorted_names(names).values() for name in shards][::-1]

    files = _files(source, needed)
    return {split: [files[name] for name in names] for split, names in sorted_names(files).items()}


def _single_file(path: Path) -> Path:
    """A data set that is one file, after a look at it."""
    if suffix_of(path.name) is None:
        raise FtError(
            f"--dataset is the file {path}, whose format is not read: it must be one of {', '.join(SUFFIXES)}."
        )
    try:
        _check_beginning(path)
    except OSError as error:
        raise FtError(f"cannot read {path}, named by --dataset: {error.strerror}.") from error
    return path


def save_dataset(files: dict[str, list[Path]], directory: Path) -> None:
    """Copy a data set, as `dataset_files` returns it, into a new folder, which gets its name only when complete.

    Raises:
        FtError: the folder holds something already, or it cannot be written.
    """
    try:
        if directory.exists() and any(directory.iterdir()):
            raise FtError(f"{directory} is not empty: name a new folder for the copy of the data set.")
        directory.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}-") as staging:
            copy = Path(staging) / directory.name
            copy.mkdir()
            for split, shards in files.items():
                for i, shard in enumerate(shards):
                    suffix = suffix_of(shard.name) or ".parquet"
                    shutil.copyfile(shard, copy / f"{split}-{i:05}-of-{len(shards):05}{suffix}")
            if directory.exists():
                directory.rmdir()  # it is empty; Windows renames onto nothing that exists
            copy.rename(directory)
    except OSError as error:
        raise FtError(f"cannot save the data set in {directory}: {error.strerror or error}.") from error


def _all_of(needed: list[str], names: Collection[str], model: str) -> list[str]:
    if missing := [name for name in needed if name not in names]:
        pickled = " Pickled weights (pytorch_model.bin) are not read, for they may run any program: convert them."
        hint = pickled if missing[-1].endswith(".safetensors") else ""
        raise FtError(f"{model} has no {', '.join(missing)}: name another --model or --model-revision.{hint}")
    return needed


def _shard_names(index: Path) -> list[str]:
    """Read which files hold the weights. Only plain names will do: an index must not reach for files elsewhere."""
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise FtError(f"{index} is no index of weights: it has no `weight_map` from tensors to files.") from error
    for name in names or [""]:
        if not re.fullmatch(r"\w[\w.-]*\.safetensors", str(name), re.ASCII):
            raise FtError(f"{index} names {name!r} as a file of weights: that is no .safetensors file beside it.")
    return names


def _files(source: _Source, choose: _Choice) -> dict[str, Path]:
    """Get the files that `choose` wants: from a folder if there is one of that name, else from the Hub."""
    folder = Path(os.path.expanduser(source.name))
    try:
        if not (source.name and folder.is_dir()):
            files = _hub_files(source, choose)
        elif source.revision is None:
            files = {name: folder / name for name in choose(_names_in(folder, source))}
        else:
            raise FtError(f"{folder} is a local folder and has no revisions: leave out --{source.kind}-revision.")
        for path in files.values():
            _check_beginning(path)
    except OSError as error:
        raise FtError(f"cannot read {error.filename}, named by --{source.kind}: {error.strerror}.") from error
    return files


def _names_in(folder: Path, source: _Source) -> list[str]:
    """List the files of a folder: those of a model at its top, those of a data set at any depth.

    A link that leads nowhere is listed too, so that it is told of and not passed over.
    """
    os.listdir(folder)  # as one that may not be read looks empty to `rglob`
    paths = folder.iterdir() if source.kind == "model" else (p for p in folder.rglob("*") if suffix_of(p.name))
    return [path.relative_to(folder).as_posix() for path in paths if not path.is_dir()]


def _check_beginning(path: Path) -> None:
    """Refuse a file that is not of the kind its name says."""
    if path.exists() and not path.is_file():  # from a pipe that nobody writes to, reading would wait for ever
        raise FtError(f"{path} is no file: put the real one there.")
    with path.open("rb") as file:
        beginning = file.read(100)
    if beginning.startswith(b"version https://git-lfs"):
        raise FtError(f"{path} is a Git LFS pointer in place of the file: run `git lfs pull` in its folder.")
    if not re.match(BEGINNING.get(path.suffix.lower(), rb"(?!\s*(?i:<!doctype|<html))"), beginning):
        kind = path.suffix.lstrip(".")
        raise FtError(f"{path} is no {kind} file, it begins with {beginning[:20]!r}: put the real one there.")


def _hub_files(source: _Source, choose: _Choice) -> dict[str, Path]:
    """Get files from the Hub: through its cache, and from the cache alone where the Hub does not answer."""
    from huggingface_hub import HfApi, constants, errors, hf_hub_download, try_to_load_from_cache

    api = HfApi()
    describe = api.model_info if source.kind == "model" else api.dataset_info
    try:
        # By itself the client would wait for ever for a server that accepts a connection and then says nothing.
        timeout = constants.HF_HUB_ETAG_TIMEOUT
        info = describe(source.name, revision=source.revision, files_metadata=True, timeout=timeout)
    except (errors.HFValidationError, errors.RevisionNotFoundError) as error:
        raise _failure(error, source) from error
    except Exception as error:  # the client's other errors, those of its HTTP library, an answer that is no JSON, ...
        if cached := _cached_files(source, choose):
            return cached
        raise _failure(error, source) from error
    described = {file.rfilename: file for file in info.siblings or []}
    files = {}
    for name in choose(described):
        seen = try_to_load_from_cache(source.name, name, revision=info.sha, repo_type=source.kind)
        try:
            # By branch, not by commit: this tells the cache what the branch stands for, which it needs when offline.
            files[name] = Path(hf_hub_download(source.name, name, revision=source.revision, repo_type=source.kind))
        except Exception as error:
            raise _failure(error, source) from error
        if not isinstance(seen, str):  # once, after the download: half a gigabyte is not hashed at every start
            _check_hash(files[name], described[name], source)
    return files


def _cached_files(source: _Source, choose: _Choice) -> dict[str, Path] | None:
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
        except (errors.LocalEntryNotFoundError, FtError):
            continue
    return None


def _check_hash(path: Path, described: "RepoSibling", source: _Source) -> None:
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


def _failure(error: BaseException, source: _Source) -> FtError:
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
            text = f"there is no folder {source.name!r}, and that is no Hub id (`name` or `owner/name`): check {flag}."
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
