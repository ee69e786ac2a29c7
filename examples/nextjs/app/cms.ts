export type Page = {
  title: string;
  text: string;
  version: number;
  /** Milliseconds since 1970; null for a page that was never edited. */
  savedAt: number | null;
};

/** A page of the CMS, from the cache until its tag is revalidated. */
export async function getPage(slug: string): Promise<Page> {
  const response = await fetch(`${process.env.CMS_URL}/api/pages/${slug}`, {
    cache: "force-cache",
    next: { tags: [slug] },
  });
  if (!response.ok) throw new Error(`the CMS answered ${response.status} for ${slug}`);
  return response.json();
}
