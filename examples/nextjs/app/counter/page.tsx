import { connection } from "next/server";
import { Article } from "../article";
import { getPage } from "../cms";

export default async function Counter() {
  await connection(); // Rendered for each request; only the CMS's answer is cached.
  return <Article page={await getPage("counter")} kind="Dynamic page: rendered for each visit, from a cached answer of the CMS" />;
}
