import { Live } from "./live";

export default function Layout({ children }: { children: React.ReactNode }) {
  return (
    <html lang="en">
      <body>
        <Live />
        {children}
      </body>
    </html>
  );
}
