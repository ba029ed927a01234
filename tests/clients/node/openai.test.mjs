// openai, the Node package.
import assert from "node:assert/strict";
import { test } from "node:test";
import OpenAI, { BadRequestError, NotFoundError } from "openai";

const client = new OpenAI({ baseURL: process.env.BASE_URL + "/v1", apiKey: "-", maxRetries: 0 });
const messages = [{ role: "user", content: "What is the capital of France?" }];
const ask = { model: "tgi", messages, max_tokens: 20, temperature: 0 };

test("a chat, plain and streamed", async () => {
  const plain = await client.chat.completions.create({ ...ask, logprobs: true, top_logprobs: 2 });
  const { message, finish_reason, logprobs } = plain.choices[0];
  assert.match(message.content, /Paris/);
  assert.equal(finish_reason, "stop");
  assert.equal(logprobs.content.length, plain.usage.completion_tokens);

  const stream = await client.chat.completions.create({ ...ask, stream: true, stream_options: { include_usage: true } });
  let text = "";
  let last;
  for await (const chunk of stream) {
    text += chunk.choices[0]?.delta.content ?? "";
    last = chunk;
  }
  assert.equal(text, message.content);
  assert.deepEqual(last.choices, []);
  assert.equal(last.usage.completion_tokens, plain.usage.completion_tokens);
});

test("the helper for streams", async () => {
  const stream = client.chat.completions.stream(ask);
  let text = "";
  stream.on("content", (delta) => (text += delta));
  const final = await stream.finalChatCompletion();
  assert.equal(text, final.choices[0].message.content);
  assert.equal(final.choices[0].finish_reason, "stop");
});

test("a stream that is left before its end", async () => {
  const stream = await client.chat.completions.create({ ...ask, max_tokens: 2000, stream: true });
  for await (const chunk of stream) {
    assert.equal(chunk.object, "chat.completion.chunk");
    break;
  }
  assert.ok(stream.controller.signal.aborted);
});

test("completions, plain and streamed", async () => {
  const about = { model: "tgi", prompt: "The capital of France is", max_tokens: 5, temperature: 0 };
  const plain = await client.completions.create({ ...about, echo: true, logprobs: 1 });
  assert.ok(plain.choices[0].text.startsWith("The capital of France is Paris"));
  assert.equal(plain.choices[0].logprobs.token_logprobs[0], null);
  let text = "";
  for await (const chunk of await client.completions.create({ ...about, stream: true })) text += chunk.choices[0].text;
  assert.equal("The capital of France is" + text, plain.choices[0].text);
});

test("models and errors", async () => {
  const models = (await client.models.list()).data;
  assert.equal(models.length, 1);
  assert.equal((await client.models.retrieve(models[0].id)).id, models[0].id);
  await assert.rejects(client.models.retrieve("nothing"), NotFoundError);
  for (const stream of [false, true]) {
    await assert.rejects(client.chat.completions.create({ ...ask, temperature: -1, stream }), (error) => {
      assert.ok(error instanceof BadRequestError);
      assert.equal(error.param, "temperature");
      return true;
    });
  }
});
