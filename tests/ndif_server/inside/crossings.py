"""What a request moves between the process that it runs in and the model's."""

import json
import time


class Crossings:
    """From now on, `bytes` counts what goes through a connection of NDIF's protocol, both ways."""

    def __init__(self, connection) -> None:
        self.bytes = 0
        self._send, self._receive = connection.send_raw, connection.recv_raw
        connection.send_raw, connection.recv_raw = self._sending, self._receiving

    def _sending(self, data):
        self.bytes += len(data)
        self._send(data)

    def _receiving(self, *timeout):
        data = self._receive(*timeout)
        self.bytes += len(data)
        return data


def noted(driver, pump, file, connection):
    """`pump`, and a line in a file: the bytes that crossed, the result left out, and the seconds that it took."""
    crossings, began = Crossings(connection), time.perf_counter()
    data, *rest = pump(driver, connection)
    line = {"bytes": crossings.bytes - len(data), "seconds": time.perf_counter() - began}
    with open(file, "a") as notes:
        notes.write(f"{json.dumps(line)}\n")
    return data, *rest
