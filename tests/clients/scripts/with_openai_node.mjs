// needs: openai@6.49.0
import assert from "node:assert";
import OpenAI from "openai";

const client = new OpenAI({ baseURL: process.env.BASE_URL, apiKey: "any", maxRetries: 0 });
const messages = [{ role: "user", content: "How many blocks do 100 tokens need?" }];
const parameters = {
  type: "object",
  properties: { tokens: { type: "integer", minimum: 0, maximum: 999 } },
  required: ["tokens"],
  additionalProperties: false,
};
const tools = [{ type: "function", function: { name: "count_blocks", parameters } }];

const whole = await client.chat.completions.create({ model: "tutor", messages, temperature: 0, max_tokens: 24 });
let streamed = "";
for await (const chunk of await client.chat.completions.create({
  model: "tutor", messages, temperature: 0, max_tokens: 24, stream: true,
})) streamed += chunk.choices[0]?.delta?.content ?? "";
assert.equal(streamed, whole.choices[0].message.content);

const called = await client.chat.completions.create({ model: "tutor", messages, tools, tool_choice: "required", parallel_tool_calls: false });
const [call] = called.choices[0].message.tool_calls;
assert.equal(called.choices[0].finish_reason, "tool_calls");
assert.ok(Number.isInteger(JSON.parse(call.function.arguments).tokens));

const runner = client.chat.completions.runTools({
  model: "tutor", messages, max_tokens: 60, parallel_tool_calls: false,
  tool_choice: { type: "function", function: { name: "count_blocks" } },
  tools: [{ type: "function", function: { name: "count_blocks", parameters, parse: JSON.parse, function: () => "7" } }],
});
await runner.done();
assert.ok(runner.messages.some((message) => message.role === "tool" && message.content === "7"));

const format = { type: "json_schema", name: "blocks", schema: parameters, strict: true };
const response = await client.responses.create({ model: "tutor", input: messages, text: { format } });
assert.ok(Number.isInteger(JSON.parse(response.output_text).tokens));
const items = await client.responses.inputItems.list(response.id);
assert.equal(items.data[0].content[0].text, messages[0].content);

await assert.rejects(
  client.chat.completions.create({ model: "tutor", messages: [{ role: "user", content: "word ".repeat(15000) }] }),
  (error) => error.status === 400 && error.code === "context_length_exceeded",
);
