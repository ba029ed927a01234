"""Define every option: its field, default, environment variable and help. No other file reads os.environ.

Names and defaults are those of TGI's launcher. Additional options follow, with variables that begin with TOKENMILL_.
An option that is not implemented yet is parsed and refused with a message, never ignored.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec

from tokenmill import cluster, options, surroundings
from tokenmill.amounts import graph_sizes, memory_bytes
from tokenmill.cluster import Nodes, check_nodes
from tokenmill.errors import ArgumentError
from tokenmill.host import cpu_threads, has_gpu
from tokenmill.options import Option

_QUANTIZATIONS = ("awq", "compressed-tensors", "eetq", "exl2", "gptq", "marlin", "bitsandbytes", "bitsandbytes-nf4",
                  "bitsandbytes-fp4", "fp8")  # fmt: skip
_KV_DTYPES = ("int8", "fp8_e4m3fn", "fp8_e5m2")
_ATTENTIONS = ("triton", "flashinfer", "flashdecoding", "flashdecoding-ipex", "paged")
_CHUNKED = "prefill is always chunked and mixed with decoding, so nothing waits for it."
WITHOUT_EFFECT = {
    "TGI_WIGGLE_ROOM": "say how much memory may be used with --memory-limit.",
    "XPU_MEMORY_FRACTION": "say how much memory may be used with --memory-limit.",
    "USE_PREFIX_CACHING": "the prefix cache is always on: it costs nothing and changes no answer.",
    "USE_FLASH_ATTENTION": "each backend has its own attention.",
    "REQUEST_LOGPROBS": "log-probabilities of prompts are computed for every request that asks for them.",
    **dict.fromkeys(
        ("USE_CUTLASS_W8A8", "EXLLAMA_VERSION", "DISABLE_EXLLAMA", "ROCM_USE_FLASH_ATTN_V2_TRITON",
         "ROCM_USE_CUSTOM_PAGED_ATTN", "ROCM_USE_SKINNY_GEMM"), "there are no such kernels."),
}  # fmt: skip
"""Variables of TGI that are not options of its launcher -> the reason why they have no effect here"""
_MOST_RANKS = 1024
_LOCAL = "ranks meet in a private folder of this machine, not at an address."


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """Options of a server. None and "" mean "not given"; their effective values are determined once, at start."""

    # fmt: off
    # The model
    model_id: Annotated[str, Option("A Hub id, a folder, or a .gguf file. Without it: the embedded default.",
                                     env="MODEL_ID,HF_MODEL_ID")] = ""
    revision: Annotated[str, Option("Branch, tag, refs/pr/N or commit of a model on the Hub.",
                                    env="REVISION,HF_MODEL_REVISION")] = ""
    dtype: Annotated[str, Option("Number format of the computation.", choices=("float32", "bfloat16", "float16"))] = ""
    quantize: Annotated[str, Option(
        "Quantize weights while loading (int8, int4, eetq, fp8, bitsandbytes and its kinds), or name the method that "
        "the model is stored in. Default: as it is stored.", choices=("int8", "int4", *_QUANTIZATIONS))] = ""
    kv_cache_dtype: Annotated[str, Option("Number format of the KV cache: int8 on a CPU, FP8 on a GPU. Default: "
                                          "float16 on a CPU, the computation's on a GPU.", choices=_KV_DTYPES)] = ""
    trust_remote_code: Annotated[bool, Option(
        "Run a model repository's own Python code, if it defines the model and neither tokenmill nor transformers "
        "does.")] = False
    tokenizer_config_path: Annotated[str, Option("A tokenizer_config.json in place of the model's.")] = ""
    rope_scaling: Annotated[str, Option("Override the model's RoPE scaling.", choices=("linear", "dynamic"), later=(
        "overriding RoPE is not in this release; the scaling in config.json is used."))] = ""
    rope_factor: Annotated[float | None, Option("Factor of --rope-scaling.", later=(
        "overriding RoPE is not in this release; the scaling in config.json is used."))] = None
    lora_adapters: Annotated[tuple[str, ...], Option("LoRA adapters, separated by commas.", later=(
        "adapters by request are not in this release; give an adapter as --model-id to merge it into its base."))] = ()
    speculate: Annotated[int | None, Option("Tokens to speculate.", at_least=0, later=(
        "speculation is not in this release; leave the option out."))] = None
    huggingface_hub_cache: Annotated[str, Option(
        "Folder of the Hub's cache.", env="HUGGINGFACE_HUB_CACHE,HF_HUB_CACHE")] = ""
    weights_cache_override: Annotated[str, Option("Folder that holds the weights, used in place of the Hub.")] = ""

    # Devices
    sharded: Annotated[bool | None, Option("Split the model over the devices.")] = None
    num_shard: Annotated[int | None, Option("Ranks that share each layer of the model (tensor parallel).", at_least=1,
                                            at_most=_MOST_RANKS)] = None
    enable_expert_parallel: Annotated[bool, Option(
        "Each rank has some of a layer's experts, whole, instead of a part of each; with --num-shard.")] = False
    cuda_graphs: Annotated[str, Option(
        "Batch sizes to capture as CUDA graphs, as 1,2,4; 0: none. Default: up to the largest batch.")] = ""
    cuda_memory_fraction: Annotated[float, Option(
        "Share of a GPU's memory that may be used.", at_least=0.01, at_most=1)] = 1.0
    attention: Annotated[str, Option("Whose kernels attend to the cache on a GPU; TGI's flashdecoding and paged are "
                                     "served by triton. Default: triton.", choices=_ATTENTIONS)] = ""
    disable_custom_kernels: Annotated[bool, Option("TGI: old kernels off.", no_effect="there are none.")] = False
    shard_uds_path: Annotated[str, Option("TGI: prefix of its sockets.", no_effect=_LOCAL)] = (
        "/tmp/text-generation-server")
    master_addr: Annotated[str, Option("Address of node 0, with --num-nodes.")] = cluster.ADDRESS
    master_port: Annotated[int, Option("First of the ports at which nodes meet, with --num-nodes.", at_least=1,
                                       at_most=65535)] = cluster.PORT

    # Limits
    max_concurrent_requests: Annotated[int, Option("Requests at once, 128 an engine; more get 429.", at_least=1)] = 128
    max_best_of: Annotated[int, Option("The most a request may ask for with best_of.", at_least=1)] = 2
    max_stop_sequences: Annotated[int, Option("The most stop strings of a request.", at_least=0)] = 4
    max_top_n_tokens: Annotated[int, Option("The most alternatives of a token.", at_least=0)] = 5
    max_input_tokens: Annotated[int | None, Option("The longest prompt. Default: --max-total-tokens − 1.",
                                                   at_least=1)] = None
    max_input_length: Annotated[int | None, Option("Old name of --max-input-tokens.", at_least=1)] = None
    max_total_tokens: Annotated[int | None, Option(
        "Prompt and answer together. Default: what model and KV cache allow.", at_least=2)] = None
    max_batch_prefill_tokens: Annotated[int | None, Option(
        "Tokens that one step computes at most. Default: 512 on a CPU, 8192 on a GPU.", at_least=1)] = None
    max_batch_total_tokens: Annotated[int | None, Option("TGI: tokens of all running requests.", at_least=1, no_effect=(
        "the KV cache's capacity is measured; see --memory-limit."))] = None
    max_batch_size: Annotated[int | None, Option(
        "Requests that run at once. Default: 128, 256 on a GPU.", at_least=1)] = None
    max_waiting_tokens: Annotated[int, Option("TGI: steps before waiting requests join.", no_effect=_CHUNKED)] = 20
    waiting_served_ratio: Annotated[float, Option("TGI: when waiting requests join.", no_effect=_CHUNKED)] = 0.3
    max_client_batch_size: Annotated[int, Option("Prompts of one /v1/completions request.", at_least=1)] = 4
    payload_limit: Annotated[int, Option("Bytes of a request's body.", at_least=1)] = 2_000_000
    max_image_fetch_size: Annotated[int, Option("TGI: bytes of an image.", env_only=True, no_effect=(
        "this release serves no images; requests with one are refused."))] = 1_073_741_824
    validation_workers: Annotated[int, Option("Threads that tokenize, per HTTP worker.")] = 2

    # HTTP
    hostname: Annotated[str, Option("Address to listen on.")] = "0.0.0.0"
    port: Annotated[int, Option("Port to listen on; 0: any free one.", at_least=0, at_most=65535, short="-p")] = 3000
    prometheus_port: Annotated[int, Option("TGI: unused.", at_most=65535, no_effect=(
        "metrics are at /metrics of the main port, as in TGI."))] = 9000
    api_key: Annotated[str, Option("Bearer key that every request needs. Better given as API_KEY.", secret=True)] = ""
    cors_allow_origin: Annotated[tuple[str, ...], Option("Origin that browsers may call from; repeatable.")] = ()
    disable_grammar_support: Annotated[bool, Option("Refuse requests with a grammar.")] = False
    enable_prefill_logprobs: Annotated[bool, Option("Allow log-probabilities of prompts.", no_effect=(
        "they are computed for every request that asks for them."))] = False
    watermark_gamma: Annotated[float | None, Option("Share of the vocabulary that a watermark favours. Default: 0.5.",
                                                    at_least=0, at_most=1)] = None
    watermark_delta: Annotated[float | None, Option("What a watermark adds to the logits of that share. Default: 2.",
                                                    )] = None
    ngrok: Annotated[bool, Option("TGI: tunnel.", later="tunnels are not supported; run ngrok beside it.")] = False
    ngrok_authtoken: Annotated[str, Option("TGI: of --ngrok.", secret=True, no_effect=(
        "there are no tunnels; ngrok itself, run beside it, reads the variable."))] = ""
    ngrok_edge: Annotated[str, Option("TGI: of --ngrok.", no_effect="there are no tunnels; run ngrok beside it.")] = ""

    # Running
    json_output: Annotated[bool, Option("Log lines as JSON.")] = False
    log_level: Annotated[str, Option("What is logged: trace, debug, info, warn, error or off; or levels by target, as "
                                     "info,tokenmill.engine=debug.")] = "info"
    log_format: Annotated[str, Option("`json`: as --json-output.", env_only=True)] = ""
    log_colorize: Annotated[bool | None, Option("Colours in text logs. Default: on a terminal.", env_only=True)] = None
    otlp_endpoint: Annotated[str, Option("OpenTelemetry collector that gets each request's trace, by OTLP over gRPC, "
                                         "as http://localhost:4317; needs the extra `tokenmill[otel]`.")] = ""
    otlp_service_name: Annotated[str, Option("Name of this service in traces.")] = "text-generation-inference.router"
    otel_traces_sampler: Annotated[str, Option("OpenTelemetry's: which requests are traced. Default: all.",
                                               env_only=True)] = ""
    usage_stats: Annotated[str, Option("TGI's telemetry.", choices=("on", "off", "no-stack"), no_effect=(
        "nothing is ever sent to anybody."))] = "off"
    env: Annotated[bool, Option("Print the runtime environment at start.", env="", short="-e")] = False
    graceful_termination_timeout: Annotated[int, Option("Seconds that running requests get after SIGTERM.",
                                                        at_least=0, short="-g")] = 90
    prefix_caching: Annotated[bool, Option("TGI: prefix cache.", env_only=True)] = True
    prefill_chunking: Annotated[bool, Option("TGI: chunked prefill.", env_only=True)] = True
    compute_type: Annotated[str, Option("Value of the x-compute-type header.", env="COMPUTE_TYPE")] = ""
    docker_label: Annotated[str, Option("What /info shows as docker_label.", env_only=True)] = ""
    aip_http_port: Annotated[str, Option("Vertex AI: the port, in place of --port.", env_only=True)] = ""
    aip_predict_route: Annotated[str, Option("Vertex AI: one more path of /vertex.", env_only=True)] = ""
    aip_health_route: Annotated[str, Option("Vertex AI: one more path of /health.", env_only=True)] = ""
    hf_token: Annotated[str, Option("Token of the Hub.", secret=True, env_only=True,
                                    env="HF_TOKEN,HUGGING_FACE_HUB_TOKEN,HF_API_TOKEN")] = ""
    offline: Annotated[bool, Option("Use the cache only, never the network.", env="HF_HUB_OFFLINE")] = False

    # Additional options
    pipeline_parallel_size: Annotated[int, Option(
        "Stages that the layers are divided into; each has --num-shard ranks.", at_least=1, at_most=_MOST_RANKS,
        env="TOKENMILL_PIPELINE_PARALLEL_SIZE")] = 1
    data_parallel_size: Annotated[int, Option(
        "Engines behind this server, each with the whole model and ranks of its own.", at_least=1, at_most=_MOST_RANKS,
        env="TOKENMILL_DATA_PARALLEL_SIZE")] = 1
    num_nodes: Annotated[int, Option("Machines that the ranks of the engine are divided among.", at_least=1,
                                     at_most=_MOST_RANKS, env="TOKENMILL_NUM_NODES")] = 1
    node_rank: Annotated[int, Option("Number of this machine; node 0 serves.", at_least=0, at_most=_MOST_RANKS,
                                     env="TOKENMILL_NODE_RANK")] = 0
    cluster_secret_file: Annotated[str, Option("File with a secret that all nodes share.",
                                               env="TOKENMILL_CLUSTER_SECRET_FILE")] = ""
    rank_timeout: Annotated[float, Option("Seconds in which every rank of an engine must have joined it.", at_least=0.1,
                                          env="TOKENMILL_RANK_TIMEOUT")] = 600.0
    share_devices: Annotated[bool, Option("Let several ranks compute on one GPU or CPU: for tests.",
                                          env="TOKENMILL_SHARE_DEVICES")] = False
    device: Annotated[str, Option("Where to compute.", choices=("auto", "cpu", "cuda"),
                                  env="TOKENMILL_DEVICE")] = "auto"
    backend: Annotated[str, Option("Who computes.", choices=("auto", "cpu", "cuda", "torch", "transformers"),
                                   env="TOKENMILL_BACKEND")] = "auto"
    cpu_isa: Annotated[str, Option("Instruction set of the CPU backend, one that this machine has. Default: the best.",
                                   env="TOKENMILL_ISA")] = ""
    kernel_cache: Annotated[str, Option("Folder for compiled kernels. Default: in the user's cache.",
                                        env="TOKENMILL_KERNEL_CACHE")] = ""
    deterministic: Annotated[bool, Option("The same tokens whatever else a step computes, however a prompt is cut and "
                                          "whatever of it is cached; slower on a GPU, always so on a CPU.",
                                          env="TOKENMILL_DETERMINISTIC,DETERMINISTIC")] = False
    http_workers: Annotated[int, Option("HTTP processes.", at_least=1, at_most=64, env="TOKENMILL_HTTP_WORKERS")] = 1
    cpu_threads: Annotated[int | None, Option("Threads that compute, per rank. Default: the CPUs that this process may "
                                              "use.", at_least=1, env="TOKENMILL_CPU_THREADS,OMP_NUM_THREADS",
                                              shared_env="OMP_NUM_THREADS")] = None
    memory_limit: Annotated[str, Option("Memory for weights and KV cache, as 8GiB or 500MB. Default: most of what is "
                                        "free.", env="TOKENMILL_MEMORY_LIMIT")] = ""
    block_size: Annotated[int, Option("Tokens of a KV cache block.", at_least=1, at_most=1024,
                                      env="TOKENMILL_BLOCK_SIZE")] = 16
    cache_dir: Annotated[str, Option("Folder for the embedded default model.", env="TOKENMILL_CACHE")] = ""
    protect_metrics: Annotated[bool, Option("Ask for the API key at /metrics too.",
                                            env="TOKENMILL_PROTECT_METRICS")] = False
    strict_model_name: Annotated[bool, Option("Refuse unknown model names with 404.",
                                              env="TOKENMILL_STRICT_MODEL_NAME")] = False
    grammar_backend: Annotated[str, Option("Library that compiles grammars; xgrammar is served by llguidance.",
                                           choices=("llguidance", "xgrammar"),
                                           env="TOKENMILL_GRAMMAR_BACKEND")] = "llguidance"
    tool_call_parser: Annotated[str, Option("Format of the model's tool calls. Default: found from the chat template.",
                                            env="TOKENMILL_TOOL_CALL_PARSER")] = ""
    reasoning_parser: Annotated[str, Option("Format of the model's reasoning; none: it is content. Default: found from "
                                            "the chat template.", env="TOKENMILL_REASONING_PARSER")] = ""
    max_engine_restarts: Annotated[int, Option("Restarts of the engine in ten minutes before giving up.", at_least=0,
                                               env="TOKENMILL_MAX_ENGINE_RESTARTS")] = 5
    debug_plans: Annotated[bool, Option("Compare the ranks' plans at each step.", env="TOKENMILL_DEBUG_PLANS")] = False
    mock: Annotated[bool, Option("No model: scripted answers through the real server, for tests.",
                                 env="TOKENMILL_MOCK")] = False
    mock_text: Annotated[str, Option("What the mock engine answers, over and over.", env="TOKENMILL_MOCK_TEXT")] = (
        "The quick brown fox jumps over the lazy dog. ")
    mock_step_ms: Annotated[float, Option("Milliseconds of a step of the mock engine.", at_least=0,
                                          env="TOKENMILL_MOCK_STEP_MS")] = 10.0
    mock_fault: Annotated[str, Option("Faults of the mock engine at its N-th step: nan@N, raise@N, hang@N, exit@N; "
                                      "hang@N:R on rank R only.", env="TOKENMILL_MOCK_FAULT")] = ""
    warnings: Annotated[tuple[str, ...], Option("What to tell the user.", env="", env_only=True)] = ()
    # fmt: on

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for a `Configure` frame. Secrets are included, as it is sent over inherited pipes only."""
        return {name: getattr(self, name) for name in self.__struct_fields__}

    @property
    def ranks_per_engine(self) -> int:
        """Ranks of one engine: those of all its stages."""
        return (self.num_shard or 1) * self.pipeline_parallel_size

    @property
    def nodes(self) -> Nodes:
        """Machines of the engine."""
        return Nodes(self.num_nodes, self.node_rank, self.master_addr, self.master_port, self.cluster_secret_file)

    @property
    def max_batch_tokens(self) -> int | None:
        """Token budget of a step, TGI's --max-batch-prefill-tokens; None if not given."""
        return self.max_batch_prefill_tokens

    @staticmethod
    def environ() -> Mapping[str, str]:
        """Return the environment, for commands with options of their own."""
        return os.environ

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Settings:
        """Return the settings that `to_dict` was called on."""
        return msgspec.convert(dict(values), cls)

    @classmethod
    def from_args(cls, argv: Sequence[str], environ: Mapping[str, str] | None = None,
                  prog: str = "text-generation-launcher") -> Settings:  # fmt: skip
        """Build settings from the command line, then the environment, then the defaults, and check their consistency.

        Usage errors exit with status 2. Raises ArgumentError for values that contradict each other.
        """
        about = "Serve a large language model over HTTP."
        parser = options.Parser(prog=prog, usage=f"{prog} [OPTIONS]", description=about)
        options.add_options(parser, cls)
        return cls.from_namespace(parser.parse_args(list(argv)), environ)

    @classmethod
    def from_namespace(cls, namespace: Any, environ: Mapping[str, str] | None = None) -> Settings:
        """As `from_args`, for parsed options. An absent attribute is an option that was not given.

        `environ`: the environment; None: this process's, repaired by `surroundings.mend`.
        """
        warnings = _mended() if environ is None else []
        environ = os.environ if environ is None else environ
        values, odd = options.collect(cls, namespace, environ)
        warnings += odd
        warnings += [f"`{name}` has no effect: {why}" for name, why in WITHOUT_EFFECT.items() if environ.get(name)]
        if "hostname" in values:
            said = hasattr(namespace, "hostname")
            values["hostname"] = surroundings.hostname(values["hostname"], said, warnings)
        if "num_shard" not in values and (values.get("sharded") or _shards_by_itself(values)):
            values["num_shard"] = surroundings.visible_devices(environ)
        if "cpu_threads" in values:
            variable = surroundings.stripped(environ.get("TOKENMILL_CPU_THREADS", ""))
            said = hasattr(namespace, "cpu_threads") or bool(variable)
            ranks = 1 if values.get("share_devices") else _ranks(values)
            values["cpu_threads"] = cpu_threads(values["cpu_threads"], ranks, said, warnings)
        values.setdefault("max_concurrent_requests", 128 * values.get("data_parallel_size", 1))
        return _checked(cls(**{**values, "warnings": tuple(warnings)}))

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None, /, **values: Any) -> Settings:
        """Build settings from `values`, by field name, and then the environment. Raises ArgumentError."""
        return cls.from_namespace(type("Given", (), values)(), environ)

    def shown(self) -> str:
        """Format the options that differ from their defaults, for the log, with secrets hidden."""
        given = []
        for field in options.fields_of(type(self)):
            value = getattr(self, field.name)
            if value != field.default and field.name != "warnings":
                given.append(f"{field.name}={'***' if field.option.secret else value}")
        return ", ".join(given) or "all defaults"


