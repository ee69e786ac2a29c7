// Drives the example with a real browser and counts stale pages: through the relay, and for comparison with browsers
// that listen to the CMS directly. Prints the table, writes screenshot.png. Its other checks throw at once: the
// receivers' answers, a 404, pages opened while the CMS is down.

import { execFileSync } from "node:child_process";
import { createHmac } from "node:crypto";
import { mkdirSync, readFileSync, writeFileSync } from "node:fs";
import { createServer, request as httpRequest } from "node:http";
import { createRequire } from "node:module";
import { connect, createServer as createTcpServer } from "node:net";
import { join } from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import { connect as connectToNats } from "@nats-io/transport-node";
import { LIVE, launch, step } from "./browser.mjs";
import { PROJECTS, assemble, assembleForNext15, countStale, visit as visitKind } from "./kinds.mjs";
import { Stack, demandFreePorts, ports } from "./stack.mjs";

/** @typedef {import("playwright-core").Page} BrowserPage */
/** @typedef {{ at: string, path: string, slug: string, kind: string }} Document */
/** @typedef {{ what: string, edits: number, stale: number, took: number[], relayed: boolean }} Row */

const EDITS = Number(process.env.EDITS ?? 30);
const OUTAGES = Math.min(3, EDITS);
/** Of three edits each, for every kind of page. */
const ROUNDS = Math.min(7, EDITS);
/** Without the fix each look takes until a page counts as stale. */
const ROUNDS_WITHOUT_MEND = Math.min(2, EDITS);
/** A page that doesn't show an edit after this time is stale, in milliseconds. */
const STALE_AFTER = 2_000;
/** The same after an outage, counted from its end: the relay's backoff grows up to 30 s. */
const STALE_AFTER_OUTAGE = 40_000;
const SLOWED_BY = 50;
/** How often a page may request itself during one outage. */
const MANY_REQUESTS = 20;
const CORE = { NATS_STREAM: "", NATS_CONSUMER: "" };

// Not the ports of `start`, so that both can run side by side.
const chosen = ports({ site: 13000, cms: 13001, nats: 14222, websocket: 14223 });
// Fixed, because somebody else may get a free port before it is used.
const [natsWebsocket, cmsBehindCable, secondSite] = [4, 5, 6].map((more) => chosen.site + more);
const SITE = `http://localhost:${chosen.site}`;
// Not localhost: nats-server 2.9 keeps only one allowed port per host name.
const SECOND_ORIGIN = `http://127.0.0.1:${secondSite}`;
/** The site's way to the CMS is a cable that can be cut; the editors' way is not. */
const CMS = `http://localhost:${cmsBehindCable}`;
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
/** @type {{ what: string, [column: string]: string | import("./kinds.mjs").Count }[]} */
const kinds = [];
/** @type {import("playwright-core").Browser | undefined} */
let browser;
let complete = false;

try {
  await demandFreePorts([...Object.values(chosen), natsWebsocket, cmsBehindCable, secondSite]);
  browser = await launch();
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
  const cmsCable = await tcpProxy(chosen.cms, cmsBehindCable);
  await stack.nats(testConfig);
  await stack.cms({ CMS_URL: CMS });
  await stack.build();
  await stack.site();

  step("what the receivers answer");
  await receivers();

  step("through the relay, durable mode");
  await stack.relay();
  for (const document of DOCUMENTS) await manyEdits(`${document.kind} page, through the relay`, document);
  const complaints = stack.output("relay").match(/.*(WARN|ERROR).*/g);
  if (complaints) throw new Error(`the relay complains:\n${complaints.join("\n")}`);
  await mayReadStream();
  await twoEnvironments();
  await screenshot();
  await looks();

  step("a page that does not exist");
  await notFound();

  step("front end cut off from the CMS during an edit");
  await outages("front end cut off from the CMS during an edit", async () => cmsCable.cut(), async () => cmsCable.mend(), 5_000);
  await openedWithoutCms(cmsCable);

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

  for (const name of ["relay", "second-site", "site"]) await stack.end(name);
  await everyKind();
  await stack.end("nats");
  cable.close();
}

