import { unstable_cache } from "next/cache";
import { type Document, Shown, source } from "../shown";

const get = unstable_cache(
  async (): Promise<Document> => (await fetch(source("unstable-cache"), { cache: "no-store" })).json(),
  ["document"],
  { tags: ["loaf"], revalidate: 3600 },
);

export default async function Page() {
  return <Shown kind="unstable-cache" document={await get()} />;
}
