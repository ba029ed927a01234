"""What crosses a process border. Frozen, typed, encoded with msgpack by `channel.py`; no pickle anywhere.

HTTP worker -> engine:  `Request`, `Abort`
engine -> HTTP worker:  `EngineInfo` (first on every connection), then one `StepOutputs` a step
rank 0 -> other ranks:  what the HTTP workers said, and `Extend`
child -> supervisor:    `Progress`, `Ready`, `Drained`, `Failed`; `ModelReady` from the one that fetches it
supervisor -> child:    `Configure` (first), `ModelReady`, `Phase`, `Drain`, `Stop`

Every field is final: `text/prepare.py` filled defaults in, so no None means "default". Token ids only: the engine knows
no text.
"""

from __future__ import annotations

from typing import Any

import msgspec


class SamplingParams(msgspec.Struct, frozen=True, array_like=True):
    """How the next token is chosen. The order of the steps is `backends/sampling.py`'s."""

    temperature: float = 0.0  # 0: greedy
    top_k: int = 0  # 0: off
    top_p: float = 1.0  # 1: off
    typical_p: float = 1.0  # 1: off
    min_p: float = 0.0  # 0: off
    repetition_penalty: float = 1.0  # over prompt and output, CTRL's rule; 1: off
    frequency_penalty: float = 0.0  # times the count in the output; 0: off
    presence_penalty: float = 0.0  # once if in the output; 0: off
    seed: int = 0  # 64 bits; randomness is a function of (seed, position, token id)
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, added to its logit)
    logprobs: int = -1  # -1: none; n >= 0: of the chosen token and of the n likeliest
    raw_logprobs: bool = False  # of the model's own distribution, before penalties, temperature and filters; else ids
    # that are as likely as the n-th are listed too (`backends.sampling.MOST_TIES`), as TGI does
    prompt_logprobs: int = -1  # -1: none; n >= 0: of every prompt token and of the n likeliest in its place
    watermark_gamma: float = 0.0  # share of the vocabulary that is favoured, anew after each token; 0: no watermark
    watermark_delta: float = 0.0  # added to the logits of that share

    @property
    def greedy(self) -> bool:
        """True if the likeliest token is taken and no randomness is needed."""
        return self.temperature == 0.0


class StoppingParams(msgspec.Struct, frozen=True, array_like=True):
    """When the engine ends a sequence by itself. Stop strings are the HTTP worker's."""

    max_new_tokens: int
    min_new_tokens: int = 0  # until then no stop id is sampled
    stop_ids: tuple[int, ...] = ()  # end-of-sequence ids; empty when the client asked to ignore them
    # so a thought that takes too long is ended: after so many new tokens `forced_ids` come next, unless one of `unless`
    # was among the new ones, whole, before; 0: never
    force_after: int = 0
    forced_ids: tuple[int, ...] = ()
    unless: tuple[tuple[int, ...], ...] = ()


class GrammarSpec(msgspec.Struct, frozen=True, array_like=True):
    """What the output must be: a grammar's kind and text, checked and canonical. Equal specs are the same grammar."""

    kind: str  # "json_schema", "regex", "choice" (source: a JSON list of strings), "grammar" (a client's Lark or EBNF),
    # "lark" (made here)
    source: str  # JSON schemas: compact, the order of keys kept
    after: tuple[tuple[int, ...], ...] = ()  # token sequences; the grammar begins behind the first one that appears in
    # the output (the end of a reasoning); (): at once


class Request(msgspec.Struct, frozen=True, array_like=True, tag="request"):
    """One sequence to generate. `id` is unique over all HTTP workers and their restarts."""

    id: int
    prompt_ids: tuple[int, ...]  # at least one
    sampling: SamplingParams
    stopping: StoppingParams
    salt: bytes = b""  # where the prefix cache's hash chain begins: requests of other salts never share blocks
    wants_timings: bool = False  # every output with tokens carries `RequestTimings`
    sent_at: float = 0.0  # of time.monotonic, which processes of a machine share: where its queue begins; 0: on arrival
    grammar: GrammarSpec | None = None  # None: any text

    @property
    def computes_whole_prompt(self) -> bool:
        """True if something is wanted of every prompt token, so that no hit of the prefix cache may skip one."""
        return self.sampling.prompt_logprobs >= 0


class Abort(msgspec.Struct, frozen=True, array_like=True, tag="abort"):
    """The client is gone, or a stop string was found: forget the request. Unknown ids are ignored."""

    id: int


ToEngine = Request | Abort


class Extend(msgspec.Struct, frozen=True, array_like=True, tag="extend"):
    """Rank 0 knows what comes next in a sequence: `token_ids` behind its first `position` tokens, prompt included.

    What the device has sampled there meanwhile is void. With a `finish_reason` it ends behind them. Unknown ids are
    ignored.
    """

    id: int
    position: int
    token_ids: tuple[int, ...] = ()
    finish_reason: str = ""  # "", "stop", "error"
    message: str = ""  # why, if the reason is "error"


ToScheduler = Request | Abort | Extend


class TokenDetails(msgspec.Struct, frozen=True, array_like=True):
    """Log-probabilities (natural) of one position: of the token there and of the likeliest, best first."""

    logprob: float
    top_ids: tuple[int, ...] = ()
    top_logprobs: tuple[float, ...] = ()


