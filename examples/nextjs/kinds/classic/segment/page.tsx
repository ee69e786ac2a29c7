import { Shown, source } from "../shown";

export const revalidate = 3600;

export default async function Page() {
  const response = await fetch(source("segment"), { next: { tags: ["loaf"] } });
  return <Shown kind="segment" document={await response.json()} />;
}
