import { cacheLife, cacheTag } from "next/cache";
import { Shown, source } from "../shown";

export default async function Page() {
  "use cache";
  cacheTag("loaf");
  cacheLife("hours");
  const response = await fetch(source("use-cache"));
  return <Shown kind="use-cache" document={await response.json()} />;
}
