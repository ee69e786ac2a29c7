import { connection } from "next/server";
import { Suspense } from "react";
import { Shown, source } from "../shown";

export default function Page() {
  return (
    <Suspense>
      <Fetched />
    </Suspense>
  );
}

async function Fetched() {
  await connection();
  const response = await fetch(source("fetch"), { next: { tags: ["loaf"], revalidate: 3600 } });
  return <Shown kind="fetch" document={await response.json()} />;
}
