import Link from "next/link";
import { type Document, Shown, source } from "./shown";

const KINDS = ["no-lifetime", "lifetime", "segment", "dynamic", "unstable-cache", "route-handler", "in/de", "path"];

export default async function All() {
  const response = await fetch(source("all"), { cache: "force-cache", next: { tags: ["loaf"] } });
  const document: Document = await response.json();
  return (
    <>
      <Shown kind="all" document={document} />
      {KINDS.map((kind) => (
        <Link key={kind} href={`/${kind}`}>
          {kind}
        </Link>
      ))}
    </>
  );
}