/** Every kind of page: in production, behind a shared cache, in dev, in Next.js 15, and without the fix in next.config.ts. */
async function everyKind() {
  for (const project of PROJECTS) {
    const directory = stack.project(project.variant);
    assemble(directory, project);
    step(`every kind of page, ${project.variant}`);
    await stack.nextBuild(directory);
    const built = await countKinds("start", directory, project, ROUNDS);
    step(`every kind of page, ${project.variant}, behind a shared cache`);
    await stack.sharedCache(secondSite);
    const shared = await countKinds("start", directory, project, ROUNDS, SECOND_ORIGIN);
    await stack.end("shared-cache");
    step(`every kind of page, ${project.variant}, in dev`);
    const dev = await countKinds("dev", directory, project, ROUNDS);
    /** @type {typeof built} */
    let next15 = new Map();
    if (project === PROJECTS[0]) {
      step("every kind of page, in Next.js 15");
      const previous = await installNext15();
      await stack.nextBuild(previous);
      next15 = await countKinds("start", previous, project, ROUNDS);
    }
    step(`every kind of page, ${project.variant}, without the fix`);
    const plain = stack.project(`${project.variant}-without`);
    assemble(plain, project, false);
    await stack.nextBuild(plain);
    const without = await countKinds("start", plain, project, ROUNDS_WITHOUT_MEND);

    for (const [name, what] of Object.entries(project.kinds)) {
      const all = (/** @type {typeof built} */ counts) => sum(Object.values(counts.get(name) ?? {}));
      kinds.push({ what, ...built.get(name), "behind a shared cache": all(shared), "in dev": all(dev), "in Next.js 15": all(next15), "without the fix": all(without) });
    }
  }
}

/** @param {import("./kinds.mjs").Count[]} counts */
function sum(counts) {
  return counts.reduce((all, { looks, stale }) => ({ looks: all.looks + looks, stale: all.stale + stale }), { looks: 0, stale: 0 });
}

/**
 * @param {"start" | "dev"} command
 * @param {string} directory
 * @param {(typeof PROJECTS)[number]} project
 * @param {number} rounds
 */
async function countKinds(command, directory, project, rounds, origin = SITE) {
  if (!browser) throw new Error("no browser");
  const handlers = ["webhook", "path"].map((name) => `${SITE}${project.basePath}/api/cache/${name}`);
  await stack.next(command, directory);
  await stack.relay({ WEBHOOK_DESTINATION: handlers.join(" ") });
  const counts = await countStale({
    browser,
    origin,
    project,
    rounds,
    dev: command === "dev",
    edit: (title) => edit(DOCUMENTS[0], title),
  });
  // A shared cache that keeps no documents would prove nothing.
  if (origin !== SITE && (await visitKind(`${origin}${project.basePath}/in/de`)) !== "HIT") throw new Error("the shared cache keeps no documents");
  await stack.end("relay");
  await stack.end("site");
  return counts;
}

/** Creates a project of the previous major version, with packages of its own. */
async function installNext15() {
  const directory = join(stack.directory, "next15");
  mkdirSync(directory);
  const { dependencies, devDependencies } = JSON.parse(readFileSync(join(import.meta.dirname, "../package.json"), "utf8"));
  for (const name of Object.keys(dependencies)) if (name.startsWith("@nats-io/") && name !== "@nats-io/nats-core") delete dependencies[name];
  delete devDependencies["playwright-core"];
  writeFileSync(join(directory, "package.json"), JSON.stringify({ private: true, dependencies: { ...dependencies, next: "15" }, devDependencies }));
  await stack.run("npm", ["install", "--no-audit", "--no-fund"], directory);
  assembleForNext15(directory);
  return directory;
}

/** Does the same with browsers that hear of an edit when the relay does. */
async function directly() {
  step("browsers listening to the CMS directly");
  stack.settings.NEXT_PUBLIC_NATS_SUBJECT = "cms.cache.>";
  const cable = await tcpProxy(chosen.websocket, natsWebsocket);
  await stack.nats((config) => testConfig(config).replace('subscribe: ["relayed.cache.>"', 'subscribe: ["cms.cache.>"'));
  await stack.build();
  await stack.site(chosen.site, "direct");
  await stack.relay(CORE);
  for (const document of DOCUMENTS) {
    await manyEdits(`${document.kind} page, listening directly, handler not slowed`, document, false);
  }
  await stack.end("relay");
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
    // Otherwise an invalidation that comes too late would help the next edit.
    await visit(document.at);
  }
  await page.context().close();
}

/** Checks that the relay's user may look at a message in the stream, as it must for one that no client can read. */
async function mayReadStream() {
  const { NATS_HOST, NATS_USER, NATS_PASS, NATS_STREAM } = stack.settings;
  const nats = await connectToNats({ servers: NATS_HOST, user: NATS_USER, pass: NATS_PASS });
  const answer = await nats.request(`$JS.API.STREAM.MSG.GET.${NATS_STREAM}`, '{"seq":1}');
  await nats.close();
  const { error } = /** @type {{ error?: { description: string } }} */ (answer.json());
  if (error) throw new Error(`the relay’s user can’t read the stream: ${error.description}`);
}

