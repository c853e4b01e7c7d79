# Changes arrays step by step, each step a function of its number; see `state.rs` for what it is
# asked, and `numpy.rs` for the same computed again.

import select
import socket
import time

import numpy

LENGTH = 4 << 20
WINDOW = 2048
FACTOR = numpy.uint64(6364136223846793005)
MASK = (1 << 64) - 1

indices = numpy.arange(LENGTH, dtype=numpy.uint64)
# No two elements of a window are alike.
integers = indices * FACTOR
integers ^= integers >> numpy.uint64(29)
reals = indices.astype(numpy.float64)
weights = indices * numpy.uint64(2) + numpy.uint64(1)


def mix(number):
    x = (number * 0x9E3779B97F4A7C15) & MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def weighted(window):
    values = integers[window] + reals[window].view(numpy.uint64)
    return int((values * weights[window]).sum(dtype=numpy.uint64))


def step(number):
    """Changes one window; by how much the checksum changes."""
    first = mix(number) % (LENGTH // WINDOW) * WINDOW
    window = slice(first, first + WINDOW)
    before = weighted(window)
    integers[window] = integers[window] * FACTOR + numpy.uint64(number)
    reals[window] = reals[window] * 0.5 + float(number % 65536)
    return weighted(window) - before


def main():
    steps = 0
    carried = weighted(slice(0, LENGTH))
    server = socket.create_server(("0.0.0.0", 7450))
    poll = select.poll()
    poll.register(server, select.POLLIN)
    clients = {}
    while True:
        for descriptor, _ in poll.poll(0):
            if descriptor == server.fileno():
                client, _ = server.accept()
                client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                clients[client.fileno()] = client
                poll.register(client, select.POLLIN)
                continue
            client = clients[descriptor]
            question = client.recv(64)
            if not question:
                poll.unregister(client)
                del clients[descriptor]
                client.close()
                continue
            answer = f"{steps} {carried}"
            if question == b"verify\n":
                answer += f" {weighted(slice(0, LENGTH))}"
            client.sendall(answer.encode() + b"\n")
        steps += 1
        carried = (carried + step(steps)) & MASK
        time.sleep(0.001)


main()
