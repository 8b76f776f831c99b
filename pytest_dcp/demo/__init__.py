"""A tour of pytest_dcp: the suite that one of its users might write, on gloo, CPU and local disk.

    python -m pytest -p pytest_dcp --pyargs pytest_dcp.demo -v

Read the files in this order; all shard the small model of `model.py`:

1. `test_worlds.py`: a test in many processes, and the fixtures it finds there;
2. `test_tensor_parallel.py`: a sharded model against the plain one, and its checkpoint;
3. `test_fsdp.py`: a training step, saved by four ranks and loaded by two;
4. `test_meta_device.py`: a model built without memory and filled from a checkpoint;
5. `test_fault.py`: a rank that cannot write, and a rank that dies;
6. `test_resume.py`: the small trainer of `trainer.py`, killed at any time and resumed;
7. `test_failure_report.py`: a test that fails as expected. `conftest.py` shows its report at the
   end, below the processes that were started and the time that they took.

Checkpoints are those of `pytest_dcp.checkpoint`, imported instead of
`torch.distributed.checkpoint`.
"""
