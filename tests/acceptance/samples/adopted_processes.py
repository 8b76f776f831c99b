"""Copied as test_processes.py: a suite that starts its ranks itself, with none of our names."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def add_up(rank: int, size: int, port: str) -> None:
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = "localhost", port
    dist.init_process_group("gloo", rank=rank, world_size=size)
    total = torch.ones(1)
    dist.all_reduce(total)
    assert total.item() == size
    dist.destroy_process_group()
    print(f"added up in rank {rank}")


def fail_in_one(rank: int) -> None:
    if rank == 1:
        raise ValueError("one of them")
    time.sleep(600)


def exit_in_one(rank: int, code: int) -> None:
    if rank == 1:
        os._exit(code)


def put(queue: object, rank: int, tensor: torch.Tensor) -> None:
    queue.put((rank, tensor.sum().item()))


def wait_for_ever(connection: object) -> None:
    connection.recv()


def say_something(connection: object) -> None:
    connection.send("something")


class Checker:
    def check(self, value: int) -> None:
        assert value == 1


class CheckingProcess(multiprocessing.get_context("spawn").Process):
    def run(self) -> None:
        raise ValueError(f"in {self.name}")


def processes(function: object, *args: object, count: int = 2) -> list[object]:
    context = multiprocessing.get_context("spawn")
    started = [context.Process(target=function, args=(rank, *args)) for rank in range(count)]
    for process in started:
        process.start()
    return started


@pytest.mark.parametrize("time", [1, 2])
def test_spawn_with_a_fixed_port(time: int) -> None:
    mp.spawn(add_up, args=(2, "29517"), nprocs=2)


def test_spawn_fails() -> None:
    mp.spawn(fail_in_one, nprocs=2)


def test_spawn_is_expected_to_fail() -> None:
    with pytest.raises(mp.ProcessRaisedException, match="one of them"):
        mp.spawn(fail_in_one, nprocs=2)


def test_spawn_without_join() -> None:
    mp.spawn(exit_in_one, args=(4,), nprocs=2, join=False)


def test_exit_codes_are_not_looked_at() -> None:
    for process in processes(exit_in_one, 5):
        process.join()


def test_only_the_first_exit_code_is_looked_at() -> None:
    started = processes(exit_in_one, 5)
    for process in started:
        process.join()
    assert started[0].exitcode == 0


def test_exit_codes_are_looked_at() -> None:
    started = processes(exit_in_one, 5)
    for process in started:
        process.join()
    assert [process.exitcode for process in started] == [0, 5]
    assert not any(process.is_alive() for process in started)


def test_wrong_exit_codes_are_looked_at() -> None:
    started = processes(exit_in_one, 5)
    for process in started:
        process.join()
    assert [process.exitcode for process in started] == [0, 0]


def test_queue() -> None:
    context = mp.get_context("spawn")
    queue = context.Queue()
    started = [context.Process(target=put, args=(queue, r, torch.ones(r + 1))) for r in range(2)]
    for process in started:
        process.start()
    assert sorted(queue.get(timeout=60) for _ in started) == [(0, 1.0), (1, 2.0)]
    for process in started:
        process.join()
        assert process.exitcode == 0


def test_pipe_and_sentinel() -> None:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=say_something, args=(theirs,))
    process.start()
    assert ours.recv() == "something"
    assert multiprocessing.connection.wait([process.sentinel], timeout=60) == [process.sentinel]
    process.join()


def test_waits_in_vain() -> None:
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=exit_in_one, args=(1, 6))
    process.start()
    queue.get()


def test_terminates_its_own() -> None:
    context = multiprocessing.get_context("spawn")
    _, theirs = context.Pipe()
    process = context.Process(target=wait_for_ever, args=(theirs,))
    process.start()
    process.terminate()
    process.join()
    assert process.exitcode == -15


def test_process_by_default() -> None:
    process = multiprocessing.Process(target=exit_in_one, args=(1, 8))
    process.start()
    process.join()


def test_method_of_an_object() -> None:
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=Checker().check, args=(2,))
    process.start()
    process.join()


def test_process_with_a_run_of_its_own() -> None:
    process = CheckingProcess(name="checker")
    process.start()
    process.join()


def test_closure() -> None:
    context = multiprocessing.get_context("fork")

    def local() -> None:
        sys.exit(0)

    process = context.Process(target=local)
    process.start()
    process.join()
    assert process.exitcode == 0


def test_closure_fails() -> None:
    process = multiprocessing.get_context("fork").Process(target=lambda: sys.exit(3), name="local")
    process.start()
    process.join()


def test_without_processes() -> None:
    assert True
