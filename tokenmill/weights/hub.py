"""Models on the Hugging Face Hub, or in a folder: get what serving needs onto the disk and say where it is.

What is fetched: config, tokenizer and template files, and the weights as .safetensors, else the one .gguf file, else
pickled .bin files, which are converted in a process of their own. The Hub's own cache layout is kept, so other tools
see the same files.
"""

from __future__ import annotations

import concurrent.futures
import importlib.util
import logging
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from tokenmill.errors import DownloadError, ModelError
from tokenmill.extras import need_torch
from tokenmill.weights.source import ModelSource, local_source
from tokenmill.wire.messages import Progress

Report = Callable[[Progress], None]

_ID = re.compile(r"[A-Za-z0-9][\w.\-]*(/[A-Za-z0-9][\w.\-]*)?")
_NEVER = re.compile("training|args|arguments")
_SMALL = re.compile(r"[^/]*\.(json|jinja|txt|model|tiktoken)|additional_chat_templates/.*")
_TRIES, _PAUSE_S = 5, 5.0
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class HubAccess:
    """How to reach the Hub. Empty strings: the library's own defaults."""

    cache_dir: str = ""
    token: str = ""
    offline: bool = False


def resolve(
    model_id: str, *, revision: str, cache_dir: str, token: str, offline: bool, report: Report, convert: bool = True
) -> ModelSource:
    """The model on disk. `model_id`: a folder, a file, or a Hub id; what is missing is downloaded unless `offline`.

    Weights that are only there pickled are converted if `convert`. Blocks as long as all that takes and reports bytes.
    DownloadError or ModelError with the cure.
    """
    if Path(model_id).exists():
        return _opened(Path(model_id), model_id, report, convert)
    if not _ID.fullmatch(model_id):
        raise DownloadError(
            f"Model {model_id!r} is neither a folder or file that exists here nor an id on the Hub (owner/name)."
        )
    access = HubAccess(cache_dir, token, offline)
    folder, sha = _cached(model_id, revision, access) if offline else _fetched(model_id, revision, access, report)
    return msgspec.structs.replace(_opened(folder, model_id, report, convert), revision=sha)


def wanted_files(names: Sequence[str]) -> list[str]:
    """Of a repository's files those that serving needs. ModelError if it has no weights at all."""
    names = [name for name in names if not _NEVER.search(name)]
    small = [name for name in names if _SMALL.fullmatch(name)]
    top = [name for name in names if "/" not in name]
    safetensors = [name for name in top if name.endswith(".safetensors")]
    split = [name for name in safetensors if not name.startswith("consolidated")]
    ggufs = [name for name in top if name.endswith(".gguf") and not name.startswith("mmproj")]
    pickled = [name for name in top if re.fullmatch(r"pytorch_model.*\.bin", name)]
    weights = split or safetensors or ggufs or pickled
    if not weights:
        raise ModelError("The repository has no weights: neither .safetensors nor .gguf nor pytorch_model.bin files.")
    if weights is ggufs and len(ggufs) > 1:
        raise ModelError(
            f"The repository has {len(ggufs)} GGUF files ({', '.join(ggufs[:6])}…). Download the one you "
            "want, for example with `hf download`, and give its path."
        )
    return sorted({*small, *weights})


def _cached(model_id: str, revision: str, access: HubAccess) -> tuple[Path, str]:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        found = snapshot_download(
            model_id, revision=revision or None, cache_dir=access.cache_dir or None, local_files_only=True
        )
    except LocalEntryNotFoundError:
        raise DownloadError(
            f"Model {model_id!r}{_at(revision)} is not in the Hub's cache, and the network may not be used (offline). "
            f"Run `tokenmill download-weights {model_id}` once with a network, or give a folder."
        ) from None
    return Path(found), Path(found).name


def _at(revision: str) -> str:
    return f" at revision {revision!r}" if revision else ""


def _fetched(model_id: str, revision: str, access: HubAccess, report: Report) -> tuple[Path, str]:
    from huggingface_hub import HfApi

    api = HfApi(token=access.token or None)
    info = _insistently(
        model_id, revision, lambda: api.model_info(model_id, revision=revision or None, files_metadata=True)
    )
    if info is None:  # the Hub cannot be reached
        _log.warning("The Hub cannot be reached: looking for %s in the cache", model_id)
        return _cached(model_id, revision, access)
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
    names = wanted_files(list(sizes))
    folder = _download(_Job(model_id, info.sha, access, {name: sizes[name] for name in names}), report)
    _remember(folder, revision or "main", info.sha)
    return folder, info.sha


def _remember(folder: Path, revision: str, sha: str) -> None:
    """Write in the cache, as the Hub's library does, which commit a revision is: offline that is all there is."""
    if revision != sha:
        reference = folder.parents[1] / "refs" / revision
        reference.parent.mkdir(parents=True, exist_ok=True)
        reference.write_text(sha)


