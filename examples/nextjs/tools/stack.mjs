// The parts of the example as processes: nats-server, CMS, Next.js and relay. `start` and `test`
// share them.

import { spawn } from "node:child_process";
import { createHash } from "node:crypto";
import { cpSync, existsSync, mkdirSync, mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { createRequire } from "node:module";
import { createServer } from "node:net";
import { tmpdir } from "node:os";
import { join, resolve } from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import { parseEnv } from "node:util";

const HERE = resolve(import.meta.dirname, "..");
// From tools/prepare.
const RELAY = resolve(HERE, process.env.RELAY ?? "");
/** Longer than any part takes to start on a slow machine. */
const PATIENCE = 120_000;

/** @typedef {Record<string, string>} Variables */
/** @typedef {{ site: number, cms: number, nats: number, websocket: number }} Ports */

/**
 * The ports, each from the environment or the default.
 * @param {Ports} defaults
 * @returns {Ports}
 */
export function ports(defaults) {
  const { SITE_PORT, CMS_PORT, NATS_CLIENT_PORT, NATS_WEBSOCKET_PORT } = process.env;
  return {
    site: Number(SITE_PORT ?? defaults.site),
    cms: Number(CMS_PORT ?? defaults.cms),
    nats: Number(NATS_CLIENT_PORT ?? defaults.nats),
    websocket: Number(NATS_WEBSOCKET_PORT ?? defaults.websocket),
  };
}

/** Returns the program of a project's own Next.js. @param {string} directory */
function nextOf(directory) {
  return createRequire(join(directory, "package.json")).resolve("next/dist/bin/next");
}

/** @param {number[]} wanted */
export async function demandFreePorts(wanted) {
  for (const port of wanted) {
    const server = createServer();
    await new Promise((done, fail) => {
      server.once("error", () => fail(new Error(`port ${port} is taken; see README.md for how to choose others`)));
      server.listen(port, "127.0.0.1", () => server.close(done));
    });
  }
}

/** Everything that was started; `stop` ends all of it. */
export class Stack {
  /** @type {Map<string, Part>} */
  parts = new Map();
  directory = mkdtempSync(join(tmpdir(), "nextjs-example-"));
  /** @type {string[]} */
  copies = [];
  /** @type {Promise<void> | undefined} */
  stopping;

  /**
   * @param {Ports} ports
   * @param {(name: string, line: string) => void} onLine
   */
  constructor(ports, onLine = () => {}) {
    this.ports = ports;
    this.onLine = onLine;
    this.settings = /** @type {Variables} */ (parseEnv(this.#example(".env.example")));
    // Whatever happens: no process survives this one.
    process.once("exit", () => this.#kill());
  }

  /**
   * @param {(config: string) => string} change
   */
  async nats(change = (config) => config) {
    const config = change(this.#example("nats.conf"));
    const directory = join(this.directory, "nats");
    mkdirSync(directory, { recursive: true });
    writeFileSync(join(directory, "nats.conf"), config);
    writeFileSync(join(directory, ".env"), this.#example(".env.example"));
    // The command that nats.conf itself names.
    const command = config.match(/^# (.*)/)?.[1] ?? "";
    const part = this.#start("nats", "sh", ["-c", command], {}, { cwd: directory });
    await part.says("Server is ready");
  }

  /** @param {Variables} changes */
  async cms(changes = {}) {
    const part = this.#start("cms", process.execPath, [join(HERE, "cms/server.mjs")], { ...this.settings, ...changes });
    await part.says("CMS at");
  }

  /** Runs `next build`, unless the last one used the same files and settings. */
  async build() {
    const stamp = join(HERE, ".next/made-of");
    const hash = this.#buildHash();
    if (existsSync(stamp) && readFileSync(stamp, "utf8") === hash) return;
    rmSync(stamp, { force: true });
    await this.nextBuild(HERE);
    writeFileSync(stamp, hash);
  }

  /**
   * Runs `next build` in any project.
   * @param {string} directory
   */
  async nextBuild(directory) {
    await this.run(process.execPath, [nextOf(directory), "build"], directory, this.settings);
  }

  /**
   * Runs a program that must succeed.
   * @param {string} program
   * @param {string[]} args
   * @param {string} directory
   * @param {Variables} variables
   */
  async run(program, args, directory, variables = {}) {
    const part = this.#start("program", program, args, variables, { cwd: directory, mayEnd: true });
    const code = await part.ended;
    if (code !== 0) throw new Error(`${[program, ...args].join(" ")} failed (${code}):\n${part.output}`);
    return part.output;
  }

  /**
   * Starts Next.js on a copy of the build.
   * @param {number} port
   * @param {string} name
   * @param {Variables} changes
   */
  async site(port = this.ports.site, name = "site", changes = {}) {
    const copy = join(HERE, `.next-${name}-${process.pid}`);
    if (!this.copies.includes(copy)) {
      this.copies.push(copy);
      cpSync(join(HERE, ".next"), join(copy, ".next"), { recursive: true, filter: (path) => !path.endsWith(".next/cache/turbopack") });
    }
    await this.next("start", copy, port, name, changes);
  }

  /**
   * Starts Next.js in any project.
   * @param {"start" | "dev"} command
   * @param {string} directory
   * @param {number} port
   * @param {string} name
   * @param {Variables} changes
   */
  async next(command, directory, port = this.ports.site, name = "site", changes = {}) {
    // In dev a browser gets no scripts from another host name than this one.
    const args = [nextOf(directory), command, "--port", String(port), "--hostname", command === "dev" ? "localhost" : "127.0.0.1"];
    const part = this.#start(name, process.execPath, args, { ...this.settings, ...changes }, { cwd: directory });
    await part.says("Ready in");
  }

  /**
   * Creates an empty directory below the example, from which Next.js finds the example's packages.
   * @param {string} name
   */
  project(name) {
    const directory = join(HERE, `.next-${name}-${process.pid}`);
    this.copies.push(directory);
    mkdirSync(directory);
    return directory;
  }

  /**
   * @param {Variables} changes
   * @param {string} name
   * @param {string} directory where it looks for .env
   */
  async relay(changes = {}, name = "relay", directory = this.directory) {
    const part = this.#start(name, RELAY, [], { ...this.settings, ...changes }, { cwd: directory });
    await part.says("listening on");
  }

  /**
   * Starts a shared cache in front of a site, which does what the site's Cache-Control and Vary say, as a CDN does.
   * @param {number} port
   */
  async sharedCache(port) {
    const directory = mkdtempSync(join(this.directory, "nginx-"));
    const temporary = ["client_body", "proxy", "fastcgi", "scgi", "uwsgi"].map((name) => `${name}_temp_path ${directory}/${name};`);
    const config = `
      daemon off;
      pid ${directory}/pid;
      error_log stderr notice;
      ${process.getuid?.() === 0 ? "user root;" : ""}
      events {}
      http {
        access_log off;
        ${temporary.join(" ")}
        proxy_cache_path ${directory}/cache keys_zone=pages:1m;
        server {
          listen 127.0.0.1:${port};
          location / {
            proxy_pass http://127.0.0.1:${this.ports.site};
            proxy_http_version 1.1;
            proxy_set_header Host $http_host;
            proxy_cache pages;
            add_header X-Cache $upstream_cache_status;
          }
        }
      }`;
    writeFileSync(join(directory, "nginx.conf"), config);
    const args = ["-c", join(directory, "nginx.conf"), "-e", "stderr"];
    await this.start("shared-cache", "nginx", args, directory, "start worker process ");
  }

  /**
   * Starts any other program.
   * @param {string} name
   * @param {string} program
   * @param {string[]} args
   * @param {string} directory
   * @param {string} ready what it says once it is
   */
  async start(name, program, args, directory, ready) {
    await this.#start(name, program, args, {}, { cwd: directory }).says(ready);
  }

  /**
   * Starts the receiver without a framework.
   * @param {number} port
   * @param {Variables} changes
   */
  async receiver(port, changes = {}) {
    // Where it finds the packages.
    const file = join(HERE, ".next/receiver.mjs");
    cpSync(resolve(HERE, "../receivers/node.mjs"), file);
    const part = this.#start("receiver", process.execPath, [file], { ...this.settings, PORT: String(port), ...changes });
    await part.says("listening on");
  }

  /** @param {string} name */
  async end(name) {
    const part = this.parts.get(name);
    this.parts.delete(name);
    await part?.end();
  }

  /** Returns what the part has printed so far. @param {string} name */
  output(name) {
    return this.parts.get(name)?.output ?? "";
  }

  /** Ends everything, each part after those that use it. */
  stop() {
    this.stopping ??= (async () => {
      for (const name of [...this.parts.keys()].reverse()) await this.end(name);
      this.#removeFiles();
    })();
    return this.stopping;
  }

  #kill() {
    for (const part of this.parts.values()) part.kill();
    this.#removeFiles();
  }

  #removeFiles() {
    for (const copy of this.copies) rmSync(copy, { recursive: true, force: true });
    rmSync(this.directory, { recursive: true, force: true });
  }

  /**
   * @param {string} name
   * @param {string} program
   * @param {string[]} args
   * @param {Variables} variables
   */
  #start(name, program, args, variables, { cwd = this.directory, mayEnd = false } = {}) {
    if (this.stopping) throw new Error("stopping");
    // Unless told otherwise, a part finds no .env and leaves no data where the example is.
    const part = new Part(name, program, args, { cwd, env: { ...process.env, NEXT_TELEMETRY_DISABLED: "1", ...variables } }, this.onLine);
    this.parts.set(name, part);
    part.ended.then((code) => {
      const expected = mayEnd || this.parts.get(name) !== part || this.stopping;
      if (mayEnd) this.parts.delete(name);
      if (!expected) this.onBroken(new Error(`${name} ended by itself (${code}):\n${part.output.slice(-2_000)}`));
    });
    return part;
  }

  /** Called when a part ends unexpectedly. @param {Error} error */
  onBroken(error) {
    console.error(error.message);
    process.exitCode = 1;
    this.stop().then(() => process.exit());
  }

  /** Returns one of the example's files, with the ports put in. @param {string} name */
  #example(name) {
    return this.withPorts(readFileSync(join(HERE, name), "utf8"));
  }

  /** @param {string} text */
  withPorts(text) {
    const { site, cms, nats, websocket } = this.ports;
    /** @type {Record<string, number>} */
    const ports = { 3000: site, 3001: cms, 4222: nats, 4223: websocket };
    return text.replaceAll(/(?<=:)(3000|3001|4222|4223)\b/g, (port) => String(ports[port]));
  }

  #buildHash() {
    const files = readdirSync(join(HERE, "app"), { recursive: true, withFileTypes: true })
      .filter((entry) => entry.isFile())
      .map((entry) => join(entry.parentPath, entry.name));
    const hash = createHash("sha256");
    for (const file of [...files, join(HERE, "next.config.ts"), join(HERE, "package-lock.json")].sort()) {
      hash.update(file).update(readFileSync(file));
    }
    for (const [name, value] of Object.entries(this.settings)) {
      if (name.startsWith("NEXT_PUBLIC_") || name === "CMS_URL") hash.update(`${name}=${value}\n`);
    }
    return hash.digest("hex");
  }
}

/** One process, with what it printed. */
class Part {
  output = "";

  /**
   * @param {string} name
   * @param {string} program
   * @param {string[]} args
   * @param {{ cwd: string, env: NodeJS.ProcessEnv }} options
   * @param {(name: string, line: string) => void} onLine
   */
  constructor(name, program, args, options, onLine) {
    this.name = name;
    // A process group of its own: Ctrl-C reaches only this program, which then ends the parts in order.
    this.process = spawn(program, args, { ...options, detached: true, stdio: ["ignore", "pipe", "pipe"] });
    for (const stream of [this.process.stdout, this.process.stderr]) {
      let rest = "";
      stream.setEncoding("utf8").on("data", (text) => {
        this.output = (this.output + text).slice(-1_000_000);
        const lines = (rest + text).split("\n");
        rest = lines.pop() ?? "";
        for (const line of lines) onLine(name, line);
      });
    }
    this.ended = /** @type {Promise<number | string | null>} */ (
      new Promise((done) => {
        this.process.once("error", (error) => done(error.message));
        this.process.once("close", (code, signal) => done(code ?? signal));
      })
    );
  }

  /** Waits until the output matches. @param {string} pattern */
  async says(pattern) {
    const deadline = Date.now() + PATIENCE;
    let ended = false;
    this.ended.then(() => (ended = true));
    while (!new RegExp(pattern).test(this.output)) {
      if (ended || Date.now() > deadline) throw new Error(`${this.name} did not start:\n${this.output}`);
      await sleep(10);
    }
  }

  async end() {
    this.#signal("SIGTERM");
    const late = setTimeout(() => this.kill(), 25_000);
    await this.ended;
    clearTimeout(late);
    // Its children, too.
    this.kill();
  }

  kill() {
    this.#signal("SIGKILL");
  }

  /** @param {NodeJS.Signals} signal */
  #signal(signal) {
    try {
      if (this.process.pid) process.kill(-this.process.pid, signal);
    } catch {
      // It has ended already.
    }
  }
}
