import { cacheLife, cacheTag } from "next/cache";
import { type Document, Shown, source } from "../shown";

async function get(): Promise<Document> {
  "use cache";
  cacheTag("loaf");
  cacheLife({ stale: 300, revalidate: 900, expire: 86_400 });
  return (await fetch(source("use-cache-function"))).json();
}

export default async function Page() {
  return <Shown kind="use-cache-function" document={await get()} />;
}
