// Client packages of npm against servers: node javascript_clients.mjs CLIENT URL MODEL [URL MODEL ...]. See
// python_clients.py.
import assert from "node:assert/strict";
import { readFileSync } from "node:fs";

const CALL = '{"name": "get_weather", "parameters": {"city": "Rome"}}';
const PLACE = '{"city": "Rome", "people": 3}';
const [client, ...pairs] = process.argv.slice(2);
let url, model;
const user = (...texts) => texts.map(content => ({ role: "user", content }));
const check = (text, said) => (model === "scripted" ? assert.equal(text, said) : assert.ok(text, "no text"));
const city = { type: "object", properties: { city: { type: "string", maxLength: 12 } }, required: ["city"] };
const tool = { type: "function", function: { name: "get_weather", parameters: city } };

const clients = {
  async openai() {
    const { default: OpenAI } = await import("openai");
    const made = new OpenAI({ baseURL: `${url}/v1`, apiKey: "key", maxRetries: 0 });
    const chat = made.chat.completions, more = { model, max_tokens: 80 };
    return {
      chat: async () => check((await chat.create({ messages: user("Hello"), ...more })).choices[0].message.content, "Hello"),
      stream: async () => check(await chat.stream({ messages: user("Hello"), ...more }).finalContent(), "Hello"),
      tools: async () => {
        const asked = { messages: user("I say", CALL), tools: [tool], tool_choice: "required", ...more };
        for (const message of [(await chat.create(asked)).choices[0].message, await chat.stream(asked).finalMessage()])
          assert.ok("city" in JSON.parse(message.tool_calls[0].function.arguments));
      },
      responses: async () => {
        check((await made.responses.create({ model, input: "Hello", max_output_tokens: 20 })).output_text, "Hello");
        const whole = await made.responses.stream({ model, input: "Hello", max_output_tokens: 20 }).finalResponse();
        assert.ok(["completed", "incomplete"].includes(whole.status));
      },
    };
  },

  async cloudflare() {
    const { default: Cloudflare } = await import("cloudflare");
    const made = new Cloudflare({ apiToken: "key", baseURL: `${url}/client/v4`, maxRetries: 0 });
    const run = body => made.ai.run(model, { account_id: "me", max_tokens: 80, ...body });
    return {
      chat: async () => check((await run({ messages: user("Hello") })).response, "Hello"),
      tools: async () => {
        const { tool_calls } = await run({ messages: user("I say", CALL), tools: [tool], tool_choice: "required" });
        assert.equal(tool_calls[0].name, "get_weather");
      },
    };
  },

  async "workers-ai-provider"() {
    const before = globalThis.fetch, here = url;  // the provider takes no address of its own
    globalThis.fetch = (input, init) => before(String(input?.url ?? input).replace(/^https:\/\/[^/]+/, here), init);
    const { createWorkersAI } = await import("workers-ai-provider");
    const made = createWorkersAI({ accountId: "me", apiKey: "key" });
    return aiTasks(made(model));
  },

  async "@ai-sdk/openai"() {
    const { createOpenAI } = await import("@ai-sdk/openai");
    const made = createOpenAI({ baseURL: `${url}/v1`, apiKey: "key" });
    const tasks = await aiTasks(made.chat(model));
    const { generateText, streamText } = await import("ai");
    tasks.responses = async () => {
      const asked = { model: made.responses(model), prompt: "Hello", maxOutputTokens: 80, maxRetries: 0 };
      check((await generateText(asked)).text, "Hello");
      check(await streamText(asked).text, "Hello");
    };
    return tasks;
  },
};

async function aiTasks(languageModel) {
  const ai = await import("ai");
  const { z } = await import("zod");
  const more = { model: languageModel, maxOutputTokens: 80, maxRetries: 0 };
  const tools = { get_weather: ai.tool({ inputSchema: z.object({ city: z.string().max(12) }) }) };
  return {
    chat: async () => check((await ai.generateText({ prompt: "Hello", ...more })).text, "Hello"),
    stream: async () => check(await ai.streamText({ prompt: "Hello", ...more }).text, "Hello"),
    tools: async () => {
      const asked = { messages: user("I say", CALL), tools, toolChoice: "required", ...more };
      for (const calls of [(await ai.generateText(asked)).toolCalls, await ai.streamText(asked).toolCalls])
        assert.equal(calls[0].toolName, "get_weather");
    },
    structured: async () => {
      const schema = z.object({ city: z.string().max(12), people: z.number().int() });
      const { output } = await ai.generateText({ prompt: PLACE, output: ai.Output.object({ schema }), ...more });
      assert.equal(typeof output.people, "number");
    },
  };
}

const models = {};
while (pairs.length) {
  [url, model] = pairs.splice(0, 2);
  const told = (models[model] = {});
  for (const [task, run] of Object.entries(await clients[client]())) {
    try {
      await run();
      told[task] = "ok";
    } catch (error) {
      told[task] = `${error.name}: ${error.message}`.slice(0, 400);
    }
  }
}
const file = new URL(`node_modules/${client}/package.json`, import.meta.url);
const { version } = JSON.parse(readFileSync(file, "utf8"));
console.log(JSON.stringify({ version, models }));
process.exit(0);
