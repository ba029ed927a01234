"""Generate text in this process, without a server: `python examples/offline.py [MODEL]`.

MODEL is a folder, a .gguf file or a Hub id; without it the embedded default model is used.
"""

import sys

from tokenmill import LLM


def main() -> None:
    with LLM(*sys.argv[1:2]) as llm:
        # Many prompts run as one batch; options have the names of TGI's API.
        prompts = ["The capital of France is", "Water boils at"]
        for prompt, completion in zip(prompts, llm.generate(prompts, max_new_tokens=12), strict=True):
            print(f"{prompt!r} -> {completion.text!r} ({completion.finish_reason})")

        # Token ids go in as they are, and come out.
        ids = llm.tokenizer.encode("Once upon a time")
        [story] = llm.generate(ids, max_new_tokens=30, temperature=0.8, top_p=0.95, seed=7)
        print(f"{ids} -> {list(story.token_ids)}")

        # The second of two prompts that begin alike finds the beginning in the prefix cache.
        [again] = llm.generate(list(story.prompt_ids) + list(story.token_ids) + ids, max_new_tokens=4)
        print(f"{again.num_cached} of {len(again.prompt_ids)} prompt tokens were cached")

        # A conversation through the model's own chat template, as it is generated.
        if llm.tokenizer.chat_template is not None:
            for piece in llm.stream_chat([{"role": "user", "content": "Say hello."}], max_new_tokens=20):
                print(piece, end="", flush=True)
            print()


if __name__ == "__main__":
    main()
