// Vercel's AI SDK, through its provider for OpenAI and the one for servers that speak as OpenAI does.
import assert from "node:assert/strict";
import { test } from "node:test";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, streamText } from "ai";

const baseURL = process.env.BASE_URL + "/v1";
const compatible = createOpenAICompatible({ name: "tokenmill", baseURL, includeUsage: true });
const openai = createOpenAI({ baseURL, apiKey: "-" });
const models = {
  "openai-compatible, chat": compatible.chatModel("tgi"),
  "openai-compatible, completion": compatible.completionModel("tgi"),
  "openai, chat": openai.chat("tgi"),
  "openai, completion": openai.completion("tgi"),
};

for (const [name, model] of Object.entries(models)) {
  const ask = { model, prompt: "What is the capital of France?", maxOutputTokens: 20, temperature: 0, maxRetries: 0 };

  test(`${name}: plain and streamed`, async () => {
    const plain = await generateText(ask);
    if (name.endsWith("chat")) assert.match(plain.text, /Paris/);
    assert.ok(plain.text.length > 0);
    assert.ok(plain.usage.inputTokens > 0);
    const stream = streamText(ask);
    let text = "";
    for await (const delta of stream.textStream) text += delta;
    assert.equal(text, plain.text);
    assert.equal(await stream.finishReason, plain.finishReason);
    assert.equal((await stream.usage).outputTokens, plain.usage.outputTokens);
  });

  test(`${name}: errors`, async () => {
    await assert.rejects(generateText({ ...ask, temperature: -1 }), (error) => {
      assert.equal(error.statusCode, 400);
      assert.match(error.message, /temperature/);
      return true;
    });
  });
}

test("messages, a system prompt, stop strings and a seed", async () => {
  const ask = {
    model: compatible.chatModel("tgi"),
    system: "You are a helpful AI assistant.",
    messages: [{ role: "user", content: [{ type: "text", text: "What is the capital of France?" }] }],
    stopSequences: ["zzz"],
    seed: 7,
    topP: 0.9,
    frequencyPenalty: 0.1,
    presencePenalty: 0.1,
    maxOutputTokens: 12,
    maxRetries: 0,
  };
  const first = await generateText(ask);
  assert.equal((await generateText(ask)).text, first.text);
  assert.ok(first.usage.outputTokens <= 12);
});
