import { cacheLife, cacheTag } from "next/cache";
import { Shown, source } from "../../shown";

export function generateStaticParams() {
  return [{ locale: "en" }, { locale: "de" }];
}

export const instant = false;

export default async function Page({ params }: { params: Promise<{ locale: string }> }) {
  "use cache";
  cacheTag("loaf");
  cacheLife("days");
  const { locale } = await params;
  const response = await fetch(source(locale));
  return <Shown kind={`in/${locale}`} document={await response.json()} />;
}
