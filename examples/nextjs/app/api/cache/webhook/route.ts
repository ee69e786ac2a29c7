// The relay calls this: it drops the cached responses with the message's tags. The response lets the relay tell
// the browsers, so it is sent only after the cache has been invalidated.

import { revalidateTag } from "next/cache";
import { Webhook, WebhookVerificationError } from "standardwebhooks";

const utf8 = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true });

export async function POST(request: Request) {
  // A 500 makes the relay try again: in durable mode a wrong setting loses no edit. A malformed secret throws,
  // which is a 500 too.
  const secret = process.env.WEBHOOK_SECRET;
  if (!secret) return new Response("WEBHOOK_SECRET is not set", { status: 500 });
  const webhook = new Webhook(secret);

  let message: unknown;
  try {
    // request.text() would strip a byte order mark, which is signed too.
    const payload = utf8.decode(await request.arrayBuffer());
    webhook.verify(payload, Object.fromEntries(request.headers), { jsonParse: false });
    message = JSON.parse(payload.replace(/^\uFEFF/, ""));
  } catch (error) {
    if (error instanceof WebhookVerificationError) return new Response(error.message, { status: 401 });
    return new Response("the payload is not JSON", { status: 400 });
  }

  const tags = (message as { tags?: unknown } | null)?.tags;
  if (!Array.isArray(tags) || !tags.every((tag) => typeof tag === "string")) {
    return new Response('expected {"tags": ["…"]}', { status: 400 });
  }

  // With the profile "max" the next visitor would get the stale page once more.
  for (const tag of tags) revalidateTag(tag, { expire: 0 });
  return new Response(null, { status: 204 });
}
