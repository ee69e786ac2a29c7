import { Shown, source } from "../shown";

// Without a tag: api/cache/path drops it by its path.
export default async function Page() {
  const response = await fetch(source("path"), { next: { revalidate: 3600 } });
  return <Shown kind="path" document={await response.json()} />;
}
