"""Which devices a training uses, and how several processes that train together find each other."""
import contextlib
import socket
import time

import jax

from core.errors import UserError
from launchers import cli


def use_devices(devices, coordinator, num_processes, process_id):
    if devices < 0:
        raise UserError(f"--devices={devices}: 0 for all there are, or how many")
    if devices > 1:
        with contextlib.suppress(RuntimeError):  # JAX runs already, with the devices it has
            jax.config.update("jax_num_cpu_devices", devices)
    if coordinator:
        meet(coordinator, num_processes, process_id)
    cli.compilation_cache()
    if devices > jax.device_count():
        raise UserError(f"--devices={devices}, but JAX has {jax.device_count()}")
    one_cpu = jax.default_backend() == "cpu" and jax.process_count() == 1
    return devices or (1 if one_cpu else jax.device_count())


def meet(coordinator, num_processes, process_id, patience=60):
    """Join the processes that train together. Where one of them does not come JAX waits for minutes, and then aborts
    without an exception; so they meet here before."""
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 2**16:
        raise UserError(f"--coordinator={coordinator}: not of the form host:port")
    if not 0 <= process_id < num_processes:
        raise UserError(f"--process_id={process_id}, but --num_processes={num_processes}")
    until = time.perf_counter() + patience
    try:
        if process_id == 0:
            wait_for_others(int(port), num_processes, until)
        else:
            say_hello((host, int(port)), process_id, until)
    except OSError as error:
        raise UserError(f"--coordinator={coordinator}: the {num_processes} processes did not meet there within "
                        f"{patience} s: {error.strerror or error}") from error
    jax.distributed.initialize(coordinator, num_processes, process_id, initialization_timeout=patience)


def wait_for_others(port, num_processes, until):
    with contextlib.ExitStack() as stack:
        server, waiting = stack.enter_context(socket.create_server(("", port))), {}
        while len(waiting) < num_processes - 1:
            server.settimeout(max(0.01, until - time.perf_counter()))
            peer = stack.enter_context(server.accept()[0])
            peer.settimeout(1.0)
            waiting[peer.recv(20)] = peer
        for peer in waiting.values():
            peer.sendall(b"all are here")


def say_hello(address, process_id, until):
    while True:
        try:
            with socket.create_connection(address, timeout=1.0) as server:
                server.sendall(b"process %d" % process_id)
                server.settimeout(max(0.01, until - time.perf_counter()))
                if server.recv(20):
                    return
        except OSError:
            if time.perf_counter() > until:
                raise
        time.sleep(0.1)
