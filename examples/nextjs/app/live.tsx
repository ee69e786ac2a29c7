"use client";

// Keeps an open page fresh. A message that arrives here has passed the relay, so the server's cache is already
// invalidated, and a refresh gets the new page.

import { type NatsConnection, type Subscription, wsconnect } from "@nats-io/nats-core";
import { useRouter } from "next/navigation";
import { useCallback, useEffect, useRef, useState, useTransition } from "react";

const LABELS = {
  connecting: "Connecting",
  live: "Live",
  offline: "Offline, reconnecting",
};

export function Live() {
  const [state, setState] = useState<keyof typeof LABELS>("connecting");
  const refresh = useRefresh();

  useEffect(() => {
    let connection: NatsConnection | undefined;
    let unmounted = false;

    function show(state: keyof typeof LABELS) {
      if (!unmounted) setState(state);
    }

    async function listen() {
      // In dev React mounts this twice in a row: only the second one connects.
      await undefined;
      if (unmounted) return;
      connection = await wsconnect({
        servers: process.env.NEXT_PUBLIC_NATS_URL,
        user: process.env.NEXT_PUBLIC_NATS_USER,
        pass: process.env.NEXT_PUBLIC_NATS_PASS,
        waitOnFirstConnect: true,
        maxReconnectAttempts: -1,
        reconnectTimeWait: 1_000,
        reconnectJitter: 1_000,
        // Notices within a minute that a laptop was asleep or has changed its network.
        pingInterval: 20_000,
      });
      if (unmounted) return connection.close();
      const subscription = connection.subscribe(process.env.NEXT_PUBLIC_NATS_SUBJECT!, {
        callback: (error) => (error ? console.error(error) : refresh()),
      });

      // If catching up fails, the connection is lost again, and there will be a reconnect.
      catchUp(connection, subscription).catch(() => {});
      for await (const status of connection.status()) {
        if (status.type === "disconnect") show("offline");
        if (status.type === "reconnect") catchUp(connection, subscription).catch(() => {});
      }
    }

    // Something may have been missed before the subscription became active.
    async function catchUp(connection: NatsConnection, subscription: Subscription) {
      await connection.flush();
      if (subscription.isClosed()) return show("offline"); // No permission.
      show("live");
      refresh();
    }

    listen()
      .catch(console.error)
      .finally(() => show("offline"));
    return () => {
      unmounted = true;
      connection?.close();
    };
  }, [refresh]);

  return (
    <p className="live" role="status" data-state={state}>
      {LABELS[state]}
    </p>
  );
}

/** Returns a function that refreshes the page. Calls during a refresh share one that follows it. */
function useRefresh() {
  const router = useRouter();
  const [wanted, setWanted] = useState(0);
  const [asking, setAsking] = useState(false);
  const [refreshing, startTransition] = useTransition();
  const last = useRef({ wanted: 0, on: "" });

  useEffect(() => {
    if (asking || refreshing) return;
    // Next.js drops a refresh if the visitor follows a link in the meantime, so it has to be repeated.
    const dropped = last.current.on && last.current.on !== location.href;
    if (last.current.wanted === wanted && !dropped) {
      last.current.on = "";
      return;
    }
    last.current = { wanted, on: location.href };
    setAsking(true);
    canBeServed().then((yes) => {
      if (yes) startTransition(() => router.refresh());
      setAsking(false);
    });
  }, [wanted, asking, refreshing, router]);

  return useCallback(() => setWanted((count) => count + 1), []);
}

/**
 * Waits until the server answers for this page, since a refresh that fails puts an error in its place.
 * Returns false if there is nothing to show, such as on a 404, where Next.js would reload.
 */
export async function canBeServed() {
  for (let wait = 500; ; wait = Math.min(2 * wait, 10_000)) {
    try {
      // Requests the whole page, because Next.js answers router.refresh() with 200 even if it fails.
      const { ok, status } = await fetch(location.href, { method: "HEAD", cache: "no-store" });
      if (ok) return true;
      if (status < 500 && status !== 429) return false;
    } catch {
      // The server can't be reached.
    }
    // Random, so that not every browser asks at the same moment.
    await new Promise((done) => setTimeout(done, wait * (0.5 + Math.random() / 2)));
  }
}