def _checked(settings: Settings) -> Settings:
    """Return `settings` with options set that follow from others. Raises ArgumentError."""
    warnings = list(settings.warnings)
    max_input = settings.max_input_tokens
    if settings.max_input_length is not None:
        if max_input is not None:
            raise ArgumentError(
                f"Both `max_input_tokens` ({max_input}) and `max_input_length` ({settings.max_input_length}) are set. "
                "Please define only `max_input_tokens`: `max_input_length` is its old name."
            )
        max_input = settings.max_input_length
    total = settings.max_total_tokens
    if max_input is not None and total is not None and max_input >= total:
        raise ArgumentError(f"`max_input_tokens` ({max_input}) must be < `max_total_tokens` ({total}).")
    _check_limits(settings)
    warnings += check_nodes(settings.nodes, settings.ranks_per_engine, settings.data_parallel_size) + _odd(settings)
    memory_bytes(settings.memory_limit)
    graph_sizes(settings.cuda_graphs)
    return msgspec.structs.replace(
        settings, max_input_tokens=max_input, max_input_length=None, num_shard=_num_shard(settings),
        port=int(settings.aip_http_port) if surroundings.is_port(settings.aip_http_port) else settings.port,
        json_output=settings.json_output or settings.log_format == "json", warnings=tuple(warnings),
        cache_dir=settings.cache_dir or default_cache_dir(),
        kernel_cache=settings.kernel_cache or str(Path(default_cache_dir()) / "kernels"),
    )  # fmt: skip