/** Checks that a laptop with the prefix and the consumer that .env.example names hears every edit, and production does too. */
async function twoEnvironments() {
  const { NATS_HOST, NEXT_PUBLIC_NATS_USER, NEXT_PUBLIC_NATS_PASS } = stack.settings;
  const [prefix, consumer] = ["relayed-ana.cache", "relay-ana"];
  const example = readFileSync(join(import.meta.dirname, "../.env.example"), "utf8");
  if (!example.includes(`# For Ana's laptop: ${prefix} and ${consumer},`)) throw new Error(".env.example names others");
  await stack.relay({ NATS_RELAYED_SUBJECT_PREFIX: prefix, NATS_CONSUMER: consumer }, "relay-ana");
  const browsers = await connectToNats({ servers: NATS_HOST, user: NEXT_PUBLIC_NATS_USER, pass: NEXT_PUBLIC_NATS_PASS });
  const environments = ["relayed.cache", prefix].map((each) => browsers.subscribe(`${each}.>`, { max: OUTAGES }));
  await browsers.flush();
  // The laptop’s consumer begins with what the stream has already.
  for (let count = 0; count < OUTAGES; count++) await edit(DOCUMENTS[0], `Edit ${count + 1} for two environments`);
  for (const environment of environments) {
    let heard = 0;
    const late = setTimeout(() => environment.unsubscribe(), 10_000);
    for await (const _ of environment) heard += 1;
    clearTimeout(late);
    if (heard < OUTAGES) throw new Error(`${environment.getSubject()}: ${heard} of ${OUTAGES} messages`);
  }
  await browsers.close();
  await stack.end("relay-ana");
}

/** Checks that the route handler and the receiver without a framework answer the same. */
async function receivers() {
  const secret = stack.settings.WEBHOOK_SECRET;
  const port = await freePort();
  const route = (/** @type {number} */ site) => `http://localhost:${site}/api/cache/webhook`;
  const receiver = `http://localhost:${port}`;
  // Signs the bytes, as the relay does.
  const signed = (/** @type {string | Buffer<ArrayBuffer>} */ body, at = new Date()) => {
    const time = String(Math.floor(at.getTime() / 1_000));
    const key = Buffer.from(secret.replace("whsec_", ""), "base64");
    const signature = createHmac("sha256", key).update(`test.${time}.`).update(body).digest("base64");
    return { body, headers: { "webhook-id": "test", "webhook-timestamp": time, "webhook-signature": `v1,${signature}` } };
  };
  const good = signed('{"tags":["loaf"]}');
  /** @type {[number, string, RequestInit][]} */
  const cases = [
    [204, "tags", good],
    [204, "no tags", signed('{"tags":[]}')],
    [204, "tags after a byte order mark", signed('\uFEFF{"tags":["loaf"]}')],
    [401, "another payload than the one signed", { ...good, body: '{"tags":["counter"]}' }],
    [401, "no signature", { body: good.body }],
    [401, "half a signature", { ...good, headers: { ...good.headers, "webhook-signature": "v1" } }],
    [401, "an old signature", signed(good.body, new Date(Date.now() - 3_600_000))],
    [400, "no JSON", signed("tags")],
    [400, "an empty payload", signed("")],
    [400, "no UTF-8", signed(Buffer.from('{"tags":["caf\xe9"]}', "latin1"))],
    [400, "null", signed("null")],
    [400, "a string for tags", signed('{"tags":"home"}')],
    [400, "a tag that is no string", signed('{"tags":["home",1]}')],
  ];

  await expectAnswers(route(chosen.site), cases);
  await stack.receiver(port);
  await expectAnswers(receiver, cases);
  const subject = "cms.cache.seiten.käse";
  // fetch takes a header's bytes as Latin-1.
  const bytes = Buffer.from(subject).toString("latin1");
  await expectAnswers(receiver, [[204, "a subject", { ...good, headers: { ...good.headers, "x-nats-subject": bytes } }]]);
  if (!stack.output("receiver").includes(subject)) throw new Error(`the receiver does not know ${subject}`);
  await stack.end("receiver");

  for (const WEBHOOK_SECRET of ["", "whsec_not base64"]) {
    await stack.site(secondSite, "second-site", { WEBHOOK_SECRET });
    await expectAnswers(route(secondSite), [[500, `WEBHOOK_SECRET=${WEBHOOK_SECRET}`, good]]);
    await stack.end("second-site");
    await stack.receiver(port, { WEBHOOK_SECRET });
    await expectAnswers(receiver, [[500, `WEBHOOK_SECRET=${WEBHOOK_SECRET}`, good]]);
    await stack.end("receiver");
  }

  const [source, readme] = ["../app/api/cache/webhook/route.ts", "../../../README.md"].map((path) =>
    readFileSync(join(import.meta.dirname, path), "utf8"),
  );
  if (!readme.includes(source.slice(source.indexOf("export async function POST")))) {
    throw new Error("README.md shows another route handler than the example has");
  }
}

