"""Models from a misbehaving Hub, from outdated, partial or read-only caches, and by names of all kinds."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import ssl
import subprocess
import threading
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
from support_hub import Answer, FakeHub
from support_users import another_user

from tokenmill.errors import DownloadError, MissingFiles, ModelError, Unsupported
from tokenmill.weights import hub
from tokenmill.weights.hub_faults import Target, fault_of
from tokenmill.weights.hub_names import HubName, parse
from tokenmill.weights.source import ModelSource

EMPTY = (2).to_bytes(8, "little") + b"{}"
FILES = {"config.json": b'{"model_type": "llama"}', "tokenizer.json": b"{}", "model.safetensors": EMPTY}
GGUF = b"GGUF"


class Client:
    """The user's side: a cache, a token, and a Hub."""

    def __init__(self, fake: FakeHub, cache: Path) -> None:
        self.hub, self.cache = fake, cache

    def get(self, name: str = "owner/tiny", revision: str = "", token: str = "", offline: bool = False) -> ModelSource:
        cache = str(self.cache)
        return hub.resolve(
            name, revision=revision, cache_dir=cache, token=token, offline=offline, report=lambda _: None, convert=False
        )

    def fault(self, *words: str, **how: bool) -> str:
        """Return the message of the error for a missing model. Assert that it blames "the network" only if true."""
        with pytest.raises(DownloadError) as caught:
            self.get(*words, **how)
        return str(caught.value)


def open_sessions_anew() -> None:
    from huggingface_hub.utils import _http

    (getattr(_http, "reset_sessions", None) or _http.close_session)()


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch, run_dir: Path) -> Iterator[Client]:
    """Return a client of a Hub with `owner/tiny`, without pauses between retries."""
    from huggingface_hub import constants, file_download
    from huggingface_hub.utils import _http

    fake = FakeHub()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "_endpoint", lambda: fake.url)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(run_dir / "token"))
    for module in (hub, _http, file_download):
        monkeypatch.setattr(module, "time", SimpleNamespace(sleep=lambda seconds: None))
    fake.add("owner/tiny", FILES)
    open_sessions_anew()
    run_dir.chmod(0o755)
    yield Client(fake, run_dir / "cache")
    fake.close()
    open_sessions_anew()


@pytest.mark.parametrize(
    "text, expected",
    [
        ("owner/name", HubName("owner/name")),
        ("gpt2", HubName("gpt2")),
        ("owner/name/", HubName("owner/name")),
        (" owner/name\n", HubName("owner/name")),
        ('"owner/name"', HubName("owner/name")),
        ("owner/name:Q4_K_M", HubName("owner/name", "", "Q4_K_M")),
        ("owner/name:sub/x-Q4_K_M.gguf", HubName("owner/name", "", "sub/x-Q4_K_M.gguf")),
        ("owner/name/x.gguf", HubName("owner/name", "", "x.gguf")),
        ("owner/name/sub/x-00001-of-00002.gguf", HubName("owner/name", "", "sub/x-00001-of-00002.gguf")),
        ("https://huggingface.co/owner/name", HubName("owner/name")),
        ("https://huggingface.co/owner/name/", HubName("owner/name")),
        ("http://www.huggingface.co/owner/name?library=x#y", HubName("owner/name")),
        ("huggingface.co/owner/name", HubName("owner/name")),
        ("https://hf.co/owner/name:Q8_0", HubName("owner/name", "", "Q8_0")),
        ("hf.co/owner/name:Q8_0", HubName("owner/name", "", "Q8_0")),
        ("hf://owner/name", HubName("owner/name")),
        ("https://huggingface.co/gpt2/tree/main", HubName("gpt2")),
        ("https://huggingface.co/owner/name/tree/main", HubName("owner/name")),
        ("https://huggingface.co/owner/name/tree/v1.0", HubName("owner/name", "v1.0")),
        ("https://huggingface.co/owner/name/tree/refs%2Fpr%2F1", HubName("owner/name", "refs/pr/1")),
        ("https://huggingface.co/owner/name/blob/main/config.json", HubName("owner/name")),
        (
            "https://huggingface.co/owner/name/resolve/main/q/x-Q4_0.gguf?download=true",
            HubName("owner/name", "", "q/x-Q4_0.gguf"),
        ),
        ("https://mirror.example/hf/owner/name", HubName("owner/name")),
        ("https://huggingface.co/datasets/owner/name", None),
        ("https://huggingface.co/spaces/owner/name", None),
        ("https://huggingface.co/", None),
        ("https://elsewhere.example/owner/name", None),
        ("owner/name:", None),
        ("owner/name:../x.gguf", None),
        ("owner/name/../x.gguf", None),
        ("owner/name/file.bin", None),
        ("/models/x", None),
        ("a..b/c", None),
        ("ö/c", None),
        ("", None),
    ],
)
def test_names_and_addresses_of_a_model_are_read(text: str, expected: HubName | None) -> None:
    assert parse(text, "https://mirror.example/hf") == expected


