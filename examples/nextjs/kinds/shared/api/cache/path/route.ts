import { revalidatePath } from "next/cache";

export function POST() {
  revalidatePath("/path");
  return new Response(null, { status: 204 });
}
