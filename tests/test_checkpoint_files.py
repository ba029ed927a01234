"""Choice of the weight files in a folder: the same as transformers', and other contents are named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from safetensors.numpy import load_file, save_file
from support_models import make_checkpoint
from support_users import another_user

from tokenmill.errors import MissingFiles, ModelError
from tokenmill.text.load import load_tokenizer
from tokenmill.weights import hub
from tokenmill.weights.checkpoint import Safetensors, open_checkpoint
from tokenmill.weights.choice import Weights, choose, file_sets, parts_of
from tokenmill.weights.convert import convert_folder
from tokenmill.weights.source import ModelSource, is_pickled, local_source, on_this_machine, weights_in

torch.set_num_threads(1)
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Write folders of one tiny model with different weights: `new` and `old` whole, `split` and `older` in parts."""
    folders = {}
    for name, size in (("new", "5GB"), ("old", "5GB"), ("split", "150KB"), ("older", "100KB")):
        folder = folders[name] = tmp_path_factory.mktemp(name)
        make_checkpoint(folder, num_hidden_layers=2, shard_size=size)
        for file in folder.glob("*.safetensors"):  # give every folder different weights
            tensors = {key: value + len(folders) for key, value in load_file(file).items()}
            save_file(tensors, file, metadata={"format": "pt"})
    return folders


def pickle_weights(source: Path, target: Path) -> None:
    torch.save(
        {name: torch.from_numpy(value) for name, value in load_file(source / "model.safetensors").items()}, target
    )


def copy(folder: Path, to: Path, pattern: str = "*") -> list[str]:
    for file in folder.glob(pattern):
        shutil.copy(file, to / file.name)
    return sorted(file.name for file in folder.glob(pattern))


Lay = Callable[[dict[str, Path], Path], object]


def rename(made: Path, to: Path, name: str) -> None:
    shutil.copy(made / "model.safetensors", to / name)


def variants(made: dict[str, Path], to: Path) -> None:
    copy(made["new"], to)
    rename(made["old"], to, "model.fp16.safetensors")


def split_and_variants(made: dict[str, Path], to: Path) -> None:
    copy(made["split"], to)
    for file in made["older"].glob("model-*"):
        shutil.copy(file, to / file.name.replace(".safetensors", ".fp16.safetensors"))
    index = (made["older"] / INDEX).read_text().replace(".safetensors", ".fp16.safetensors")
    (to / "model.safetensors.index.fp16.json").write_text(index)


def explicit(made: dict[str, Path], to: Path) -> None:
    copy(made["old"], to)
    rename(made["new"], to, "chosen.safetensors")
    config = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps(config | {"transformers_weights": "chosen.safetensors"}))


LAYOUTS: dict[str, list[Lay]] = {
    "a whole file beside a stale index": [lambda m, to: copy(m["split"], to), lambda m, to: copy(m["new"], to)],
    "parts of an older split beside the new": [lambda m, to: copy(m["older"], to), lambda m, to: copy(m["split"], to)],
    "an index and a part of an older split": [
        lambda m, to: copy(m["split"], to),
        lambda m, to: copy(m["older"], to, "model-00003-*"),
    ],
    "variants beside the plain file": [variants],
    "variants beside plain parts": [split_and_variants],
    "consolidated copies": [
        lambda m, to: copy(m["split"], to),
        lambda m, to: rename(m["old"], to, "consolidated.safetensors"),
        lambda m, to: rename(m["old"], to, "consolidated-00001-of-00001.safetensors"),
    ],
    "pickled weights beside": [
        lambda m, to: copy(m["new"], to),
        lambda m, to: pickle_weights(m["old"], to / "pytorch_model.bin"),
    ],
    "what training leaves": [
        lambda m, to: copy(m["new"], to),
        lambda m, to: rename(m["old"], to, "optimizer.safetensors"),
        lambda m, to: rename(m["old"], to, "adapter_model.safetensors"),
        lambda m, to: torch.save({}, to / "training_args.bin"),
        lambda m, to: torch.save({}, to / "optimizer.pt"),
    ],
    "sub-folders": [
        lambda m, to: shutil.copytree(m["old"], to / "original"),
        lambda m, to: shutil.copytree(m["old"], to / "onnx"),
        lambda m, to: copy(m["new"], to),
    ],
    "a file that config.json names": [explicit],
    "another name beside": [lambda m, to: copy(m["new"], to), lambda m, to: rename(m["old"], to, "zzz.safetensors")],
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_what_transformers_loads_of_a_folder_is_loaded(made: dict[str, Path], tmp_path: Path, name: str) -> None:
    from transformers import AutoModelForCausalLM

    for lay in LAYOUTS[name]:
        lay(made, tmp_path)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).state_dict()
    found = open_checkpoint(local_source(tmp_path))
    for tensor in ("model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight", "lm_head.weight"):
        np.testing.assert_array_equal(found[tensor].data.view(np.float32), expected[tensor].numpy())


