import { source } from "../../shown";

export const revalidate = 3600;

export async function GET() {
  const response = await fetch(source("route-handler"), { next: { tags: ["loaf"] } });
  return Response.json(await response.json());
}