@dataclass(frozen=True, slots=True)
class _Job:
    model_id: str
    sha: str
    access: HubAccess
    sizes: dict[str, int]  # bytes of each file to fetch


def _download(job: _Job, report: Report) -> Path:
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()  # ours counts all files together
    if importlib.util.find_spec("hf_transfer") is None:  # TGI's images ask for it; without, the Hub's library refuses
        constants.HF_HUB_ENABLE_HF_TRANSFER = False
    cache = Path(job.access.cache_dir or constants.HF_HUB_CACHE)
    blobs = cache / f"models--{job.model_id.replace('/', '--')}" / "blobs"

    def fetch(name: str) -> str:
        path = _insistently(job.model_id, job.sha, lambda: hf_hub_download(
            job.model_id, name, revision=job.sha, cache_dir=job.access.cache_dir or None,
            token=job.access.token or None))  # fmt: skip
        if path is None:
            raise DownloadError(f"{name} of {job.model_id}: the connection to the Hub was lost {_TRIES} times.")
        return str(path)

    total = sum(job.sizes.values())
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        running = {pool.submit(fetch, name): name for name in job.sizes}
        try:
            while not concurrent.futures.wait(running, 0.2, concurrent.futures.FIRST_EXCEPTION).done >= set(running):
                done = sum(job.sizes[name] for task, name in running.items() if _succeeded(task))
                report(Progress("download", min(done + _incomplete(blobs), total), total, detail=job.model_id))
                if any(task.done() and task.exception() for task in running):
                    break
        finally:
            for task in running:
                task.cancel()
        paths = {name: task.result() for task, name in running.items()}
    report(Progress("download", total, total, detail=job.model_id))
    name, path = next(iter(paths.items()))
    return Path(path).parents[name.count("/")]


def _succeeded(task: concurrent.futures.Future[str]) -> bool:
    return task.done() and not task.cancelled() and task.exception() is None


def _incomplete(blobs: Path) -> int:
    total = 0
    for path in blobs.glob("*.incomplete"):
        try:
            total += path.stat().st_size
        except OSError:
            continue  # it was completed meanwhile
    return total


def _insistently(model_id: str, revision: str, call: Callable[[], Any]) -> Any:
    """Call, again after a pause if the connection fails; None if it fails every time. DownloadError if that is vain."""
    from huggingface_hub import errors

    for attempt in range(_TRIES):
        try:
            return call()
        except errors.GatedRepoError:
            raise DownloadError(
                f"Model {model_id!r} is gated: ask for access at https://huggingface.co/{model_id} and set HF_TOKEN."
            ) from None
        except errors.RevisionNotFoundError:
            raise DownloadError(f"Model {model_id!r} has no revision {revision!r} on the Hub.") from None
        except errors.RepositoryNotFoundError:
            raise DownloadError(
                f"Model {model_id!r} is not on the Hub, or is private. Look for a misspelling; for a private model set "
                "HF_TOKEN to a token that may read it. (A folder of that name does not exist here either.)"
            ) from None
        except errors.OfflineModeIsEnabled:
            return None
        except errors.HfHubHTTPError as error:
            status = error.response.status_code if error.response is not None else 0
            if 400 <= status < 500 and status not in (408, 429):
                raise DownloadError(f"The Hub refuses {model_id!r}: {str(error).splitlines()[0]}") from None
        except (OSError, errors.LocalEntryNotFoundError) as error:
            if getattr(error, "errno", None) == 28:
                raise DownloadError(f"No space is left on the disk for {model_id!r}: {error}.") from None
            if attempt == 0:
                _log.warning("The Hub cannot be reached (%s); trying again", type(error).__name__)
        if attempt < _TRIES - 1:
            time.sleep(_PAUSE_S if attempt else 0.5)
    return None


def _opened(path: Path, model_id: str, report: Report, convert: bool) -> ModelSource:
    """As `local_source`, after pickled weights, if there is nothing else, were converted beside themselves."""
    pickled = path.is_dir() and any(path.glob("pytorch_model*.bin"))
    if convert and pickled and not any(path.glob("*.safetensors")) and not any(path.glob("*.gguf")):
        convert_in_child(path, report)
    return local_source(path, model_id)


def convert_in_child(folder: Path, report: Report) -> None:
    """Write the folder's pickled weights as .safetensors beside them, in a child process. StartError if that fails."""
    need_torch(f"{folder} has pickled weights only; converting them")
    report(Progress("convert", detail=str(folder)))
    _log.warning("%s has pickled weights only: converting them to .safetensors", folder)
    command = [sys.executable, "-m", "tokenmill.weights.convert", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ModelError(f"The pickled weights in {folder} could not be converted to .safetensors: {last}")