/**
 * @param {string} url
 * @param {[number, string, RequestInit][]} cases
 */
async function expectAnswers(url, cases) {
  for (const [expected, what, request] of cases) {
    const { status } = await fetch(url, { method: "POST", ...request });
    if (status !== expected) throw new Error(`${url} answered ${status} instead of ${expected} to: ${what}`);
  }
}

/** Checks that where there is nothing to refresh, neither going live nor a message makes the page reload. */
async function notFound() {
  const path = "/no-such-page";
  const page = await newPage();
  const requests = requestsFor(page, path);
  await page.goto(`http://localhost:${chosen.site}${path}`);
  await page.waitForSelector(LIVE);
  await edit(DOCUMENTS[0], "Edit beside a page that does not exist");
  await sleep(5_000);
  step(`  ${requests.length} requests for the page in 5 s`);
  if (requests.length > MANY_REQUESTS) throw new Error(`a page that does not exist was requested ${requests.length} times in 5 s`);
  const loads = requests.filter((request) => request.resourceType() === "document").length;
  if (loads !== 1) throw new Error(`a page that does not exist was loaded ${loads} times`);
  // It lives: its links work without a load.
  await page.getByRole("link", { name: "At the counter" }).click();
  await page.waitForSelector("[data-version]");
  await page.context().close();
}

/**
 * Checks that a page opened while it can't be rendered shows an error, and then recovers by itself.
 * @param {{ cut: () => void, mend: () => void }} cmsCable
 */
async function openedWithoutCms(cmsCable) {
  for (const document of DOCUMENTS) {
    cmsCable.cut();
    const version = await edit(document, "Edit before a visit without the CMS");
    // The relay needs a moment to have the old page dropped.
    while ((await fetch(document.at)).ok) await sleep(50);
    const page = await newPage();
    const requests = requestsFor(page, document.path);
    await page.goto(document.at);
    await page.getByRole("heading", { name: "One moment, please" }).waitFor();
    cmsCable.mend();
    await page.waitForSelector(`[data-version="${version}"]`, { timeout: STALE_AFTER_OUTAGE });
    if (requests.length > MANY_REQUESTS) throw new Error(`${document.at} was requested ${requests.length} times`);
    await page.context().close();
  }
}

/**
 * Edits while something is down.
 * @param {string} what
 * @param {() => Promise<void>} begin
 * @param {() => Promise<void>} end
 * @param {number} lasting in milliseconds
 */
