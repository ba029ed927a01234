"""Run llama.cpp's HTTP server on one GGUF file, in llama.cpp's environment, without this project's code.

`python llamacpp_server.py JSON` with gguf, slots, context (tokens of a slot), threads, flash (bool), port.
"""

import json
import sys
import time

import xllamacpp


def main() -> None:
    asked = json.loads(sys.argv[1])
    params = xllamacpp.CommonParams()
    params.model.path = asked["gguf"]
    params.n_parallel = asked["slots"]
    params.n_ctx = asked["context"] * asked["slots"]
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = asked["threads"]
    flash = "ENABLED" if asked["flash"] else "DISABLED"
    params.flash_attn_type = getattr(xllamacpp.llama_flash_attn_type, f"LLAMA_FLASH_ATTN_TYPE_{flash}")
    params.port = asked["port"]
    params.cache_ram_mib = 0  # no prompt cache besides that of the slots
    params.verbosity = 0
    params.n_gpu_layers = 0
    server = xllamacpp.Server(params)
    print("READY", server.listening_address, flush=True)
    while True:
        time.sleep(3600)


if __name__ == "__main__":
    main()
