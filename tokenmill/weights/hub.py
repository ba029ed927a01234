"""Locate a model on the Hugging Face Hub or in a folder, and download the files that serving needs.

These are config, tokenizer and template files, and the weights that `choice` selects. Pickled weights are converted in
a separate process. Downloads use the Hub's own cache layout, so other tools share the files. A complete cache is not
written to.
"""

from __future__ import annotations

import concurrent.futures
import importlib.util
import logging
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from tokenmill.errors import DownloadError, MissingFiles, ModelError
from tokenmill.extras import need_torch
from tokenmill.weights.adapter_config import base_of
from tokenmill.weights.choice import Weights, choose, indexed_files
from tokenmill.weights.hub_cache import CachedRepository, incomplete, verified
from tokenmill.weights.hub_faults import HubFault, Target, fault_of, unusable
from tokenmill.weights.hub_names import HubName, clean, named
from tokenmill.weights.source import (
    ModelSource,
    is_adapter,
    is_pickled,
    local_source,
    on_this_machine,
    read_json,
    refuse_pointer,
    weights_in,
)
from tokenmill.wire.messages import Progress

Report = Callable[[Progress], None]
T = TypeVar("T")

_SMALL = re.compile(r"[^/]*\.(json|jinja|txt|model|tiktoken)|additional_chat_templates/[^/]+")
_NOT_SMALL = re.compile(r"(training|trainer|args|arguments|optimizer|scheduler)|\.index(\.[\w-]+)?\.json$")
_SHA = re.compile("[0-9a-f]{7,64}")
_REVISION = re.compile(r"[\w.\-+#@]+(/[\w.\-+#@]+)*")
_TOKEN = re.compile(r"[!-~]+")
_TRIES, _PAUSE_S = 5, 5.0
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class HubAccess:
    """Access to the Hub. `token`: "" for none. `cache`: folder of the Hub's cache."""

    cache: Path
    token: str
    endpoint: str
    code: bool = False  # a model's Python files are downloaded too


def resolve(
    model_id: str,
    *,
    revision: str,
    cache_dir: str,
    token: str,
    offline: bool,
    report: Report,
    convert: bool = True,
    of_adapter: bool = False,
    code: bool = False,
) -> ModelSource:
    """Return the model on disk, downloading missing files unless `offline`. Of an adapter, its base model as well.

    `model_id`: a folder, a file, or a name on the Hub. `convert`: True to convert weights that exist only in pickled
    form. `of_adapter`: True if the model is an adapter's base, which may not be an adapter. `report`: called with the
    bytes so far. `code`: True to download Python files, too. Blocks. Raises DownloadError or ModelError with the cure.
    """

    def base(name: str, of: str) -> ModelSource:
        if of_adapter:
            raise ModelError(
                f"{model_id} is the base model of an adapter, but an adapter itself. Merge them with peft."
            )
        return resolve(
            name, revision=of, cache_dir=cache_dir, token=token, offline=offline, report=report, convert=convert,
            of_adapter=True, code=code,
        )  # fmt: skip

    here = on_this_machine(model_id)
    if here is not None:
        return _opened(here[0], model_id, here[1], report, convert, base)
    access = _access(cache_dir, token, code)
    name = named(model_id, access.endpoint)
    model = _Model(name, _revision(name, revision.strip()), access)
    model.cache.check_readable()
    folder = model.cached_offline() if offline else model.fetched(report)
    shown = str(name) if "://" in model_id or name.revision else model_id.strip()
    source = _opened(folder, shown, name.wanted, report, convert, base)
    return msgspec.structs.replace(source, revision=folder.name)


def wanted_files(names: Iterable[str], weights: Weights, code: bool = False) -> list[str]:
    """Select the files of a repository that serving needs, in order: `weights`, and the small files next to them.

    `code`: the Python files as well.
    """
    taken = [n for n in names if (code and n.endswith(".py")) or (_SMALL.fullmatch(n) and not _NOT_SMALL.search(n))]
    index = [weights.index] if weights.index else []
    return sorted({*taken, *index, *weights.files})


