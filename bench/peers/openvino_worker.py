"""Run OpenVINO's continuous batching pipeline in process, in OpenVINO's environment.

`python openvino_worker.py JSON` with model (folder), cache_gb, threads; prints READY, then answers each
JSON line with one.
in: {"streams": [ask…], "arrivals": [ask…], "quiet_s": s}, an ask being {"prompt": text or ids, "new_tokens": n};
out: the same two lists of {"sent", "events": [times of tokens], "prompt_tokens", "token_ids"}.
"""

import json
import sys
import time

import numpy
import openvino
import openvino_genai as genai


class Worker:
    """Pipeline with its running requests."""

    def __init__(self, asked: dict) -> None:
        scheduler = genai.SchedulerConfig()
        scheduler.cache_size = asked["cache_gb"]
        scheduler.max_num_seqs = 64
        scheduler.max_num_batched_tokens = 512
        scheduler.dynamic_split_fuse = True
        scheduler.enable_prefix_caching = False
        options = {"INFERENCE_NUM_THREADS": asked["threads"]}
        self.pipeline = genai.ContinuousBatchingPipeline(asked["model"], scheduler, "CPU", options)
        self.tokenizer = self.pipeline.get_tokenizer()
        self.open: list[tuple[object, dict]] = []
        self.last_id = 0

    def start(self, ask: dict) -> dict:
        """Submit a request and return its answer, which `step` fills."""
        config = genai.GenerationConfig()
        config.max_new_tokens, config.do_sample, config.ignore_eos = ask["new_tokens"], False, True
        if isinstance(ask["prompt"], str):
            ids = self.tokenizer.encode(ask["prompt"]).input_ids
        else:
            ids = openvino.Tensor(numpy.array([ask["prompt"]], numpy.int64))
        answer = {"sent": time.perf_counter(), "events": [], "prompt_tokens": ids.shape[1], "token_ids": []}
        self.last_id += 1
        self.open.append((self.pipeline.add_request(self.last_id, ids, config), answer))
        return answer

    def step(self) -> None:
        """Run one step of the pipeline and append the tokens to their answers."""
        self.pipeline.step()
        now = time.perf_counter()
        for handle, answer in self.open:
            while handle.can_read():
                for output in handle.read().values():
                    answer["events"] += [now] * len(output.generated_ids)
                    answer["token_ids"] += output.generated_ids

    def drain(self, cut: bool) -> None:
        """Step until no request is left. `cut`: True to cancel the running requests first."""
        for handle, _ in self.open if cut else ():
            handle.cancel()
        while self.pipeline.has_non_finished_requests():
            self.step()
        self.open.clear()

    def play(self, streams: list, arrivals: list, quiet_s: float) -> dict:
        """Start the streams; `quiet_s` seconds after all have begun, run the arrivals one after another."""
        begun = [self.start(ask) for ask in streams]
        late = []
        if arrivals:
            while not all(answer["events"] for answer in begun):
                self.step()
            until = time.perf_counter() + quiet_s
            while time.perf_counter() < until:
                self.step()
            for ask in arrivals:
                late.append(self.start(ask))
                while len(late[-1]["events"]) < ask["new_tokens"]:
                    self.step()
        self.drain(cut=bool(arrivals))
        return {"streams": begun, "arrivals": late}


def main() -> None:
    worker = Worker(json.loads(sys.argv[1]))
    print("READY", flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        print(json.dumps(worker.play(asked["streams"], asked["arrivals"], asked["quiet_s"])), flush=True)


if __name__ == "__main__":
    main()
