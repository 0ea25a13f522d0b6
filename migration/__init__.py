"""Moving a running request between two stock vLLM engines.

`engine_seam` and `worker` are the only files that touch vLLM's scheduler and model runner;
`transport` is the only one that touches Ray's collective groups.
"""
