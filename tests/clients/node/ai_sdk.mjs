// The AI SDK against the server at BASE_URL, by each of its providers; prints what it was answered as one line of JSON.
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { embedMany, generateText, Output, stepCountIs, streamText, tool } from "ai";
import { z } from "zod";

globalThis.AI_SDK_LOG_WARNINGS = false;
const baseURL = process.env.BASE_URL;
const openai = createOpenAI({ baseURL, apiKey: "any" });
const compatible = createOpenAICompatible({
  name: "nibble",
  baseURL,
  includeUsage: true,
  supportsStructuredOutputs: true,
});
const models = {
  responses: openai("llama"), // its default
  chat: openai.chat("llama"),
  completion: openai.completion("llama"),
  compatible: compatible("llama"),
};
const Light = z.object({ room: z.enum(["kitchen", "hall"]), on: z.boolean() });
const asked = { prompt: "What is CPU?", temperature: 0, maxRetries: 0 };
const found = {};

for (const [name, model] of Object.entries(models)) {
  const whole = await generateText({ ...asked, model, maxOutputTokens: 12 });
  const stream = streamText({ ...asked, model, maxOutputTokens: 12 });
  let text = "";
  for await (const piece of stream.textStream) text += piece;
  found[name] = { text: whole.text, streamed: text, tokens: (await stream.usage).totalTokens };
  if (name === "completion") continue;
  const object = await generateText({ ...asked, model, output: Output.object({ schema: Light }) });
  found[name].object = object.output;
  // The call of the tool, then the text that follows its answer.
  const { steps } = await generateText({
    ...asked,
    model,
    tools: { set_light: tool({ inputSchema: Light, execute: async ({ room }) => `${room}: done` }) },
    toolChoice: { type: "tool", toolName: "set_light" },
    stopWhen: stepCountIs(2),
    prepareStep: ({ stepNumber }) => (stepNumber ? { toolChoice: "none" } : {}),
  });
  found[name].steps = steps.map((step) => ({
    finish: step.finishReason,
    calls: step.toolCalls.map((call) => call.input),
    results: step.toolResults.map((result) => result.output),
  }));
}
const { embeddings } = await embedMany({ model: openai.embedding("llama"), values: ["a", "b"], maxRetries: 0 });
found.widths = embeddings.map((each) => each.length);
console.log(JSON.stringify(found));