def _access(cache_dir: str, token: str, code: bool) -> HubAccess:
    from huggingface_hub import constants, get_token

    token = clean(token)
    if not token and not constants.HF_HUB_DISABLE_IMPLICIT_TOKEN:
        try:
            token = clean(get_token() or "")
        except (OSError, ValueError) as error:
            _log.warning("The token of the Hub in %s cannot be read (%s): none is sent", constants.HF_TOKEN_PATH, error)
    if token and not _TOKEN.fullmatch(token):
        raise DownloadError(
            "The token of the Hub (HF_TOKEN) has blanks or characters inside that no token has. Set it again."
        )
    cache = Path(os.path.expandvars(clean(cache_dir)) or constants.HF_HUB_CACHE).expanduser()
    return HubAccess(cache, token, _endpoint(), code)


def _endpoint() -> str:
    """Return the Hub's address, or the mirror's in HF_ENDPOINT. An empty variable counts as unset."""
    from huggingface_hub import constants

    return clean(constants.ENDPOINT).rstrip("/") or "https://huggingface.co"


def _revision(name: HubName, revision: str) -> str:
    if revision and name.revision and revision != name.revision:
        raise DownloadError(f"The address names revision {name.revision!r}, --revision {revision!r}. Give one of them.")
    found = revision or name.revision
    if found and (not _REVISION.fullmatch(found) or ".." in found):
        raise DownloadError(f"{found!r} is no revision. Give a branch, a tag, a commit, or refs/pr/NUMBER.")
    return found