def _check_limits(settings: Settings) -> None:
    """Check the limits as TGI's launcher does. Raises ArgumentError."""
    most = settings.max_batch_total_tokens
    for name in ("max_total_tokens", "max_batch_prefill_tokens"):
        value = getattr(settings, name)
        if most is not None and value is not None and value > most:
            raise ArgumentError(f"`{name}` ({value}) must be <= `max_batch_total_tokens` ({most}).")
    if settings.api_key and not settings.api_key.strip():
        raise ArgumentError("`api_key` must not be blank. Leave it out if no key is to be asked for.")
    if settings.validation_workers < 1:
        raise ArgumentError(f"`validation_workers` must be > 0; {settings.validation_workers} was given.")


def _odd(settings: Settings) -> list[str]:
    """Return a warning for each option or variable of TGI that is set but has no effect."""
    warnings = []
    if not settings.prefix_caching:
        warnings.append("`PREFIX_CACHING=0` has no effect: the prefix cache costs nothing and changes no answer.")
    if not settings.prefill_chunking:
        warnings.append("`PREFILL_CHUNKING=0` has no effect: prefill is always chunked.")
    if settings.log_format not in ("", "json", "text"):
        warnings.append(f"`LOG_FORMAT={settings.log_format}` has no effect: logs are `text` or `json`.")
    if settings.aip_http_port and not surroundings.is_port(settings.aip_http_port):
        warnings.append(f"`AIP_HTTP_PORT={settings.aip_http_port}` has no effect: it is not a number up to 65535.")
    if settings.grammar_backend != "llguidance":
        warnings.append("`--grammar-backend xgrammar` has no effect: llguidance serves all grammars.")
    return warnings


