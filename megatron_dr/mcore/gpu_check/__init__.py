"""What `megatron-dr gpu-check` runs on one GPU, a part each; without a GPU small, on the CPU.

found.py   what a part is given, and what it says
start.py   this process as the only rank
model.py   Megatron's model at some size, and its steps
oracle.py  what a step should give, from dense rows
maths.py   the projection's functions on the GPU against the CPU
paths.py   steps of both paths against the oracle, and the same bits on repeat
waits.py   where the host waits for the device in a step
cost.py    time and memory of a step beside plain Megatron
parts.py   time of the projection's parts beside a copy of the same bytes
trace.py   a profiler's trace of a step
"""
