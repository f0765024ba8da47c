// Sends a prompt and shows the answer as it comes.

import { check, headers } from "./api.js";
import { byId, setText } from "./dom.js";
import { seconds } from "./format.js";

let request = null;

byId("stop").addEventListener("click", () => request?.abort());

byId("try-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  if (request !== null) return;
  request = new AbortController();
  byId("send").disabled = true;
  byId("stop").disabled = false;
  byId("answer").textContent = "";
  setText(byId("try-status"), "waiting for the first token …");
  try {
    const usage = await complete(byId("kind").value === "chat", (text) => byId("answer").append(text));
    const times = usage?.tandem?.timeline;
    setText(byId("try-status"), usage
      ? `${usage.prompt_tokens} + ${usage.completion_tokens} tokens, TTFT ${seconds(times?.ttft_s)}, ${seconds(times?.tpot_s)} per token`
      : "done");
  } catch (error) {
    setText(byId("try-status"), error.name === "AbortError" ? "stopped" : error.message);
  } finally {
    request = null;
    byId("send").disabled = false;
    byId("stop").disabled = true;
  }
});

// Calls `add` with each piece of text; returns the usage that comes last.
async function complete(isChat, add) {
  const prompt = byId("prompt").value;
  const body = {
    model: byId("model").textContent,
    max_tokens: Number(byId("max-tokens").value),
    stream: true,
    stream_options: { include_usage: true },
    tandem: { timeline: true },
    ...(isChat ? { messages: [{ role: "user", content: prompt }] } : { prompt }),
  };
  const response = await fetch(isChat ? "v1/chat/completions" : "v1/completions", {
    method: "POST",
    headers: { ...headers(), "content-type": "application/json" },
    body: JSON.stringify(body),
    signal: request.signal,
  });
  await check(response);
  let usage = null;
  for await (const chunk of events(response.body)) {
    if (chunk.error) throw new Error(chunk.error.message);
    usage = chunk.usage ?? usage;
    const text = chunk.choices?.[0]?.text ?? chunk.choices?.[0]?.delta?.content;
    if (text) {
      add(text);
      setText(byId("try-status"), "writing …");
    }
  }
  return usage;
}

// The JSON values of a stream of server-sent events, up to [DONE].
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data: ")) continue;
      const data = line.slice("data: ".length);
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}
