"""Translate errors of the Hub's library into messages with a cause and a remedy.

The library raises errors of two HTTP libraries (requests before its version 1, httpx since) that have no common base
class. They are distinguished by the names of their classes and by the errors that caused them.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any

from tokenmill.errors import DownloadError

_FULL = {errno.ENOSPC, errno.EDQUOT}
_CONNECTION = {
    "ConnectionError": "the connection failed",
    "ConnectError": "the connection failed",
    "NetworkError": "the connection failed",
    "ChunkedEncodingError": "the connection broke off",
    "ProtocolError": "the connection broke off",
    "IncompleteRead": "the connection broke off",
    "RemoteProtocolError": "the connection broke off",
}


@dataclass(frozen=True, slots=True)
class Target:
    """Request that failed, for messages: the server, the model and the revision."""

    model_id: str
    revision: str
    endpoint: str
    token: bool  # True if a token is sent


class HubFault(DownloadError):
    """Failure of one request to the Hub.

    `again`: a retry may succeed. `afresh`: a retry may succeed only if it restarts the download. `definite`: the Hub
    itself answered that the model or file is not available. `wait_s`: seconds that the server asks to wait.
    """

    def __init__(
        self, message: str, *, again: bool = False, afresh: bool = False, definite: bool = False,
        wait_s: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.again, self.afresh, self.definite, self.wait_s = again, afresh, definite, wait_s


def fault_of(error: Exception, target: Target) -> HubFault | None:
    """Explain an error of the Hub's library; None if its cause is not the Hub, the network or the disk."""
    chain = list(_chain(error))
    kinds = {kind.__name__ for each in chain for kind in type(each).__mro__}
    response = next((r for each in chain if (r := getattr(each, "response", None)) is not None), None)
    return (
        _stored(chain, target)
        or _of_repository(kinds, getattr(response, "status_code", 0), target)
        or (_of_status(response, chain, target) if response is not None and "HfHubHTTPError" in kinds else None)
        or _of_settings(kinds, chain, target)
        or _of_connection(kinds, chain, target)
        or _of_answer(kinds, error, target)
    )


