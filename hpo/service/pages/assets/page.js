// Keeps a page up to date. Nothing here is needed: each page is whole without it.
"use strict";

// Every element with data-live is replaced by what the server now says it is, unless somebody is using it.
async function refresh() {
  const answer = await fetch(location.href, { headers: { Accept: "text/html" } });
  if (answer.redirected && new URL(answer.url).pathname === "/login") return location.reload();
  if (!answer.ok) return;
  const now = new DOMParser().parseFromString(await answer.text(), "text/html");
  for (const part of document.querySelectorAll("[data-live]")) {
    const fresh = now.getElementById(part.id);
    const used = part.contains(document.activeElement) || part.querySelector("details[open]");
    if (fresh && !used && fresh.innerHTML !== part.innerHTML) part.innerHTML = fresh.innerHTML;
  }
}

let waiting = false, again = false;
async function soon() {
  if (waiting) { again = true; return; }
  waiting = true;
  try { await refresh(); } catch { /* the server is away for a moment */ }
  setTimeout(() => { waiting = false; if (again) { again = false; soon(); } }, 500);
}

// A study's page hears of its events; other pages ask now and then, while somebody looks at them.
const source = document.querySelector("[data-events]");
if (source) {
  const events = new EventSource(source.dataset.events);
  events.addEventListener("progress", soon);
  events.addEventListener("end", () => { events.close(); soon(); setTimeout(soon, 3000); });
  addEventListener("pagehide", () => events.close());
}
const timed = document.querySelector("[data-live]:not([data-live=''])");
if (timed) setInterval(() => { if (!document.hidden) soon(); }, 1000 * timed.dataset.live);

// A form that takes a while says so and is sent once.
for (const form of document.querySelectorAll("form[data-busy]")) {
  form.addEventListener("submit", () => {
    const button = form.querySelector("button:not([type=button])");
    setTimeout(() => { button.disabled = true; button.textContent = form.dataset.busy; });
  });
}
addEventListener("pageshow", (event) => { if (event.persisted) location.reload(); });
