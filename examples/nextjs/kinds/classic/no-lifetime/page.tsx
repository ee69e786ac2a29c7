import { Shown, source } from "../shown";

export default async function Page() {
  const response = await fetch(source("no-lifetime"), { cache: "force-cache", next: { tags: ["loaf"] } });
  return <Shown kind="no-lifetime" document={await response.json()} />;
}