def test_pickled_weights_come_before_files_that_transformers_does_not_know(
    made: dict[str, Path], tmp_path: Path
) -> None:
    copy(made["new"], tmp_path, "config.json")
    pickle_weights(made["new"], tmp_path / "pytorch_model.bin")
    rename(made["old"], tmp_path, "model.fp16.safetensors")
    assert is_pickled(tmp_path)
    convert_folder(tmp_path)
    found, want = open_checkpoint(local_source(tmp_path)), load_file(made["new"] / "model.safetensors")
    np.testing.assert_array_equal(found["model.norm.weight"].data.view(np.float32).ravel(), want["model.norm.weight"])


SMALL = ["config.json", "tokenizer.json"]


@pytest.mark.parametrize(
    "names, expected",
    [
        (["model.fp16.safetensors"], ("model.fp16.safetensors",)),
        (["gptq_model-4bit-128g.safetensors"], ("gptq_model-4bit-128g.safetensors",)),
        (["a.safetensors", "b.safetensors", "adapter_model.safetensors"], ("a.safetensors", "b.safetensors")),
        (["model-00001-of-00001.safetensors"], ("model-00001-of-00001.safetensors",)),
        (["model-1-of-2.safetensors", "pytorch_model.bin"], ("pytorch_model.bin",)),
        (["consolidated.safetensors", "params.json"], ("consolidated.safetensors",)),
        (
            [
                "model-00001-of-00002.safetensors",
                "model-00002-of-00002.safetensors",
                "model-00003-of-00003.safetensors",
            ],
            ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"),
        ),
        (["model.safetensors", "x-Q4_K_M.gguf"], ("model.safetensors",)),
        (["weights.safetensors", "consolidated.safetensors", "optimizer.safetensors"], ("weights.safetensors",)),
        (["optimizer.bin", "scheduler.bin", "model.safetensors"], ("model.safetensors",)),
    ],
)
def test_without_an_index_whole_sets_of_files_are_chosen(names: list[str], expected: tuple[str, ...]) -> None:
    assert choose([*SMALL, *names], "m").files == expected


