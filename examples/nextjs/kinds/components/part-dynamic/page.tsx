import { cacheLife, cacheTag } from "next/cache";
import { headers } from "next/headers";
import { Suspense } from "react";
import { type Document, Shown, source } from "../shown";

async function get(): Promise<Document> {
  "use cache";
  cacheTag("loaf");
  cacheLife("hours");
  return (await fetch(source("part-dynamic"))).json();
}

export default async function Page() {
  const { version } = await get();
  return (
    <>
      <p>Version {version} in the static part</p>
      <Suspense>
        <Dynamic outside={version} />
      </Suspense>
    </>
  );
}

/** Shows the older one of the two versions, so that a stale half is noticed. */
async function Dynamic({ outside }: { outside: number }) {
  await headers();
  const { version } = await get();
  return <Shown kind="part-dynamic" document={{ version: Math.min(outside, version) }} />;
}