class RequestTimings(msgspec.Struct, frozen=True, array_like=True):
    """Times and counts of one request, up to the output that carries them. A wait after a preemption counts as part of
    the phase that it interrupted."""

    queue_s: float = 0.0  # from when it was sent to the engine until its first step began
    prefill_s: float = 0.0  # from then until its first token
    decode_s: float = 0.0  # from the first token to the newest
    num_cached: int = 0  # tokens of its prompt that the prefix cache had
    num_preemptions: int = 0
    largest_batch: int = 0  # the most sequences of any step while it ran
    num_forced: int = 0  # of its tokens, those that were appended without sampling, as nothing else could follow


class Output(msgspec.Struct, frozen=True, array_like=True):
    """What one step did for one request.

    The first one has no tokens and says that the request was admitted (`num_cached` of its prompt's tokens were found
    in the prefix cache); the last one has a `finish_reason`. Nothing comes after an `Abort`.
    """

    request_id: int
    token_ids: tuple[int, ...] = ()
    finish_reason: str = ""  # "", "stop" (a stop id), "length", "error"
    details: tuple[TokenDetails, ...] = ()  # one a token, if asked
    prompt_details: tuple[TokenDetails, ...] = ()  # of the prompt's tokens from the second on, in order, as computed
    num_cached: int = 0
    num_preemptions: int = 0  # on the last one
    message: str = ""  # why, if the reason is "error"
    timings: RequestTimings | None = None  # with every token, if asked for: a stop string may end the request at any


class Stats(msgspec.Struct, frozen=True, array_like=True):
    """The engine's state after a step, for metrics. Counters only grow while an engine lives."""

    waiting: int = 0
    running: int = 0
    blocks_used: int = 0
    blocks_total: int = 0
    steps: int = 0
    prefill_tokens: int = 0  # computed, cache hits not counted
    decode_tokens: int = 0
    cached_tokens: int = 0  # prompt tokens that the prefix cache saved
    preemptions: int = 0
    batch_size: int = 0  # rows of this step
    batch_tokens: int = 0  # tokens of this step
    step_s: float = 0.0  # from launch to its tokens on the host
    prefill_rows: int = 0  # rows of this step that computed more than one token or did not sample
    admitted: int = 0  # requests that joined in this step
    retracted: int = 0  # steps that found no memory on the device and were taken back
    forced_tokens: int = 0  # appended without sampling


class StepOutputs(msgspec.Struct, frozen=True, array_like=True, tag="outputs"):
    """One frame: everything a step did for the requests of one HTTP worker. Sent about once a second when idle too."""

    outputs: tuple[Output, ...]
    stats: Stats


class EngineInfo(msgspec.Struct, frozen=True, array_like=True, tag="info"):
    """What an engine is, known once it has loaded."""

    model_id: str
    dtype: str
    device: str  # "cpu", "cuda", "mock"
    backend: str  # "torch", "cpu", "cuda", "mock"
    num_blocks: int
    block_size: int  # tokens
    vocab_size: int  # columns of the logits
    max_input_tokens: int
    max_total_tokens: int
    max_batch_tokens: int
    max_batch_size: int
    num_shard: int = 1
    revision: str = ""
    quantize: str = ""
    isa: str = ""  # instruction set that the kernels are made for

    @property
    def capacity(self) -> int:
        """Tokens that the KV cache holds."""
        return self.num_blocks * self.block_size


FromEngine = EngineInfo | StepOutputs


class Progress(msgspec.Struct, frozen=True, tag="progress"):
    """How far a phase of the start is. `total` 0: unknown. `unit`: "bytes" or "items"."""

    phase: str  # "download", "load", "warmup", …
    done: int = 0
    total: int = 0
    unit: str = "bytes"
    detail: str = ""


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """The process does its work from now on. `info` from engine rank 0."""

    info: EngineInfo | None = None


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """The process ends; `message` is for the user. `fatal`: starting it again would fail the same way."""

    variant: str  # StartError.variant
    message: str
    fatal: bool = True


class Configure(msgspec.Struct, frozen=True, tag="configure"):
    """The first frame a child reads: all settings (as plain data), who it is, and where the engine listens."""

    settings: dict[str, Any]
    index: int  # HTTP worker's number, or rank
    engine_address: str  # path of the Unix socket that rank 0 listens on
    run_dir: str  # private folder (mode 0700) of this server
    generation: int = 0  # how often the engine was started before
    listen_fd: int = -1  # HTTP worker: the listening socket it inherited


class ModelReady(msgspec.Struct, frozen=True, tag="model"):
    """The model is on disk. `source` is a `weights.source.ModelSource` as plain data."""

    source: dict[str, Any]


class Phase(msgspec.Struct, frozen=True, tag="phase"):
    """What the start is doing, for `/health` before ready. `percent` -1: unknown. Phase "ready" ends it."""

    name: str
    percent: int = -1


class Drain(msgspec.Struct, frozen=True, tag="drain"):
    """Finish what runs within `timeout_s` and send `Drained`; refuse new requests until `Stop`."""

    timeout_s: float


class Drained(msgspec.Struct, frozen=True, tag="drained"):
    """No request is left that began before `Drain`."""


class Stop(msgspec.Struct, frozen=True, tag="stop"):
    """Exit 0 now; a request that still runs ends with an error."""


FromChild = Progress | Ready | Failed | ModelReady | Drained
ToChild = Configure | ModelReady | Phase | Drain | Stop
