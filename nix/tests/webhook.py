"""A webhook on port 3000 that writes down what it accepted and what it refused.

It refuses the payload 3 twice and 7 once, and takes three seconds for the payload "slow".
"""

import http.server
import pathlib
import time

DIRECTORY = pathlib.Path("/run/webhook")
refusals = {"3": 2, "7": 1}


class Webhook(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"])).decode()
        if body == "slow":
            (DIRECTORY / "slow").touch()
            time.sleep(3)
        refused = refusals.get(body, 0) > 0
        if refused:
            refusals[body] -= 1
        with open(DIRECTORY / ("refused" if refused else "accepted"), "a") as log:
            print(body, file=log)
        self.send_response(503 if refused else 204)
        self.send_header("content-length", "0")
        self.end_headers()


DIRECTORY.mkdir(parents=True, exist_ok=True)
http.server.ThreadingHTTPServer(("127.0.0.1", 3000), Webhook).serve_forever()
