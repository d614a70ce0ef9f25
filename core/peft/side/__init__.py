"""Networks beside the frozen backbone, which feed on it and never run back through it."""
