// A CMS as small as can be: two pages in memory, a form for each, and a message on NATS per edit.

import { createServer } from "node:http";
import { jetstream, jetstreamManager } from "@nats-io/jetstream";
import { connect } from "@nats-io/transport-node";

const { CMS_URL, CMS_NATS_USER, CMS_NATS_PASS, NATS_HOST } = process.env;
const SITE_URL = new URL(process.env.WEBHOOK_DESTINATION ?? "").origin;

/** @type {Record<string, { path: string, title: string, text: string, version: number, savedAt: number | null }>} */
const pages = {
  loaf: {
    path: "/",
    title: "Rye with caraway",
    text: "A dark one today: whole rye, a sourdough of two days, and caraway from the garden behind the shop.",
    version: 1,
    savedAt: null,
  },
  counter: {
    path: "/counter",
    title: "Twelve loaves left",
    text: "And a tray of cardamom buns, still warm. The next bake is out at three.",
    version: 1,
    savedAt: null,
  },
};

const nats = await connect({
  servers: NATS_HOST,
  user: CMS_NATS_USER,
  pass: CMS_NATS_PASS,
  name: "cms",
  maxReconnectAttempts: -1,
});
// The stream keeps every edit until the relay has seen it, even while the relay is down.
const { streams } = await jetstreamManager(nats, { checkAPI: false });
await streams.add({ name: "CMS", subjects: ["cms.cache.>"], max_age: 24 * 3600 * 1e9 });

/**
 * Saves before it publishes: an edit must be there to fetch once it is announced.
 * @param {string} slug
 * @param {URLSearchParams} form
 */
async function save(slug, form) {
  const page = pages[slug];
  page.title = form.get("title") ?? page.title;
  page.text = form.get("text") ?? page.text;
  page.version += 1;
  page.savedAt = Date.now();
  const { version, savedAt } = page;
  await jetstream(nats).publish(`cms.cache.pages.${slug}`, JSON.stringify({ tags: [slug] }));
  return { version, savedAt };
}

const server = createServer(async (request, response) => {
  try {
    const { pathname, searchParams } = new URL(request.url ?? "/", CMS_URL);
    const slug = pathname.match(/\/pages\/([a-z]+)$/)?.[1] ?? "";
    if (pathname === "/") {
      response.setHeader("content-type", "text/html; charset=utf-8").end(editor(searchParams.get("saved")));
    } else if (!Object.hasOwn(pages, slug)) {
      response.writeHead(404).end("no such page\n");
    } else if (request.method !== "POST") {
      response.setHeader("content-type", "application/json").end(JSON.stringify(pages[slug]));
    } else {
      const saved = await save(slug, new URLSearchParams(await read(request)));
      if (pathname.startsWith("/api/")) response.end(JSON.stringify(saved));
      else response.writeHead(303, { location: `/?saved=${slug}#${slug}` }).end();
    }
  } catch (error) {
    console.error(error);
    response.writeHead(500).end(`${error}\n`);
  }
});
server.listen(Number(new URL(CMS_URL ?? "").port), "127.0.0.1", () => console.log(`CMS at ${CMS_URL}`));

process.once("SIGTERM", () => {
  server.close();
  server.closeAllConnections();
  nats.close();
});

/** @param {import("node:http").IncomingMessage} request */
async function read(request) {
  let body = "";
  for await (const part of request) {
    body += part;
    if (body.length > 100_000) throw new Error("the form is too large");
  }
  return body;
}

/** @param {string} text */
function escape(text) {
  return text.replace(/[&<>"]/g, (character) => `&#${character.charCodeAt(0)};`);
}

/**
 * @param {number} version
 * @param {number | null} savedAt
 */
function status(version, savedAt) {
  if (!savedAt) return "Not edited yet";
  return `Version ${version}, saved at ${new Date(savedAt).toISOString().slice(11, 19)} UTC`;
}

/** @param {string | null} saved the page that was saved just now */
function editor(saved) {
  const forms = Object.entries(pages).map(
    ([slug, { path, title, text, version, savedAt }]) => `
    <form method="post" action="/pages/${slug}" id="${slug}" aria-labelledby="${slug}-name">
      <h2 id="${slug}-name">${slug === "loaf" ? "Today’s loaf" : "At the counter"}</h2>
      <label>Title <input name="title" value="${escape(title)}" required></label>
      <label>Text <textarea name="text" rows="3" required>\n${escape(text)}</textarea></label>
      <p>
        <button>Save</button>
        <span role="status"${slug === saved ? ' class="saved"' : ""}>${status(version, savedAt)}</span>
        <a href="${SITE_URL}${path}" target="_blank">Open the page</a>
      </p>
    </form>`,
  );
  return `<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<link rel="icon" href="data:image/svg+xml,<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 32 32'><rect width='32' height='32' rx='7' fill='%231a56db'/><path d='M8 24l2-6L21 7l4 4L14 22z' fill='white'/></svg>">
<title>CMS of the Corner Bakery</title>
<style>
  :root { color-scheme: light dark; --quiet: light-dark(#57606a, #9ea7b3); --line: light-dark(#8c959f, #6e7681); --accent: light-dark(#1a56db, #8ab4f8); --good: light-dark(#15803d, #4ade80) }
  * { box-sizing: border-box }
  body { margin: 0 auto; max-width: 40rem; padding: 1.25rem 1.5rem 3rem; background: light-dark(#fff, #16181c); color: light-dark(#1f2328, #e6e9ee); font: 1rem/1.5 system-ui, "Liberation Sans", sans-serif }
  h1 { margin: 0; font-size: 1.625rem; line-height: 1.2 }
  h2 { margin: 0 0 .75rem; font-size: 1.25rem }
  form { padding: 1.5rem 0 .5rem }
  form + form { border-top: 1px solid light-dark(#d1d9e0, #33383f) }
  label { display: block; margin-bottom: .75rem; color: var(--quiet) }
  input, textarea { display: block; width: 100%; padding: .5rem .625rem; border: 1px solid var(--line); border-radius: 6px; background: transparent; color: light-dark(#1f2328, #e6e9ee); font: inherit; resize: vertical }
  form p { display: flex; flex-wrap: wrap; gap: .5rem 1rem; align-items: center }
  button { padding: .5rem 1.25rem; border: 0; border-radius: 6px; background: var(--accent); color: light-dark(#fff, #16181c); font: inherit; font-weight: 600; cursor: pointer }
  .saved { padding: .125rem .625rem; border-radius: 6px; background: color-mix(in srgb, var(--good) 15%, transparent); color: var(--good); font-weight: 600 }
  .saved::before { content: "✓ " }
  a { margin-left: auto; color: var(--accent) }
  :focus-visible { outline: 2px solid var(--accent); outline-offset: 2px }
</style>
<header><h1>CMS of the Corner Bakery</h1></header>
<main>${forms.join("")}</main>
</html>`;
}
