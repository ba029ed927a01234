"""The options of the server that its HTTP workers use."""

from __future__ import annotations

import msgspec


class ServiceOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Options of the server that its HTTP workers use."""

    version: str
    max_concurrent_requests: int  # of this worker
    num_workers: int = 1  # HTTP workers of the server
    max_best_of: int = 2
    max_stop_sequences: int = 4
    max_top_n_tokens: int = 5
    max_client_batch_size: int = 4
    payload_limit: int = 2_000_000  # bytes
    validation_workers: int = 2
    api_key: str = ""
    cors_allow_origin: tuple[str, ...] = ()
    compute_type: str = ""
    protect_metrics: bool = False
    strict_model_name: bool = False
    configured_concurrent_requests: int = 128  # of all workers, as `/info` shows it
    docker_label: str = ""
    aip_predict_route: str = ""  # Vertex AI: one more path of /vertex
    aip_health_route: str = ""  # and of /health
    watermark_gamma: float = 0.5
    watermark_delta: float = 2.0
    grammars: bool = True  # True: requests may have a grammar
    tool_call_parser: str = ""  # "": found from the chat template
    reasoning_parser: str = ""
    numerics: str = ""  # settings that may change what is computed
