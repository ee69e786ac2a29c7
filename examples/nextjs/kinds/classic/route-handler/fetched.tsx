"use client";

import { useEffect, useState } from "react";
import { type Document, Shown } from "../shown";

export function Fetched({ at }: { at: number }) {
  const [document, setDocument] = useState<Document>();

  useEffect(() => {
    let latest = true;
    fetch("/api/document")
      .then((response) => response.json())
      .then((document) => latest && setDocument(document));
    return () => void (latest = false);
  }, [at]);

  return document && <Shown kind="route-handler" document={document} />;
}
