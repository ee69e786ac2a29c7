import type { NextConfig } from "next";

const config: NextConfig = {
  // Next.js lets browsers and CDNs cache the router's requests for a page with a lifetime
  // (stale-while-revalidate), and a refresh then gets the old page from that cache. Documents may still be
  // cached.
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
