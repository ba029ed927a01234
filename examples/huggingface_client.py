"""Ask a running server with Hugging Face's client: `python examples/huggingface_client.py [URL]`.

These are TGI's own routes: what was written for text-generation-inference runs as it is.
"""

import sys

from huggingface_hub import InferenceClient
from huggingface_hub.errors import ValidationError

URL = "http://127.0.0.1:3000"
PROMPT = "The capital of France is"


def main() -> None:
    client = InferenceClient(sys.argv[1] if len(sys.argv) > 1 else URL)

    # One text, with what is known about each token: of the answer, and of the prompt.
    answer = client.text_generation(
        PROMPT, details=True, decoder_input_details=True, max_new_tokens=8, return_full_text=False
    )
    print(repr(answer.generated_text), answer.details.finish_reason)
    for token in [*answer.details.prefill, *answer.details.tokens]:
        print(f"{token.logprob or 0.0:8.3f} {token.text!r}")

    # The likelier of two.
    best = client.text_generation(PROMPT, details=True, best_of=2, do_sample=True, max_new_tokens=8)
    print(repr(best.generated_text), best.details.seed)

    # Token by token, up to a stop string.
    for text in client.text_generation("1, 2, 3,", max_new_tokens=30, stream=True, stop=["9"]):
        print(text, end="", flush=True)
    print()

    # A conversation.
    chat = client.chat_completion([{"role": "user", "content": "Say hello."}], max_tokens=20)
    print(chat.choices[0].message.content)

    # What cannot be done is refused, and the message says why.
    try:
        client.text_generation("x", top_p=2.0)
    except ValidationError as error:
        print(error)


if __name__ == "__main__":
    main()
