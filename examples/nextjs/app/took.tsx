"use client";

import { useEffect, useRef, useState } from "react";

/** How long an edit took to get here. CMS and browser share a clock only on one machine. */
export function Took({ version, savedAt }: { version: number; savedAt: number | null }) {
  const loaded = useRef(version);
  const [seen, setSeen] = useState({ version, at: 0 });

  useEffect(() => {
    if (version !== loaded.current) setSeen({ version, at: Date.now() });
  }, [version]);

  const took = seen.version === version && seen.at && savedAt ? seen.at - savedAt : undefined;
  return (
    <span role="status" data-took={took}>
      {took === undefined ? "waiting for an edit" : `${took} ms`}
    </span>
  );
}
