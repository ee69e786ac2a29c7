import { cacheLife, cacheTag } from "next/cache";
import Link from "next/link";
import { Shown, source } from "./shown";

const KINDS = ["use-cache", "use-cache-function", "part-dynamic", "fetch", "in/de", "path"];

export default async function All() {
  "use cache";
  cacheTag("loaf");
  cacheLife("hours");
  const response = await fetch(source("all"));
  return (
    <>
      <Shown kind="all" document={await response.json()} />
      {KINDS.map((kind) => (
        <Link key={kind} href={`/${kind}`}>
          {kind}
        </Link>
      ))}
    </>
  );
}
