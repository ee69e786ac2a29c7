// What all tests in a browser share.

import { chromium } from "playwright-core";

const FLAGS = [
  "--no-sandbox --disable-gpu --disable-quic --no-first-run",
  "--disable-background-networking --disable-component-update --disable-sync",
].flatMap((flags) => flags.split(" "));

export const LIVE = '[role="status"][data-state="live"]';

export function launch() {
  return chromium.launch({ executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium", args: FLAGS });
}

/** @param {string} what */
export function step(what) {
  console.error(`${new Date().toISOString().slice(11, 19)} ${what}`);
}
