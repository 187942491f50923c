"""Environment that native libraries read once, when they are loaded: set before torch is imported."""

import os


def prepare() -> None:
    """What the operator has set stays, except where a fork would break."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    # Idle OpenMP threads sleep instead of spinning. Spinning wins a little on a machine of one's own and loses
    # everything on a shared one: two threads on two busy cores, 30M model, were seen to take 390 ms a step against 45.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # cuda:N shall be the GPU that the driver's tools call N; CUDA's own order begins with the fastest.
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    # No thread may exist before the template forks: a fork copies only the one that calls it.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # numpy's; torch's own pool starts after the fork
