// The chat page: streams answers of /v1/chat/completions. Text from the model only ever becomes text nodes.

const $ = (id) => document.getElementById(id);
const messages = []; // as the server takes them
let running = null; // the AbortController of the answer that comes

// -- Small parts ----------------------------------------------------------------------------------------------------

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

/** Text with ``` fences as paragraphs and code blocks. */
function showText(target, text) {
  const parts = text.split(/^```[^\n]*\n?/m);
  target.replaceChildren(...parts.map((part, at) => element(at % 2 ? "pre" : "p", "", part.replace(/\n$/, "")))
    .filter((made) => made.textContent));
}

function article(role, title) {
  $("empty")?.remove();
  const made = element("article", role);
  made.append(element("h2", "", title));
  $("chat").append(made);
  return made;
}

function notice(text) { $("notice").textContent = text; }

/** Follow what comes, unless the reader has scrolled up. */
function following(change) {
  const chat = $("chat");
  const atEnd = chat.scrollHeight - chat.scrollTop - chat.clientHeight < 60;
  change();
  if (atEnd) chat.scrollTop = chat.scrollHeight;
}

// -- Requests -------------------------------------------------------------------------------------------------------

function headers() {
  const key = $("key").value.trim();
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

/** What the server's error object says; asks for a key where one is missing. */
async function refusal(answer) {
  if (answer.status === 401) {
    openSettings(true);
    $("key").focus();
    return "This server needs an API key: enter it above, then send again.";
  }
  try { return (await answer.json()).error.message; } catch { return `The server answered ${answer.status}.`; }
}

function request() {
  const system = $("system").value.trim();
  const asked = {
    messages: [...(system ? [{ role: "system", content: system }] : []), ...messages],
    stream: true,
    stream_options: { include_usage: true, continuous_usage_stats: true },
    chat_template_kwargs: { enable_thinking: $("thinking").checked },
  };
  if ($("temperature").value !== "") asked.temperature = Number($("temperature").value);
  if ($("max-tokens").value !== "") asked.max_tokens = Number($("max-tokens").value);
  if ($("tools").value.trim()) asked.tools = JSON.parse($("tools").value);
  return asked;
}

/** The documents of a stream of server-sent events. */
async function* events(body) {
  const decoder = new TextDecoder();
  const reader = body.getReader();
  let buffer = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    buffer += decoder.decode(value, { stream: true });
    const parts = buffer.split("\n\n");
    buffer = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

// -- One answer -----------------------------------------------------------------------------------------------------

/** An answer on the page, as it grows. */
class Answer {
  constructor(asked) {
    this.asked = asked;
    this.message = { role: "assistant", content: "" };
    this.place = article("assistant", "Answer");
    this.text = element("div", "text");
    this.figures = element("p", "figures");
    this.place.append(this.text, this.figures);
  }

  add(chunk) {
    if (chunk.error) throw new Error(chunk.error.message);
    if (chunk.usage) this.count(chunk.usage);
    const choice = chunk.choices[0];
    if (!choice) return;
    const delta = choice.delta;
    if (delta.reasoning_content) this.think(delta.reasoning_content);
    if (delta.content) {
      this.settle();
      this.message.content += delta.content;
      showText(this.text, this.message.content);
    }
    for (const call of delta.tool_calls ?? []) this.call(call);
    for (const problem of delta.problems ?? []) {
      this.text.after(element("p", "problem", `${problem.message}: ${problem.text}`));
    }
    if (choice.finish_reason === "length") this.cut = "cut at the most tokens";
  }

  think(text) {
    if (!this.thoughts) {
      this.details = element("details");
      this.details.open = true;
      this.summary = element("summary", "", "Thinking…");
      this.thoughts = element("p", "thoughts");
      this.details.append(this.summary, this.thoughts);
      this.text.before(this.details);
      this.message.reasoning_content = "";
    }
    this.message.reasoning_content += text;
    this.thoughts.textContent = this.message.reasoning_content;
  }

  /** The thoughts are over: they fold, unless the reader has folded or opened them by hand. */
  settle() {
    if (!this.details || this.settled) return;
    this.settled = true;
    this.summary.textContent = `Thought for ${((performance.now() - this.asked) / 1000).toFixed(1)} s`;
    if (!this.details.contains(document.activeElement)) this.details.open = false;
  }

  call(call) {
    this.settle();
    this.message.tool_calls = [...(this.message.tool_calls ?? []),
      { id: call.id, type: "function", function: call.function }];
    const card = element("div", "call");
    card.append(element("h3", "", `Calls ${call.function.name}`));
    let shown = call.function.arguments;
    try { shown = JSON.stringify(JSON.parse(shown), null, 2); } catch { /* shown as it is */ }
    card.append(element("pre", "", shown), this.replyTo(call));
    this.figures.before(card);
  }

  /** Where the result of a call is entered; the chat goes on when all have theirs. */
  replyTo(call) {
    const form = element("form", "reply");
    const input = element("input");
    input.placeholder = "Result of the call";
    input.setAttribute("aria-label", `Result of ${call.function.name}`);
    const button = element("button", "", "Give result");
    form.append(input, button);
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      if (running) return;
      messages.push({ role: "tool", tool_call_id: call.id, content: input.value });
      input.disabled = button.disabled = true;
      const given = messages.filter((m) => m.role === "tool").map((m) => m.tool_call_id);
      if (this.message.tool_calls.every((c) => given.includes(c.id))) answer();
    });
    return form;
  }

  /** Time to the first token, tokens a second behind it, and drafts where there was a drafter. */
  count(usage) {
    const now = performance.now();
    if (!this.first && usage.completion_tokens) {
      this.first = now;
      this.atFirst = usage.completion_tokens;
    }
    this.usage = usage;
    this.last = now;
    this.showFigures();
  }

  showFigures() {
    if (!this.usage || !this.first) return;
    const seconds = (this.last - this.first) / 1000;
    const tokens = this.usage.completion_tokens;
    const parts = [`first token after ${((this.first - this.asked) / 1000).toFixed(2)} s`];
    if (seconds > 0) parts.push(`${((tokens - this.atFirst) / seconds).toFixed(1)} tokens/s`);
    parts.push(`${tokens} tokens`);
    this.figures.replaceChildren(parts.join(" · "));
    const found = this.usage.completion_tokens_details;
    const drafted = found ? found.accepted_prediction_tokens + found.rejected_prediction_tokens : 0;
    if (drafted) {
      const steps = this.usage.m27quant.verify_steps;
      const perStep = (1 + found.accepted_prediction_tokens / steps).toFixed(2);
      this.figures.append(" · ", element("span", "drafts",
        `${found.accepted_prediction_tokens} of ${drafted} drafts accepted, ${perStep} tokens a step`));
    }
    if (this.cut) this.figures.append(" · ", element("span", "cut", this.cut));
  }

  end() {
    this.settle();
    this.showFigures();
    const { content, tool_calls: calls } = this.message;
    $("spoken").textContent = calls ? `The model calls ${calls[0].function.name}` : content;
  }
}

/** Ask for the next turn, and show it as it comes. */
async function answer() {
  notice("");
  let body;
  try { body = JSON.stringify(request()); } catch (fault) { notice(`The tools are not JSON: ${fault.message}`); return; }
  running = new AbortController();
  $("send").hidden = true;
  $("stop").hidden = false;
  let shown = null;
  const asked = performance.now();
  try {
    const got = await fetch("v1/chat/completions", { method: "POST", headers: headers(), body, signal: running.signal });
    if (!got.ok) throw new Error(await refusal(got));
    shown = new Answer(asked);
    for await (const chunk of events(got.body)) following(() => shown.add(chunk));
  } catch (fault) {
    if (fault.name === "AbortError") { if (shown) shown.cut = "stopped"; } else notice(fault.message);
  } finally {
    running = null;
    $("send").hidden = false;
    $("stop").hidden = true;
    if (shown) {
      following(() => shown.end());
      messages.push(shown.message);
    } else {
      takeBack();
    }
  }
}

/** A question that was refused goes back to where it can be changed. */
function takeBack() {
  const last = messages.at(-1);
  if (last?.role !== "user") return;
  messages.pop();
  $("chat").lastElementChild?.remove();
  if (!$("question").value) $("question").value = last.content;
}

// -- What the reader does -------------------------------------------------------------------------------------------

function send() {
  const text = $("question").value.trim();
  if (!text || running) return;
  messages.push({ role: "user", content: text });
  const place = article("user", "You");
  place.append(element("div", "text", text));
  $("question").value = "";
  $("chat").scrollTop = $("chat").scrollHeight;
  answer();
}

function openSettings(open) {
  $("settings").hidden = !open;
  $("show-settings").setAttribute("aria-expanded", String(open));
}

function useTheme(theme) {
  document.documentElement.dataset.theme = theme;
  $("theme").textContent = theme === "dark" ? "Light" : "Dark";
}

$("ask").addEventListener("submit", (event) => { event.preventDefault(); send(); });
$("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); send(); }
});
$("stop").addEventListener("click", () => { running?.abort(); $("question").focus(); });
document.addEventListener("keydown", (event) => { if (event.key === "Escape") running?.abort(); });
$("fresh").addEventListener("click", () => {
  running?.abort();
  messages.length = 0;
  $("chat").replaceChildren();
  notice("");
  $("question").focus();
});
$("show-settings").addEventListener("click", () => openSettings($("settings").hidden));
$("theme").addEventListener("click", () => {
  const theme = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
  localStorage.setItem("theme", theme);
  useTheme(theme);
});
$("key").value = sessionStorage.getItem("key") ?? "";
$("key").addEventListener("change", () => { sessionStorage.setItem("key", $("key").value.trim()); showModel(); });

async function showModel() {
  try {
    const got = await fetch("v1/models", { headers: headers() });
    if (got.ok) { $("model").textContent = (await got.json()).data[0].id; notice(""); } else notice(await refusal(got));
  } catch { notice("The server does not answer."); }
}

useTheme(localStorage.getItem("theme") ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light"));
showModel();