def test_an_address_is_served_under_the_models_name(client: Client) -> None:
    source = client.get(f"{client.hub.url}/owner/tiny/tree/main")
    assert (source.model_id, source.revision) == ("owner/tiny", client.hub.repositories["owner/tiny"]["main"][0])
    assert client.get("owner/tiny/").path == source.path


@pytest.mark.parametrize(
    "token, sent",
    [
        ("hf_x", "hf_x"),
        (" hf_x\n", "hf_x"),
        ('"hf_x"', "hf_x"),
        ("'hf_x'\r\n", "hf_x"),
        (" \n", "in_file"),
        ("", "in_file"),
    ],
)
def test_a_token_is_sent_without_what_surrounds_it(client: Client, run_dir: Path, token: str, sent: str) -> None:
    (run_dir / "token").write_text(' "in_file"\n')
    client.get(token=token)
    assert client.hub.tokens == {f"Bearer {sent}"}


@pytest.mark.parametrize("token", ["hf_x y", "hf_x\nhf_y", "hf_ö"])
def test_a_token_that_cannot_be_one_is_refused_before_it_is_sent(client: Client, token: str) -> None:
    assert "HF_TOKEN) has blanks or characters inside" in client.fault("owner/tiny", "", token)
    assert not client.hub.requests


HTML = Answer(200, b"<html>Please log in</html>", {"Content-Type": "text/html"})
CODE = "X-Error-Code"
FAULTS: dict[str, tuple[Answer, str, int]] = {
    "a login page": (HTML, r"not the Hub's \(no JSON\)\. Is there a proxy, a login page", 1),
    "a list": (Answer(200, b"[1]"), "not the Hub's", 1),
    "a number": (Answer(200, b"7"), "not the Hub's", 1),
    "null": (Answer(200, b"null"), "not the Hub's", 1),
    "an empty object": (Answer(200, b"{}"), "not the Hub's", 1),
    "an empty body": (Answer(200, b""), "not the Hub's", 1),
    "no commit": (Answer(200, b'{"id": "owner/tiny", "siblings": [{"rfilename": "a"}]}'), "no commit or no files", 1),
    "a commit that is a path": (
        Answer(200, b'{"id": "owner/tiny", "sha": "../../x", "siblings": [{"rfilename": "a"}]}'), "no commit", 1),
    "no files": (Answer(200, b'{"id": "owner/tiny", "sha": "0123456789"}'), "no commit or no files", 1),
    "files that are none": (
        Answer(200, b'{"id": "owner/tiny", "sha": "0123456789", "siblings": 5}'), "not the Hub's", 1),
    "401": (Answer(401, b'{"error": "Please log in"}'), "answers 401 for 'owner/tiny': a token is needed", 1),
    "401 of the Hub": (Answer(401, b"{}", {CODE: "RepoNotFound"}), "not on the Hub, or is private", 1),
    "401 with its message": (
        Answer(401, b"{}", {"X-Error-Message": "Invalid credentials in Authorization header"}),
        "answers 401 for 'owner/tiny': a token is needed", 1),
    "403": (Answer(403, b'{"error": "no right"}'), r"refuses access to 'owner/tiny' \(403: no right\).*HF_TOKEN", 1),
    "gated": (Answer(403, b"{}", {CODE: "GatedRepo"}), r"gated: ask for access at http://127.*/owner/tiny and", 1),
    "404": (Answer(404, b"nothing here"), r"does not have 'owner/tiny' \(404: nothing here\).*HF_ENDPOINT", 1),
    "404 of the Hub": (Answer(404, b"{}", {CODE: "RepoNotFound"}), "not on the Hub, or is private", 1),
    "no revision": (Answer(404, b"{}", {CODE: "RevisionNotFound"}), "has no revision ''", 1),
    "407": (Answer(407, b""), "proxy on the way .* wants a name and a password", 1),
    "418": (Answer(418, b""), r"refuses 'owner/tiny' \(418", 1),
    "429": (Answer(429, b'{"error": "slow down"}'), r"limits requests \(429: slow down\)\. Set HF_TOKEN", 5),
    "500": (Answer(500, b""), "answers 500.*Try again later", 5),
    "503": (Answer(503, b"<html>", {"Content-Type": "text/html"}), "answers 503: Service Unavailable: the fault", 5),
    "a reset": (Answer(200, b"{}" * 9, cut=3), "cannot be reached: the connection", 5),
    "too few bytes": (Answer(200, b"{}", length=99), "cannot be reached: the connection broke off", 5),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_an_answer_is_named_as_what_it_is(client: Client, name: str) -> None:
    answer, message, tries = FAULTS[name]
    client.hub.override = lambda request: answer
    said = client.fault()
    assert re.search(message, said), said
    assert len(client.hub.requests) == tries


@pytest.mark.parametrize("name", ["a login page", "401", "403", "gated", "404 of the Hub", "429", "503", "a reset"])
def test_what_is_cached_is_served_with_a_warning_that_names_the_fault(
    client: Client, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    before = client.get()
    answer, message, _ = FAULTS[name]
    client.hub.override = lambda request: answer
    assert client.get() == before
    warned = caplog.records[-1].getMessage()
    assert re.search(f"{message}.* Serving the commit that is in the cache: {before.revision[:12]}", warned)


def test_a_revision_that_the_hub_does_not_have_is_no_matter_for_the_cache(client: Client) -> None:
    client.get()
    assert "has no revision 'v9'" in client.fault("owner/tiny", "v9")
    client.hub.add("owner/tiny", FILES, "v9")
    client.get("owner/tiny", "v9")
    del client.hub.repositories["owner/tiny"]["v9"]
    assert "has no revision 'v9'" in client.fault("owner/tiny", "v9")


def test_a_token_that_is_not_accepted_is_named(client: Client) -> None:
    client.hub.override = lambda request: Answer(401, b"{}")
    assert "the token that is sent (HF_TOKEN) is wrong or expired" in client.fault("owner/tiny", "", "hf_old")
    client.hub.override = lambda request: Answer(403, b"{}", {CODE: "GatedRepo"})
    assert "the account of the token has no access" in client.fault("owner/tiny", "", "hf_other")


def test_no_server_and_no_name_are_the_network(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    client.hub.close()
    assert "cannot be reached: the connection failed" in client.fault()
    for endpoint, message in (
        ("http://127.0.0.1:1", "Connection refused"),
        ("http://no-such-host.invalid", "cannot be reached: the connection failed"),
        ("hub.example", "HF_ENDPOINT is 'hub.example', which is no address of a server"),
        ("ftp://hub.example", "HF_ENDPOINT is 'ftp://hub.example'"),
    ):
        monkeypatch.setattr(hub, "_endpoint", lambda endpoint=endpoint: endpoint)
        assert message in client.fault()


def test_a_server_that_does_not_answer_is_named(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(hub, "_TRIES", 2)
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.1)
    client.hub.override = lambda request: Answer(silent=0.5)
    assert "did not answer in time" in client.fault()


def test_a_certificate_that_is_not_accepted_is_named(
    client: Client, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl to make a certificate")
    make = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN=x -keyout key -out cert"
    subprocess.run(make.split(), cwd=run_dir, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(run_dir / "cert", run_dir / "key")
    server = ThreadingHTTPServer(("127.0.0.1", 0), client.hub.server.RequestHandlerClass)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    server.handle_error = lambda *who: None  # type: ignore[method-assign]
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setattr(hub, "_endpoint", lambda: f"https://127.0.0.1:{server.server_port}")
    said = client.fault()
    server.shutdown()
    assert "The certificate of https://127.0.0.1" in said
    assert "REQUESTS_CA_BUNDLE and SSL_CERT_FILE" in said
    monkeypatch.setattr(hub, "_endpoint", lambda: client.hub.url.replace("http", "https"))
    assert "does not speak TLS" in client.fault()


def test_a_file_that_comes_with_another_size_is_fetched_anew_and_then_named(client: Client) -> None:
    answers = iter([b"short"])

    def other_size(request: str) -> Answer | None:
        if request.startswith("GET") and request.endswith("model.safetensors") and (body := next(answers, None)):
            return Answer(200, body)
        return None

    client.hub.override = other_size
    source = client.get()
    assert (Path(source.path) / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    client.hub.add("owner/other", FILES | {"model.safetensors": EMPTY + b" "})
    answers = iter([b"short"] * 20)
    assert "sent 5 bytes of a file that has 11" in client.fault("owner/other")


@pytest.mark.parametrize("git", [False, True])
def test_a_file_of_another_content_is_fetched_anew_and_then_named_and_not_kept(client: Client, git: bool) -> None:
    right, wrong = FILES["model.safetensors"], EMPTY[:-1] + b"]"
    name = hashlib.sha1(b"blob 10\0" + right).hexdigest() if git else hashlib.sha256(right).hexdigest()
    bodies: list[bytes] = [wrong]

    def damaged(request: str) -> Answer | None:
        if not request.endswith("model.safetensors"):
            return None
        body = bodies.pop(0) if bodies and request.startswith("GET") else right
        sha = request.split("/resolve/")[1].partition("/")[0]
        return Answer(200, body, {"ETag": f'"{name}"', "X-Repo-Commit": sha})

    client.hub.override = damaged
    assert (Path(client.get().path) / "model.safetensors").read_bytes() == right
    client.hub.add("owner/other", FILES)
    bodies += [wrong] * 20
    said = client.fault("owner/other")
    assert f"sent model.safetensors with a wrong content: its {'sha1' if git else 'sha256'} is" in said
    assert f"should be {name}. The file was removed" in said
    assert not [path for path in client.cache.rglob(name) if "other" in str(path)]
    bodies.clear()
    assert (Path(client.get("owner/other").path) / "model.safetensors").read_bytes() == right


@pytest.mark.parametrize("answer, message", [
    (HTML, "not the Hub's (a file without the Hub's headers)"),
    (Answer(403, b"{}"), "refuses access to 'owner/tiny' (403"),
    (Answer(502, b"{}"), "answers 502"),
    (Answer(404, b"{}", {CODE: "EntryNotFound"}), "A file of 'owner/tiny' is gone from http"),
])  # fmt: skip
def test_a_fault_of_one_file_is_named_as_what_it_is(client: Client, answer: Answer, message: str) -> None:
    client.hub.override = lambda request: answer if request.endswith("model.safetensors") else None
    assert message in client.fault()


def test_names_of_files_that_lead_elsewhere_are_not_fetched(client: Client, run_dir: Path) -> None:
    client.hub.add("owner/bad", FILES | {"additional_chat_templates/../../../../../x": b"x"})
    assert "x" not in client.get("owner/bad").path.split("/")
    assert all(".." not in request for request in client.hub.requests)


@pytest.mark.parametrize(
    "variable, value, message",
    [
        ("HTTP_PROXY", "http://127.0.0.1:1", r"The proxy on the way to http.* fails|cannot be reached"),
        ("HTTP_PROXY", "socks5://127.0.0.1:1", "HTTPS_PROXY, or another variable of its kind, cannot be used"),
        (
            "REQUESTS_CA_BUNDLE",
            "/no/such/file",
            "REQUESTS_CA_BUNDLE or CURL_CA_BUNDLE names no file of certificates|TLS",
        ),
    ],
)
def test_a_proxy_or_certificates_that_cannot_be_used_are_named(
    client: Client, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, message: str
) -> None:
    monkeypatch.setenv(variable, value)
    monkeypatch.setenv(variable.lower(), value)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    if "CA" in variable:
        monkeypatch.setattr(hub, "_endpoint", lambda: client.hub.url.replace("http", "https"))
    open_sessions_anew()
    said = client.fault()
    assert re.search(message, said), said


def test_a_token_file_or_cache_of_another_user_is_named(
    client: Client, run_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    client.get()
    for path in [client.cache, *client.cache.rglob("*")]:
        path.chmod(0o755)
    (run_dir / "token").write_text("hf_x")
    (run_dir / "token").chmod(0o600)
    with another_user():
        assert client.get().format == "safetensors"
    assert "cannot be read" in caplog.text
    for folder in (client.cache, client.cache / "models--owner--tiny" / "snapshots"):
        folder.chmod(0o700)
        for offline in (True, False):
            with another_user(), pytest.raises(ModelError, match=rf"{folder} cannot be read by the user with id 65534"):
                client.get(offline=offline)
        folder.chmod(0o755)


def test_a_cache_that_is_a_file_is_named(client: Client) -> None:
    client.cache.write_text("")
    with pytest.raises(ModelError, match=rf"{client.cache} cannot be read: Not a directory"):
        client.get()


def test_a_newer_commit_that_cannot_be_fetched_leaves_the_cached_one(
    client: Client, caplog: pytest.LogCaptureFixture
) -> None:
    first = client.get()
    client.hub.add("owner/tiny", FILES | {"config.json": b'{"a": 2}'})
    client.hub.override = lambda request: Answer(403, b"{}", {CODE: "GatedRepo"}) if "/resolve/" in request else None
    assert client.get() == first
    assert "is gated: ask for access" in caplog.records[-1].getMessage()
    assert "Serving the one that is in the cache" in caplog.records[-1].getMessage()


def tree(folder: Path) -> set[tuple[str, int, int]]:
    return {(str(p), p.lstat().st_mtime_ns, p.lstat().st_size) for p in folder.rglob("*")}


def test_nothing_is_written_into_a_cache_that_has_all(client: Client) -> None:
    first = client.get()
    before = tree(client.cache)
    assert client.get() == first
    assert client.get(offline=True) == first
    assert tree(client.cache) == before


def test_a_read_only_cache_is_served_from_also_when_the_hub_has_a_newer_commit(
    client: Client, caplog: pytest.LogCaptureFixture
) -> None:
    first = client.get()
    for folder, _, files in os.walk(client.cache):
        Path(folder).chmod(0o755)
        for file in files:
            (Path(folder) / file).chmod(0o644)
    with another_user():
        assert client.get() == first
        assert client.get(offline=True) == first
    assert not caplog.records
    newer = client.hub.add("owner/tiny", FILES | {"config.json": b'{"model_type": "mistral"}'})
    with another_user():
        assert client.get() == first
    assert "Permission denied. Make the Hub's cache writable, or name another" in caplog.records[-1].getMessage()
    assert f"the newer commit {newer[:12]}. Serving the one that is in the cache: {first.revision[:12]}" in caplog.text
    with another_user():
        assert "cannot be stored" in client.fault("owner/tiny", newer)
        client.hub.add("owner/other", FILES)
        assert "cannot be stored" in client.fault("owner/other")


def test_a_reference_that_cannot_be_written_does_not_end_a_start(
    client: Client, caplog: pytest.LogCaptureFixture
) -> None:
    first = client.get("owner/tiny", client.hub.repositories["owner/tiny"]["main"][0])
    assert not (client.cache / "models--owner--tiny" / "refs").exists()
    for path in [client.cache, *client.cache.rglob("*")]:
        path.chmod(0o755)
    with another_user():
        assert client.get() == first
    assert "offline, main will not be known" in caplog.text


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT])
def test_what_cannot_be_stored_is_no_matter_of_the_network(number: int) -> None:
    target = Target("owner/tiny", "", "https://huggingface.co", False)
    fault = fault_of(OSError(number, os.strerror(number), "/cache/blobs/0"), target)
    assert fault is not None
    assert not fault.again
    assert "HF_HOME or --huggingface-hub-cache" in str(fault)


INDEX = {"weight_map": {"a": "model-a.safetensors", "b": "model-b.safetensors"}}
SPLIT = {
    "config.json": b'{"a": 1}', "tokenizer.json": b'{"b": 1}',
    "model.safetensors.index.json": json.dumps(INDEX).encode(),
    "model-a.safetensors": EMPTY, "model-b.safetensors": EMPTY + b" ", "model-old.safetensors": EMPTY,
    "model.fp16.safetensors": EMPTY, "pytorch_model.bin": b"x", "original/consolidated.00.pth": b"x",
    "onnx/model.onnx": b"x", "trainer_state.json": b"{}", "pytorch_model.bin.index.json": b"{}",
}  # fmt: skip


def test_of_a_split_model_the_files_that_its_index_names_are_fetched_alone(client: Client) -> None:
    client.hub.add("owner/split", SPLIT)
    client.get("owner/split")
    needed = [
        "config.json",
        "model-a.safetensors",
        "model-b.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
    ]
    assert client.hub.fetched() == needed


def test_half_a_cache_offline_names_what_is_missing_and_the_command_that_completes_it(client: Client) -> None:
    client.hub.add("owner/split", SPLIT, "v1")
    folder = Path(client.get("owner/split", "v1").path)
    (folder / "model-b.safetensors").unlink()
    (folder / "tokenizer.json").unlink()
    said = client.fault("owner/split", "v1", offline=True)
    assert "has a part only" in said
    assert "Missing: model-b.safetensors, the tokenizer. The network may not be used (offline)." in said
    assert "Run `tokenmill download-weights owner/split --revision v1` once with a network" in said
    client.hub.override = lambda request: Answer(503)
    said = client.fault("owner/split", "v1")
    assert "Missing: model-b.safetensors, the tokenizer" in said
    assert "answers 503" in said
    client.hub.override = lambda request: None
    client.get("owner/split", "v1")
    assert client.get("owner/split", "v1", offline=True).path == str(folder)
    blob = (folder / "model-a.safetensors").resolve()
    blob.unlink()  # a dangling link is not a file
    assert "Missing: model-a.safetensors." in client.fault("owner/split", "v1", offline=True)
    for path in folder.iterdir():
        path.unlink()
    assert "Missing: the weights, config.json, the tokenizer." in client.fault("owner/split", "v1", offline=True)


def test_a_first_download_that_did_not_end_is_half_a_cache(client: Client) -> None:
    client.hub.override = lambda request: Answer(403) if request.endswith("model.safetensors") else None
    client.fault()
    said = client.fault(offline=True)
    assert "has a part only" in said
    assert "Missing: the weights" in said


def test_a_model_that_is_not_cached_offline_names_the_commits_that_are(client: Client) -> None:
    sha = client.get("owner/tiny", client.hub.repositories["owner/tiny"]["main"][0]).revision
    said = client.fault(offline=True)
    assert f"'owner/tiny' is not in the Hub's cache ({client.cache})" in said
    assert f"other commits of it: give --revision {sha}" in said
    assert client.get("owner/tiny", sha, offline=True).revision == sha
    assert client.get("owner/tiny", sha[:8], offline=True).revision == sha
    assert "download-weights owner/else`" in client.fault("owner/else", offline=True)
    client.get()
    shutil.rmtree(client.cache / "models--owner--tiny" / "snapshots")
    assert "is not in the Hub's cache" in client.fault(offline=True)


@pytest.mark.parametrize("revision", ["v1.0", "feature/x", "refs/pr/1", "0123abc"])
def test_revisions_of_every_kind_are_fetched_and_known_offline(client: Client, revision: str) -> None:
    sha = client.hub.add("owner/tiny", FILES | {"config.json": b'{"a": 1}'}, revision)
    found = client.get("owner/tiny", f" {revision}\n")
    assert found.revision == sha
    assert client.get("owner/tiny", revision, offline=True) == found
    assert client.get("owner/tiny", sha, offline=True).path == found.path


@pytest.mark.parametrize("revision", ["../../x", "a b", "/main", "a//b", "main;x"])
def test_what_is_no_revision_is_refused(client: Client, revision: str) -> None:
    assert "is no revision. Give a branch, a tag, a commit, or refs/pr/NUMBER." in client.fault("owner/tiny", revision)
    assert not client.hub.requests


def test_two_revisions_at_once_are_refused(client: Client) -> None:
    assert "Give one of them" in client.fault(f"{client.hub.url}/owner/tiny/tree/v1", "v2")


QUANTIZED = {
    "config.json": b"{}", "x-Q4_K_M.gguf": GGUF, "x-Q8_0.gguf": GGUF, "mmproj-x-F16.gguf": GGUF, "README.md": b"",
    "BF16/x-BF16-00001-of-00002.gguf": GGUF, "BF16/x-BF16-00002-of-00002.gguf": GGUF + b" ",
}  # fmt: skip


def test_a_gguf_file_of_a_repository_is_chosen_after_a_colon(client: Client) -> None:
    client.hub.add("owner/quants", QUANTIZED)
    with pytest.raises(ModelError, match=r"owner/quants has 2 GGUF models.*as `owner/quants:Q4_K_M`"):
        client.get("owner/quants")
    source = client.get("owner/quants:q8_0")
    assert (Path(source.path).name, source.model_id, source.format) == ("x-Q8_0.gguf", "owner/quants:q8_0", "gguf")
    assert client.hub.fetched() == ["config.json", "x-Q8_0.gguf"]
    assert client.get("owner/quants:q8_0", offline=True) == source
    assert client.get("owner/quants", offline=True).path == source.path  # the only one that is cached
    said = client.fault("owner/quants:Q4_K_M", offline=True)
    assert "Missing: Q4_K_M." in said
    assert "Run `tokenmill download-weights owner/quants:Q4_K_M`" in said
    split = client.get("owner/quants:BF16")
    assert split.path.endswith("/BF16/x-BF16-00001-of-00002.gguf")
    assert Path(split.path).with_name("x-BF16-00002-of-00002.gguf").is_file()
    assert client.get("owner/quants/BF16/x-BF16-00002-of-00002.gguf").path == split.path
    with pytest.raises(MissingFiles, match="no GGUF model matches 'Q5_K_M'"):
        client.get("owner/quants:Q5_K_M")


def test_an_adapter_of_the_hub_is_fetched_with_its_base_model(client: Client) -> None:
    about = b'{"base_model_name_or_path": "owner/base", "peft_type": "LORA"}'
    client.hub.add("owner/adapter", {"adapter_config.json": about, "adapter_model.safetensors": EMPTY, "x.bin": b"x"})
    with pytest.raises(DownloadError, match="owner/adapter is an adapter to the model owner/base, which cannot be had"):
        client.get("owner/adapter")
    assert client.hub.fetched() == ["adapter_config.json", "adapter_model.safetensors"]
    client.hub.add("owner/base", FILES)
    source = client.get("owner/adapter")
    assert source == client.get("owner/adapter", offline=True)
    assert (source.model_id, source.format) == ("owner/adapter", "safetensors")
    assert Path(source.path, "config.json").is_file()
    assert Path(source.adapter, "adapter_config.json").is_file()
    about = about.replace(b"LORA", b"IA3")
    client.hub.add("owner/old", {"adapter_config.json": about, "adapter_model.safetensors": EMPTY})
    with pytest.raises(Unsupported, match="peft_type of an adapter 'IA3'"):
        client.get("owner/old")


def test_an_index_that_names_a_file_that_the_repository_lacks_is_refused(client: Client) -> None:
    client.hub.add("owner/split", {name: data for name, data in SPLIT.items() if name != "model-b.safetensors"})
    with pytest.raises(
        MissingFiles, match=r"index\.json names model-b\.safetensors, which the repository does not have"
    ):
        client.get("owner/split")


def test_a_lock_that_says_to_wait_is_heeded(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(hub, "time", SimpleNamespace(sleep=pauses.append))
    answers = iter([Answer(429, headers={"Retry-After": "7"}), Answer(503, headers={"Retry-After": "soon"})])
    client.hub.override = lambda request: next(answers, None) if "/api/" in request else None
    assert client.get().format == "safetensors"
    assert pauses == [7.0, 5.0]


def test_a_home_folder_in_the_caches_name_is_read(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(client.cache.parent))
    for cache in ("~/cache", "$HOME/cache", f' "{client.cache}"\n'):
        found = hub.resolve("owner/tiny", revision="", cache_dir=cache, token="", offline=False, report=lambda _: None)
        assert found.path.startswith(f"{client.cache}/")


@pytest.mark.parametrize("value, expected", [
    ("", "https://huggingface.co"), (' "http://mirror:80/hf/"\n', "http://mirror:80/hf"), ("http://mirror/", "http://mirror"),
])  # fmt: skip
def test_a_mirrors_address_is_read_without_what_surrounds_it(
    monkeypatch: pytest.MonkeyPatch, value: str, expected: str
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", value)
    assert hub._endpoint() == expected
