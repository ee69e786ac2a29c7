import Link from "next/link";

export type Document = { version: number };

/** Where the document is; each kind of page has an entry of its own in the cache. */
export function source(kind: string) {
  return `${process.env.CMS_URL}/api/pages/loaf?kind=${kind}`;
}

export function Shown({ kind, document }: { kind: string; document: Document }) {
  return (
    <main data-kind={kind} data-version={document.version}>
      <h1>{kind}</h1>
      <p>Version {document.version}</p>
      <Link href="/">All kinds</Link>
    </main>
  );
}