class _Model:
    """Model on the Hub at one revision ("": the main branch)."""

    def __init__(self, name: HubName, revision: str, access: HubAccess) -> None:
        self.name, self.revision, self.access = name, revision, access
        self.cache = CachedRepository(access.cache, name.repo)
        self.target = Target(name.repo, revision, access.endpoint, bool(access.token))

    def cached_offline(self) -> Path:
        """Return the snapshot in the cache. DownloadError names the missing files and the command that gets them."""
        return self._cached("The network may not be used (offline).")

    def fetched(self, report: Report) -> Path:
        """Return the newest snapshot of the revision, downloading missing files; the cached one if the Hub fails."""
        try:
            sha, sizes = self._listed()
        except HubFault as fault:
            if fault.definite or self.cache.commit(self.revision) is None:
                raise
            folder = self._cached(str(fault))
            _log.warning("%s Serving the commit that is in the cache: %s", fault, folder.name[:12])
            return folder
        try:
            folder = self._downloaded(sha, sizes, report)
        except HubFault as fault:
            if self.cache.commit(self.revision) in (None, sha):
                raise
            folder = self._cached(str(fault))
            _log.warning("%s The Hub has the newer commit %s. Serving the one that is in the cache: %s",
                         fault, sha[:12], folder.name[:12])  # fmt: skip
            return folder
        self._remember(sha)
        return folder

    def _cached(self, why: str) -> Path:
        """Return the cache's complete snapshot. DownloadError names missing files. `why`: cause of not downloading."""
        commit = self.cache.commit(self.revision) or self._interrupted()
        if commit is None:
            others = ", ".join(f"--revision {each}" for each in self.cache.commits()[:4])
            others = f" The cache has other commits of it: give {others}." if others else ""
            raise DownloadError(
                f"Model {self._called()} is not in the Hub's cache ({self.access.cache}). {why}{others} "
                f"{self._cure()}, or give a folder."
            )
        lacking = self.cache.lacking(commit, self.name.wanted)
        if lacking:
            raise DownloadError(
                f"Of model {self._called()} the Hub's cache has a part only ({self.cache.snapshot(commit)}). Missing: "
                f"{', '.join(lacking[:8])}. {why} {self._cure()}."
            )
        return self.cache.snapshot(commit)

    def _interrupted(self) -> str | None:
        """Return the commit of an interrupted first download, else None.

        It is the only commit in the cache, it is incomplete, and no revision refers to it.
        """
        commits = self.cache.commits()
        only = len(commits) == 1 and not self.revision and self.cache.lacking(commits[0], self.name.wanted)
        return commits[0] if only else None

    def _called(self) -> str:
        return f"{str(self.name)!r}" + (f" at revision {self.revision!r}" if self.revision else "")

    def _cure(self) -> str:
        revision = f" --revision {self.revision}" if self.revision else ""
        return f"Run `tokenmill download-weights {self.name}{revision}` once with a network"

    def _listed(self) -> tuple[str, dict[str, int]]:
        """Return the commit, and the sizes of its files by name."""
        from huggingface_hub import HfApi, constants

        api = HfApi(endpoint=self.access.endpoint, token=self.access.token or False)
        info = self.insistently(
            lambda _: api.model_info(
                self.name.repo,
                revision=self.revision or None,
                files_metadata=True,
                timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
            )
        )
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
        if not isinstance(info.sha, str) or not _SHA.fullmatch(info.sha) or not sizes:
            raise unusable("no commit or no files", self.target)
        return info.sha, sizes

    def _downloaded(self, sha: str, sizes: Mapping[str, int], report: Report) -> Path:
        """Download the files of a commit that serving needs, and return the snapshot's folder."""
        fetch = _Download(self, sha)
        weights = self._weights(list(sizes), fetch)
        fetch.all({name: sizes[name] for name in wanted_files(sizes, weights, self.access.code)}, report)
        return self.cache.snapshot(sha)

    def _weights(self, names: Sequence[str], fetch: _Download) -> Weights:
        """Choose the repository's weights, after downloading the small files that name them."""
        explicit: Any = None
        if "config.json" in names and not self.name.wanted:
            explicit = read_json(fetch.one("config.json")).get("transformers_weights")
        weights = choose(names, str(self.name.repo), self.name.wanted, explicit if isinstance(explicit, str) else "")
        if not weights.index:
            return weights
        listed = sorted(set(indexed_files(read_json(fetch.one(weights.index)), weights.index).values()))
        absent = [name for name in listed if name not in names]
        if absent:
            message = f"{self.name.repo}: {weights.index} names {absent[0]}, which the repository does not have."
            raise MissingFiles(f"{message} Give another --revision, or another model.", absent)
        return Weights(weights.format, tuple(listed), weights.index)

    def _remember(self, sha: str) -> None:
        """Record the commit of the revision in the cache, as the Hub's library does, for later offline use."""
        revision = self.revision or "main"
        reference = self.cache.folder / "refs" / revision
        if revision == sha or self.cache.commit(revision) == sha:
            return
        try:
            reference.parent.mkdir(parents=True, exist_ok=True)
            reference.write_text(sha)
        except OSError as error:
            _log.warning("The Hub's cache cannot be written to (%s): offline, %s will not be known", error, revision)

    def insistently(self, call: Callable[[bool], T]) -> T:
        """Call, and retry after a pause if the fault may be temporary. Raises HubFault if retries do not help.

        `call`: its argument is True to restart a download, False to resume it.
        """
        afresh = False
        for attempt in range(1, _TRIES + 1):
            try:
                return call(afresh)
            except Exception as error:  # the errors of the two HTTP libraries have no common base class
                fault = error if isinstance(error, HubFault) else fault_of(error, self.target)
                if fault is None:
                    raise
                if not fault.again or attempt == _TRIES:
                    raise fault from None
                if attempt == 1:
                    _log.warning("%s Trying again", fault)
                afresh = fault.afresh
                time.sleep(max(0.5 if attempt == 1 else _PAUSE_S, fault.wait_s))
        raise AssertionError("unreachable")


