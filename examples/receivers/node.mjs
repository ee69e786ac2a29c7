// The smallest receiver in Node: checks the header and the signature, then does its work, and only
// then answers. `npm install standardwebhooks`, then
// WEBHOOK_SECRET=whsec_… REVALIDATE_SECRET=… node node.mjs
import { createServer } from "node:http";
import { timingSafeEqual } from "node:crypto";
import { Webhook } from "standardwebhooks";

const webhook = new Webhook(process.env.WEBHOOK_SECRET);
const expected = Buffer.from(process.env.REVALIDATE_SECRET);

const server = createServer(async (request, response) => {
  const header = Buffer.from(request.headers["x-revalidate-secret"] ?? "");
  if (header.length !== expected.length || !timingSafeEqual(header, expected)) {
    return response.writeHead(401).end("x-revalidate-secret is wrong");
  }
  const chunks = [];
  for await (const chunk of request) chunks.push(chunk);
  const payload = Buffer.concat(chunks);
  try {
    webhook.verify(payload.toString(), request.headers);
  } catch (error) {
    return response.writeHead(401).end(error.message);
  }
  console.log(request.headers["x-nats-subject"], payload.toString());
  response.writeHead(204).end();
});

server.listen(Number(process.env.PORT ?? 3000), "127.0.0.1");
