import { Shown, source } from "../shown";

export default async function Page() {
  const response = await fetch(source("lifetime"), { next: { tags: ["loaf"], revalidate: 3600 } });
  return <Shown kind="lifetime" document={await response.json()} />;
}
