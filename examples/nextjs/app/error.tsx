"use client";

// Shown instead of a page that the server could not render. It recovers the page by itself.

import { useEffect } from "react";
import { canBeServed } from "./live";

export default function Failed({ error, retry }: { error: Error; retry: () => void }) {
  useEffect(() => {
    // The server may claim that it can serve a page that then still fails, so don't retry at once.
    const timer = setTimeout(async () => {
      if (await canBeServed()) retry();
    }, 5_000);
    return () => clearTimeout(timer);
  }, [error, retry]);

  return (
    <article>
      <h1>One moment, please</h1>
      <p role="alert">This page can’t be shown right now. It will appear here as soon as it can.</p>
    </article>
  );
}
