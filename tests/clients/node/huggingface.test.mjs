// @huggingface/inference: the newest, which asks OpenAI's routes of an endpoint, and the second, which asks TGI's.
import assert from "node:assert/strict";
import { test } from "node:test";
import { InferenceClient } from "@huggingface/inference";
import { HfInference } from "huggingface-inference-2";

const url = process.env.BASE_URL;
const clients = { newest: new InferenceClient("-", { endpointUrl: url }), second: new HfInference("-").endpoint(url) };
const inputs = "The capital of France is";
const model = "tgi"; // without one, the second asks the Hub for a default
const messages = [{ role: "user", content: "What is the capital of France?" }];

async function all(stream) {
  const events = [];
  for await (const event of stream) events.push(event);
  return events;
}

for (const [name, client] of Object.entries(clients)) {
  test(`${name}: textGeneration and textGenerationStream`, async () => {
    const parameters = { max_new_tokens: 6, temperature: 0, return_full_text: false };
    const plain = await client.textGeneration({ model, inputs, parameters });
    assert.match(plain.generated_text, /^ Paris/);
    const events = await all(client.textGenerationStream({ model, inputs, parameters }));
    const text = events.map((event) => event.token?.text ?? event.choices[0].text).join("");
    assert.equal(text, plain.generated_text);
  });

  test(`${name}: chatCompletion and chatCompletionStream`, async () => {
    const ask = { model, messages, max_tokens: 20, temperature: 0 };
    const plain = await client.chatCompletion(ask);
    assert.match(plain.choices[0].message.content, /Paris/);
    const chunks = await all(client.chatCompletionStream(ask));
    const text = chunks.map((chunk) => chunk.choices[0].delta.content ?? "").join("");
    assert.equal(text, plain.choices[0].message.content);
    assert.equal(chunks.at(-1).choices[0].finish_reason, plain.choices[0].finish_reason);
  });

  test(`${name}: errors`, async () => {
    const bad = { model, inputs, parameters: { temperature: -1 } };
    const told = (error) => /temperature/.test(error.message + JSON.stringify(error.httpResponse ?? ""));
    await assert.rejects(client.textGeneration(bad), told);
    await assert.rejects(all(client.textGenerationStream(bad)), told);
    // The second expects TGI's texts of the chat, too, and prints OpenAI's objects as [object Object].
    const chatTold = (error) => told(error) || (name === "second" && /\[object Object\]/.test(error.message));
    await assert.rejects(client.chatCompletion({ model, messages, temperature: -1 }), chatTold);
    await assert.rejects(all(client.chatCompletionStream({ model, messages, temperature: -1 })), chatTold);
  });
}

test("second: details", async () => {
  const parameters = { max_new_tokens: 6, details: true, decoder_input_details: true, return_full_text: false };
  const plain = await clients.second.textGeneration({ model, inputs, parameters });
  assert.equal(plain.details.tokens.map((token) => token.text).join(""), plain.generated_text);
  assert.equal(plain.details.prefill.map((token) => token.text).join(""), inputs);
  const events = await all(
    clients.second.textGenerationStream({ model, inputs, parameters: { max_new_tokens: 6, details: true, return_full_text: false } }),
  );
  assert.deepEqual(events.map((event) => event.index), [1, 2, 3, 4, 5, 6]);
  assert.equal(events.at(-1).generated_text, plain.generated_text);
  assert.equal(events.at(-1).details.finish_reason, "length");
});
