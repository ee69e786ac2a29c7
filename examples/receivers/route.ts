// app/api/cache/webhook/route.ts of a Next.js app: checks the header and the signature, drops the
// cache, and only then answers, for the answer is what lets the browsers refresh.
// `npm install standardwebhooks`, and set WEBHOOK_SECRET and REVALIDATE_SECRET.
import { timingSafeEqual } from "node:crypto";
import { revalidateTag } from "next/cache";
import { Webhook } from "standardwebhooks";

function isExpected(header: string | null): boolean {
  const expected = Buffer.from(process.env.REVALIDATE_SECRET!);
  const given = Buffer.from(header ?? "");
  return given.length === expected.length && timingSafeEqual(given, expected);
}

export async function POST(request: Request): Promise<Response> {
  if (!isExpected(request.headers.get("x-revalidate-secret"))) {
    return new Response("x-revalidate-secret is wrong", { status: 401 });
  }
  const payload = await request.text();
  try {
    new Webhook(process.env.WEBHOOK_SECRET!).verify(payload, Object.fromEntries(request.headers));
  } catch (error) {
    return new Response((error as Error).message, { status: 401 });
  }
  const { tags } = JSON.parse(payload) as { tags: string[] };
  for (const tag of tags) revalidateTag(tag, { expire: 0 });
  return new Response(null, { status: 204 });
}
