// A minimal receiver in Node: checks the signature, then does its work, and only then responds.
// `npm install standardwebhooks`, then WEBHOOK_SECRET=whsec_… node node.mjs
import { createServer } from "node:http";
import { Webhook, WebhookVerificationError } from "standardwebhooks";

const utf8 = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true });

async function receive(request) {
  const secret = process.env.WEBHOOK_SECRET;
  if (!secret) return [500, "WEBHOOK_SECRET is not set"];
  const webhook = new Webhook(secret);

  const chunks = [];
  for await (const chunk of request) chunks.push(chunk);
  let message;
  try {
    // Keep the byte order mark, if there is one, because it is signed too.
    const payload = utf8.decode(Buffer.concat(chunks));
    webhook.verify(payload, request.headers, { jsonParse: false });
    message = JSON.parse(payload.replace(/^\uFEFF/, ""));
  } catch (error) {
    if (error instanceof WebhookVerificationError) return [401, error.message];
    return [400, "the payload is not JSON"];
  }

  const tags = message?.tags;
  if (!Array.isArray(tags) || !tags.every((tag) => typeof tag === "string")) {
    return [400, 'expected {"tags": ["…"]}'];
  }

  // Node reads a header as Latin-1, but the subject is UTF-8.
  const subject = Buffer.from(request.headers["x-nats-subject"] ?? "", "latin1").toString();
  console.log(subject, tags);
  return [204];
}

const server = createServer((request, response) => {
  receive(request)
    // After a 500 the relay tries again, so that no edit is lost to a fault on this side. After a 400 it
    // gives up on the message, which would only be rejected again while all later ones wait.
    .catch((error) => [500, error.message])
    .then(([status, text]) => response.writeHead(status).end(text));
});

const port = Number(process.env.PORT ?? 3000);
server.listen(port, "127.0.0.1", () => console.log(`listening on http://127.0.0.1:${port}`));
