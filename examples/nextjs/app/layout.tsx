import type { Metadata } from "next";
import "./globals.css";
import { Live } from "./live";
import { Nav } from "./nav";

export const metadata: Metadata = { title: "Corner Bakery" };

export default function Layout({ children }: { children: React.ReactNode }) {
  return (
    <html lang="en">
      <body>
        <header>
          <p className="name">Corner Bakery</p>
          <Nav />
          <Live />
        </header>
        <main>{children}</main>
      </body>
    </html>
  );
}
