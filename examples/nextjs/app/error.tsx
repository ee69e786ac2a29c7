"use client";

// Shown instead of a page that the server could not render. It recovers the page by itself.

import { useRouter } from "next/navigation";
import { startTransition, useEffect } from "react";
import { canBeServed } from "./live";

export default function Failed({ error, reset }: { error: Error; reset: () => void }) {
  const router = useRouter();

  useEffect(() => {
    // The server may claim that it can serve a page that then still fails, so don't retry at once.
    const timer = setTimeout(async () => {
      if (!(await canBeServed())) return;
      startTransition(() => {
        router.refresh();
        reset();
      });
    }, 5_000);
    return () => clearTimeout(timer);
  }, [error, reset, router]);

  return (
    <article>
      <h1>One moment, please</h1>
      <p role="alert">This page can’t be shown right now. It will appear here as soon as it can.</p>
    </article>
  );
}
