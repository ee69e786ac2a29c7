// The status page in a real browser, between a real nats-server and a webhook that does what it is told.
// `node --test` runs it, with the relay that RELAY names; SCREENSHOTS names a directory for pictures.

import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { createServer } from "node:http";
import { createRequire } from "node:module";
import { connect, createServer as createTcpServer } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, before, test } from "node:test";
import { setTimeout as sleep } from "node:timers/promises";
import { chromium } from "playwright-core";

const RELAY = process.env.RELAY ?? new URL("../../target/debug/nats-webhook-relay", import.meta.url).pathname;
const CHROMIUM = process.env.CHROMIUM ?? "/usr/bin/chromium";
const FLAGS = [
  "--no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-component-update",
  "--disable-sync",
].flatMap((flags) => flags.split(" "));
const AXE = createRequire(import.meta.url).resolve("axe-core/axe.min.js");
const PAYLOAD = "the payload, which is nobody's business";
const PATIENCE = 30_000;

const directory = mkdtempSync(join(tmpdir(), "page-"));
const children = new Set();
const nats = { port: await freePort(), process: null };
const status = await freePort();
const home = `http://127.0.0.1:${status}/`;
let answer = (response) => response.end();
const webhook = createServer((request, response) => request.resume().on("end", () => answer(response)));
let relay, browser, page, publisher;

before(async () => {
  await new Promise((listening) => webhook.listen(0, "127.0.0.1", listening));
  browser = await chromium.launch({ executablePath: CHROMIUM, args: FLAGS });
  page = await browser.newPage({ viewport: { width: 1280, height: 900 } });
  page.on("pageerror", (error) => assert.fail(error));
  page.on("dialog", () => assert.fail("a script from elsewhere has run"));
  await startNats();
  startRelay();
  await up();
  await page.goto(home);
});

after(async () => {
  await browser?.close();
  for (const child of children) child.kill("SIGKILL");
  webhook.closeAllConnections();
  webhook.close();
  publisher?.destroy();
  rmSync(directory, { recursive: true });
});

test("says where messages come from and go to, and that there was none", async () => {
  await shows("h1", /^Listening; no messages yet$/);
  const about = await page.textContent("[data-live=about]");
  const url = `http://127.0.0.1:${webhook.address().port}/hook`;
  assert.equal(about, `cms.cache.> → POST to ${url} → relayed.cache.> (core mode); NATS server: nats://127.0.0.1:${nats.port}`);
  assert.match(await page.title(), /^Listening/);
  const { headers } = await fetch(home);
  assert.match(headers.get("content-security-policy"), /^default-src 'none'/);
  assert.ok(!headers.get("content-security-policy").includes("unsafe"));
  assert.equal((await fetch(`${home}other`)).status, 404);
  for (const path of ["livez", "readyz", "metrics"]) assert.equal((await fetch(home + path)).status, 200);
});

test("shows hostile subjects as text, in whole lines, and no payload", async () => {
  const hostile = ["<script>alert(1)</script>", "<img/src=x/onerror=alert(1)>", "שלום.\u202Etxt", "x".repeat(3500)];
  for (const name of hostile) await publish(`cms.cache.${name}`);
  await shows("[data-live=messages] tr:nth-child(4)", /relayed/);
  const rows = await page.$$eval("[data-live=messages] bdi:first-child", (cells) => cells.map((cell) => cell.textContent));
  assert.ok(rows.includes("cms.cache.<script>alert(1)</script>"), rows.join("\n"));
  assert.ok(rows.includes("cms.cache.שלום. txt"), rows.join("\n"));
  assert.ok(rows.some((row) => row.startsWith("cms.cache.xxx") && row.length < 600));
  assert.equal(await page.locator("[data-live] script, [data-live] img").count(), 0);
  assert.ok(!(await page.content()).includes(PAYLOAD));
  await isFit("hostile");
});

