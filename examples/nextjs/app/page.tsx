import { Article } from "./article";
import { getPage } from "./cms";

export const dynamic = "error"; // Built once, then served from the cache until its tag is revalidated.

export default async function Home() {
  return <Article page={await getPage("loaf")} kind="Static page: built once, served from the cache" />;
}