@pytest.mark.parametrize(
    "names, message",
    [
        (["model-00001-of-00002.safetensors"], r"m has 1 of 2 parts; missing: model-00002-of-00002\.safetensors"),
        (["model.fp16.safetensors", "model.bf16.safetensors"], "several variants"),
        (["pytorch_model-00002-of-00002.bin"], r"missing: pytorch_model-00001-of-00002\.bin"),
        (["sub/model.safetensors"], "Its sub-folder sub has some"),
        (["snapshots/0123/model.safetensors"], "Its sub-folder snapshots/0123 has some"),
        (["x.pth"], "pickled .* convert them to .safetensors"),
        (["tf_model.h5", "flax_model.msgpack"], "another library's format"),
        (["optimizer.pt", "training_args.bin"], "no weights to serve"),
        (["x.Q8_0.gguf-split-a", "x.Q8_0.gguf-split-b"], "join the pieces in order with `cat`"),
        (["mmproj-F16.gguf"], "no weights to serve"),
        ([], "no weights to serve. Expected .safetensors"),
        (["a-00001-of-00002.gguf"], r"missing: a-00002-of-00002\.gguf"),
        (
            ["model-00001-of-00003.gguf", "model-00003-of-00003.gguf"],
            r"2 of 3 parts; missing: model-00002-of-00003\.gguf",
        ),
    ],
)
def test_what_is_missing_or_undecided_is_named(names: list[str], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        choose([*SMALL, *names], "m")


GGUFS = [
    "x-Q4_K_M.gguf", "x-Q4_K_S.gguf", "x.q8_0.gguf", "mmproj-x-F16.gguf", "x-imatrix.gguf", "README.md",
    "BF16/x-BF16-00001-of-00002.gguf", "BF16/x-BF16-00002-of-00002.gguf", "UD/x-UD-Q2_K_XL.gguf",
]  # fmt: skip


@pytest.mark.parametrize(
    "wanted, expected",
    [
        ("Q4_K_M", ["x-Q4_K_M.gguf"]),
        ("q4_k_s", ["x-Q4_K_S.gguf"]),
        ("Q8_0", ["x.q8_0.gguf"]),
        ("BF16", ["BF16/x-BF16-00001-of-00002.gguf", "BF16/x-BF16-00002-of-00002.gguf"]),
        ("BF16/x-BF16-00002-of-00002.gguf", ["BF16/x-BF16-00001-of-00002.gguf", "BF16/x-BF16-00002-of-00002.gguf"]),
        ("x-BF16-00001-of-00002.gguf", ["BF16/x-BF16-00001-of-00002.gguf", "BF16/x-BF16-00002-of-00002.gguf"]),
        ("UD-Q2_K_XL", ["UD/x-UD-Q2_K_XL.gguf"]),
        ("x-Q4_K_M", ["x-Q4_K_M.gguf"]),
        ("x-Q4_K_M.gguf", ["x-Q4_K_M.gguf"]),
    ],
)
def test_a_gguf_file_is_chosen_by_its_quantization_or_name_in_any_folder(wanted: str, expected: list[str]) -> None:
    assert choose(GGUFS, "m", wanted) == Weights("gguf", tuple(expected))


@pytest.mark.parametrize("wanted", ["Q4", "Q4_K", "Q5_K_M", "mmproj", "imatrix", ".*"])
def test_a_choice_that_matches_no_gguf_file_lists_those_that_are_there(wanted: str) -> None:
    with pytest.raises(MissingFiles, match=r"no GGUF model matches .*: BF16/x-BF16-00001-of-00002\.gguf, UD/"):
        choose(GGUFS, "m", wanted)


def test_several_gguf_files_and_no_choice_list_the_choices() -> None:
    with pytest.raises(
        ModelError, match=r"m has 3 GGUF models. .* as `m:Q4_K_M`: x-Q4_K_M\.gguf, x-Q4_K_S\.gguf, x\.q8"
    ):
        choose(GGUFS, "m")
    with pytest.raises(ModelError, match=r"2 GGUF models match 'Q8_0'.*: a-Q8_0\.gguf, b-Q8_0\.gguf"):
        choose(["a-Q8_0.gguf", "b-Q8_0.gguf", "c-Q4_0.gguf"], "m", "Q8_0")
    with pytest.raises(ModelError, match="has no GGUF files, so 'Q4' selects nothing"):
        choose(["model.safetensors"], "m", "Q4")


def test_one_gguf_file_needs_no_choice_wherever_it_is() -> None:
    assert choose(["q/x-Q4_0.gguf", "mmproj.gguf"], "m").files == ("q/x-Q4_0.gguf",)
    assert choose(["x-Q4_0.gguf", "q/x-Q8_0.gguf"], "m").files == ("x-Q4_0.gguf",)
    assert choose(["model.safetensors", "x-Q4_0.gguf"], "m").files == ("x-Q4_0.gguf",)  # no config.json


def test_parts_are_named_by_any_of_them() -> None:
    assert parts_of("a-00002-of-00003.gguf") == [f"a-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    assert parts_of("a-00004-of-00003.gguf") == ["a-00004-of-00003.gguf"]
    assert parts_of("a-00000-of-00000.gguf") == ["a-00000-of-00000.gguf"]
    assert parts_of("plain.gguf") == ["plain.gguf"]
    assert [(each.label, each.missing) for each in file_sets(["a-002-of-003.x", "b.x"])] == [
        ("a", ("a-001-of-003.x", "a-003-of-003.x")),
        ("b", ()),
    ]


def test_a_folder_of_an_adapter_only_is_recognized(tmp_path: Path) -> None:
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(MissingFiles, match=r"is an adapter that lacks adapter_config\.json"):
        weights_in(tmp_path)
    about = {"base_model_name_or_path": "meta-llama/Llama-3.2-1B", "peft_type": "LORA"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(about))
    (tmp_path / "config.json").write_text("{}")  # some repositories keep the base model's
    (tmp_path / "training_args.bin").write_bytes(b"")
    assert weights_in(tmp_path) == Weights("adapter", ("adapter_model.safetensors",))
    with pytest.raises(ModelError, match="is an adapter to another model"):
        local_source(tmp_path)
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    assert weights_in(tmp_path).files == ("adapter_model.safetensors",)
    (tmp_path / "adapter_model.safetensors").unlink()
    assert weights_in(tmp_path).files == ("adapter_model.bin",)


def test_a_model_with_an_adapter_beside_it_is_served_without_and_this_is_said(
    made: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    copy(made["new"], tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    assert local_source(tmp_path).format == "safetensors"
    assert "The adapter is not applied" in caplog.text


def test_an_index_that_names_a_missing_or_foreign_file_is_refused(made: dict[str, Path], tmp_path: Path) -> None:
    copy(made["split"], tmp_path)
    next(tmp_path.glob("model-00001-of-*")).unlink()
    with pytest.raises(
        MissingFiles, match=r"model-00001-of-0000\d\.safetensors is missing, though .*index.json names it"
    ):
        local_source(tmp_path)
    for content in (
        '{"weight_map": {"a": "../x.safetensors"}}',
        '{"weight_map": {"a": ""}}',
        '{"weight_map": {"a": "."}}',
    ):
        (tmp_path / INDEX).write_text(content)
        with pytest.raises(ModelError, match="names a file outside"):
            local_source(tmp_path)
    for content in ("{}", "[]", '{"weight_map": {}}', '{"weight_map": {"a": 1}}', "", "<html>"):
        (tmp_path / INDEX).write_text(content)
        with pytest.raises(ModelError, match=rf"{INDEX}.*Download the file again"):
            local_source(tmp_path)


def test_a_tensor_that_the_index_lists_and_its_file_lacks_is_named_with_the_file(
    made: dict[str, Path], tmp_path: Path
) -> None:
    copy(made["split"], tmp_path)
    index = json.loads((tmp_path / INDEX).read_text())
    file = tmp_path / index["weight_map"]["model.norm.weight"]
    tensors = load_file(file)
    del tensors["model.norm.weight"]
    save_file(tensors, file)
    found = Safetensors(tmp_path)
    for ask in (found.shape, found.__getitem__):
        with pytest.raises(ModelError, match=rf"{file.name} lacks the tensor 'model.norm.weight'.*Download"):
            ask("model.norm.weight")
    assert found.shape("model.layers.0.self_attn.q_proj.bias") is None


@pytest.mark.parametrize("size", [0, 1, 7, 8, 100, 3000, -1])
def test_a_file_that_was_cut_off_is_named_with_the_cure(made: dict[str, Path], tmp_path: Path, size: int) -> None:
    copy(made["new"], tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(ModelError, match=r"model\.safetensors.*[Dd]ownload (the file|it) again"):
        Safetensors(tmp_path)


def test_mistrals_own_format_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    save_file({"tok_embeddings.weight": np.zeros((2, 2), np.float32)}, tmp_path / "consolidated.safetensors")
    with pytest.raises(ModelError, match="Mistral's or Meta's own format"):
        Safetensors(tmp_path)


def here(path: Path) -> ModelSource:
    return hub.resolve(str(path), revision="", cache_dir="", token="", offline=True, report=lambda _: None)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:%s\nsize 3825110\n" % (b"4" * 64)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", INDEX, "pytorch_model.bin", "m.gguf", "unnamed"])
def test_a_git_lfs_pointer_in_place_of_weights_or_config_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_bytes(POINTER)
    if name == "config.json":
        (tmp_path / "model.safetensors").write_bytes(b"")
    path = tmp_path / name if name in ("m.gguf", "unnamed") else tmp_path
    with pytest.raises(ModelError, match=rf"{name} is a Git LFS pointer .*`git lfs pull` in {tmp_path}"):
        open_checkpoint(here(path))


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer.model", "tokenizer_config.json", "x.tiktoken", "tekken.json", "vocab.txt",
             "chat_template.jinja", "generation_config.json", "vocab.json"],
)  # fmt: skip
def test_a_git_lfs_pointer_in_place_of_a_tokenizers_file_is_named(tmp_path: Path, name: str) -> None:
    if name in ("chat_template.jinja", "generation_config.json", "tokenizer_config.json"):
        tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0}, [])).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "merges.txt").write_text("")
    (tmp_path / name).write_bytes(POINTER)
    with pytest.raises(ModelError, match=f"{name} is a Git LFS pointer .*`git lfs pull`"):
        load_tokenizer(ModelSource("m", str(tmp_path), "safetensors"))