test("tells a webhook that fails, one that hangs, and forgets both", async () => {
  answer = (response) => response.writeHead(503).end("no database");
  await publish("cms.cache.fails");
  await shows("h1", /^The webhook at http:\/\/127\.0\.0\.1:\d+\/hook has been failing for \d+s: .*503.*; next attempt in \d+s$/);
  await publish("cms.cache.waits");
  await shows("h1", /; 1 message waits$/);
  await shows("[data-live=now] p", /^Current message: cms\.cache\.fails, \d+s old, [2-9] attempts$/);
  assert.match(await page.title(), /^The webhook at /);
  await isFit("failing");
  answer = () => {};
  await shows("h1", /trying again now/);
  answer = (response) => response.end();
  // The one that hangs ends with its timeout.
  await shows("[data-live=messages] tr:nth-child(1)", /cms\.cache\.waits/);
  await shows("h1", /^Relaying$/);
  assert.match(await page.textContent("[data-live=messages] tr:nth-child(2)"), /cms\.cache\.failsrelayed: 200, \d attempts/);

  answer = () => {};
  await publish("cms.cache.hangs");
  await shows("h1", /^Waiting for the webhook's answer for \d+s$/);
  await picture("hangs");
  answer = (response) => response.end();
  await shows("h1", /^Relaying$/);

  answer = (response) => response.writeHead(422).end("what is that?");
  await publish("cms.cache.refused");
  await shows("h1", /^Gave up on cms\.cache\.refused \d+s ago: .*422.*what is that\?/);
  await picture("refused");
  answer = (response) => response.end();
  await publish("cms.cache.fine");
  await shows("h1", /^Relaying$/);
});

test("keeps the reader's place", async () => {
  for (let n = 0; n < 60; n++) await publish(`cms.cache.${n}`);
  await shows("[data-live=messages] tr:nth-child(1)", /cms\.cache\.59/);
  assert.equal(await page.locator("[data-live=messages] tr").count(), 50);
  await page.evaluate(() => scrollTo(0, 500));
  await page.focus("footer a");
  await page.evaluate(() => scrollTo(0, 500));
  await publish("cms.cache.next");
  await shows("[data-live=messages] tr:nth-child(1)", /cms\.cache\.next/);
  assert.equal(await page.evaluate(() => scrollY), 500);
  assert.equal(await page.evaluate(() => document.activeElement.textContent), "livez");
});

test("stays small with 100,000 messages", async () => {
  const sent = 100_000;
  const before = await count("relayed");
  for (let n = 0; n < sent; n++) publish(`cms.cache.many.${n}`);
  await publish("cms.cache.last");
  await shows("[data-live=messages] tr:nth-child(1)", /cms\.cache\.last/, 10 * PATIENCE);
  await shows("h1", /^Relaying$/);
  assert.equal((await count("relayed")) - before + (await count("dropped")), sent + 1);
  const length = (await (await fetch(home)).text()).length;
  assert.ok(length < 50_000, `${length}`);
  await isFit("many");
});

test("tells that NATS is away, and that the relay is", async () => {
  nats.process.kill("SIGKILL");
  await shows("h1", /^Waiting for NATS for \d+s: cannot connect to NATS at nats:\/\/.*: Connection refused/);
  await picture("nats-away");
  await startNats();
  await shows("h1", /^(Relaying$|Listening)/);
  relay.kill("SIGKILL");
  await shows("h1", /^The relay does not answer$/);
  startRelay();
  await shows("h1", /^Listening/);
});

test("tells that the password was changed", async () => {
  relay.kill("SIGKILL");
  await restartNats("authorization { user: relay, password: old }");
  startRelay({ NATS_USER: "relay", NATS_PASS: "old" });
  await up();
  await shows("h1", /^Listening/);
  await restartNats("authorization { user: relay, password: new }");
  await shows("h1", /refused the login \(authorization violation\); check NATS_USER and NATS_PASS/);
  await picture("password");
});

test("tells that the relay has ended", async () => {
  relay.kill("SIGKILL");
  await restartNats(`jetstream { store_dir: "${directory}/jetstream" }`);
  await publish("$JS.API.STREAM.CREATE.CMS", '{"name":"CMS","subjects":["cms.cache.>"]}');
  startRelay({ NATS_STREAM: "CMS", NATS_CONSUMER: "relay" });
  await up();
  await shows("h1", /^Listening/);
  assert.match(await page.textContent("[data-live=about]"), /\(durable mode, consumer relay of the stream CMS\)/);
  await publish("$JS.API.STREAM.DELETE.CMS", "");
  await shows("h1", /^The relay does not answer$/);
});

/** Nothing sticks out, nothing is inaccessible, on a wide and a narrow screen, in light and in dark. */
async function isFit(name) {
  for (const colorScheme of ["light", "dark"]) {
    for (const width of [1280, 390]) {
      await page.emulateMedia({ colorScheme });
      await page.setViewportSize({ width, height: 900 });
      const overflow = await page.evaluate(() => document.documentElement.scrollWidth - innerWidth);
      assert.ok(overflow <= 0, `${name}, ${width}: ${overflow} px too wide`);
      const other = await browser.newContext({ bypassCSP: true, colorScheme, viewport: { width, height: 900 } });
      const copy = await other.newPage();
      await copy.goto(home);
      await copy.addScriptTag({ path: AXE });
      const { violations } = await copy.evaluate(() => globalThis.axe.run());
      await other.close();
      assert.deepEqual(violations.map(({ id, nodes }) => [id, nodes[0].html]), [], `${name}, ${colorScheme}, ${width}`);
      await picture(`${name}-${colorScheme}-${width}`);
    }
  }
  await page.emulateMedia({ colorScheme: "light" });
  await page.setViewportSize({ width: 1280, height: 900 });
}

async function picture(name) {
  const folder = process.env.SCREENSHOTS;
  if (folder) await page.screenshot({ path: join(folder, `${name}.png`) });
}

/** Waits until an element of the page, which refreshes itself, has such a text. */
async function shows(selector, pattern, patience = PATIENCE) {
  const deadline = Date.now() + patience;
  let text;
  do {
    text = await page.locator(selector).first().textContent({ timeout: PATIENCE }).catch(() => "nothing");
    if (pattern.test(text)) return;
    await sleep(50);
  } while (Date.now() < deadline);
  assert.fail(`${selector} does not become ${pattern}: ${text}`);
}

async function count(name) {
  const text = await page.textContent(`dt:text-is("${name}") + dd`);
  return Number(text);
}

async function publish(subject, payload = PAYLOAD) {
  if (!publisher || publisher.destroyed) {
    publisher = connect(nats.port, "127.0.0.1").on("error", () => {});
    publisher.on("data", (data) => data.includes("PING") && publisher.write("PONG\r\n"));
    publisher.write('CONNECT {"verbose":false}\r\n');
  }
  const wait = !publisher.write(`PUB ${subject} ${payload.length}\r\n${payload}\r\n`);
  if (wait) await new Promise((drained) => publisher.once("drain", drained));
}

async function restartNats(settings) {
  nats.process.kill("SIGKILL");
  await startNats(settings);
}

async function startNats(settings = "") {
  const config = join(directory, "nats.conf");
  writeFileSync(config, `listen: "127.0.0.1:${nats.port}"\n${settings}`);
  nats.process = start("nats-server", ["-c", config], {});
  while (!(await canConnect(nats.port))) await sleep(20);
}

function startRelay(changes = {}) {
  relay = start(RELAY, [], {
    NATS_HOST: `nats://127.0.0.1:${nats.port}`,
    NATS_SUBJECT_PREFIX: "cms.cache",
    NATS_RELAYED_SUBJECT_PREFIX: "relayed.cache",
    WEBHOOK_DESTINATION: `http://127.0.0.1:${webhook.address().port}/hook?token=secret`,
    WEBHOOK_TIMEOUT: "3s",
    WEBHOOK_MAX_ATTEMPTS: "0",
    STATUS_LISTEN: `127.0.0.1:${status}`,
    ...changes,
  });
}

async function up() {
  while (!(await fetch(`${home}readyz`).catch(() => ({}))).ok) await sleep(20);
}

function start(program, args, env) {
  const options = { cwd: directory, env: { PATH: process.env.PATH, ...env }, stdio: "ignore" };
  const child = spawn(program, args, options);
  children.add(child);
  return child.on("exit", () => children.delete(child));
}

function canConnect(port) {
  return new Promise((done) => {
    const socket = connect(port, "127.0.0.1", () => done(true)).on("error", () => done(false));
    socket.on("connect", () => socket.destroy());
  });
}

function freePort() {
  return new Promise((done) => {
    const server = createTcpServer().listen(0, "127.0.0.1", () => {
      const { port } = server.address();
      server.close(() => done(port));
    });
  });
}
