// app/api/cache/webhook/route.ts of a Next.js app: checks the header and the signature, drops the
// cache, and only then answers, for the answer is what lets the browsers refresh.
// `npm install standardwebhooks`, and set WEBHOOK_SECRET and REVALIDATE_SECRET.
import { timingSafeEqual } from "node:crypto";
import { revalidateTag } from "next/cache";
import { Webhook, WebhookVerificationError } from "standardwebhooks";

function isExpected(header: string | null): boolean {
  const expected = Buffer.from(process.env.REVALIDATE_SECRET!);
  const given = Buffer.from(header ?? "");
  return given.length === expected.length && timingSafeEqual(given, expected);
}

export async function POST(request: Request): Promise<Response> {
  if (!isExpected(request.headers.get("x-revalidate-secret"))) {
    return new Response("x-revalidate-secret is wrong", { status: 401 });
  }
  let tags: string[];
  try {
    const headers = Object.fromEntries(request.headers);
    const message = new Webhook(process.env.WEBHOOK_SECRET!).verify(await request.text(), headers);
    tags = [...(message as { tags: string[] }).tags];
  } catch (error) {
    // No 500: the relay would try again, and all that follows would wait.
    const status = error instanceof WebhookVerificationError ? 401 : 400;
    return new Response((error as Error).message, { status });
  }
  for (const tag of tags) revalidateTag(tag, { expire: 0 });
  return new Response(null, { status: 204 });
}