def _mended() -> list[str]:
    """Repair this process's environment and return the changes. Raises ArgumentError if no folder is writable."""
    try:
        return surroundings.mend(os.environ)
    except OSError as error:
        raise ArgumentError(f"{error.strerror}. Set TMPDIR to a folder that this user may write to.") from None


def _shards_by_itself(values: Mapping[str, Any]) -> bool:
    """Return True if a model is shared by all devices that TGI's variables list, because no option says otherwise."""
    elsewhere = values.get("device") == "cpu" or values.get("backend", "auto") not in ("auto", "cuda")
    others = ("sharded", "mock", "pipeline_parallel_size", "data_parallel_size", "num_nodes")
    return not elsewhere and not any(name in values for name in others) and has_gpu()


def _ranks(values: Mapping[str, Any]) -> int:
    """Return the number of ranks of all engines on this machine."""
    sizes = [values.get(name) or 1 for name in ("num_shard", "pipeline_parallel_size", "data_parallel_size")]
    return max(1, math.prod(sizes) // (values.get("num_nodes") or 1))


def _num_shard(settings: Settings) -> int:
    given = settings.num_shard
    if settings.sharded and (given is None or given < 2):
        found = "no number was given, and no devices are listed" if given is None else f"`num_shard` is {given}"
        raise ArgumentError(f"`sharded` is true, but {found}. Give `--num-shard` of at least 2, or no `--sharded`.")
    return given or 1


def default_cache_dir() -> str:
    """Return the folder of the embedded default model: XDG_CACHE_HOME/tokenmill or ~/.cache/tokenmill if usable."""
    return str(surroundings.cache_home(os.environ) / "tokenmill")


def environment(threads: int) -> dict[str, str]:
    """Return the environment for a child with `threads` compute threads, which libraries read on import."""
    libraries = {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    return {"NCCL_NVLS_ENABLE": "0", **os.environ, **libraries}  # NVLink multicast fails on some machines