def test_a_text_about_git_lfs_is_no_pointer(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b'{"a": "' + POINTER.replace(b"\n", b" ") + b'"}')
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert local_source(tmp_path).format == "safetensors"


def test_a_name_with_a_choice_is_a_folder_or_file_here_if_there_is_one(tmp_path: Path) -> None:
    (tmp_path / "a:b").mkdir()
    assert on_this_machine(str(tmp_path / "a:b")) == (tmp_path / "a:b", "")
    assert on_this_machine(f"{tmp_path}:Q4_K_M") == (tmp_path, "Q4_K_M")
    assert on_this_machine(f"{tmp_path / 'a:b'}:Q4_K_M") == (tmp_path / "a:b", "Q4_K_M")
    assert on_this_machine("owner/name:Q4_K_M") is None
    assert on_this_machine("x" * 5000) is None
    assert on_this_machine("a\0b") is None


def test_links_to_nothing_are_named(made: dict[str, Path], tmp_path: Path) -> None:
    copy(made["new"], tmp_path, "config.json")
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "blobs" / "0123")
    with pytest.raises(MissingFiles, match=r"model\.safetensors is a link to a file that is not there.*cp -rL"):
        local_source(tmp_path)


def test_what_may_not_be_read_is_named_with_the_user(made: dict[str, Path], run_dir: Path) -> None:
    run_dir.chmod(0o755)
    folder = run_dir / "deep" / "model"
    folder.mkdir(parents=True)
    for name in copy(made["new"], folder):
        (folder / name).chmod(0o644)
    for path in (folder / "model.safetensors", folder / "config.json", folder, folder.parent):
        before = path.stat().st_mode
        path.chmod(0o600)
        denied = (
            rf"{'model' if path == folder.parent else path.name} cannot be read by the user with id 65534: Permission"
        )
        with another_user(), pytest.raises(ModelError, match=denied):
            open_checkpoint(local_source(folder))
        path.chmod(before)
    with another_user():
        assert open_checkpoint(local_source(folder)).shape("model.norm.weight") == (64,)