def unusable(why: str, target: Target) -> HubFault:
    """Explain an answer that does not come from a Hub."""
    return HubFault(
        f"{target.endpoint} gave an answer about {target.model_id!r} that is not the Hub's ({why}). Is there a proxy, "
        "a login page or a wrong HF_ENDPOINT in between? Try the address in a browser."
    )


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield the error and its causes, the outermost first."""
    seen: set[int] = set()
    queue: list[BaseException] = [error]
    while queue:
        each = queue.pop(0)
        if id(each) in seen:
            continue
        seen.add(id(each))
        yield each
        inner = [each.__cause__, each.__context__, getattr(each, "reason", None), *each.args]
        queue += [cause for cause in inner if isinstance(cause, BaseException)]


def _stored(chain: list[BaseException], target: Target) -> HubFault | None:
    found = next((e for e in chain if isinstance(e, OSError) and e.errno and isinstance(e.filename, str | Path)), None)
    found = found or next((e for e in chain if isinstance(e, OSError) and e.errno in _FULL), None)
    if found is None:
        return None
    where = f" in {found.filename}" if found.filename else ""
    if found.errno in _FULL:
        why = f"No space is left on the disk for {target.model_id!r}{where}: make room"
    else:
        why = f"{target.model_id!r} cannot be stored{where}: {found.strerror}. Make the Hub's cache writable"
    return HubFault(f"{why}, or name another folder with HF_HOME or --huggingface-hub-cache.")


def _of_repository(kinds: set[str], status: int, target: Target) -> HubFault | None:
    model, at = f"Model {target.model_id!r}", f"{target.endpoint}/{target.model_id}"
    if "OfflineModeIsEnabled" in kinds:
        return HubFault("The network may not be used (offline).")
    if "GatedRepoError" in kinds:
        if target.token:
            return HubFault(f"{model} is gated, and the account of the token has no access: ask for it at {at}.")
        return HubFault(f"{model} is gated: ask for access at {at} and set HF_TOKEN.")
    if "DisabledRepoError" in kinds:
        return HubFault(f"{model} was disabled on the Hub: see {at}. Give another model.")
    if "RevisionNotFoundError" in kinds:
        return HubFault(f"{model} has no revision {target.revision!r} on the Hub. See {at}/tree/main.", definite=True)
    if "RepositoryNotFoundError" in kinds and not (status == 401 and target.token):  # else the token is rejected
        return HubFault(
            f"{model} is not on the Hub, or is private. Look for a misspelling; for a private model set "
            "HF_TOKEN to a token that may read it. (A folder of that name does not exist here either.)"
        )
    if "EntryNotFoundError" in kinds and "LocalEntryNotFoundError" not in kinds:
        return HubFault(
            f"A file of {target.model_id!r} is gone from {target.endpoint}. Start again, or see {at}/tree/main."
        )
    if "HFValidationError" in kinds:
        return HubFault(f"{model} is no name that the Hub allows (owner/name, no -- or .. in it).", definite=True)
    return None


def _of_status(response: Any, chain: list[BaseException], target: Target) -> HubFault | None:
    status, model, hub = int(response.status_code), repr(target.model_id), target.endpoint
    phrase = HTTPStatus(status).phrase if status in list(HTTPStatus) else ""
    told = str(next((m for each in chain if (m := getattr(each, "server_message", None))), phrase)).strip()
    told = f": {told.splitlines()[0][:200]}" if told else ""
    if status == 401:
        token = "the token that is sent (HF_TOKEN) is wrong or expired" if target.token else "a token is needed"
        return HubFault(f"{hub} answers 401 for {model}: {token}. Set HF_TOKEN to a valid one, or unset it.")
    if status == 403:
        return HubFault(
            f"{hub} refuses access to {model} (403{told}). Give the token (HF_TOKEN) the right to read this "
            "repository, or use one that has it."
        )
    if status == 404:
        return HubFault(
            f"{hub} does not have {model} (404{told}). If this is a mirror or a proxy, look at HF_ENDPOINT.",
        )
    if status == 407:
        return HubFault(f"The proxy on the way to {hub} wants a name and a password (407): give them in HTTPS_PROXY.")
    if status == 416:
        return HubFault(f"{hub} cannot continue the download of {model} (416).", again=True, afresh=True)
    if status == 429:
        cure = "Try again later" if target.token else "Set HF_TOKEN, whose limit is higher, or try again later"
        return HubFault(f"{hub} limits requests (429{told}). {cure}.", again=True, wait_s=_seconds(response))
    if status == 408 or status >= 500:
        return HubFault(
            f"{hub} answers {status}{told}: the fault is on that side. Try again later.",
            again=True, wait_s=_seconds(response),
        )  # fmt: skip
    return HubFault(f"{hub} refuses {model} ({status}{told}).")


def _seconds(response: Any) -> float:
    text = str(response.headers.get("Retry-After", ""))
    return min(float(text), 30.0) if text.isdigit() else 0.0


def _of_settings(kinds: set[str], chain: list[BaseException], target: Target) -> HubFault | None:
    """Explain faults of certificates, proxies and addresses, which require a change of settings."""
    hub, last = target.endpoint, str(chain[-1])[:200]
    if any("CERTIFICATE_VERIFY" in str(each) for each in chain):
        return HubFault(
            f"The certificate of {hub} is not accepted ({last}). If a proxy of your own signs connections, name its "
            "certificates with REQUESTS_CA_BUNDLE and SSL_CERT_FILE; else look at the machine's clock and its "
            "ca-certificates."
        )
    if any("CA certificate bundle" in str(each) for each in chain):
        return HubFault(f"REQUESTS_CA_BUNDLE or CURL_CA_BUNDLE names no file of certificates ({last}).")
    if any("SOCKS" in str(each) for each in chain) or "InvalidProxyURL" in kinds:
        return HubFault(f"HTTPS_PROXY, or another variable of its kind, cannot be used ({last}).")
    if {"MissingSchema", "InvalidSchema", "InvalidURL", "UnsupportedProtocol", "LocationParseError"} & kinds:
        return HubFault(
            f"HF_ENDPOINT is {hub!r}, which is no address of a server. Expected one as https://huggingface.co."
        )
    if {"InvalidHeader", "UnicodeEncodeError", "LocalProtocolError"} & kinds:
        return HubFault("The token (HF_TOKEN) holds characters that no token has. Set it again.")
    return None


def _of_connection(kinds: set[str], chain: list[BaseException], target: Target) -> HubFault | None:
    hub, last = target.endpoint, str(chain[-1])[:200]
    if {"JSONDecodeError", "FileMetadataError"} & kinds:
        return None
    if {"SSLError", "SSLEOFError"} & kinds or any("[SSL" in str(each) for each in chain):
        message = f"{hub} does not speak TLS as it should ({last}). Look at HF_ENDPOINT and HTTPS_PROXY."
        return HubFault(message, again=True)
    if "ProxyError" in kinds:
        return HubFault(f"The proxy on the way to {hub} fails ({last}). Look at HTTPS_PROXY and NO_PROXY.", again=True)
    if {"Timeout", "TimeoutException", "TimeoutError"} & kinds and "NewConnectionError" not in kinds:
        return HubFault(
            f"{hub} did not answer in time. Look at the network, or give more time (HF_HUB_DOWNLOAD_TIMEOUT, "
            "HF_HUB_ETAG_TIMEOUT; seconds).", again=True,
        )  # fmt: skip
    for each in chain:
        sizes = re.search(r"Consistency check failed\D*(\d+)\D*(\d+)", str(each))
        if sizes:
            message = f"{hub} sent {sizes[2]} bytes of a file that has {sizes[1]}. Is a proxy in between?"
            return HubFault(message, again=True, afresh=True)
    what = next((text for kind, text in _CONNECTION.items() if kind in kinds), None)
    if what is None:
        return None
    return HubFault(
        f"{hub} cannot be reached: {what} ({last}). Look at the network, HTTPS_PROXY and HF_ENDPOINT.", again=True
    )


def _of_answer(kinds: set[str], error: Exception, target: Target) -> HubFault | None:
    if "FileMetadataError" in kinds:
        return unusable("a file without the Hub's headers", target)
    if "JSONDecodeError" in kinds:
        return unusable("no JSON", target)
    if {"TypeError", "KeyError", "AttributeError", "ValueError"} & kinds:
        return unusable(f"{type(error).__name__}: {str(error)[:100]}", target)
    if "RuntimeError" in kinds:  # raised by hf_xet and hf_transfer
        return HubFault(
            f"The transfer of {target.model_id!r} failed: {str(error)[:200]}. Without these libraries it is plainer: "
            "HF_HUB_DISABLE_XET=1, HF_HUB_ENABLE_HF_TRANSFER=0.", again=True,
        )  # fmt: skip
    if {"OSError", "HTTPError"} & kinds:
        return HubFault(f"{target.endpoint} cannot be asked for {target.model_id!r}: {str(error)[:200]}.", again=True)
    return None
