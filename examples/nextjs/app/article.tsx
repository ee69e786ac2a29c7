import type { Page } from "./cms";
import { Took } from "./took";

export function Article({ page, kind }: { page: Page; kind: string }) {
  return (
    <article data-version={page.version}>
      <p className="kind">{kind}</p>
      <h1>{page.title}</h1>
      <p className="text">{page.text}</p>
      <dl>
        <Fact name="Version">{page.version}</Fact>
        <Fact name="Saved">{page.savedAt ? <Clock at={page.savedAt} /> : "not edited yet"}</Fact>
        <Fact name="Rendered">
          <Clock at={Date.now()} />
        </Fact>
        <Fact name="Save to screen">
          <Took version={page.version} savedAt={page.savedAt} />
        </Fact>
      </dl>
    </article>
  );
}

function Fact({ name, children }: { name: string; children: React.ReactNode }) {
  return (
    <div>
      <dt>{name}</dt>
      <dd>{children}</dd>
    </div>
  );
}

function Clock({ at }: { at: number }) {
  const iso = new Date(at).toISOString();
  return <time dateTime={iso}>{iso.slice(11, 19)} UTC</time>;
}
