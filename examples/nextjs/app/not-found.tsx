export default function NotFound() {
  return (
    <article>
      <h1>Sold out</h1>
      <p>There is no page at this address.</p>
    </article>
  );
}
