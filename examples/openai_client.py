"""Ask a running server with OpenAI's client: `pip install openai`, `python examples/openai_client.py [URL]`."""

import sys

from openai import BadRequestError, OpenAI

URL = "http://127.0.0.1:3000/v1"


def main() -> None:
    client = OpenAI(base_url=sys.argv[1] if len(sys.argv) > 1 else URL, api_key="-")  # the key of --api-key, if any
    messages = [{"role": "user", "content": "What is the capital of France?"}]

    # "tgi", or the name in /v1/models. Temperature 0 is greedy.
    answer = client.chat.completions.create(model="tgi", messages=messages, max_tokens=40, temperature=0)
    print(answer.choices[0].message.content)
    print(answer.usage)

    # Token by token. What OpenAI does not know goes into `extra_body`.
    stream = client.chat.completions.create(
        model="tgi", messages=messages, max_tokens=40, stream=True, seed=7, extra_body={"top_k": 20, "min_p": 0.05}
    )
    for chunk in stream:
        print(chunk.choices[0].delta.content or "", end="", flush=True)
    print()

    # How likely is each token of a text? Echo it, generate nothing.
    scored = client.completions.create(model="tgi", prompt="The sky is blue.", echo=True, max_tokens=0, logprobs=0)
    logprobs = scored.choices[0].logprobs
    for token, logprob in zip(logprobs.tokens, logprobs.token_logprobs, strict=True):
        print(f"{logprob or 0.0:8.3f} {token!r}")

    # What cannot be done is refused, and the message says which field it is about.
    try:
        client.chat.completions.create(model="tgi", messages=messages, temperature=-1)
    except BadRequestError as error:
        print(f"{error.param}: {error.message}")


if __name__ == "__main__":
    main()
