// needs: ai@6.0.325 @ai-sdk/openai-compatible@2.0.92 zod@4.6.7
import assert from "node:assert";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { APICallError, embed, generateObject, generateText, Output, stepCountIs, streamObject, streamText, tool } from "ai";
import { z } from "zod";

const provider = createOpenAICompatible({
  name: "mini-infer", baseURL: process.env.BASE_URL, apiKey: "any", supportsStructuredOutputs: true, includeUsage: true,
});
const model = provider("tutor");
const asked = { model, prompt: "What is a KV cache?", temperature: 0, maxOutputTokens: 60, maxRetries: 0 };

const whole = await generateText(asked);
assert.ok(whole.text && whole.usage.inputTokens > 0);
const streamed = streamText(asked);
let text = "";
for await (const piece of streamed.textStream) text += piece;
assert.equal(text, whole.text);
assert.equal((await streamed.usage).outputTokens, whole.usage.outputTokens);
assert.ok((await generateText({ ...asked, model: provider.completionModel("tutor") })).text);

const schema = z.object({ tokens: z.number().int().min(0).max(999) });
const { object } = await generateObject({ ...asked, schema });
assert.ok(Number.isInteger(object.tokens));
const parts = streamObject({ ...asked, schema });
for await (const part of parts.partialObjectStream) assert.ok(part);
assert.deepEqual(await parts.object, object);
assert.deepEqual((await generateText({ ...asked, output: Output.object({ schema }) })).output, object);

const results = [];
const tools = {
  count_blocks: tool({
    description: "Count the blocks that tokens need.",
    inputSchema: schema,
    execute: ({ tokens }) => { results.push(tokens); return "7 blocks"; },
  }),
};
// The first step calls, the second answers.
const steps = {
  ...asked, tools, stopWhen: stepCountIs(2),
  prepareStep: ({ stepNumber }) => ({ toolChoice: stepNumber === 0 ? { type: "tool", toolName: "count_blocks" } : "none" }),
};
const called = await generateText(steps);
assert.equal(called.steps.length, 2);
assert.equal(called.steps[0].finishReason, "tool-calls");
assert.equal(called.steps[0].toolResults[0].output, "7 blocks");
assert.ok(called.text);
const stream = streamText(steps);
await stream.consumeStream();
assert.equal(await stream.text, called.text);
assert.ok(results.length === 2 && results[0] === results[1]);

const { embedding } = await embed({ model: provider.textEmbeddingModel("tutor"), value: "Once" });
assert.ok(embedding.length > 0);
await assert.rejects(
  generateText({ ...asked, prompt: "word ".repeat(15000) }),
  (error) => APICallError.isInstance(error) && error.statusCode === 400 && error.responseBody.includes("context_length_exceeded"),
);
