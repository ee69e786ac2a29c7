import { connection } from "next/server";
import { Shown, source } from "../shown";

export default async function Page() {
  await connection();
  const response = await fetch(source("dynamic"), { next: { tags: ["loaf"], revalidate: 3600 } });
  return <Shown kind="dynamic" document={await response.json()} />;
}
