// Drives the example with a real browser and counts stale pages: through the relay, and for
// comparison with browsers that listen to the CMS directly. Prints the table, writes screenshot.png.

import { execFileSync } from "node:child_process";
import { createServer, request as httpRequest } from "node:http";
import { createRequire } from "node:module";
import { connect, createServer as createTcpServer } from "node:net";
import { join } from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import { chromium } from "playwright-core";
import { Stack, demandFreePorts, ports } from "./stack.mjs";

/** @typedef {import("playwright-core").Page} BrowserPage */
/** @typedef {{ at: string, path: string, slug: string, kind: string }} Document */
/** @typedef {{ what: string, edits: number, stale: number, took: number[], relayed: boolean }} Row */

const EDITS = Number(process.env.EDITS ?? 30);
const OUTAGES = Math.min(3, EDITS);
/** A page that doesn't show an edit after this time is stale, in milliseconds. */
const STALE_AFTER = 2_000;
/** The same after an outage, counted from its end: the relay's backoff grows up to 30 s. */
const STALE_AFTER_OUTAGE = 40_000;
const SLOWED_BY = 50;
const FLAGS = [
  "--no-sandbox --disable-gpu --disable-quic --no-first-run",
  "--disable-background-networking --disable-component-update --disable-sync",
].flatMap((flags) => flags.split(" "));
const CORE = { NATS_STREAM: "", NATS_CONSUMER: "" };

// Other ports than `start` has, so that both run side by side.
const chosen = ports({ site: 13000, cms: 13001, nats: 14222, websocket: 14223 });
const natsWebsocket = await freePort();
const secondSite = await freePort();
// Not localhost: nats-server 2.9 keeps only one allowed port per host name.
const SECOND_ORIGIN = `http://127.0.0.1:${secondSite}`;
const stack = new Stack(chosen);
for (const signal of ["SIGINT", "SIGTERM", "SIGHUP"]) {
  process.on(signal, () => stack.stop().then(() => process.exit(130)));
}

/** @type {Document[]} */
const DOCUMENTS = [
  { path: "/", slug: "loaf", kind: "static" },
  { path: "/counter", slug: "counter", kind: "dynamic" },
].map((document) => ({ ...document, at: `http://localhost:${chosen.site}${document.path}` }));
/** @type {Row[]} */
const rows = [];
/** @type {import("playwright-core").Browser | undefined} */
let browser;
let complete = false;

