import { connection } from "next/server";
import { Fetched } from "./fetched";

export default async function Page() {
  await connection();
  // Each refresh makes the browser ask the route handler again.
  return <Fetched at={Date.now()} />;
}
