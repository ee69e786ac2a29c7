import { Shown, source } from "../../shown";

// The other languages are rendered when they are first asked for.
export function generateStaticParams() {
  return [{ locale: "en" }];
}

export default async function Page({ params }: { params: Promise<{ locale: string }> }) {
  const { locale } = await params;
  const response = await fetch(source(locale), { next: { tags: ["loaf"], revalidate: 3600 } });
  return <Shown kind={`in/${locale}`} document={await response.json()} />;
}
