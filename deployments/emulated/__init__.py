"""The emulated engine: vLLM as it is, but for an accelerator that only takes its time."""
