"""Speed and memory beside a peer, in one process: ``python -m benchmarks.training_step``. Run by hand, not by tests."""
