// Does what "Copy it" in README.md says, in a fresh project of create-next-app: runs its commands, makes its
// changes, builds, edits, and counts stale pages.

import { readFileSync, writeFileSync } from "node:fs";
import { createServer } from "node:http";
import { join, resolve } from "node:path";
import { parseEnv } from "node:util";
import { connect } from "@nats-io/transport-node";
import { LIVE, launch, step } from "./browser.mjs";
import { Stack, demandFreePorts, ports } from "./stack.mjs";

const HERE = resolve(import.meta.dirname, "..");
const EDITS = Number(process.env.EDITS ?? 20);
const STALE_AFTER = 4_000;
const STALE_AFTER_IN_DEV = 30_000;

const chosen = ports({ site: 13000, cms: 13001, nats: 14222, websocket: 14223 });
const origin = `http://localhost:${chosen.site}`;
const stack = new Stack(chosen);
for (const signal of ["SIGINT", "SIGTERM", "SIGHUP"]) {
  process.on(signal, () => stack.stop().then(() => process.exit(130)));
}
/** The user's own CMS: one document and its version. */
let version = 1;
const cms = createServer((_, response) => response.end(JSON.stringify({ version })));
/** @type {import("playwright-core").Browser | undefined} */
let browser;
let ok = false;

try {
  await demandFreePorts(Object.values(chosen));
  browser = await launch();
  ok = await copyAndCount();
} catch (error) {
  if (!stack.stopping) console.error(error, `\nThe relay said:\n${stack.output("relay").slice(-2_000)}`);
} finally {
  await browser?.close();
  cms.close();
  await stack.stop();
}
process.exit(ok ? 0 : 1);

async function copyAndCount() {
  await new Promise((done) => cms.listen(chosen.cms, "127.0.0.1", () => done(undefined)));
  step("a fresh project of create-next-app");
  const creator = ["--yes", "create-next-app@latest", "site", "--yes", "--empty", "--use-npm", "--disable-git"];
  await stack.run("npx", creator, stack.directory);
  const directory = join(stack.directory, "site");

  step("what README.md says");
  const readme = readFileSync(join(HERE, "README.md"), "utf8");
  const section = readme.split("\n## Copy it\n")[1].split("\n## ")[0];
  const [copy, startNats, createStream, ...more] = [...section.matchAll(/^```sh\n(.*?)^```$/gms)].map(([, block]) => block);
  if (!createStream || more.length > 0) throw new Error("README.md has commands that this test does not know");
  await stack.run("bash", ["-euc", copy.replace("~/nats-webhook-relay", resolve(HERE, "../.."))], directory);
  for (const name of [".env", "nats.conf"]) change(name, (text) => stack.withPorts(text));
  const [headers] = readFileSync(join(HERE, "next.config.ts"), "utf8").match(/^  async headers.*?^  },$/ms) ?? [];
  change("next.config.ts", (text) => text.replace("/* config options here */", headers ?? ""));
  change("app/layout.tsx", (text) => `import { Live } from "./live";\n${text.replace("<body>", "<body><Live />")}`);
  // Their own page, with a tag.
  change("app/page.tsx", () => `import { cacheLife, cacheTag } from "next/cache";

export default async function Page() {
  "use cache";
  cacheTag("home");
  cacheLife("hours");
  const response = await fetch(process.env.CMS_URL!);
  const { version } = await response.json();
  return <main data-version={version}>Version {version}</main>;
}
`);

  // Everything finds its settings in the project's .env by itself.
  const settings = parseEnv(readFileSync(join(directory, ".env"), "utf8"));
  stack.settings = {};
  await stack.start("nats", "bash", ["-euc", startNats], directory, "Server is ready");
  await stack.run("bash", ["-euc", stack.withPorts(createStream)], directory);
  await stack.relay({}, "relay", directory);
  const nats = await connect({ servers: settings.NATS_HOST, user: settings.CMS_NATS_USER, pass: settings.CMS_NATS_PASS });

  step("in dev");
  await stack.next("dev", directory);
  let stale = await count(nats, STALE_AFTER_IN_DEV);
  await stack.end("site");
  step("in production");
  await stack.nextBuild(directory);
  await stack.next("start", directory);
  stale += await count(nats, STALE_AFTER);
  await nats.close();
  console.log(`In a fresh project: ${EDITS} edits in dev, ${EDITS} in production, ${stale} stale.`);
  return stale === 0;

  /** @param {string} name @param {(text: string) => string} how */
  function change(name, how) {
    const file = join(directory, name);
    const before = readFileSync(file, "utf8");
    const after = how(before);
    if (after === before) throw new Error(`${file} is not changed`);
    writeFileSync(file, after);
  }
}

/**
 * @param {import("@nats-io/transport-node").NatsConnection} nats
 * @param {number} timeout
 * @returns {Promise<number>} how many edits the page does not show
 */
async function count(nats, timeout) {
  if (!browser) throw new Error("no browser");
  const page = await browser.newPage();
  /** @type {string[]} */
  const errors = [];
  page.on("console", (message) => {
    // An empty project has no icon.
    if (message.type() === "error" && !message.location().url.endsWith("/favicon.ico")) errors.push(message.text());
  });
  page.on("pageerror", (error) => errors.push(String(error)));
  await page.goto(origin);
  await page.waitForSelector(LIVE, { timeout: 60_000 });
  let stale = 0;
  for (let edit = 0; edit < EDITS; edit++) {
    version += 1;
    nats.publish("cms.cache.pages.home", '{"tags":["home"]}');
    await page.waitForSelector(`[data-version="${version}"]`, { timeout }).catch(() => (stale += 1));
    await (await fetch(origin)).text();
  }
  await page.close();
  if (errors.length > 0) throw new Error(`errors in the browser’s console:\n${errors.join("\n")}`);
  return stale;
}