class _Download:
    """Download of one commit's files into the cache."""

    def __init__(self, model: _Model, sha: str) -> None:
        from huggingface_hub import constants
        from huggingface_hub.utils.tqdm import disable_progress_bars

        self.model, self.sha = model, sha
        disable_progress_bars()  # our own progress counts all files together
        # TGI's images enable it; before huggingface_hub 1.0 the library fails without it
        if importlib.util.find_spec("hf_transfer") is None and hasattr(constants, "HF_HUB_ENABLE_HF_TRANSFER"):
            constants.HF_HUB_ENABLE_HF_TRANSFER = False

    def one(self, name: str) -> Path:
        """Download a file if it is not in the cache. Writes nothing if it is."""
        from huggingface_hub import hf_hub_download

        there = self.model.cache.snapshot(self.sha) / name
        if there.is_file():
            return there
        access = self.model.access
        return self.model.insistently(lambda afresh: verified(hf_hub_download(
            self.model.name.repo, name, revision=self.sha, cache_dir=access.cache, token=access.token or False,
            endpoint=access.endpoint, force_download=afresh), name, access.endpoint))  # fmt: skip

    def all(self, sizes: Mapping[str, int], report: Report) -> None:
        """Download files, several at a time, and report the sum of their bytes."""
        total, model_id = sum(sizes.values()), self.model.name.repo
        blobs = self.model.cache.folder / "blobs"
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            running = {pool.submit(self.one, name): name for name in sizes}
            try:
                while not concurrent.futures.wait(running, 0.2, concurrent.futures.FIRST_EXCEPTION).done >= set(
                    running
                ):
                    done = sum(sizes[name] for task, name in running.items() if _succeeded(task))
                    report(Progress("download", min(done + incomplete(blobs), total), total, detail=model_id))
                    if any(task.done() and task.exception() for task in running):
                        break
            finally:
                for task in running:
                    task.cancel()
            for task in running:
                if not task.cancelled():
                    task.result()
        report(Progress("download", total, total, detail=model_id))


def _succeeded(task: concurrent.futures.Future[Path]) -> bool:
    return task.done() and not task.cancelled() and task.exception() is None


def _opened(
    path: Path, model_id: str, wanted: str, report: Report, convert: bool, base: Callable[[str, str], ModelSource]
) -> ModelSource:
    """As `local_source`, but first convert pickled weights in place if there are no others.

    `base`: function of a model's name and revision that returns the model, for an adapter's base.
    """
    if convert and is_pickled(path, wanted):
        convert_in_child(path, report)
    if is_adapter(path, wanted):
        return with_adapter(path, model_id, base)
    return local_source(path, model_id, wanted)


def with_adapter(path: Path, model_id: str, base: Callable[[str, str], ModelSource]) -> ModelSource:
    """Return the base model of the adapter in the folder `path`, with the adapter to be merged into it.

    `base`: function of a model's name and revision that returns the model.
    """
    name, revision = base_of(path)
    try:
        found = base(name, revision)
    except DownloadError as error:
        raise DownloadError(f"{model_id} is an adapter to the model {name}, which cannot be had. {error}") from None
    return msgspec.structs.replace(found, model_id=model_id, adapter=str(path))


def convert_in_child(folder: Path, report: Report) -> None:
    """Convert the folder's pickled weights to .safetensors files in a child process. StartError if that fails."""
    for name in weights_in(folder).files:
        refuse_pointer(folder / name)
    need_torch(f"{folder} has pickled weights only; converting them")
    if not os.access(folder, os.W_OK, effective_ids=os.access in os.supports_effective_ids):
        raise ModelError(
            f"{folder} has pickled weights only, and their conversion cannot be written there. Give a copy of the "
            "folder that can be written to."
        )
    report(Progress("convert", detail=str(folder)))
    _log.warning("%s has pickled weights only: converting them to .safetensors", folder)
    command = [sys.executable, "-m", "tokenmill.weights.convert", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ModelError(f"The pickled weights in {folder} could not be converted to .safetensors: {last}")