try {
  await demandFreePorts(Object.values(chosen));
  browser = await chromium.launch({ executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium", args: FLAGS });
  await throughTheRelay();
  await directly();
  complete = true;
} catch (error) {
  if (!stack.stopping) console.error(error, `\nThe relay said:\n${stack.output("relay").slice(-2_000)}`);
} finally {
  await browser?.close();
  await stack.stop();
}
process.exit(report() && complete ? 0 : 1);

async function throughTheRelay() {
  step("starting");
  const cable = await tcpProxy(chosen.websocket, natsWebsocket);
  await stack.nats(testConfig);
  await stack.cms();
  await stack.build();
  await stack.site();

  step("through the relay, durable mode");
  await stack.relay();
  for (const document of DOCUMENTS) await manyEdits(`${document.kind} page, through the relay`, document);
  await screenshot();

  step("front end stopped during an edit");
  await outages("front end stopped during an edit, started again", () => stack.end("site"), () => stack.site());

  step("browser cut off from NATS during an edit");
  await outages("browser cut off from NATS during an edit", async () => cable.cut(), async () => cable.mend());

  step("through the relay, core mode, handler slowed");
  await stack.end("relay");
  await stack.relay({ WEBHOOK_DESTINATION: await slowProxy(chosen.site), ...CORE });
  for (const document of DOCUMENTS) {
    await manyEdits(`${document.kind} page, through the relay, handler slowed by ${SLOWED_BY} ms`, document);
  }

  step("two Next.js instances");
  await stack.end("relay");
  await stack.site(secondSite, "second-site");
  const slowSecond = await slowProxy(secondSite);
  await stack.relay({ WEBHOOK_DESTINATION: `${stack.settings.WEBHOOK_DESTINATION} ${slowSecond}`, ...CORE });
  await twoInstances();

  for (const name of ["relay", "second-site", "site", "nats"]) await stack.end(name);
  cable.close();
}

/** The same with browsers that hear of an edit when the relay does. */
async function directly() {
  step("browsers listening to the CMS directly, handler slowed");
  stack.settings.NEXT_PUBLIC_NATS_SUBJECT = "cms.cache.>";
  const cable = await tcpProxy(chosen.websocket, natsWebsocket);
  await stack.nats((config) => testConfig(config).replace('subscribe: "relayed.cache.>"', 'subscribe: "cms.cache.>"'));
  await stack.build();
  await stack.site(chosen.site, "direct");
  await stack.relay({ WEBHOOK_DESTINATION: await slowProxy(chosen.site), ...CORE });
  for (const document of DOCUMENTS) {
    await manyEdits(`${document.kind} page, listening directly, handler slowed by ${SLOWED_BY} ms`, document, false);
  }
  cable.close();
}

/**
 * One page stays open while its document is edited again and again.
 * @param {string} what
 * @param {Document} document
 */
async function manyEdits(what, document, relayed = true) {
  const page = await open(document.at);
  const row = addRow(what, relayed);
  for (let count = 0; count < EDITS; count++) {
    const version = await edit(document, `Edit ${count + 1} of ${EDITS}`);
    await look(row, page, version, STALE_AFTER);
    // Without another visitor the invalidation that comes too late would help the next edit.
    await visit(document.at);
  }
  await page.context().close();
}

/**
 * An edit while something is down.
 * @param {string} what
 * @param {() => Promise<void>} begin
 * @param {() => Promise<void>} end
 */
async function outages(what, begin, end) {
  const row = addRow(what);
  for (const document of DOCUMENTS) {
    const page = await open(document.at);
    for (let count = 0; count < OUTAGES; count++) {
      await begin();
      const version = await edit(document, `Edit ${count + 1} during an outage`);
      await sleep(500);
      await end();
      await look(row, page, version, STALE_AFTER_OUTAGE);
    }
    await page.context().close();
  }
  // They tell how long the outage was, not how fast the way is.
  row.took = [];
}

async function twoInstances() {
  const row = addRow("two Next.js instances, the second one’s handler slowed");
  for (const document of DOCUMENTS) {
    const addresses = [document.at, `${SECOND_ORIGIN}${document.path}`];
    const pages = await Promise.all(addresses.map(open));
    for (let count = 0; count < EDITS / 2; count++) {
      const version = await edit(document, `Edit ${count + 1} for two`);
      await Promise.all(pages.map((page) => look(row, page, version, STALE_AFTER)));
      await Promise.all(addresses.map(visit));
    }
    await Promise.all(pages.map((page) => page.context().close()));
  }
}

/** @param {string} address */
async function open(address) {
  if (!browser) throw new Error("no browser");
  const context = await browser.newContext();
  const page = await context.newPage();
  await page.goto(address);
  await page.waitForSelector('[role="status"][data-state="live"]');
  // The refresh that follows upon getting live is no part of what is measured.
  await page.waitForLoadState("networkidle");
  return page;
}

/** @param {string} address */
async function visit(address) {
  const response = await fetch(address);
  await response.text();
  // Were the static page not cached, there would be nothing to show.
  if (new URL(address).pathname === "/" && !response.headers.has("x-nextjs-cache")) {
    throw new Error("the static page is not static");
  }
}

/**
 * @param {Document} document
 * @param {string} title
 * @returns {Promise<number>} the new version
 */
async function edit(document, title) {
  const url = `${stack.settings.CMS_URL}/api/pages/${document.slug}`;
  const response = await fetch(url, { method: "POST", body: new URLSearchParams({ title }) });
  if (!response.ok) throw new Error(await response.text());
  return (await response.json()).version;
}

/**
 * Waits until the open page shows the version, and notes how long that took, or that it is stale.
 * @param {Row} row
 * @param {BrowserPage} page
 * @param {number} version
 * @param {number} timeout
 */
async function look(row, page, version, timeout) {
  row.edits += 1;
  try {
    const shown = await page.waitForSelector(`[data-version="${version}"] [data-took]`, { timeout });
    row.took.push(Number(await shown.getAttribute("data-took")));
  } catch {
    row.stale += 1;
  }
}

/** An editor at work, and the page of somebody who has it open. */
async function screenshot() {
  const page = await open(DOCUMENTS[0].at);
  const cms = await page.context().newPage();
  for (const each of [page, cms]) await each.setViewportSize({ width: 640, height: 378 });
  await cms.goto(stack.settings.CMS_URL);
  const form = cms.getByRole("form", { name: "Today’s loaf" });
  await form.getByLabel("Title").fill("Walnut and honey");
  await form.getByLabel("Text").fill("Light and nutty, with honey from Ana’s bees. Still warm until ten.");
  await form.getByRole("button", { name: "Save" }).click();
  await page.getByRole("heading", { name: "Walnut and honey" }).waitFor();
  await page.waitForSelector("[data-took]");
  await cms.evaluate(() => scrollTo(0, 0));
  const [left, right] = await Promise.all([cms, page].map(async (each) => (await each.screenshot()).toString("base64")));
  await cms.setViewportSize({ width: 1376, height: 470 });
  await cms.setContent(`<!doctype html>
    <style>
      body { display: flex; gap: 32px; margin: 0; padding: 32px; background: #d8dee6; font: 600 15px system-ui, "Liberation Sans", sans-serif; color: #1f2328 }
      figure { margin: 0 }
      img { display: block; width: 640px; margin-top: 12px; border-radius: 8px; box-shadow: 0 4px 16px #0003 }
    </style>
    <figure>The editor saves …<img src="data:image/png;base64,${left}"></figure>
    <figure>… and every open page shows it<img src="data:image/png;base64,${right}"></figure>`);
  await cms.locator("body").screenshot({ path: join(import.meta.dirname, "../screenshot.png") });
  await page.context().close();
}

/**
 * NATS behind the cable that can be cut, and both instances as origins.
 * @param {string} config
 */
function testConfig(config) {
  const origin = `"http://localhost:${chosen.site}"`;
  return config
    .replace(`127.0.0.1:${chosen.websocket}`, `127.0.0.1:${natsWebsocket}`)
    .replace(origin, `${origin}, "${SECOND_ORIGIN}"`);
}

/**
 * A front end whose handler is slower: each request waits before it goes on.
 * @param {number} to
 * @returns {Promise<string>} the webhook's URL
 */
async function slowProxy(to) {
  const server = createServer(async (incoming, outgoing) => {
    await sleep(SLOWED_BY);
    const { method, headers, url: path } = incoming;
    const forwarded = httpRequest({ host: "127.0.0.1", port: to, method, path, headers }, (answer) => {
      outgoing.writeHead(answer.statusCode ?? 502, answer.headers);
      answer.pipe(outgoing);
    });
    forwarded.on("error", () => outgoing.destroy());
    incoming.pipe(forwarded);
  });
  const port = await freePort();
  await new Promise((done) => server.listen(port, "127.0.0.1", () => done(undefined)));
  return `http://localhost:${port}/api/cache/webhook`;
}

/**
 * @param {number} from
 * @param {number} to
 */
async function tcpProxy(from, to) {
  let whole = true;
  /** @type {Set<import("node:net").Socket>} */
  const sockets = new Set();
  const server = createTcpServer((incoming) => {
    if (!whole) return incoming.destroy();
    const outgoing = connect(to, "127.0.0.1");
    for (const [one, other] of [[incoming, outgoing], [outgoing, incoming]]) {
      sockets.add(one);
      one.pipe(other);
      one.on("error", () => other.destroy());
      one.on("close", () => {
        sockets.delete(one);
        other.destroy();
      });
    }
  });
  await new Promise((done) => server.listen(from, "127.0.0.1", () => done(undefined)));
  function cut() {
    whole = false;
    for (const socket of sockets) socket.destroy();
  }
  return {
    cut,
    mend: () => void (whole = true),
    close: () => (cut(), server.close()),
  };
}

/** @returns {Promise<number>} */
function freePort() {
  const server = createTcpServer();
  return new Promise((done) => {
    server.listen(0, "127.0.0.1", () => {
      const { port } = /** @type {import("node:net").AddressInfo} */ (server.address());
      server.close(() => done(port));
    });
  });
}

/**
 * @param {string} what
 * @returns {Row}
 */
function addRow(what, relayed = true) {
  const row = { what, edits: 0, stale: 0, took: [], relayed };
  rows.push(row);
  return row;
}

/** @param {string} what */
function step(what) {
  console.error(`${new Date().toISOString().slice(11, 19)} ${what}`);
}

function report() {
  console.log("\n| | pages looked at after an edit | stale | save to screen, median | slowest |\n|---|--:|--:|--:|--:|");
  for (const { what, edits, stale, took } of rows) {
    took.sort((a, b) => a - b);
    const times = took.length > 0 ? [took[took.length >> 1], took[took.length - 1]].map((time) => `${time} ms`) : ["", ""];
    console.log(`| ${what} | ${edits} | ${stale} | ${times.join(" | ")} |`);
  }
  const stale = rows.filter((row) => row.relayed).reduce((sum, row) => sum + row.stale, 0);
  const next = createRequire(import.meta.url)("next/package.json").version;
  const nats = execFileSync("nats-server", ["--version"], { encoding: "utf8" }).trim().replace(": v", " ");
  console.log(`\nNext.js ${next}, Node.js ${process.versions.node}, Chromium ${browser?.version()}, ${nats}.`);
  if (!complete) console.log("\nNot complete.");
  else console.log(stale === 0 ? "\nThrough the relay: no stale page." : `\nThrough the relay: ${stale} stale pages.`);
  return stale === 0;
}
