import type { NextConfig } from "next";

const config: NextConfig = {
  // To a page with a lifetime Next.js adds "stale-while-revalidate", and the browser then answers a refresh
  // from its own cache, with the old page. This holds for the data that the router requests, so that a CDN
  // may still keep the documents.
  async headers() {
    return [
      {
        source: "/:path*",
        has: [{ type: "header", key: "rsc" }],
        headers: [{ key: "Cache-Control", value: "no-store" }],
      },
    ];
  },
};

export default config;
