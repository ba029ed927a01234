"""Options: TGI's names and defaults, precedence of sources, checks, refusals."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest
from support_slow import mostly_slow

from tokenmill import options
from tokenmill.amounts import memory_bytes
from tokenmill.backends.cpu.backend import KV_DTYPES as CPU_KV_DTYPES
from tokenmill.backends.cuda.prepare import ATTENTIONS, KV_DTYPES
from tokenmill.config import Settings
from tokenmill.errors import ArgumentError, UsageError
from tokenmill.surroundings import visible_devices

# TGI 3.3's launcher: option, environment variable, default (its documentation); "" and None: none.
TGI = """
--model-id MODEL_ID
--revision REVISION
--validation-workers VALIDATION_WORKERS 2
--sharded SHARDED
--num-shard NUM_SHARD
--quantize QUANTIZE
--speculate SPECULATE
--dtype DTYPE
--kv-cache-dtype KV_CACHE_DTYPE
--trust-remote-code TRUST_REMOTE_CODE false
--max-concurrent-requests MAX_CONCURRENT_REQUESTS 128
--max-best-of MAX_BEST_OF 2
--max-stop-sequences MAX_STOP_SEQUENCES 4
--max-top-n-tokens MAX_TOP_N_TOKENS 5
--max-input-tokens MAX_INPUT_TOKENS
--max-input-length MAX_INPUT_LENGTH
--max-total-tokens MAX_TOTAL_TOKENS
--waiting-served-ratio WAITING_SERVED_RATIO 0.3
--max-batch-prefill-tokens MAX_BATCH_PREFILL_TOKENS
--max-batch-total-tokens MAX_BATCH_TOTAL_TOKENS
--max-waiting-tokens MAX_WAITING_TOKENS 20
--max-batch-size MAX_BATCH_SIZE
--cuda-graphs CUDA_GRAPHS
--hostname HOSTNAME 0.0.0.0
--port PORT 3000
--prometheus-port PROMETHEUS_PORT 9000
--shard-uds-path SHARD_UDS_PATH /tmp/text-generation-server
--master-addr MASTER_ADDR localhost
--master-port MASTER_PORT 29500
--huggingface-hub-cache HUGGINGFACE_HUB_CACHE
--weights-cache-override WEIGHTS_CACHE_OVERRIDE
--disable-custom-kernels DISABLE_CUSTOM_KERNELS false
--cuda-memory-fraction CUDA_MEMORY_FRACTION 1.0
--rope-scaling ROPE_SCALING
--rope-factor ROPE_FACTOR
--json-output JSON_OUTPUT false
--otlp-endpoint OTLP_ENDPOINT
--otlp-service-name OTLP_SERVICE_NAME text-generation-inference.router
--cors-allow-origin CORS_ALLOW_ORIGIN
--api-key API_KEY
--watermark-gamma WATERMARK_GAMMA
--watermark-delta WATERMARK_DELTA
--ngrok NGROK false
--ngrok-authtoken NGROK_AUTHTOKEN
--ngrok-edge NGROK_EDGE
--tokenizer-config-path TOKENIZER_CONFIG_PATH
--disable-grammar-support DISABLE_GRAMMAR_SUPPORT false
--env - false
--max-client-batch-size MAX_CLIENT_BATCH_SIZE 4
--lora-adapters LORA_ADAPTERS
--payload-limit PAYLOAD_LIMIT 2000000
--enable-prefill-logprobs ENABLE_PREFILL_LOGPROBS false
--graceful-termination-timeout GRACEFUL_TERMINATION_TIMEOUT 90
""".strip().splitlines()

FIELDS = {field.flag: field for field in options.fields_of(Settings)}


@pytest.mark.parametrize("line", TGI)
def test_each_option_of_tgi_is_there_with_its_variable_and_default(line: str) -> None:
    flag, variable, default = (*line.split(), "")[:3]
    field = FIELDS[flag]
    assert (field.variables[:1] or ("-",)) == (variable,)
    if default:
        assert options.value_of(field, default) == field.default
    else:
        assert field.default in (None, "", ())
    assert not field.option.env_only


def test_the_command_line_beats_the_environment_which_beats_the_default() -> None:
    environ = {"PORT": "8000", "MAX_BEST_OF": "7"}
    settings = Settings.from_args(["--port", "9000"], environ)
    assert (settings.port, settings.max_best_of, settings.max_top_n_tokens) == (9000, 7, 5)


def test_an_empty_variable_is_one_that_is_not_set() -> None:
    assert Settings.from_args([], {"PORT": "", "MODEL_ID": ""}).port == 3000


@pytest.mark.parametrize("text", ["true", "1", "yes", "TRUE", "on"])
def test_a_boolean_is_a_flag_or_a_word_and_a_variable_takes_the_word(text: str) -> None:
    assert Settings.from_args(["--json-output"], {}).json_output
    assert Settings.from_args(["--json-output", text], {}).json_output
    assert Settings.from_args([], {"JSON_OUTPUT": text}).json_output
    assert not Settings.from_args(["--json-output=false"], {"JSON_OUTPUT": text}).json_output


def test_settings_survive_the_way_to_a_child() -> None:
    settings = Settings.from_args(["--api-key", "k", "--cors-allow-origin", "a", "--cors-allow-origin", "b"], {})
    assert settings.cors_allow_origin == ("a", "b")
    assert Settings.from_dict(settings.to_dict()) == settings


@pytest.mark.parametrize("argv, words", [
    (["--prot", "1"], "unknown option --prot; did you mean --port?"),
    (["--port", "x"], "'x' is not a whole number"),
    (["--port", "70000"], "70000 is too large: at most 65535"),
    (["--max-concurrent-requests", "0"], "0 is too small: at least 1"),
    (["--dtype", "int3"], "'int3' is not one of: float32, bfloat16, float16"),
    (["--json-output", "perhaps"], "'perhaps' is neither true nor false"),
    (["--por", "1"], "unknown option --por"),
])  # fmt: skip
def test_wrong_usage_exits_with_2_and_says_what_is_allowed(
    argv: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        Settings.from_args(argv, {})
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("argv, environ, words", [
    (["--max-input-tokens", "5", "--max-input-length", "6"], {}, r"_tokens` \(5\) and `max_input_length` \(6\)"),
    (["--max-input-tokens", "5", "--max-total-tokens", "5"], {}, r"`max_input_tokens` \(5\) must be < .*\(5\)"),
    (["--validation-workers", "0"], {}, "`validation_workers` must be > 0"),
    (["--sharded", "true"], {}, "`sharded` is true, but no number was given"),
    (["--sharded", "true", "--num-shard", "1"], {}, "`num_shard` is 1"),
    (["--memory-limit", "lots"], {}, "'lots' is not an amount of memory"),
    (["--api-key", " "], {}, "`api_key` must not be blank"),
    ([], {"PORT": "http"}, "Environment variable PORT: 'http' is not a whole number"),
    ([], {"QUANTIZE": "gptqq"}, "QUANTIZE: 'gptqq' is not one of"),
])  # fmt: skip
def test_values_that_contradict_each_other_are_explained(argv: list[str], environ: dict[str, str], words: str) -> None:
    with pytest.raises(ArgumentError, match=words):
        Settings.from_args(argv, environ)


@pytest.mark.parametrize("field", [field for field in FIELDS.values() if field.option.later], ids=lambda f: f.name)
def test_an_option_whose_machinery_comes_later_is_refused_by_name(field: options.Field) -> None:
    choices = field.option.choices
    text = choices[0] if choices else "2" if field.kind in (int, float) else "true"
    variable = field.variables[0]
    with pytest.raises(ArgumentError, match=f"`{variable}` cannot be used yet: {re.escape(field.option.later)}"):
        Settings.from_args([], {variable: text})
    if not field.option.env_only:
        with pytest.raises(ArgumentError, match=f"`{field.flag}` cannot be used yet"):
            Settings.from_args([field.flag, text], {})


@pytest.mark.parametrize("field", [field for field in FIELDS.values() if field.option.no_effect], ids=lambda f: f.name)
def test_an_option_without_effect_is_named_in_a_warning(field: options.Field) -> None:
    text = field.option.choices[0] if field.option.choices else "0.5" if field.kind is float else "7"
    text = "true" if field.kind is bool else text
    (warning,) = Settings.from_args([], {field.variables[0]: text}).warnings
    assert field.variables[0] in warning


def test_a_hostname_that_is_no_address_becomes_all_interfaces_with_a_warning() -> None:
    settings = Settings.from_args([], {"HOSTNAME": "my-container"})
    assert settings.hostname == "0.0.0.0"
    assert "my-container" in settings.warnings[0]


def test_what_is_logged_hides_secrets() -> None:
    settings = Settings.from_args(["--api-key", "hunter2"], {"HF_TOKEN": "hf_x"})
    assert "hunter2" not in settings.shown()
    assert "hf_x" not in settings.shown()
    assert "api_key=***" in settings.shown()


def test_older_names_of_the_hub_token_are_read() -> None:
    assert Settings.from_args([], {"HUGGING_FACE_HUB_TOKEN": "old"}).hf_token == "old"
    assert Settings.from_args([], {"HUGGING_FACE_HUB_TOKEN": "old", "HF_TOKEN": "new"}).hf_token == "new"


@pytest.mark.parametrize("text, expected", [("8GiB", 8 << 30), ("500MB", 500_000_000), ("1024", 1024), ("", None),
                                            ("1.5g", 1_500_000_000), ("2 KiB", 2048)])  # fmt: skip
def test_amounts_of_memory(text: str, expected: int | None) -> None:
    assert memory_bytes(text) == expected


def test_every_option_has_help_and_a_variable_of_its_own() -> None:
    seen: set[str] = set()
    for field in FIELDS.values():
        assert field.option.help.endswith("."), field.name
        assert not seen & set(field.variables), field.name
        seen |= set(field.variables)


def test_more_threads_than_cpus_are_refused_with_both_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokenmill.host.usable_cpus", lambda: 2)
    for words, environ in ((["--cpu-threads", "3"], {}), ([], {"TOKENMILL_CPU_THREADS": "3"})):
        with pytest.raises(ArgumentError, match=r"`cpu_threads` is 3, but .* may use 2 CPUs.* Give at most 2"):
            Settings.from_args(words, environ)
    assert Settings.from_args(["--cpu-threads", "2"], {}).cpu_threads == 2


def test_more_threads_than_cpus_for_every_program_are_cut_with_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokenmill.host.usable_cpus", lambda: 2)
    settings = Settings.from_args([], {"OMP_NUM_THREADS": "64"})
    assert settings.cpu_threads == 2
    assert any("OMP_NUM_THREADS is 64" in warning for warning in settings.warnings)
    assert Settings.from_args(["--cpu-threads", "1"], {"OMP_NUM_THREADS": "64"}).warnings == ()


def test_methods_of_quantization_and_caches_are_taken_by_name() -> None:
    settings = Settings.from_args(["--quantize", "int4", "--kv-cache-dtype", "int8", "--backend", "cpu"], {})
    assert (settings.quantize, settings.kv_cache_dtype, settings.backend) == ("int4", "int8", "cpu")
    assert Settings.from_args([], {"TOKENMILL_ISA": "avx2"}).cpu_isa == "avx2"
    for name in ("awq", "compressed-tensors", "eetq", "exl2", "gptq", "marlin", "bitsandbytes", "bitsandbytes-nf4",
                 "bitsandbytes-fp4", "fp8"):  # fmt: skip
        assert Settings.from_args(["--quantize", name], {}).quantize == name


@pytest.mark.parametrize("name", ["fp8_e4m3fn", "fp8_e5m2", "int8"])
def test_the_caches_formats_are_tgis_and_a_cpus(name: str) -> None:
    assert Settings.from_args(["--kv-cache-dtype", name], {}).kv_cache_dtype == name
    assert Settings.from_args([], {"KV_CACHE_DTYPE": name}).kv_cache_dtype == name


@pytest.mark.parametrize("name", ["flashinfer", "flashdecoding", "flashdecoding-ipex", "paged", "triton"])
def test_attention_takes_tgis_names_and_one_of_ours(name: str) -> None:
    for settings in (Settings.from_args(["--attention", name], {}), Settings.from_args([], {"ATTENTION": name})):
        assert (settings.attention, settings.warnings) == (name, ())
    assert name in ATTENTIONS
    with pytest.raises(UsageError, match="ATTENTION: 'flash' is not one of: triton, flashinfer, flashdecoding"):
        Settings.from_args([], {"ATTENTION": "flash"})


def test_every_name_of_attention_and_of_a_cache_is_known_to_the_backends() -> None:
    assert set(FIELDS["--attention"].option.choices) == set(ATTENTIONS)
    assert set(FIELDS["--kv-cache-dtype"].option.choices) <= {*KV_DTYPES, *CPU_KV_DTYPES}


def test_determinism_is_asked_for_by_flag_or_variable() -> None:
    assert not Settings.from_args([], {}).deterministic
    assert Settings.from_args(["--deterministic"], {}).deterministic
    for variable in ("TOKENMILL_DETERMINISTIC", "DETERMINISTIC"):
        assert Settings.from_args([], {variable: "true"}).deterministic
    assert not Settings.from_args(["--deterministic", "false"], {"DETERMINISTIC": "1"}).deterministic


def test_a_variable_that_cannot_be_read_is_a_usage_error_with_exit_code_2() -> None:
    with pytest.raises(UsageError, match="PORT: 'http' is not a whole number") as caught:
        Settings.from_args([], {"PORT": "http"})
    assert (caught.value.exit_code, ArgumentError.exit_code) == (2, 1)


@pytest.mark.parametrize("name", [
    "TGI_WIGGLE_ROOM", "XPU_MEMORY_FRACTION", "USE_PREFIX_CACHING", "USE_FLASH_ATTENTION", "EXLLAMA_VERSION",
    "ROCM_USE_SKINNY_GEMM", "REQUEST_LOGPROBS", "MAX_IMAGE_FETCH_SIZE",
])  # fmt: skip
def test_a_variable_of_tgi_that_does_nothing_here_is_named(name: str) -> None:
    (warning,) = Settings.from_args([], {name: "1"}).warnings
    assert warning.startswith(f"`{name}` has no effect: ")


@pytest.mark.parametrize("argv, environ", [(["--hostname", "localhost"], {}), (["--hostname", "127.0.0.1"], {})])
def test_localhost_said_to_us_is_not_the_whole_world(argv: list[str], environ: dict[str, str]) -> None:
    settings = Settings.from_args(argv, environ)
    assert (settings.hostname, settings.warnings) == ("127.0.0.1", ())
    assert Settings.from_args([], {"HOSTNAME": "localhost"}).hostname == "0.0.0.0"  # a machine's name


@pytest.mark.parametrize("environ, num_shard", [
    ({"CUDA_VISIBLE_DEVICES": "0,1,2"}, 3), ({"NVIDIA_VISIBLE_DEVICES": "GPU-1,GPU-2"}, 2),
    ({"NVIDIA_VISIBLE_DEVICES": "all", "ZE_AFFINITY_MASK": "0,1"}, 2),
])  # fmt: skip
def test_sharded_without_a_number_means_the_visible_devices(environ: dict[str, str], num_shard: int) -> None:
    assert Settings.from_args(["--sharded", "true"], environ).num_shard == num_shard
    assert Settings.from_args(["--sharded", "false"], environ).num_shard == 1
    assert Settings.from_args(["--sharded", "true", "--num-shard", "4"], environ).num_shard == 4


@pytest.mark.parametrize("has_gpu, words, num_shard", [
    (True, [], 2), (False, [], 1), (True, ["--sharded", "false"], 1), (True, ["--num-shard", "1"], 1),
    (True, ["--device", "cpu"], 1), (True, ["--backend", "torch"], 1), (True, ["--data-parallel-size", "2"], 1),
    (True, ["--backend", "cuda"], 2), (True, ["--mock", "true"], 1),
])  # fmt: skip
def test_without_an_option_a_model_is_shared_by_the_visible_gpus(
    has_gpu: bool, words: list[str], num_shard: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tokenmill.config.has_gpu", lambda: has_gpu)
    assert Settings.from_args(words, {"CUDA_VISIBLE_DEVICES": "0,1"}).num_shard == num_shard
    assert Settings.from_args(words, {}).num_shard == 1


@pytest.mark.parametrize("option", ["--max-total-tokens", "--max-batch-prefill-tokens"])
def test_limits_above_the_batchs_are_refused(option: str) -> None:
    name = option[2:].replace("-", "_")
    with pytest.raises(ArgumentError, match=rf"`{name}` \(101\) must be <= `max_batch_total_tokens` \(100\)"):
        Settings.from_args([option, "101", "--max-batch-total-tokens", "100"], {})
    Settings.from_args([option, "100", "--max-batch-total-tokens", "100"], {})


def test_vertex_ai_names_the_port_and_two_paths() -> None:
    environ = {"AIP_HTTP_PORT": "8080", "AIP_PREDICT_ROUTE": "/predict", "AIP_HEALTH_ROUTE": "/well"}
    settings = Settings.from_args(["--port", "80"], environ)
    assert (settings.port, settings.aip_predict_route, settings.aip_health_route) == (8080, "/predict", "/well")
    settings = Settings.from_args(["--port", "80"], {"AIP_HTTP_PORT": "http"})
    assert settings.port == 80
    assert "`AIP_HTTP_PORT=http` has no effect" in settings.warnings[0]


def test_sagemakers_names_of_the_model_are_read() -> None:
    environ = {"HF_MODEL_ID": "owner/model", "HF_MODEL_REVISION": "v1"}
    settings = Settings.from_args([], environ)
    assert (settings.model_id, settings.revision) == ("owner/model", "v1")
    assert Settings.from_args([], environ | {"MODEL_ID": "mine"}).model_id == "mine"


def test_the_format_of_logs_may_come_from_a_variable() -> None:
    assert Settings.from_args([], {"LOG_FORMAT": "json"}).json_output
    assert not Settings.from_args([], {"LOG_FORMAT": "text"}).json_output
    assert "`LOG_FORMAT=logfmt` has no effect" in Settings.from_args([], {"LOG_FORMAT": "logfmt"}).warnings[0]
    assert Settings.from_args([], {"LOG_COLORIZE": "0"}).log_colorize is False
    assert Settings.from_args([], {}).log_colorize is None


@pytest.mark.parametrize(("argv", "environ"), [
    (["--grammar-backend", "xgrammar"], {}), (["--grammar-backend=xgrammar", "--disable-grammar-support"], {}),
    ([], {"TOKENMILL_GRAMMAR_BACKEND": "xgrammar"}), ([], {"TOKENMILL_GRAMMAR_BACKEND": '"xgrammar"'}),
    (["--grammar-backend", "xgrammar"], {"TOKENMILL_GRAMMAR_BACKEND": "llguidance"}),
])  # fmt: skip
def test_xgrammar_is_accepted_and_said_to_be_served_by_llguidance(argv: list[str], environ: dict[str, str]) -> None:
    warning = Settings.from_args(argv, environ).warnings[-1]
    assert warning == "`--grammar-backend xgrammar` has no effect: llguidance serves all grammars."
    assert Settings.from_args(["--grammar-backend", "llguidance"], {}).warnings == ()
    with pytest.raises(ArgumentError, match="not one of: llguidance, xgrammar"):
        Settings.from_args([], {"TOKENMILL_GRAMMAR_BACKEND": "outlines"})


def test_traces_and_watermarks_are_there() -> None:
    words = ["--otlp-endpoint", "http://localhost:4317", "--otlp-service-name", "x", "--watermark-gamma", "0.25"]
    settings = Settings.from_args([*words, "--watermark-delta", "1.5"], {})
    assert (settings.otlp_endpoint, settings.otlp_service_name) == ("http://localhost:4317", "x")
    assert (settings.watermark_gamma, settings.watermark_delta, settings.warnings) == (0.25, 1.5, ())


# Surroundings


@pytest.mark.parametrize("link", ["tcp://10.0.0.1:9090", "udp://10.0.0.1:53"])
def test_the_address_of_a_service_is_no_option_and_is_ignored_with_a_warning(link: str) -> None:
    variables = [name for field in FIELDS.values() if field.kind in (int, float, bool) for name in field.variables]
    assert {"PORT", "PROMETHEUS_PORT", "MASTER_PORT", "OMP_NUM_THREADS", "SHARDED"} <= set(variables)
    settings = Settings.from_env(dict.fromkeys(variables, link))
    assert settings == msgspec.structs.replace(Settings.from_env({}), warnings=settings.warnings)
    assert [warning.partition("=")[0] for warning in settings.warnings] == [f"`{name}" for name in variables]


def test_an_alias_counts_where_the_better_name_is_the_address_of_a_service() -> None:
    environ = {"TOKENMILL_CPU_THREADS": "tcp://10.0.0.1:80", "OMP_NUM_THREADS": "1"}
    assert Settings.from_env(environ).cpu_threads == 1


@pytest.mark.parametrize("field", [field for field in FIELDS.values() if field.option.no_effect], ids=lambda f: f.name)
@pytest.mark.parametrize("text", ["tcp://10.0.0.1:9090", "nonsense", "-1e9"])
def test_no_value_of_a_variable_without_effect_ends_the_start(field: options.Field, text: str) -> None:
    (warning,) = Settings.from_env({field.variables[0]: text}).warnings
    assert field.variables[0] in warning


@pytest.mark.parametrize(
    "text, threads", [("2,1", 2), ("1", 1), ("2, 4,8", 2), ('"2,1"\r', 2), (" 1 ", 1), ("64,1", 2)]
)
def test_of_openmps_nested_threads_the_first_number_counts(
    text: str, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tokenmill.host.usable_cpus", lambda: 2)
    assert Settings.from_env({"OMP_NUM_THREADS": text}).cpu_threads == threads


@pytest.mark.parametrize("text", ["0", "-1", "auto", ",4", "two,1", "2x4", "tcp://10.0.0.1:80"])
def test_what_openmp_would_not_read_is_ignored_with_a_warning(text: str) -> None:
    settings = Settings.from_env({"OMP_NUM_THREADS": text})
    assert settings.cpu_threads is None
    assert all("OMP_NUM_THREADS" in warning for warning in settings.warnings)
    with pytest.raises(UsageError):
        Settings.from_env({"TOKENMILL_CPU_THREADS": "two"})


FROM_VARIABLES = [field for field in FIELDS.values() if field.variables and not field.option.later]


@pytest.mark.parametrize("field", mostly_slow(FROM_VARIABLES, FROM_VARIABLES[::6]), ids=lambda f: f.name)
def test_quotes_and_line_ends_around_a_variable_are_no_part_of_it(field: options.Field) -> None:
    values = {int: "1", float: "0.5", bool: "true"} | dict.fromkeys(("max_total_tokens", "max_input_tokens"), "20")
    values |= {"memory_limit": "1GB", "hostname": "127.0.0.1", "sharded": "false", "num_shard": "2", "node_rank": "0"}
    plain = field.option.choices[0] if field.option.choices else values.get(field.name, values.get(field.kind, "7"))
    variable = field.variables[0]
    expected = Settings.from_env({variable: plain})
    for around in ('"{}"', "'{}'", "{}\r", "{}\r\n", " {}\t", '"{}" \r', "' {} '", "\"'{}'\"", "“{}”"):
        given = Settings.from_env({variable: around.format(plain)})
        assert getattr(given, field.name) == getattr(expected, field.name)
        (warning,) = set(given.warnings) - set(expected.warnings)
        assert warning == f"`{variable}`: white space or quotes around its value are taken to be no part of it."


@pytest.mark.parametrize("text", ['""', "''", " ", "\r\n", '" "'])
def test_a_variable_with_nothing_in_its_quotes_is_one_that_is_not_set(text: str) -> None:
    assert Settings.from_env({"MODEL_ID": text, "HF_MODEL_ID": "owner/model"}).model_id == "owner/model"
    assert Settings.from_env({"PORT": text}).port == 3000


@pytest.mark.parametrize("text", ['"3000', "3000'", "\"3000'"])
def test_a_quote_without_its_partner_is_part_of_the_value(text: str) -> None:
    with pytest.raises(UsageError, match=r"PORT: .* is not a whole number"):
        Settings.from_env({"PORT": text})


@pytest.mark.parametrize("variable, text", [
    ("CUDA_MEMORY_FRACTION", "nan"), ("WATERMARK_DELTA", "inf"), ("MAX_BATCH_SIZE", "9" * 30), ("MODEL_ID", "a\udcff"),
])  # fmt: skip
def test_a_value_that_no_child_could_be_told_is_a_usage_error(variable: str, text: str) -> None:
    with pytest.raises(UsageError, match=variable):
        Settings.from_env({variable: text})


@pytest.mark.parametrize("given, hostname", [
    ("[::1]", "::1"), ("::1", "::1"), ("[::]", "::"), ("0:0:0:0:0:0:0:1", "::1"), ("fe80::1%eth0", "fe80::1%eth0"),
    ("localhost", "127.0.0.1"), ("my-machine", "my-machine"), (" 127.0.0.1 ", "127.0.0.1"), ("", "0.0.0.0"),
])  # fmt: skip
def test_a_hostname_on_the_command_line_is_an_address_or_a_name(given: str, hostname: str) -> None:
    settings = Settings.from_args(["--hostname", given], {"HOSTNAME": "container"})
    assert (settings.hostname, settings.warnings) == (hostname, ())


def test_an_address_in_hostname_counts_and_a_name_does_not() -> None:
    assert Settings.from_env({"HOSTNAME": "[::1]"}).hostname == "::1"
    assert Settings.from_env({"HOSTNAME": "tokenmill-7f9c-abcde"}).hostname == "0.0.0.0"


@pytest.mark.parametrize("visible", ["NoDevFiles", "-1", "", "none", "void", '""'])
def test_devices_that_a_batch_system_takes_away_are_not_counted(visible: str) -> None:
    with pytest.raises(ArgumentError, match="no number was given"):
        Settings.from_args(["--sharded", "true"], {"CUDA_VISIBLE_DEVICES": visible})
    environ = {"CUDA_VISIBLE_DEVICES": "GPU-8f2a,MIG-3,-1,2", "WORLD_SIZE": "x", "RANK": "y", "SLURM_NTASKS": "z"}
    assert Settings.from_args(["--sharded", "true"], environ).num_shard == 2


@pytest.mark.parametrize("port", ["65536", "-1", "tcp://10.0.0.1:80", "8080x", "1" * 9])
def test_vertex_ais_port_must_be_one(port: str) -> None:
    settings = Settings.from_env({"AIP_HTTP_PORT": port})
    assert settings.port == 3000
    assert f"`AIP_HTTP_PORT={port}` has no effect" in settings.warnings[0]


@pytest.mark.parametrize("words, most", [
    (["--num-shard", "2"], 4), (["--data-parallel-size", "2", "--pipeline-parallel-size", "2"], 2),
    (["--num-shard", "16"], 1), (["--num-shard", "2", "--share-devices"], 8),
])  # fmt: skip
def test_the_cpus_are_divided_among_all_ranks(words: list[str], most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokenmill.host.usable_cpus", lambda: 8)
    assert Settings.from_args([*words, "--cpu-threads", f"{most}"], {}).cpu_threads == most
    with pytest.raises(ArgumentError, match=f"`cpu_threads` is {most + 1}.* Give at most {most}"):
        Settings.from_args([*words, "--cpu-threads", f"{most + 1}"], {})
    assert Settings.from_args(words, {"OMP_NUM_THREADS": "64"}).cpu_threads == most


@pytest.mark.parametrize("flag, least", [
    ("--pipeline-parallel-size", "1"), ("--data-parallel-size", "1"), ("--num-shard", "1"), ("--rank-timeout", "0.1"),
])  # fmt: skip
def test_no_ranks_and_no_time_are_refused(flag: str, least: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        Settings.from_args([flag, "0"], {})
    assert f"argument {flag}: 0 is too small: at least {least}" in capsys.readouterr().err


def test_all_devices_of_a_container_are_counted(tmp_path: Path) -> None:
    for name in ("nvidia0", "nvidia1", "nvidia11", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    assert visible_devices({"NVIDIA_VISIBLE_DEVICES": "all"}, str(tmp_path)) == 3
    assert visible_devices({"NVIDIA_VISIBLE_DEVICES": "all", "CUDA_VISIBLE_DEVICES": "0,1"}, str(tmp_path)) == 2
    assert visible_devices({"NVIDIA_VISIBLE_DEVICES": "void"}, str(tmp_path)) is None
    assert visible_devices({"NVIDIA_VISIBLE_DEVICES": "all"}, str(tmp_path / "none")) is None


def test_each_engine_may_have_the_default_number_of_requests() -> None:
    for given, most in (([], 128), (["--data-parallel-size", "3"], 384)):
        assert Settings.from_args(given, {}).max_concurrent_requests == most
        assert Settings.from_args([*given, "--max-concurrent-requests", "5"], {}).max_concurrent_requests == 5
