"""The images' health check: status 0 if the server in this container answers /health with 200, else 1 and the reason.

It asks port 8000, or that of HEALTH_PORT, for a server that was started with another --port.
"""

import http.client
import os
import sys

SECONDS = 8  # less than the --timeout of HEALTHCHECK, so that the reason is told


def main() -> str | None:
    """What is wrong; None if nothing is."""
    port = os.environ.get("HEALTH_PORT", "8000")
    try:
        # Not urllib: that would ask a proxy which the environment names.
        connection = http.client.HTTPConnection("127.0.0.1", int(port), timeout=SECONDS)
        connection.request("GET", "/health")
        status = connection.getresponse().status
    except (OSError, http.client.HTTPException, ValueError) as error:
        return f"health: error: port {port}: {error}"
    return None if status == 200 else f"health: error: port {port}: /health answers {status}"


if __name__ == "__main__":
    sys.exit(main())
