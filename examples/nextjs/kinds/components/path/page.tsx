import { cacheLife } from "next/cache";
import { Shown, source } from "../shown";

// Without a tag: api/cache/path drops it by its path.
export default async function Page() {
  "use cache";
  cacheLife("hours");
  const response = await fetch(source("path"));
  return <Shown kind="path" document={await response.json()} />;
}
