// Counts stale pages for every kind of page that people have: pages that stay open, links that were
// prefetched before the edit, going back, and pages that are opened later. The pages are in ../kinds, and here they become projects with
// the files that people copy.

import { cpSync, readFileSync, writeFileSync } from "node:fs";
import { join, resolve } from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import { LIVE, step } from "./browser.mjs";

/** @typedef {import("playwright-core").Page} BrowserPage */
/** @typedef {{ looks: number, stale: number }} Count */
/** @typedef {"open page" | "opened later" | "by a link" | "back" | "link during an edit"} Way */
/** @typedef {Record<Way, Count>} Counts */
/** @typedef {{ variant: string, basePath: string, options: string, kinds: Record<string, string> }} Project */

const HERE = resolve(import.meta.dirname, "..");
/**
 * A page that doesn't show an edit after this time is stale, in milliseconds. It would stay stale; the time is for a
 * busy machine that loads and renders a dozen pages at once.
 */
const STALE_AFTER = 10_000;
const STALE_AFTER_IN_DEV = 30_000;
/** How many kinds are checked at a time. In dev every page is rendered anew, for every request. */
const AT_A_TIME = 8;
const AT_A_TIME_IN_DEV = 2;
const ALL = "all";

/** @type {Project[]} */
export const PROJECTS = [
  {
    variant: "classic",
    basePath: "",
    options: "",
    kinds: {
      "no-lifetime": "static, `fetch` without a lifetime",
      lifetime: "static, `fetch` with `revalidate: 3600`",
      segment: "static, `export const revalidate = 3600`",
      "in/de": "static, in a second language, rendered when first asked for",
      dynamic: "dynamic, `fetch` with `revalidate: 3600`",
      "unstable-cache": "`unstable_cache`",
      "route-handler": "fetched from a route handler’s `GET` in the browser",
      path: "no tag, dropped by `revalidatePath`",
    },
  },
  {
    variant: "components",
    basePath: "/shop",
    options: 'cacheComponents: true, partialPrefetching: true, basePath: "/shop",',
    kinds: {
      "use-cache": "`\"use cache\"` page, `cacheTag`, `cacheLife`",
      "use-cache-function": "`\"use cache\"` function, `cacheTag`, `cacheLife`",
      "part-dynamic": "static shell, dynamic part",
      fetch: "dynamic part, `fetch` with `revalidate: 3600`",
      "in/de": "`\"use cache\"` page in a second language",
      path: "no tag, dropped by `revalidatePath`",
    },
  },
];

/**
 * Puts a project together: pages of the test's own, and the files that people copy.
 * @param {string} directory
 * @param {Project} project
 */
export function assemble(directory, { variant, options }, fixed = true) {
  for (const part of ["shared", variant]) cpSync(join(HERE, "kinds", part), join(directory, "app"), { recursive: true });
  for (const file of ["api/cache/webhook/route.ts", "live.tsx", "error.tsx"]) {
    cpSync(join(HERE, "app", file), join(directory, "app", file));
  }
  cpSync(join(HERE, "next.config.ts"), join(directory, "next.config.ts"));
  replace(join(directory, "next.config.ts"), "= {", `= { ${options}`);
  if (!fixed) replace(join(directory, "next.config.ts"), "return [", "return []; return [");
}

/**
 * The same for Next.js 15, with the change that README.md names.
 * @param {string} directory
 */
export function assembleForNext15(directory) {
  assemble(directory, PROJECTS[0]);
  replace(join(directory, "app/api/cache/webhook/route.ts"), "revalidateTag(tag, { expire: 0 })", "revalidateTag(tag)");
}

/**
 * @param {string} file
 * @param {string} from
 * @param {string} to
 */
function replace(file, from, to) {
  const text = readFileSync(file, "utf8");
  if (!text.includes(from)) throw new Error(`${file} has no ${from}`);
  writeFileSync(file, text.replaceAll(from, to));
}

/**
 * Edits again and again, and looks at every kind of page.
 * @param {object} options
 * @param {import("playwright-core").Browser} options.browser
 * @param {string} options.origin
 * @param {Project} options.project
 * @param {(title: string) => Promise<number>} options.edit returns the new version
 * @param {number} options.rounds of three edits each
 * @param {boolean} [options.dev]
 * @returns {Promise<Map<string, Counts>>} by kind
 */
export async function countStale(options) {
  const { origin, project, dev } = options;
  const names = Object.keys(project.kinds);
  // In dev the first request compiles.
  for (const name of ["", ...names]) await visit(`${origin}${project.basePath}/${name}`);
  for (const handler of ["webhook", "path"]) await fetch(`${origin}${project.basePath}/api/cache/${handler}`, { method: "POST" });
  const atATime = dev ? AT_A_TIME_IN_DEV : AT_A_TIME;
  /** @type {Map<string, Counts>} */
  const counts = new Map();
  for (let at = 0; at < names.length; at += atATime) {
    for (const [name, count] of await countSome(options, names.slice(at, at + atATime))) counts.set(name, count);
  }
  return counts;
}

/**
 * @param {Parameters<typeof countStale>[0]} options
 * @param {string[]} names
 */
