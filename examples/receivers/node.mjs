// The smallest receiver in Node: checks the header and the signature, then does its work, and only
// then answers. `npm install standardwebhooks`, then
// WEBHOOK_SECRET=whsec_… REVALIDATE_SECRET=… node node.mjs
import { createServer } from "node:http";
import { timingSafeEqual } from "node:crypto";
import { Webhook, WebhookVerificationError } from "standardwebhooks";

const webhook = new Webhook(process.env.WEBHOOK_SECRET);
const expected = Buffer.from(process.env.REVALIDATE_SECRET);

const server = createServer(async (request, response) => {
  const header = Buffer.from(request.headers["x-revalidate-secret"] ?? "");
  if (header.length !== expected.length || !timingSafeEqual(header, expected)) {
    return response.writeHead(401).end("x-revalidate-secret is wrong");
  }
  const chunks = [];
  let message;
  try {
    for await (const chunk of request) chunks.push(chunk);
    message = webhook.verify(Buffer.concat(chunks).toString(), request.headers);
  } catch (error) {
    // A wrong signature, or no JSON. No 500: the relay would try again, and all that follows would wait.
    const status = error instanceof WebhookVerificationError ? 401 : 400;
    return response.writeHead(status).end(error.message);
  }
  console.log(request.headers["x-nats-subject"], message);
  response.writeHead(204).end();
});

server.listen(Number(process.env.PORT ?? 3000), "127.0.0.1");
