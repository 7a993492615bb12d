// OpenAI's Node package against the server at BASE_URL; prints what it was answered as one line of JSON.
import OpenAI from "openai";
import { zodResponseFormat, zodTextFormat } from "openai/helpers/zod";
import { z } from "zod";

const client = new OpenAI({ baseURL: process.env.BASE_URL, apiKey: "any", maxRetries: 0 });
const Light = z.object({ room: z.enum(["kitchen", "hall"]), on: z.boolean() });
const light = { name: "set_light", parameters: z.toJSONSchema(Light), strict: true };
const named = { type: "function", function: { name: "set_light" } };
const question = { role: "user", content: "What is CPU?" };
const asked = { model: "llama", temperature: 0, seed: 5 };
const short = { ...asked, max_completion_tokens: 12 };
const found = {};

const chat = await client.chat.completions.create({ ...short, messages: [question] });
found.chat = chat.choices[0].message.content;
found.streamed = "";
for await (const chunk of await client.chat.completions.create({
  ...short,
  messages: [question],
  stream: true,
  stream_options: { include_usage: true },
})) {
  found.streamed += chunk.choices[0]?.delta?.content ?? "";
  found.total_tokens = chunk.usage?.total_tokens;
}
const next = [question, chat.choices[0].message, { role: "user", content: "And RAM?" }];
found.next_turn = (await client.chat.completions.create({ ...short, messages: next })).choices[0].finish_reason;

const format = zodResponseFormat(Light, "light");
const parsed = await client.chat.completions.parse({ ...asked, messages: [question], response_format: format });
found.parsed = parsed.choices[0].message.parsed;

const tools = [{ type: "function", function: light }];
const called = await client.chat.completions.create({ ...asked, messages: [question], tools, tool_choice: named });
const [call] = called.choices[0].message.tool_calls;
found.call = JSON.parse(call.function.arguments);
const answered = [question, called.choices[0].message, { role: "tool", tool_call_id: call.id, content: "done" }];
const told = await client.chat.completions.create({ ...short, messages: answered, tools, tool_choice: "none" });
found.told = told.choices[0].message.tool_calls ?? null;

const input = "Q: What is CPU? A:";
const response = await client.responses.create({ ...asked, seed: undefined, input, max_output_tokens: 12 });
found.response = response.output_text;
const stream = client.responses.stream({ ...asked, seed: undefined, input, max_output_tokens: 12 });
found.response_streamed = (await stream.finalResponse()).output_text;
const text = { format: zodTextFormat(Light, "light") };
found.response_parsed = (await client.responses.parse({ ...asked, input, text })).output_parsed;

const embeddings = await client.embeddings.create({ model: "llama", input: ["a", "b"] });
found.widths = embeddings.data.map((each) => each.embedding.length);
found.models = (await client.models.list()).data.map((each) => each.id);
found.refused = await client.chat.completions
  .create({ model: "gpt-5", messages: [question] })
  .catch((error) => [error.constructor.name, error.status, error.code]);
console.log(JSON.stringify(found));
