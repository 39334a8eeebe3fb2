"use strict";
// Keeps the page of a job up to date, and streams the two answers of the playground. Without it, pages work as rendered.

const followed = document.querySelector("[data-stream]:not([data-final])");
if (followed) follow(followed.dataset.stream);
const play = document.querySelector("form[data-play]");
if (play) {
  const base = document.getElementById("base-of");
  play.elements.model.addEventListener("change", () => { base.textContent = chosen().dataset.base; });
  play.addEventListener("submit", ask);
}

function follow(address) {
  const source = new EventSource(address);
  const live = document.getElementById("live");
  source.addEventListener("open", () => { live.textContent = ""; });
  source.addEventListener("error", () => {
    live.textContent = source.readyState === EventSource.CLOSED
      ? "This page is not kept up to date any more: reload it to see what is new."
      : "The connection is lost; trying again…";
  });
  source.addEventListener("update", message => {
    const news = JSON.parse(message.data);
    for (const [id, html] of Object.entries(news.parts)) fill(document.getElementById(id), html);
    if (news.final) source.close();
  });
}

// The markup is the server's own, escaped as on the page. What has the focus keeps a place to go on from.
function fill(part, html) {
  const new_part = document.createElement("template");
  new_part.innerHTML = html;
  if (part.innerHTML === new_part.innerHTML) return;
  const focused = part.contains(document.activeElement) && document.activeElement !== part;
  part.replaceChildren(new_part.content);
  if (focused) { part.tabIndex = -1; part.focus(); }
}

function chosen() {
  return play.elements.model.selectedOptions[0];
}

let asking = null;
async function ask(event) {
  event.preventDefault();
  if (asking) asking.abort();
  asking = new AbortController();
  const models = {base: chosen().dataset.base, adapter: chosen().value};
  await Promise.all(Object.entries(models).map(
    ([who, model]) => answer(document.getElementById(who), model, play.elements.prompt.value, asking.signal)
  ));
}

async function answer(place, model, prompt, signal) {
  place.textContent = "";
  place.classList.remove("is-bad");
  place.removeAttribute("lang");
  place.setAttribute("aria-busy", "true");
  try {
    const response = await fetch("/v1/chat/completions", {
      method: "POST",
      headers: {"Content-Type": "application/json"},
      body: JSON.stringify({
        model, messages: [{role: "user", content: prompt}], stream: true, temperature: 0,
        max_completion_tokens: Number(play.dataset.tokens),
      }),
      signal,
    });
    if (!response.ok) throw new Error((await response.json()).error.message);
    for await (const piece of pieces(response.body)) {
      place.append(piece);
      if (/\p{Script=Han}/u.test(piece)) place.lang = "zh";
    }
  } catch (error) {
    if (error.name === "AbortError") return;
    place.classList.add("is-bad");
    place.append(`${error.message} Try again, or choose another model.`);
  }
  if (!signal.aborted) place.removeAttribute("aria-busy");
}

// The texts of a stream of chat completions.
async function* pieces(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const {done, value} = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      const data = line.startsWith("data: ") ? line.slice(6).trim() : "[DONE]";
      if (data === "[DONE]") continue;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Error(chunk.error.message);
      const text = chunk.choices[0]?.delta?.content;
      if (text) yield text;
    }
  }
}
