"use client";

import Link from "next/link";
import { usePathname } from "next/navigation";

const PAGES = [
  ["/", "Today’s loaf"],
  ["/counter", "At the counter"],
];

export function Nav() {
  const current = usePathname();
  return (
    <nav aria-label="Pages">
      {PAGES.map(([href, label]) => (
        <Link key={href} href={href} aria-current={href === current ? "page" : undefined}>
          {label}
        </Link>
      ))}
    </nav>
  );
}
