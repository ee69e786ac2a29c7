"use client";

import { useEffect, useRef, useState } from "react";

/** How long an edit took to get here. CMS and browser share a clock only on one machine. */
export function Took({ version, savedAt }: { version: number; savedAt: number | null }) {
  const loaded = useRef(version);
  const [took, setTook] = useState<number>();

  useEffect(() => {
    if (version !== loaded.current && savedAt) setTook(Date.now() - savedAt);
  }, [version, savedAt]);

  return (
    <span role="status" data-took={took}>
      {took === undefined ? "waiting for an edit" : `${took} ms`}
    </span>
  );
}
