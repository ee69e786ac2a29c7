// Starts the whole example and stops it on Ctrl-C.

import { Stack, demandFreePorts, ports } from "./stack.mjs";

const chosen = ports({ site: 3000, cms: 3001, nats: 4222, websocket: 4223 });
const stack = new Stack(chosen, (name, line) => {
  if (name === "relay") console.log(`relay  ${line}`);
});
for (const signal of ["SIGINT", "SIGTERM", "SIGHUP"]) {
  process.on(signal, () => stack.stop().then(() => process.exit(0)));
}

try {
  await demandFreePorts(Object.values(chosen));
  await stack.nats();
  await stack.cms();
  console.log("Building the site ...");
  await stack.build();
  await stack.site();
  await stack.relay();
  console.log(`
Open the site  http://localhost:${chosen.site}   in a window or two,
edit in        ${stack.settings.CMS_URL}   and save.

Ctrl-C stops everything. This is what the relay says:
`);
} catch (error) {
  if (!stack.stopping) console.error(error instanceof Error ? error.message : error);
  await stack.stop();
  process.exit(1);
}
