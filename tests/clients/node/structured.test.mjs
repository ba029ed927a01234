// Answers of a given shape and calls of tools: Vercel's AI SDK and openai's helpers.
import assert from "node:assert/strict";
import { test } from "node:test";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateObject, generateText, jsonSchema, stepCountIs, streamObject, streamText, tool } from "ai";
import OpenAI from "openai";

const baseURL = process.env.BASE_URL + "/v1";
const prompt = "What is the capital of France?";
const city = {
  type: "object",
  properties: { name: { enum: ["Paris", "London"] }, rivers: { type: "integer", minimum: 0, maximum: 9 } },
  required: ["name", "rivers"],
  additionalProperties: false,
};
const isCity = (value) => {
  assert.deepEqual(Object.keys(value), ["name", "rivers"]);
  assert.ok(city.properties.name.enum.includes(value.name));
  assert.ok(Number.isInteger(value.rivers) && value.rivers >= 0 && value.rivers <= 9);
};
const models = {
  "openai-compatible": createOpenAICompatible({ name: "tokenmill", baseURL, supportsStructuredOutputs: true }).chatModel("tgi"),
  openai: createOpenAI({ baseURL, apiKey: "-" }).chat("tgi"),
};

for (const [name, model] of Object.entries(models)) {
  const ask = { model, prompt, maxOutputTokens: 100, temperature: 0, maxRetries: 0 };

  test(`${name}: generateObject and streamObject`, async () => {
    const { object } = await generateObject({ ...ask, schema: jsonSchema(city), schemaName: "city" });
    isCity(object);
    const stream = streamObject({ ...ask, schema: jsonSchema(city), schemaName: "city" });
    let last;
    for await (const partial of stream.partialObjectStream) last = partial;
    assert.deepEqual(last, object);
    assert.deepEqual(await stream.object, object);
  });

  test(`${name}: tools are called and their results read`, async () => {
    const seen = [];
    const about = tool({
      description: "Facts about a city",
      inputSchema: jsonSchema(city),
      execute: async (input) => {
        seen.push(input);
        return "It is large.";
      },
    });
    const plain = await generateText({ ...ask, tools: { about }, toolChoice: "required" });
    assert.equal(plain.finishReason, "tool-calls");
    assert.equal(plain.toolCalls[0].toolName, "about");
    isCity(plain.toolCalls[0].input);
    assert.equal(plain.toolResults[0].output, "It is large.");

    const stream = streamText({ ...ask, tools: { about }, toolChoice: { type: "tool", toolName: "about" } });
    await stream.consumeStream();
    assert.equal(await stream.finishReason, "tool-calls");
    isCity((await stream.toolCalls)[0].input);
    seen.forEach(isCity);
    assert.ok(seen.length >= 2);

    const steps = await generateText({
      ...ask,
      maxOutputTokens: 60,
      tools: { about },
      stopWhen: stepCountIs(2),
      prepareStep: ({ stepNumber }) => ({ toolChoice: stepNumber === 0 ? "required" : "none" }),
    });
    assert.equal(steps.steps.length, 2);
    assert.ok(steps.steps[1].usage.outputTokens > 0);
  });
}

test("openai: parse and the helper for streams", async () => {
  const client = new OpenAI({ baseURL, apiKey: "-", maxRetries: 0 });
  const ask = { model: "tgi", messages: [{ role: "user", content: prompt }], max_tokens: 100, temperature: 0 };
  const format = { type: "json_schema", json_schema: { name: "city", strict: true, schema: city } };
  const plain = await client.chat.completions.create({ ...ask, response_format: format });
  isCity(JSON.parse(plain.choices[0].message.content));
  const tools = [{ type: "function", function: { name: "about", parameters: city, strict: true } }];
  const stream = client.chat.completions.stream({ ...ask, tools, tool_choice: "required" });
  const { message, finish_reason } = (await stream.finalChatCompletion()).choices[0];
  assert.equal(finish_reason, "tool_calls");
  assert.equal(message.tool_calls[0].type, "function");
  isCity(JSON.parse(message.tool_calls[0].function.arguments));
});

test("openai: what cannot be followed is refused by name", async () => {
  const client = new OpenAI({ baseURL, apiKey: "-", maxRetries: 0 });
  const schema = { type: "object", properties: { a: { type: "array", uniqueItems: true } } };
  const response_format = { type: "json_schema", json_schema: { name: "x", schema } };
  for (const stream of [false, true]) {
    const asked = client.chat.completions.create({ model: "tgi", messages: [{ role: "user", content: "x" }], response_format, stream });
    await assert.rejects(asked, (error) => {
      assert.equal(error.status, 400);
      assert.match(error.message, /#\/properties\/a\/uniqueItems/);
      return true;
    });
  }
});
