import type { NextConfig } from "next";

const config: NextConfig = {
  // Next.js lets browsers and CDNs keep what its router requests of a page with a lifetime
  // (stale-while-revalidate), and a refresh is then answered from there, with the old page. Documents may be
  // kept as before.
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