async function outages(what, begin, end, lasting = 500) {
  const row = addRow(what);
  for (const document of DOCUMENTS) {
    const page = await open(document.at);
    const requests = requestsFor(page, document.path);
    for (let count = 0; count < OUTAGES; count++) {
      await begin();
      const version = await edit(document, `Edit ${count + 1} during an outage`);
      await sleep(lasting);
      await end();
      await look(row, page, version, STALE_AFTER_OUTAGE);
    }
    step(`  ${requests.length} requests for the ${document.kind} page in ${OUTAGES} outages`);
    if (requests.length > OUTAGES * MANY_REQUESTS) throw new Error(`${document.at} was requested ${requests.length} times`);
    await page.context().close();
  }
  // They measure the outage, not the path.
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

/** Opens a page as a new visitor. */
async function newPage() {
  if (!browser) throw new Error("no browser");
  const context = await browser.newContext();
  return context.newPage();
}

/**
 * Returns a growing list of the page's requests for its own path.
 * @param {BrowserPage} page
 * @param {string} path
 */
function requestsFor(page, path) {
  /** @type {import("playwright-core").Request[]} */
  const requests = [];
  page.on("request", (request) => {
    if (new URL(request.url()).pathname === path) requests.push(request);
  });
  return requests;
}

/** @param {string} address */
async function open(address) {
  const page = await newPage();
  await page.goto(address);
  await page.waitForSelector(LIVE);
  // The refresh on going live is not measured.
  await page.waitForLoadState("networkidle");
  return page;
}

/** @param {string} address */
async function visit(address) {
  const response = await fetch(address);
  await response.text();
  // An uncached page would prove nothing.
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
  const url = `${CMS}/api/pages/${document.slug}`;
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

/** Checks that on a phone no page is wider than the screen, and that the CMS's headings are in order. */
async function looks() {
  const longWord = "Rindfleischetikettierungsüberwachungsaufgabenübertragungsgesetz";
  const version = await edit(DOCUMENTS[1], longWord);
  const page = await newPage();
  await page.setViewportSize({ width: 390, height: 844 });
  // The CMS comes last, and stays open.
  for (const address of [DOCUMENTS[1].at, `${DOCUMENTS[0].at}no-such-page`, CMS]) {
    await page.goto(address);
    if (address === DOCUMENTS[1].at) await page.waitForSelector(`[data-version="${version}"]`, { timeout: STALE_AFTER });
    const width = await page.evaluate(() => document.documentElement.scrollWidth);
    if (width > 390) throw new Error(`${address} is ${width} pixels wide on a screen of 390`);
  }
  const [h1, h2] = await Promise.all(
    ["header h1", "h2"].map((heading) => page.locator(heading).first().evaluate((each) => parseFloat(getComputedStyle(each).fontSize))),
  );
  if (h1 <= h2) throw new Error(`the CMS’s first heading has ${h1} pixels, its second ${h2}`);
  await page.context().close();
}

/** An editor at work, and the page of somebody who has it open. */
async function screenshot() {
  const page = await open(DOCUMENTS[0].at);
  const cms = await page.context().newPage();
  for (const each of [page, cms]) await each.setViewportSize({ width: 640, height: 378 });
  await cms.goto(CMS);
  const form = cms.getByRole("form", { name: "Today’s loaf" });
  await form.getByLabel("Title").fill("Walnut and honey");
  await form.getByLabel("Text").fill("Light and nutty, with honey from Ana’s bees. Still warm until ten.");
  await form.getByRole("button", { name: "Save" }).click();
  await form.locator(".saved").waitFor();
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
 * Starts a front end whose handler is slower: each request waits before it goes on.
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

function report() {
  console.log("\n| | pages checked after an edit | stale | save to screen, median | slowest |\n|---|--:|--:|--:|--:|");
  for (const { what, edits, stale, took } of rows) {
    took.sort((a, b) => a - b);
    const times = took.length > 0 ? [took[took.length >> 1], took[took.length - 1]].map((time) => `${time} ms`) : ["", ""];
    console.log(`| ${what} | ${edits} | ${stale} | ${times.join(" | ")} |`);
  }
  if (kinds.length > 0) {
    const [, ...columns] = Object.keys(kinds[0]);
    console.log(`\n| | ${columns.join(" | ")} |\n|---|${columns.map(() => "--:|").join("")}`);
    for (const { what, ...counts } of kinds) {
      const cells = Object.values(counts).map((count) => (typeof count !== "string" && count.looks ? `${count.stale} of ${count.looks}` : ""));
      console.log(`| ${what} | ${cells.join(" | ")} |`);
    }
  }
  const without = sum(kinds.map((kind) => /** @type {import("./kinds.mjs").Count} */ (kind["without the fix"])));
  if (kinds.length > 0 && without.stale === 0) console.log("\nNo page is stale without the fix: it fixes nothing, or this test sees nothing.");
  const fixed = kinds.flatMap(({ what, "without the fix": _, ...counts }) => /** @type {import("./kinds.mjs").Count[]} */ (Object.values(counts)));
  const stale = rows.filter((row) => row.relayed).reduce((all, row) => all + row.stale, sum(fixed).stale);
  const next = createRequire(import.meta.url)("next/package.json").version;
  const nats = execFileSync("nats-server", ["--version"], { encoding: "utf8" }).trim().replace(": v", " ");
  console.log(`\nNext.js ${next}, Node.js ${process.versions.node}, Chromium ${browser?.version()}, ${nats}.`);
  if (!complete) console.log("\nNot complete.");
  else console.log(stale === 0 ? "\nThrough the relay: no stale page." : `\nThrough the relay: ${stale} stale pages.`);
  return stale === 0 && (kinds.length === 0 || without.stale > 0);
}
