import type { NextConfig } from "next";

const config: NextConfig = {
  // `start` and `test` run copies of one build, so that no run finds the cache of an earlier one.
  distDir: process.env.DIST_DIR || ".next",
  // The repository around this example is no part of it.
  turbopack: { root: import.meta.dirname },
  poweredByHeader: false,
};

export default config;
