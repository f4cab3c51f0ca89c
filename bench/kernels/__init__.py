"""Each Triton kernel by itself: its predicted time, from its compiled code, and the measured."""