async function countSome({ browser, origin, project, edit, rounds, dev = false }, names) {
  const site = `${origin}${project.basePath}`;
  const timeout = dev ? STALE_AFTER_IN_DEV : STALE_AFTER;
  /** @type {Map<string, Counts>} */
  const counts = new Map();
  /** @type {{ name: string, open: BrowserPage, visitor: BrowserPage }[]} */
  const kinds = [];
  for (const name of names) {
    const count = () => ({ looks: 0, stale: 0 });
    counts.set(name, { "open page": count(), "opened later": count(), "by a link": count(), back: count(), "link during an edit": count() });
    const open = await openPage(browser, `${site}/${name}`);
    kinds.push({ name, open, visitor: await openPage(browser, site) });
  }

  /** @param {BrowserPage} page @param {string} name @param {number} version */
  async function shows(page, name, version) {
    try {
      await page.waitForSelector(`main[data-kind="${name}"][data-version="${version}"]:visible`, { timeout });
      return true;
    } catch {
      return false;
    }
  }
  /** @param {string} name @param {Way} way @param {boolean} fresh */
  function note(name, way, fresh) {
    const count = /** @type {Counts} */ (counts.get(name))[way];
    count.looks += 1;
    if (fresh) return;
    count.stale += 1;
    step(`  stale: ${name}, ${way}`);
  }
  /** An edit, and a look at every open page. @param {string} title */
  async function editAndLook(title) {
    const version = await edit(title);
    const looks = kinds.map(async ({ name, open }) => note(name, "open page", await shows(open, name, version)));
    return { version, looked: Promise.all(looks) };
  }
  /** Fills the caches again, even if no browser asked. */
  async function otherVisitors() {
    await Promise.all(["", ...names].map((name) => visit(`${site}/${name}`)));
    await Promise.all(kinds.flatMap(({ open, visitor }) => [quiet(open), quiet(visitor)]));
  }
  /** @param {BrowserPage} page @param {string} name */
  async function follow(page, name) {
    await page.locator("a:visible", { hasText: new RegExp(`^${name === ALL ? "All kinds" : name}$`) }).first().click();
  }

  for (let round = 1; round <= rounds; round++) {
    // A link that was prefetched before the edit, followed when the edit has arrived.
    await otherVisitors();
    const first = await editAndLook(`Edit ${round}, then a link`);
    await Promise.all(
      kinds.map(async ({ name, visitor }) => {
        await shows(visitor, ALL, first.version);
        await follow(visitor, name);
        note(name, "by a link", await shows(visitor, name, first.version));
        await follow(visitor, ALL);
        await visitor.waitForSelector(`main[data-kind="${ALL}"]:visible`);
      }),
    );
    await first.looked;

    // Back to a page that was left before the edit.
    await otherVisitors();
    const second = await editAndLook(`Edit ${round}, then back`);
    await Promise.all(
      kinds.map(async ({ name, visitor }) => {
        await shows(visitor, ALL, second.version);
        await visitor.goBack();
        note(name, "back", await shows(visitor, name, second.version));
        await follow(visitor, ALL);
        await visitor.waitForSelector(`main[data-kind="${ALL}"]:visible`);
      }),
    );
    await second.looked;

    // A link that is followed just when the edit arrives.
    await otherVisitors();
    const third = editAndLook(`Edit ${round}, and a link meanwhile`);
    await Promise.all(
      kinds.map(async ({ name, visitor }) => {
        await sleep(Math.random() * 200);
        await follow(visitor, name);
        note(name, "link during an edit", await shows(visitor, name, (await third).version));
        await follow(visitor, ALL);
        await visitor.waitForSelector(`main[data-kind="${ALL}"]:visible`);
      }),
    );
    await (await third).looked;

    // If a shared cache has the old document, the page opens with it.
    await Promise.all(
      kinds.map(async ({ name, open }) => {
        await open.reload();
        note(name, "opened later", await shows(open, name, (await third).version));
      }),
    );
  }

  await Promise.all(kinds.flatMap(({ open, visitor }) => [open.context().close(), visitor.context().close()]));
  return counts;
}

/** @type {WeakMap<BrowserPage, { open: number, since: number }>} */
const requests = new WeakMap();

/**
 * Opens a page as a new visitor, and waits until it is live.
 * @param {import("playwright-core").Browser} browser
 * @param {string} address
 */
async function openPage(browser, address) {
  const context = await browser.newContext();
  const page = await context.newPage();
  const seen = { open: 0, since: Date.now() };
  requests.set(page, seen);
  page.on("request", () => (seen.open++, (seen.since = Date.now())));
  for (const event of /** @type {const} */ (["requestfinished", "requestfailed"])) {
    page.on(/** @type {"requestfinished"} */ (event), () => (seen.open--, (seen.since = Date.now())));
  }
  await page.goto(address);
  await page.waitForSelector(LIVE, { timeout: 60_000 });
  return page;
}

/** Waits until a page has requested nothing for a while: its links are prefetched. @param {BrowserPage} page */
async function quiet(page) {
  const seen = requests.get(page);
  const deadline = Date.now() + 5_000;
  while (seen && Date.now() < deadline && (seen.open > 0 || Date.now() - seen.since < 200)) await sleep(20);
}

/** @param {string} address @returns {Promise<string | null>} what the shared cache says of it */
export async function visit(address) {
  const response = await fetch(address);
  await response.text();
  if (!response.ok) throw new Error(`${address} answered ${response.status}`);
  return response.headers.get("x-cache");
}
