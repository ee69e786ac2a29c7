import { source } from "../../shown";

export const revalidate = 3600;

export async function GET() {
  const response = await fetch(source("route-handler"), { next: { tags: ["loaf"] } });
  // For browsers and CDNs; Next.js keeps it all the same.
  return Response.json(await response.json(), { headers: { "cache-control": "no-store" } });
}
